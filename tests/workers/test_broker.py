"""The Redis seam: what passes by itself is named so, whatever library says it in whatever words."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from redis.asyncio.connection import Connection

from workers.broker import Broker, BrokerUnavailable, open_broker

pytestmark = pytest.mark.anyio


async def test_a_connection_that_ends_while_it_is_made_ends_no_worker(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valkey was killed between the accept and the first command: uvloop raises a RuntimeError, and the worker died."""
    greet = Connection.on_connect_check_health

    async def end_first(self: Any, *args: Any, **options: Any) -> None:
        self._writer.transport.abort()
        await anyio.sleep(0.02)
        await greet(self, *args, **options)

    monkeypatch.setattr(Connection, "on_connect_check_health", end_first)
    async with open_broker(redis_url) as broker:
        with pytest.raises(BrokerUnavailable, match="handler is closed"):
            await broker.ping()


async def test_an_error_of_our_own_is_not_taken_for_a_passing_one(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(broker, "_execute", fail)
    with pytest.raises(RuntimeError, match="changed size"):
        await broker.ping()
