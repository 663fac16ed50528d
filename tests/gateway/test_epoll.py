"""What only the epoll transport has: one task, shared frame readers, its own accepting."""

from __future__ import annotations

import errno
import gc
import socket
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import trio

from gateway.epoll import EpollServer
from gateway.epoll_connection import Connection
from gateway.transport import Outgoing
from tests.gateway.peers import CONTINUATION, PING, PONG, TEXT, RecordingLink, frame, open_gateway, until

if TYPE_CHECKING:
    from protocol.codec import FrameCodec

pytestmark = pytest.mark.trio


async def test_connections_cost_no_task() -> None:
    async with open_gateway(EpollServer) as gateway:
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(20):
            await gateway.open()
        assert trio.lowlevel.current_statistics().tasks_living == before


async def test_an_idle_connection_keeps_nothing_but_itself() -> None:
    async with open_gateway(EpollServer) as gateway:
        peer, link = await gateway.open()
        last = frame(TEXT, b"c")
        await peer.send(frame(TEXT, b"a", fin=False) + frame(PING) + frame(CONTINUATION, b"b") + last[:3])
        assert await peer.receive() == (PONG, b"")
        assert await peer.receive() == (TEXT, b"ab")
        await peer.send(last[3:])
        await until(lambda: gateway.server.frames_in == 2)
        connection = link.transport
        assert isinstance(connection, Connection)
        kept = {name: getattr(connection, name) for name in ("_rest", "_reader", "_held", "_outbox", "_need")}
        assert kept == {"_rest": None, "_reader": None, "_held": None, "_outbox": None, "_need": 0}
        assert not hasattr(connection, "__dict__")


async def test_an_idle_connection_costs_less_than_2_kib() -> None:
    async with open_gateway(EpollServer) as gateway:
        await gateway.open()
        with socket.socket() as unconnected:
            socket_bytes = sys.getsizeof(unconnected)
        gc.collect()
        tracemalloc.start()
        peers = [await gateway.open() for _ in range(50)]
        for peer, _link in peers:
            await peer.send(frame(TEXT, b"hello world"))
            await peer.receive()
            peer.buffer = bytearray()
        gc.collect()
        snapshot = tracemalloc.take_snapshot()
        tracemalloc.stop()
        ours = sum(
            statistic.size
            for statistic in snapshot.statistics("filename")
            if "/gateway/epoll" in statistic.traceback[0].filename
            or "/gateway/buffers" in statistic.traceback[0].filename
        )
        assert ours / 50 + socket_bytes < 2048


async def test_two_fragmented_messages_at_once_do_not_share_a_reader() -> None:
    async with open_gateway(EpollServer) as gateway:
        one, _ = await gateway.open()
        two, _ = await gateway.open()
        await one.send(frame(TEXT, b"1a", fin=False) + frame(PING))
        await one.receive()
        await two.send(frame(TEXT, b"2a", fin=False) + frame(PING))
        await two.receive()
        await one.send(frame(CONTINUATION, b"1b"))
        assert await one.receive() == (TEXT, b"1a1b")
        await two.send(frame(CONTINUATION, b"2b"))
        assert await two.receive() == (TEXT, b"2a2b")


class _Exhausted:
    """A listener whose process has no file descriptor left, until it is told otherwise."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.exhausted = True
        self.calls = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.calls += 1
        if self.exhausted:
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._listener, name)


async def test_no_file_descriptors_left_is_no_busy_loop() -> None:
    async with open_gateway(EpollServer) as gateway:
        server = gateway.server
        assert isinstance(server, EpollServer)
        assert server._listener is not None
        exhausted = _Exhausted(server._listener)
        server._listener = exhausted  # type: ignore[assignment]
        waiting = await gateway.open_raw()
        await trio.sleep(0.55)
        assert 2 <= exhausted.calls <= 8, "one try per sweep, and this test sweeps ten times a second"
        exhausted.exhausted = False
        await until(lambda: server.accepted == 1)
        await waiting.stream.aclose()


async def test_one_busy_socket_does_not_starve_the_others() -> None:
    """A socket is read once per turn, whatever it has to offer."""
    async with open_gateway(EpollServer, ready_sockets=1) as gateway:
        loud, loud_link = await gateway.open()
        loud_link.echo = False
        quiet, _ = await gateway.open()
        async with trio.open_nursery() as nursery:

            async def shout() -> None:
                while True:
                    await loud.send(frame(TEXT, b"x" * 60000) * 20)

            nursery.start_soon(shout)
            for _ in range(20):
                with trio.fail_after(2):
                    await quiet.send(frame(TEXT, b"hello"))
                    assert await quiet.receive() == (TEXT, b"hello")
            nursery.cancel_scope.cancel()
        assert loud_link.received


async def test_a_link_that_raises_everywhere_still_ends_quietly() -> None:
    class Broken(RecordingLink):
        def receive(self, payload: bytes | bytearray | memoryview, now: float) -> None:
            raise RuntimeError("receive")

        def overflowed(self) -> None:
            raise RuntimeError("overflowed")

        def lost(self) -> None:
            super().lost()
            raise RuntimeError("lost")

    async with open_gateway(EpollServer) as gateway:
        plain = gateway.host.connected

        def connected(transport: object, codec: FrameCodec, remote: str, now: float) -> RecordingLink:
            link = Broken(transport, codec, remote)  # type: ignore[arg-type]
            gateway.host.links.append(link)
            return link

        gateway.host.connected = connected  # type: ignore[method-assign]
        peer, link = await gateway.open()
        await peer.send(frame(TEXT, b"boom boom"))
        assert await peer.close_code() == 1011
        await peer.stream.aclose()
        await until(lambda: gateway.server.connections == 0)
        assert link.losses == 1
        assert gateway.server.isolated_errors == 2
        gateway.host.connected = plain  # type: ignore[method-assign]
        other, _ = await gateway.open()
        await other.send(frame(TEXT, b"alive"))
        assert await other.receive() == (TEXT, b"alive")


async def test_one_frame_for_many_is_framed_once() -> None:
    async with open_gateway(EpollServer) as gateway:
        peers = [await gateway.open() for _ in range(3)]
        outgoing = Outgoing(b'{"type":"x"}')
        for _peer, link in peers:
            link.transport.send_nowait(outgoing)
        for peer, link in peers:
            assert await peer.receive() == (TEXT, b'{"type":"x"}')
            assert outgoing.framed(link.codec) is outgoing.framed(peers[0][1].codec)


async def test_a_stuck_peer_that_wakes_in_time_reads_that_it_was_too_slow() -> None:
    """Behind all that was waiting for it: nothing is lost before the 4508."""
    async with open_gateway(EpollServer, stuck_seconds=0.3, close_seconds=5.0) as gateway:
        peer, link = await gateway.open()
        sent = 0
        while not link.overflows:
            link.transport.send_nowait(Outgoing(b"x" * 60000))
            sent += 1
        await until(lambda: link.losses == 1)
        for _ in range(sent):
            assert await peer.receive() == (TEXT, b"x" * 60000)
        assert await peer.close_code() == 4508
        assert await peer.ended()
        await peer.stream.aclose()
        await until(lambda: gateway.server.connections == 0)
