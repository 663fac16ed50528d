"""What the MongoDB driver needs from us: its waits have to stand cancellation as anyio delivers it, again and again.

Called by `open_store`, before the first client.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pymongo.asynchronous.pool
import pymongo.asynchronous.topology


async def _wait_in_this_task(condition: Any, seconds: float | None) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await condition.wait()
            return True
    except TimeoutError:
        return False


def mend_driver() -> None:
    """Let the driver wait for its conditions in the task that asked, as `asyncio.wait_for` does from Python 3.12 on.

    In 3.11 that waits in a task of its own, and its caller, cancelled a second time, leaves before the lock is its own
    again: the lock is then released by who does not hold it, taken by a task that is gone, and the client is stuck for
    good. PyMongo 4.20 waits so for a server and for a connection.
    """
    for module in (pymongo.asynchronous.topology, pymongo.asynchronous.pool):
        module._async_cond_wait = _wait_in_this_task  # type: ignore[attr-defined]
