"""A Redis that is emptied at the worst moment: between two commands of one renewal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.wire import ReplyFailed, WireLost
from protocol import keys
from tests.gateway.fakes import eventually
from tests.gateway.test_broker import Recorder, make_broker

if TYPE_CHECKING:
    import trio

    from gateway.wire import Address


@pytest.mark.trio
async def test_a_gateway_hears_again_though_the_first_try_to_make_its_stream_failed(
    address: Address, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease was written and its stream was not: it heard nothing any more, for good. Simulator, seed 120."""
    broker, receiver = make_broker(address), Recorder()
    await nursery.start(broker.run, receiver)
    call = broker.commands.call
    refused = 0

    async def call_and_refuse(*args: str | bytes | int) -> Any:
        nonlocal refused
        if args[0] == "XADD" and not refused:
            refused += 1
            raise ReplyFailed("OOM command not allowed when used memory > 'maxmemory'.")
        return await call(*args)

    monkeypatch.setattr(broker.commands, "call", call_and_refuse)
    await call("FLUSHALL")
    await eventually(lambda: bool(receiver.recoveries), 7)
    assert refused
    assert await call("EXISTS", keys.down("gw_1"), keys.instance("gw_1")) == 2


@pytest.mark.trio
async def test_a_gateway_hears_again_though_the_answer_to_its_lease_was_lost(
    address: Address, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next try found the lease that this one had written, and took Redis for one that remembers. Simulator, seed
    490."""
    broker, receiver = make_broker(address), Recorder()
    await nursery.start(broker.run, receiver)
    call = broker.commands.call
    lost = 0

    async def call_and_lose(*args: str | bytes | int) -> Any:
        nonlocal lost
        reply = await call(*args)
        if args[0] == "SET" and args[1] == keys.instance("gw_1") and not lost:
            lost += 1
            raise WireLost("closed by Redis")
        return reply

    monkeypatch.setattr(broker.commands, "call", call_and_lose)
    await call("FLUSHALL")
    await eventually(lambda: bool(receiver.recoveries), 7)
    assert lost
    assert await call("EXISTS", keys.down("gw_1"), keys.instance("gw_1")) == 2


@pytest.mark.trio
async def test_a_redis_that_is_emptied_while_it_is_looked_at_does_not_end_the_gateway(
    address: Address, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for one that was set up with another number of shards. Simulator, seed 107."""
    broker, receiver = make_broker(address), Recorder()
    await nursery.start(broker.run, receiver)
    call = broker.commands.call
    looks = 0

    async def call_and_empty(*args: str | bytes | int) -> Any:
        nonlocal looks
        reply = await call(*args)
        if args[:2] == ("GET", keys.SHARDS):
            looks += 1
            return reply if looks > 1 else None
        return reply

    monkeypatch.setattr(broker.commands, "call", call_and_empty)
    await call("FLUSHALL")
    await eventually(lambda: bool(receiver.recoveries), 7)
    assert looks > 1
