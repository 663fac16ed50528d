"""Can this worker process work? One task asks both servers; `/health/ready` on the metrics port says what is missing.

The HTTP API has a page of its own (`rest/health.py`), since there a request is to be answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from workers.broker import BrokerUnavailable
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workers.broker import Broker
    from workers.store import Store

LOOK_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 2.0


class Readiness:
    """Names of what is missing, as of the last look. Read from the thread of the metrics port."""

    def __init__(self) -> None:
        self.missing: tuple[str, ...] = ("mongodb", "redis")

    async def watch(self, store: Store, broker: Broker) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.missing = await missing(store, broker)
            await anyio.sleep(LOOK_SECONDS)


async def missing(store: Store, broker: Broker) -> tuple[str, ...]:
    """Which of the two servers does not answer within 2 s."""
    found = []
    for name, ping in (("mongodb", store.ping), ("redis", broker.ping)):
        if not await _answers(ping):
            found.append(name)
    return tuple(found)


async def _answers(ping: Callable[[], Awaitable[None]]) -> bool:
    try:
        with anyio.fail_after(ANSWER_SECONDS):
            await ping()
    except (StoreUnavailable, BrokerUnavailable, TimeoutError):
        return False
    return True
