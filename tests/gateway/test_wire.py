"""The Redis wire on a real Valkey: order, cancellation, loss, deadlines, bounds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import hiredis
import pytest
import trio

from gateway.wire import Address, ReplyFailed, Wire, WireFull, WireLost, pack
from tests.gateway.fakes import eventually

if TYPE_CHECKING:
    from tests.gateway.proxy import Proxy

pytestmark = pytest.mark.trio


KEYS = 1_000


def make_wire(address: Address, **options: Any) -> Wire:
    return Wire(address, "test", **{"max_outstanding": 10_000, "deadline_seconds": 2.0, **options})


async def started(nursery: trio.Nursery, wire: Wire) -> Wire:
    nursery.start_soon(wire.run)
    with trio.fail_after(3):
        await wire.wait_connected()
    return wire


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", Address("h", 6379, "", "", 0)),
        ("redis://h:1/2", Address("h", 1, "", "", 2)),
        ("redis://u:p%40@h", Address("h", 6379, "u", "p@", 0)),
    ],
)
async def test_a_url_says_where_redis_is(url: str, expected: Address) -> None:
    assert Address.parse(url) == expected


@pytest.mark.parametrize("url", ["", "h:1", "http://h", "rediss://h", "redis://h/x", "redis://", "redis://h:x"])
async def test_a_url_that_says_nothing_of_the_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Address.parse(url)


async def test_posted_commands_are_answered_in_order(address: Address, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(address))
    seen: list[tuple[int, bytes]] = []
    for number in range(2000):
        wire.post(pack("ECHO", f"v{number}"), lambda context, reply: seen.append((context, reply)), number)
    await eventually(lambda: len(seen) == 2000)
    assert seen == [(number, b"v%d" % number) for number in range(2000)]
    assert wire.outstanding == 0


async def test_a_call_returns_the_value_or_raises_the_error(address: Address, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(address))
    assert await wire.call("SET", "k", b"\x00\xff", "EX", 10) == b"OK"
    assert await wire.call("GET", "k") == b"\x00\xff"
    assert await wire.call("GET", "none") is None
    with pytest.raises(ReplyFailed, match="WRONGTYPE"):
        await wire.call("LPUSH", "k", "x")
    assert await wire.call("PING") == b"PONG"


async def test_an_error_reply_is_handed_to_the_slot(address: Address, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(address))
    seen: list[Any] = []
    wire.post(pack("NOSUCHCOMMAND"), lambda context, reply: seen.append(reply))
    wire.post(pack("PING"), lambda context, reply: seen.append(reply))
    await eventually(lambda: len(seen) == 2)
    assert isinstance(seen[0], hiredis.ReplyError)
    assert seen[1] == b"PONG"


async def test_c1_ten_thousand_cancelled_calls_never_give_their_answer_to_another(
    proxy: Proxy, nursery: trio.Nursery
) -> None:
    """Redis answers 100 ms late, and callers leave at any moment before, after and between: every value that comes
    carries the key it was asked for (the leak of redis-py#2665)."""
    wire = await started(nursery, make_wire(proxy.address, deadline_seconds=30.0))
    assert await wire.call("MSET", *(word for key in range(KEYS) for word in (f"k{key}", f"value of k{key}"))) == b"OK"
    proxy.delay_seconds = 0.1
    generator = random.Random(11)
    counts = {"answered": 0, "cancelled": 0, "mismatches": 0}

    async def ask(key: int) -> None:
        with trio.move_on_after(generator.uniform(0, 0.3)) as scope:
            reply = await wire.call("GET", f"k{key}")
            counts["answered"] += 1
            counts["mismatches"] += reply != f"value of k{key}".encode()
        counts["cancelled"] += scope.cancelled_caught

    while counts["cancelled"] < 10_000:
        async with trio.open_nursery() as asking:
            for _ in range(2_500):
                asking.start_soon(ask, generator.randrange(KEYS))
    assert counts["mismatches"] == 0
    assert counts["answered"] > 1_000
    assert wire.connects == 1, "it was one connection all the time"
    assert await wire.call("GET", "k7") == b"value of k7"
    assert wire.outstanding == 0


async def test_a_lost_connection_fails_every_slot_and_another_is_opened(proxy: Proxy, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(proxy.address))
    proxy.silent = True
    seen: list[Any] = []
    for number in range(50):
        wire.post(pack("ECHO", number), lambda context, reply: seen.append((context, reply)), number)
    await trio.sleep(0.05)
    proxy.cut()
    await eventually(lambda: len(seen) == 50)
    assert [context for context, _ in seen] == list(range(50))
    assert all(isinstance(reply, WireLost) for _, reply in seen)
    with pytest.raises(WireLost):
        wire.post(pack("PING"), None)
    with pytest.raises(WireLost):
        await wire.call("PING")
    proxy.silent = False
    with trio.fail_after(3):
        await wire.wait_connected()
    assert await wire.call("PING") == b"PONG"
    assert wire.connects == 2


async def test_a_silent_redis_is_given_up_within_the_deadline(proxy: Proxy, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(proxy.address, deadline_seconds=1.0))
    proxy.silent = True
    began = trio.current_time()
    with pytest.raises(WireLost, match="no answer within 1 s"):
        await wire.call("PING")
    assert trio.current_time() - began <= 1.2


async def test_answers_that_trickle_in_keep_the_connection(proxy: Proxy, nursery: trio.Nursery) -> None:
    """The deadline is for the oldest command, not for the time since the last idle moment."""
    wire = await started(nursery, make_wire(proxy.address, deadline_seconds=0.8))
    proxy.delay_seconds = 0.3
    async with trio.open_nursery() as asking:
        for _ in range(12):
            asking.start_soon(wire.call, "PING")
            await trio.sleep(0.1)
    assert wire.connects == 1


async def test_the_bound_on_outstanding_commands_holds(proxy: Proxy, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(proxy.address, max_outstanding=10))
    proxy.delay_seconds = 0.2
    for _ in range(10):
        wire.post(pack("PING"), None)
    with pytest.raises(WireFull):
        wire.post(pack("PING"), None)
    await eventually(lambda: wire.outstanding == 0)
    wire.post(pack("PING"), None)


async def test_nothing_reaches_redis_before_the_handshake_is_over(address: Address, nursery: trio.Nursery) -> None:
    infos: list[dict[str, str]] = []
    wire = make_wire(address, on_connected=infos.append)
    with pytest.raises(WireLost):
        wire.post(pack("PING"), None)
    await started(nursery, wire)
    assert len(infos[0]["run_id"]) == 40
    assert infos[0]["maxmemory_policy"] == "noeviction"


async def test_a_refused_connection_is_tried_again(proxy: Proxy, nursery: trio.Nursery) -> None:
    proxy.refusing = True
    wire = make_wire(proxy.address)
    nursery.start_soon(wire.run)
    await trio.sleep(0.4)
    assert not wire.connected
    proxy.refusing = False
    with trio.fail_after(4):
        await wire.wait_connected()
    assert await wire.call("PING") == b"PONG"


async def test_a_command_larger_than_the_socket_buffer_arrives(address: Address, nursery: trio.Nursery) -> None:
    wire = await started(nursery, make_wire(address))
    body = random.Random(3).randbytes(8_000_000)
    assert await wire.call("SET", "big", body) == b"OK"
    assert await wire.call("GET", "big") == body


async def test_ending_the_wire_fails_what_is_outstanding(proxy: Proxy) -> None:
    wire = make_wire(proxy.address)
    seen: list[Any] = []
    async with trio.open_nursery() as roles:
        await started(roles, wire)
        proxy.silent = True
        wire.post(pack("PING"), lambda context, reply: seen.append(reply))
        await trio.sleep(0.02)
        roles.cancel_scope.cancel()
    assert isinstance(seen[0], WireLost)
    assert not wire.connected
