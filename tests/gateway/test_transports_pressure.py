"""Both transports under pressure: held frames, outboxes, deadlines, failing links, vanishing peers, any bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.epoll import EpollServer
from gateway.transport import Outgoing
from gateway.trio_ws import TrioWebSocketServer
from protocol.errors import CloseCode
from tests.gateway.peers import (
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    RecordingLink,
    frame,
    open_gateway,
    request_head,
    until,
)

if TYPE_CHECKING:
    from tests.gateway.peers import NewServer

pytestmark = pytest.mark.trio
LIMIT = 65536


# --- a link that is not ready ----------------------------------------------------------------------------------------


async def test_resuming_stops_where_the_link_blocks_again(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.echo = False
        link.blocked = True

        def block_again(_payload: bytes) -> None:
            link.blocked = True

        link.on_receive = block_again
        wanted = [b"message %d" % number for number in range(5)]
        await peer.send(b"".join(map(frame, [TEXT] * 5, wanted)) + frame(PING))
        await peer.receive()
        for count in range(5):
            assert link.received == wanted[:count]
            link.blocked = False
            link.transport.resume_nowait()
        assert link.received == wanted


async def test_a_new_message_never_overtakes_a_held_one(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.blocked = True
        await peer.send(frame(TEXT, b"first one") + frame(PING))
        await peer.receive()
        link.blocked = False  # and nobody has called resume_nowait yet
        await peer.send(frame(TEXT, b"second one"))
        await until(lambda: gateway.server.frames_in == 2)
        link.transport.resume_nowait()
        assert await peer.receive() == (TEXT, b"first one")
        assert await peer.receive() == (TEXT, b"second one")
        assert link.received == [b"first one", b"second one"]


async def test_resuming_from_inside_receive_is_safe(new_server: NewServer) -> None:
    """A refusal can come back while the message is still being received: blocked and free again in one call."""
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.echo = False

        def block_and_resume(_payload: bytes) -> None:
            link.blocked = True
            link.blocked = False
            link.transport.resume_nowait()

        link.on_receive = block_and_resume
        wanted = [b"message %d" % number for number in range(300)]
        await peer.send(b"".join(frame(TEXT, payload) for payload in wanted))
        await until(lambda: len(link.received) == 300)
        assert link.received == wanted


async def test_reading_stops_at_the_bound_and_goes_on_without_loss(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.echo = False
        link.blocked = True
        wanted = [b"%08d" % number + b"x" * 1000 for number in range(20000)]
        stalled = False
        with trio.move_on_after(1):
            await peer.send(b"".join(frame(TEXT, payload) for payload in wanted[:15000]))
            stalled = True
        assert not stalled, "15 MB went into a gateway that was to hold 64 KiB"
        read = gateway.server.frames_in
        assert read < 2000
        link.blocked = False
        link.transport.resume_nowait()
        await until(lambda: len(link.received) > read + 100)
        assert link.received == wanted[: len(link.received)]


async def test_a_link_may_close_from_inside_receive(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.echo = False
        link.on_receive = lambda _payload: link.transport.close_nowait(CloseCode.AUTH)
        await peer.send(frame(TEXT, b"first one") + frame(TEXT, b"second one"))
        assert await peer.close_code() == 4401
        assert link.received == [b"first one"]


# --- a peer that does not read ---------------------------------------------------------------------------------------


async def overflow(link: RecordingLink) -> int:
    """Send 60,000-byte frames until the outbox is past its bound; how many it took."""
    sent = 0
    with trio.fail_after(8):
        while link.overflows == 0:
            link.transport.send_nowait(Outgoing(b"x" * 60000))
            sent += 1
            await trio.lowlevel.checkpoint()
    return sent


async def test_the_outbox_tells_its_link_once_and_drains(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        sent = await overflow(link)
        assert (link.overflows, link.drains) == (1, 0)
        for _ in range(sent):
            assert await peer.receive() == (TEXT, b"x" * 60000)
        await until(lambda: link.drains == 1)
        link.transport.send_nowait(Outgoing(b"live again"))
        assert await peer.receive() == (TEXT, b"live again")


async def test_a_peer_far_past_the_bound_is_cut_off(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.transport.send_nowait(Outgoing(b"x" * 60000))
        with trio.fail_after(8):
            while not link.losses:
                for _ in range(20):
                    link.transport.send_nowait(Outgoing(b"x" * 60000))
                await trio.sleep(0.01)
        assert gateway.server.connections == 0
        assert await peer.ended()


async def test_a_stuck_outbox_ends_the_connection(new_server: NewServer) -> None:
    async with open_gateway(new_server, stuck_seconds=0.3) as gateway:
        _peer, link = await gateway.open()
        await overflow(link)
        await until(lambda: link.losses == 1 and gateway.server.connections == 0)


async def test_a_close_to_a_peer_that_does_not_read_has_a_deadline(new_server: NewServer) -> None:
    async with open_gateway(new_server, close_seconds=0.3) as gateway:
        _peer, link = await gateway.open()
        await overflow(link)
        link.transport.close_nowait(CloseCode.SLOW_CONSUMER)
        await until(lambda: link.losses == 1 and gateway.server.connections == 0)


async def test_a_message_must_be_finished_in_time(new_server: NewServer) -> None:
    async with open_gateway(new_server, message_seconds=0.4) as gateway:
        fragment, _ = await gateway.open()
        part, _ = await gateway.open()
        quiet, _ = await gateway.open()
        await quiet.send(frame(TEXT, b"complete") + frame(PING))
        assert {await quiet.receive(), await quiet.receive()} == {(TEXT, b"complete"), (PONG, b"")}
        await fragment.send(frame(TEXT, b"a", fin=False))
        await part.send(frame(TEXT, b"abcdefgh")[:9])
        assert await fragment.close_code() == 4408
        assert await part.close_code() == 4408
        await trio.sleep(0.5)
        await quiet.send(frame(TEXT, b"still open"))
        assert await quiet.receive() == (TEXT, b"still open")


async def test_a_busy_peer_is_never_unfinished(new_server: NewServer) -> None:
    """Every segment ends in the middle of a frame, yet each message is complete long before its deadline."""
    async with open_gateway(new_server, message_seconds=0.4) as gateway:
        peer, link = await gateway.open()
        link.echo = False
        whole = frame(TEXT, b"abcdefgh")
        await peer.send(whole[:5])
        for _ in range(12):
            await trio.sleep(0.08)
            await peer.send(whole[5:] + whole[:5])
        await peer.send(whole[5:])
        await until(lambda: len(link.received) == 13)
        await trio.sleep(0.6)
        assert link.losses == 0
        await peer.send(whole)
        await until(lambda: len(link.received) == 14)


async def test_fragments_that_drip_do_not_prolong_a_message(new_server: NewServer) -> None:
    async with open_gateway(new_server, message_seconds=0.4, close_seconds=0.5) as gateway:
        peer, link = await gateway.open()
        await peer.send(frame(TEXT, b"a", fin=False))
        began = trio.current_time()
        with trio.fail_after(5):
            while not link.losses:
                with contextlib.suppress(trio.BrokenResourceError):
                    await peer.send(frame(CONTINUATION, b"b", fin=False))
                await trio.sleep(0.05)
        assert trio.current_time() - began < 1.5


# --- links that fail, peers that vanish ------------------------------------------------------------------------------


async def test_a_link_that_raises_on_resume_does_not_hurt_the_caller(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.blocked = True
        await peer.send(frame(TEXT, b"held back") + frame(PING))
        await peer.receive()
        link.blocked = False
        link.raises = RuntimeError("a bug")
        link.transport.resume_nowait()
        assert gateway.server.isolated_errors == 1
        assert await peer.close_code() == 1011


async def test_a_host_that_raises_costs_one_connection(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:

        def refuse(_link: RecordingLink) -> None:
            raise RuntimeError("a bug")

        gateway.host.prepare = refuse
        peer = await gateway.open_raw()
        await peer.send(request_head())
        await peer.head()
        assert await peer.close_code() == 1011
        gateway.host.prepare = None
        other, _ = await gateway.open()
        await other.send(frame(TEXT, b"alive"))
        assert await other.receive() == (TEXT, b"alive")


@pytest.mark.parametrize("ending", ["close", "reset"])
async def test_a_vanished_peer_is_noticed(new_server: NewServer, ending: str) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        if ending == "close":
            await peer.stream.aclose()
        else:
            peer.reset()
        await until(lambda: link.losses == 1 and gateway.server.connections == 0)
        link.transport.send_nowait(Outgoing(b"nobody"))
        link.transport.ping_nowait()
        link.transport.resume_nowait()
        link.transport.close_nowait(CloseCode.NORMAL)
        assert link.losses == 1


async def test_a_stopped_listener_keeps_its_connections(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, _link = await gateway.open()
        gateway.server.stop_accepting()
        await trio.sleep(0.05)
        late = await gateway.open_raw()
        await late.send(request_head())
        await trio.sleep(0.2)
        assert gateway.server.accepted == 1
        await peer.send(frame(TEXT, b"still served"))
        assert await peer.receive() == (TEXT, b"still served")


async def test_the_end_of_serving_loses_every_link(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        links = [(await gateway.open())[1] for _ in range(3)]
    assert [link.losses for link in links] == [1, 1, 1]


# --- any bytes -------------------------------------------------------------------------------------------------------

SERVERS = st.sampled_from([EpollServer, TrioWebSocketServer])
MESSAGES = st.lists(
    st.tuples(st.text(max_size=300).map(str.encode), st.integers(1, 4), st.booleans()), min_size=1, max_size=8
)
RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _stream_of(messages: list[tuple[bytes, int, bool]]) -> bytes:
    """Messages, each in so many fragments and perhaps with a pong inside, as one byte stream."""
    stream = b""
    for payload, parts, control in messages:
        size = max(1, -(-len(payload) // parts))
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
        for number, piece in enumerate(pieces):
            opcode = TEXT if number == 0 else CONTINUATION
            stream += frame(opcode, piece, fin=number == len(pieces) - 1)
            if control:
                stream += frame(PONG, b"?") if number == 0 else b""
    return stream


@RELAXED
@given(server=SERVERS, messages=MESSAGES, cuts=st.lists(st.integers(1, 200), min_size=1, max_size=30))
async def test_segmentation_does_not_matter(
    server: NewServer, messages: list[tuple[bytes, int, bool]], cuts: list[int]
) -> None:
    async with open_gateway(server) as gateway:
        peer, link = await gateway.open()
        link.echo = False
        stream = _stream_of(messages)
        at = 0
        for cut in cuts:
            await peer.send(stream[at : at + cut])
            at += cut
            await trio.lowlevel.checkpoint()
        await peer.send(stream[at:])
        await until(lambda: len(link.received) == len(messages))
        assert link.received == [payload for payload, _, _ in messages]


@RELAXED
@given(server=SERVERS, noise=st.lists(st.binary(max_size=400), max_size=5), upgraded=st.booleans())
async def test_noise_never_ends_the_server(server: NewServer, noise: list[bytes], upgraded: bool) -> None:
    async with open_gateway(server, close_seconds=0.3) as gateway:
        neighbour, _ = await gateway.open()
        peer = (await gateway.open())[0] if upgraded else await gateway.open_raw()
        try:
            for data in noise:
                await peer.send(data)
                await trio.lowlevel.checkpoint()
        except trio.BrokenResourceError:
            pass
        await peer.stream.aclose()
        await neighbour.send(frame(TEXT, b"still here"))
        assert await neighbour.receive() == (TEXT, b"still here")
        await until(lambda: gateway.server.connections == 1)
        assert gateway.server.isolated_errors == 0
