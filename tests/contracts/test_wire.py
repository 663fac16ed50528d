"""The contract of the gateways' wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from gateway.wire import ReplyFailed, WireFull, WireLost, pack

if TYPE_CHECKING:
    from gateway.wire import Wire
    from tests.contracts.worlds import Servers, Twins


def test_replies_come_in_the_order_of_the_commands(on: Twins | Servers) -> None:
    async def scenario(wire: Wire) -> None:
        heard: list[tuple[int, Any]] = []
        for number in range(5):
            wire.post(pack("INCR", "n"), lambda context, reply: heard.append((context, reply)), number)
        assert await wire.call("GET", "n") == b"5"
        assert heard == [(number, number + 1) for number in range(5)]
        assert wire.outstanding == 0

    on.wire(scenario)


def test_values_are_those_of_resp3(on: Twins | Servers) -> None:
    async def scenario(wire: Wire) -> None:
        assert await wire.call("SET", "a", "1", "EX", 60) == b"OK"
        assert await wire.call("SET", "a", "2", "NX") is None
        assert await wire.call("SET", "a", "3", "GET") == b"1"
        assert await wire.call("MGET", "a", "b") == [b"3", None]
        assert await wire.call("XADD", "s", "NOMKSTREAM", "*", "r", "x") is None
        entry_id = await wire.call("XADD", "s", "*", "r", "x")
        found = await wire.call("XREAD", "COUNT", 10, "BLOCK", 20, "STREAMS", "s", "0")
        assert found == {b"s": [[entry_id, [b"r", b"x"]]]}
        assert await wire.call("XREAD", "COUNT", 10, "BLOCK", 20, "STREAMS", "s", entry_id) is None
        with pytest.raises(ReplyFailed, match="WRONGTYPE"):
            await wire.call("HGET", "a", "f")

    on.wire(scenario)


def test_a_cancelled_call_leaves_its_reply_to_nobody(on: Twins | Servers) -> None:
    async def scenario(wire: Wire) -> None:
        with trio.move_on_after(0.01):
            await wire.call("XREAD", "BLOCK", 100, "STREAMS", "none", "0")
        assert await wire.call("PING") == b"PONG"

    on.wire(scenario)


def test_what_is_published_is_pushed_to_who_subscribed(on: Twins | Servers) -> None:
    pushed: list[Any] = []

    async def scenario(wire: Wire) -> None:
        wire.tell(pack("SUBSCRIBE", "c"))
        await wire.call("PING")
        assert await wire.call("PUBLISH", "c", "hello") == 1
        await wire.call("PING")
        wire.tell(pack("UNSUBSCRIBE", "c"))
        await wire.call("PING")
        assert await wire.call("PUBLISH", "c", "again") == 0
        assert [push for push in pushed if push[0] == b"message"] == [[b"message", b"c", b"hello"]]

    on.wire(scenario, on_push=lambda push: pushed.append(list(push)))


def test_a_connection_that_is_given_up_fails_what_is_outstanding_and_comes_back(on: Twins | Servers) -> None:
    async def scenario(wire: Wire) -> None:
        heard: list[Any] = []
        wire.post(pack("XREAD", "BLOCK", 1000, "STREAMS", "none", "0"), lambda _context, reply: heard.append(reply))
        await trio.sleep(0.02)
        wire.abort("enough")
        with trio.fail_after(5):
            while not heard:  # noqa: ASYNC110 -- the reply is a plain call
                await trio.sleep(0.01)
            assert isinstance(heard[0], WireLost)
            await wire.wait_connected()
        assert await wire.call("PING") == b"PONG"
        assert wire.connects == 2

    on.wire(scenario)


def test_too_many_outstanding_commands_are_not_sent(on: Twins | Servers) -> None:
    async def scenario(wire: Wire) -> None:
        for _ in range(100):
            wire.post(pack("PING"), None)
        with pytest.raises(WireFull):
            wire.post(pack("PING"), None)

    on.wire(scenario)
