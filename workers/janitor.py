"""What has disappeared is erased for good: content whose time is over, of messages and of the edits of them.

Part of the ingest role. Readers mask it the moment it expires, so nothing depends on how soon this comes by; several
workers do it side by side.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from workers import metrics
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.store import Store

ROUND_SECONDS: Final = 5.0
BATCH: Final = 500
"""Messages erased per update: as many as one commit inserts."""

log = structlog.get_logger()


async def run(store: Store) -> None:
    """Erase what is due, every few seconds, until cancelled."""
    while True:
        try:
            while await erase(store) == BATCH:
                pass
        except StoreUnavailable as error:
            log.warning("janitor_waits", error=str(error)[:200])
        await anyio.sleep(ROUND_SECONDS)


async def erase(store: Store) -> int:
    """Erase one batch of what is due now; returns how many. Raises StoreUnavailable."""
    erased = await store.changes.erase_expired(datetime.now(UTC), BATCH)
    metrics.ERASED.inc(erased)
    return erased
