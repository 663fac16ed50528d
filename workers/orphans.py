"""Uploads that nobody completed, that no message carries, or whose time is over: deleted, object first, document last.

Part of the REST role, several processes side by side. What is to go is marked first and looked at again after a while,
so that a message committed meanwhile keeps it (`store.media.GRACE`).
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final, assert_never

import anyio
import structlog
from msgspec import UNSET

from protocol.media import MediaStatus
from workers import metrics
from workers.objects import ObjectsUnavailable
from workers.rest.desk import now_ms
from workers.rest.shapes import moment_at
from workers.store.errors import StoreUnavailable
from workers.store.media import GRACE

if TYPE_CHECKING:
    from datetime import datetime

    from protocol.media import MediaMetadata
    from workers.objects import Objects
    from workers.store import Store

EVERY_SECONDS: Final = 30.0
_TAKEN: Final = timedelta(minutes=1)
"""How long one of several sweeps has a medium to itself."""
_CARRIED_CHECK: Final = timedelta(days=1)

log = structlog.get_logger(__name__)


async def run(store: Store, objects: Objects, orphan_seconds: int) -> None:
    """Prepare the bucket, then sweep, until cancelled."""
    prepared = False
    while True:
        try:
            if not prepared:
                await objects.prepare()
                prepared = True
            while await sweep_one(store, objects, moment_at(now_ms()), orphan_seconds):
                pass
        except (StoreUnavailable, ObjectsUnavailable) as error:
            log.warning("media_sweep_waits", error=str(error)[:200])
        await anyio.sleep(EVERY_SECONDS)


async def sweep_one(store: Store, objects: Objects, now: datetime, orphan_seconds: int) -> bool:
    """Look at the one that has been due for longest; False where none is. Raises StoreUnavailable,
    ObjectsUnavailable."""
    media = await store.media.take_due(now, now + _TAKEN)
    if media is None:
        return False
    if media.expires_at <= now or media.status is MediaStatus.PENDING:
        # Its messages are gone too, or it never was in one: an upload has an hour, this is a day.
        await _delete(store, objects, media)
        return True
    carried = await store.media.carried(media.media_id)
    match media.status:
        case MediaStatus.READY | MediaStatus.LEAVING if carried:
            await store.media.move(media.media_id, MediaStatus.READY, min(now + _CARRIED_CHECK, media.expires_at))
        case MediaStatus.READY:
            await store.media.move(media.media_id, MediaStatus.LEAVING, now + GRACE)
        case MediaStatus.LEAVING:
            await _delete(store, objects, media)
        case _:
            assert_never(media.status)
    return True


async def _delete(store: Store, objects: Objects, media: MediaMetadata) -> None:
    await objects.delete(media.media_id, "" if media.upload_id is UNSET else media.upload_id)
    await store.media.forget(media.media_id)
    metrics.MEDIA_DELETED.inc()
    log.info("media_deleted", media_id=media.media_id, status=media.status.value)
