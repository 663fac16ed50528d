"""The raw-socket attacks A1 to A13 and the transport rules R1 to R6 (reliability.md section 2), on both transports.

Every attack has a neighbour, a second connection that must not notice. What is behind a frame's refusal stands in
`test_transports.py`, what a session does in `tests/protocol`.
"""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from gateway.transport import Outgoing, TransportLimits
from protocol.errors import CloseCode
from protocol.limits import Limits
from tests.gateway.peers import (
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Gateway,
    Peer,
    RecordingLink,
    frame,
    open_gateway,
    request_head,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.gateway.peers import NewServer

pytestmark = pytest.mark.trio
LIMIT = 65536


@asynccontextmanager
async def attacked(new_server: NewServer, **limits: Any) -> AsyncIterator[Gateway]:
    """A gateway with a neighbour who is served before and after, and no bug met in between."""
    async with open_gateway(new_server, **limits) as gateway:
        neighbour, _ = await gateway.open()
        yield gateway
        await neighbour.send(frame(TEXT, b"still here"))
        assert await neighbour.receive() == (TEXT, b"still here")
        assert gateway.server.isolated_errors == 0


async def send_regardless(peer: Peer, data: bytes) -> None:
    """The server may cut the peer off before all of it is sent."""
    with contextlib.suppress(trio.BrokenResourceError):
        await peer.send(data)


# --- A1 to A5: what ends the stock server ----------------------------------------------------------------------------


async def test_a1_an_oversize_message_and_a_ping_in_one_segment(new_server: NewServer) -> None:
    async with attacked(new_server) as gateway:
        peer, link = await gateway.open()
        await send_regardless(peer, frame(TEXT, b"a" * (1024 * 1024 + 1)) + frame(PING))
        assert await peer.close_code() == 1009
        assert link.received == []


async def test_a2_two_oversize_messages_in_one_segment(new_server: NewServer) -> None:
    async with attacked(new_server) as gateway:
        peer, link = await gateway.open()
        await send_regardless(peer, frame(TEXT, b"a" * (LIMIT + 1)) * 2)
        assert await peer.close_code() == 1009
        assert link.received == []


async def test_a3_frames_after_our_close_are_not_read(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        gateway.server.close_all(CloseCode.RESTART)
        assert await peer.receive() == (CLOSE, (1012).to_bytes(2) + b"restart")
        await peer.send(frame(PING, b"late") + frame(TEXT, b"too late") + frame(TEXT, b"x", rsv=7))
        assert await peer.ended()
        assert link.received == []
        assert gateway.server.isolated_errors == 0
        other, _ = await gateway.open()
        await other.send(frame(TEXT, b"alive"))
        assert await other.receive() == (TEXT, b"alive")


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), ExceptionGroup("bugs", [RuntimeError("one"), EOFError("two")])])
async def test_a4_r1_a_link_that_raises_ends_only_itself(new_server: NewServer, bug: Exception) -> None:
    async with open_gateway(new_server) as gateway:
        neighbour, _ = await gateway.open()
        peer, link = await gateway.open()
        link.raises = bug
        await peer.send(frame(TEXT, b"boom boom") + frame(TEXT, b"boom boom"))
        assert await peer.close_code() == 1011
        await peer.stream.aclose()
        await until(lambda: link.losses == 1)
        assert gateway.server.isolated_errors == 1
        await neighbour.send(frame(TEXT, b"still here"))
        assert await neighbour.receive() == (TEXT, b"still here")


async def test_a5_after_1009_the_connection_is_closed_and_not_only_said_to_be(new_server: NewServer) -> None:
    """At once for a peer that reads, within the close deadline for one that goes on sending."""
    async with attacked(new_server, close_seconds=0.5) as gateway:
        peer, _link = await gateway.open()
        await peer.send(frame(TEXT, b"a" * (LIMIT + 1)))
        assert await peer.close_code() == 1009
        with trio.fail_after(0.3):
            assert await peer.ended()
        with trio.fail_after(2):
            while gateway.server.connections > 1:
                await send_regardless(peer, frame(TEXT, b"more"))
                await trio.sleep(0.02)


# --- A6, A7, A11: before there is a WebSocket ------------------------------------------------------------------------


async def test_a6_300_connects_and_resets_leave_nothing(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        tasks = trio.lowlevel.current_statistics().tasks_living
        for number in range(300):
            peer = await gateway.open_raw()
            if number % 3:
                await peer.send(request_head() if number % 2 else b"GET / HTT")
            if number % 4:
                peer.reset()
            else:
                await peer.stream.aclose()
        await until(lambda: gateway.server.accepted == 300 and gateway.server.connections == 0)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)
        assert all(link.losses == 1 for link in gateway.host.links)
        assert gateway.server.isolated_errors == 0


async def test_a7_100_times_garbage_leaves_nothing(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        tasks = trio.lowlevel.current_statistics().tasks_living
        peers = [await gateway.open_raw() for _ in range(100)]
        for number, peer in enumerate(peers):
            await peer.send(bytes((number,)) * 50 + b"\r\n\r\n")
        for peer in peers:
            assert (await peer.head()).startswith(b"HTTP/1.1 400 ")
            assert await peer.ended()
            await peer.stream.aclose()
        await until(lambda: gateway.server.connections == 0)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)
        assert gateway.server.isolated_errors == 0


async def test_a11_a_request_header_of_200_kb_is_refused_before_its_end(new_server: NewServer) -> None:
    async with attacked(new_server, close_seconds=0.3) as gateway:
        peer = await gateway.open_raw()
        await peer.send(b"GET /v1/ws HTTP/1.1\r\nX: " + b"a" * 20_000)
        assert (await peer.head()).startswith(b"HTTP/1.1 431 ")
        await send_regardless(peer, b"a" * 180_000)
        await until(lambda: gateway.server.connections == 1)
        assert len(gateway.host.links) == 1


# --- A8 to A10: frames that cost the sender nothing ------------------------------------------------------------------


async def test_a8_r5_a_million_empty_fragments_are_cut_after_1024(new_server: NewServer) -> None:
    async with attacked(new_server, close_seconds=0.5) as gateway:
        peer, link = await gateway.open()
        async with trio.open_nursery() as nursery:
            flood = frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 1_000_000
            nursery.start_soon(send_regardless, peer, flood)
            assert await peer.close_code() == 1009
            await until(lambda: gateway.server.connections == 1)
        assert link.received == []


async def test_a9_twenty_connections_of_60000_one_byte_fragments(new_server: NewServer) -> None:
    """What is kept of them is 20 × 1,024 bytes and not 20 × 60,000."""
    async with attacked(new_server, close_seconds=20.0) as gateway:
        peers = [(await gateway.open())[0] for _ in range(20)]
        attack = frame(TEXT, b"a", fin=False) + frame(CONTINUATION, b"b", fin=False) * 60_000
        gc.collect()
        tracemalloc.start()
        try:
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(send_regardless, peer, attack)
                for peer in peers:
                    assert await peer.close_code(seconds=40) == 1009
                nursery.cancel_scope.cancel()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8_000_000


async def test_a10_r5_a_ping_flood_of_a_peer_that_does_not_read(new_server: NewServer) -> None:
    async with attacked(new_server, close_seconds=0.5) as gateway:
        peer, link = await gateway.open()
        before = gateway.server.bytes_out
        await send_regardless(peer, frame(PING, b"p" * 125) * 20_000)
        await until(lambda: link.losses == 1 and gateway.server.connections == 1)
        assert gateway.server.bytes_out - before < 21 * 127 + 200


# --- A12, R3: a link that is not ready -------------------------------------------------------------------------------


async def test_a12_r3_pings_are_answered_while_messages_are_held(new_server: NewServer) -> None:
    async with attacked(new_server) as gateway:
        peer, link = await gateway.open()
        link.blocked = True
        await peer.send(frame(TEXT, b"first one") + frame(PING, b"1") + frame(TEXT, b"2") + frame(PING, b"2"))
        assert await peer.receive() == (PONG, b"1")
        assert await peer.receive() == (PONG, b"2")
        assert link.received == []
        link.blocked = False
        link.transport.resume_nowait()
        assert await peer.receive() == (TEXT, b"first one")
        assert await peer.receive() == (TEXT, b"2")


async def test_a12_r3_a_close_behind_held_messages_is_answered(new_server: NewServer) -> None:
    async with attacked(new_server) as gateway:
        peer, link = await gateway.open()
        link.blocked = True
        await peer.send(frame(TEXT, b"held back") + frame(CLOSE, (1000).to_bytes(2)))
        assert await peer.close_code() == 1000
        await peer.stream.aclose()
        await until(lambda: link.losses == 1)
        assert link.received == []


# --- A13, R2, R6: sending --------------------------------------------------------------------------------------------


async def fill(link: RecordingLink) -> None:
    """Send until the peer's kernel and half of the outbox are full."""
    with trio.fail_after(8):
        while not link.overflows:
            link.transport.send_nowait(Outgoing(b"x" * 60000))
            await trio.lowlevel.checkpoint()


async def test_a13_r2_nothing_is_written_after_a_send_that_was_given_up(new_server: NewServer) -> None:
    """A peer that was cut off in the middle of a frame reads whole frames and then half of one, never another in it."""
    async with attacked(new_server, stuck_seconds=0.3) as gateway:
        peer, link = await gateway.open()
        await fill(link)
        await until(lambda: gateway.server.connections == 1)
        link.transport.send_nowait(Outgoing(b"never sent"))
        whole = 0
        try:
            while await peer.receive() == (TEXT, b"x" * 60000):
                whole += 1
        except (EOFError, trio.BrokenResourceError):
            pass
        assert whole >= 1
        assert set(bytes(peer.buffer[4:])) <= {ord("x")}


async def test_r6_sending_while_closing_is_nobodys_mistake(new_server: NewServer) -> None:
    async with attacked(new_server) as gateway:
        peer, link = await gateway.open()
        link.transport.send_nowait(Outgoing(b"last words"))
        link.transport.close_nowait(CloseCode.REPLACED)
        link.transport.send_nowait(Outgoing(b"never sent"))
        link.transport.ping_nowait()
        link.transport.close_nowait(CloseCode.NORMAL)
        assert await peer.receive() == (TEXT, b"last words")
        assert await peer.receive() == (CLOSE, (4409).to_bytes(2) + b"replaced")
        assert await peer.ended()
        await peer.send(frame(CLOSE, (4409).to_bytes(2)))
        await peer.stream.aclose()
        await until(lambda: link.losses == 1 and gateway.server.connections == 1)


# --- R4, R5: the numbers ---------------------------------------------------------------------------------------------


async def test_r4_the_deadlines_of_production() -> None:
    """That each is kept: `test_upgrade.py` (handshake), `test_transports*.py` (close), `test_session.py` (the rest)."""
    limits, session = TransportLimits(), Limits()
    assert (limits.handshake_seconds, limits.close_seconds) == (5.0, 2.0)
    assert (session.auth_timeout_seconds, session.dead_seconds) == (10.0, 60.0)


async def test_r5_the_caps_of_production() -> None:
    limits = TransportLimits()
    assert (limits.max_head_bytes, limits.max_message_bytes) == (16 * 1024, 64 * 1024)
    assert (limits.max_fragments, limits.control_frames) == (1024, 20)
    assert (limits.outbox_frames, limits.outbox_bytes) == (256, 1024 * 1024)
    assert Limits().window == 32
