"""Server-assisted invalidation, as `broker.py` follows it: which keys under a prefix changed, told by Redis itself.

One connection listens on `__redis__:invalidate`, another tracks the prefix in broadcast mode and redirects to it
(https://valkey.io/topics/client-side-caching/). Raises what the client raises when either breaks.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def invalidations(client: Any, prefix: str) -> AsyncIterator[AsyncIterator[list[str] | None]]:
    """Yields the ends of the keys that changed, behind the prefix; None for "anything may have"."""
    pubsub = client.pubsub()
    tracker = client.client()
    try:
        await pubsub.connect()
        connection: Any = pubsub.connection
        await connection.send_command("CLIENT", "ID")
        listener_id = int(await connection.read_response())
        await pubsub.subscribe("__redis__:invalidate")
        await tracker.execute_command("CLIENT", "TRACKING", "ON", "REDIRECT", listener_id, "BCAST", "PREFIX", prefix)
        yield _changes(pubsub, tracker, len(prefix))
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await pubsub.aclose()
            if tracker.connection is not None:
                # It must not go back to the pool: it still tracks.
                await tracker.connection.disconnect(nowait=True)
            await tracker.aclose()


async def _changes(pubsub: Any, tracker: Any, length: int) -> AsyncIterator[list[str] | None]:
    while True:
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5.0)
        if message is None:
            await tracker.execute_command("PING")
            continue
        data = message["data"]
        if data is None:
            yield None
        else:
            yield [key[length:].decode() for key in (data if isinstance(data, list) else [data])]
