"""Transport 2: trio-websocket, one nursery per connection. Portable, and an order of magnitude dearer than `epoll.py`.

Same seam, same limits, same answers to hostile input. The stock server can be ended by one client, so here the library
never meets the network directly: `_GuardedStream` stands between them, measures frames before the library sees them,
and from the first Close frame on lets nothing more through. Every connection runs in its own boundary and under one
cancel scope whose deadline is always the next thing that connection must have done. A cancelled send leaves half a
frame on the wire, so whatever is cancelled is closed by force.

Tasks per connection: the library's reader, our reader (messages to the link), our writer (outbox to the library).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import trio
import trio_websocket
from wsproto.utilities import LocalProtocolError

from gateway import upgrade
from gateway.buffers import Held, Outbox
from gateway.tls import SecureStream
from gateway.transport import Buffered, Host, Link, Outgoing, TransportLimits, TransportServer
from gateway.websocket import FrameMeter, close_frame
from protocol.errors import CloseCode

if TYPE_CHECKING:
    import socket
    import ssl

    from protocol.codec import FrameCodec

_Network = trio.SocketStream | SecureStream

RECEIVE_BYTES: Final = 16 * 1024
_CLOSE_BYTE: Final = 0x88
_ENDED: Final = (
    trio_websocket.ConnectionClosed,
    LocalProtocolError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)
"""What the library says when the WebSocket is over; LocalProtocolError where both sides close at the same moment."""

_FAILURES: Final = {
    code.value: code for code in (CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_TEXT, CloseCode.TOO_LARGE)
}
"""Close codes the library comes to by itself when it cannot go on reading."""


class TrioWebSocketServer(TransportServer):
    """See `transport.TransportServer`."""

    def __init__(self, host: Host, limits: TransportLimits, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: every connection is a TLS one."""
        super().__init__(host, limits)
        self._tls = tls
        self._connections: set[_Connection] = set()
        self._accepting = trio.CancelScope()

    @property
    def connections(self) -> int:
        """See the base class."""
        return len(self._connections)

    @property
    def buffered(self) -> Buffered:
        """See the base class."""
        found = Buffered()
        for connection in self._connections:
            found = connection.add_to(found)
        return found

    async def serve(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See the base class."""
        # Trio's listener closes what it is given; ours is only lent.
        lent = listener.dup()
        lent.setblocking(False)
        async with trio.open_nursery() as nursery:
            task_status.started()
            with self._accepting:
                await trio.serve_listeners(
                    self._serve_stream,
                    [trio.SocketListener(trio.socket.from_stdlib_socket(lent))],
                    handler_nursery=nursery,
                )
            await trio.sleep_forever()

    async def _serve_stream(self, stream: trio.SocketStream) -> None:
        self.accepted += 1
        connection = _Connection(self, stream if self._tls is None else SecureStream(stream, self._tls))
        self._connections.add(connection)
        try:
            await connection.run()
        except* _ENDED:
            pass
        except* Exception as errors:  # noqa: BLE001 - the boundary of one connection (R1)
            self.isolate(errors, _nothing)
        finally:
            self._connections.discard(connection)

    def stop_accepting(self) -> None:
        """See the base class."""
        self._accepting.cancel()

    def sweep(self, now: float) -> None:
        """See the base class. Every other deadline is a cancel scope's."""
        for connection in self._connections:
            connection.check_unfinished(now)

    def close_all(self, code: CloseCode) -> None:
        """See the base class."""
        for connection in self._connections:
            connection.close_nowait(code)


def _nothing() -> None:
    """The connection has ended by leaving its nursery."""


class _GuardedStream(trio.abc.Stream):
    """The network as the library sees it: first the head that was already read, then frames within the limits."""

    def __init__(self, connection: _Connection, stream: _Network, head: bytes, early: bytes) -> None:
        self._connection = connection
        self._stream = stream
        self._head = head
        self._early = early
        self._writing = trio.Lock()
        self._reading = False
        self._digested = trio.Event()
        self._close_sent = False
        self._closed = False
        self.opened = trio.Event()
        """The handshake is answered. The library loses frames that it reads together with the head."""
        self.mute = False
        """A Close frame was sent or a limit was passed: nothing that comes is read as frames any more."""
        self.finished = trio.Event()
        """Nothing will come from the peer any more."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._head:
            head, self._head = self._head, b""
            await trio.lowlevel.checkpoint()
            return head
        await self.opened.wait()
        if self._early:
            early, self._early = self._early, b""
            return early
        self._reading = True
        self._digested.set()
        try:
            while True:
                data = await self._stream.receive_some(max_bytes)
                if not data:
                    self.finished.set()
                    return b""
                if not self.mute and (passed := self._connection.inspect(data)):
                    return data[:passed]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.finished.set()
            raise
        finally:
            self._reading = False
            self._digested = trio.Event()

    async def digested(self) -> None:
        """Wait until the library has dealt with all it was given: a pong after our Close would be an error to it."""
        while not self._reading:
            await self._digested.wait()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self.mute and data[0] != _CLOSE_BYTE:
            await trio.lowlevel.checkpoint()
            return
        last = data[0] == _CLOSE_BYTE
        if last:
            self.mute = self._close_sent = True
            self._connection.shorten_deadline()
        async with self._writing:
            await self._stream.send_all(data)
            self._connection.count_out(len(data))
            if last:
                await self._stream.send_eof()

    async def answer(self, response: bytes) -> None:
        """Write the answer to a plain request, then end the connection."""
        self._connection.shorten_deadline()
        await self.send_all(response)
        await self._stream.send_eof()
        self.mute = True
        self.opened.set()
        await self.aclose()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Let the peer read our Close before the socket goes: unread bytes would turn the end into a reset.

        The library ends a stream it cannot parse without a Close frame; it is added here.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            if not self._close_sent and (failure := self._connection.failure()) is not None:
                await self.send_all(close_frame(failure))
            self._closed = self.mute = True
            if not self._reading and not self.finished.is_set():
                await self.receive_some(RECEIVE_BYTES)
        except trio.BrokenResourceError:
            pass
        finally:
            self._closed = True
            await self._stream.aclose()
            self.finished.set()


class _Connection:
    """Implements `transport.Transport`."""

    def __init__(self, server: TrioWebSocketServer, stream: _Network) -> None:
        limits = server.limits
        now = trio.current_time()
        self._server = server
        self._limits = limits
        self._stream = stream
        self._scope = trio.CancelScope(deadline=now + limits.handshake_seconds)
        self._meter = FrameMeter(limits.max_message_bytes, limits.max_fragments, limits.control_frames, now)
        self._outbox = Outbox(limits)
        self._held = Held()
        self._wake = trio.Event()
        self._resumed: trio.Event | None = None
        """Not None while the held messages are at their bound and reading has stopped."""
        self._releasing = False
        self._closing: CloseCode | None = None
        self._pinging = False
        self._guard: _GuardedStream | None = None
        self._link: Link | None = None
        self._remote: str | None = None
        """Whom it comes from; not None from when the host lets it in."""
        self._codec: FrameCodec
        self._websocket: trio_websocket.WebSocketConnection
        self._nursery: trio.Nursery

    def add_to(self, buffered: Buffered) -> Buffered:
        """With what this connection holds."""
        return buffered.and_of(self._outbox, self._held)

    async def run(self) -> None:
        """From accept to the closed socket. Raises what a link raised outside a boundary, in groups."""
        try:
            with self._scope:
                await self._shake()
        finally:
            self._closing = self._closing or CloseCode.GOING_AWAY
            try:
                await trio.aclose_forcefully(self._stream)
            finally:
                self._forget()

    def _forget(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.lost()
        elif self._remote is not None:
            self._server.host.gave_up(self._remote)
        elif self._guard is None:
            self._server.handshakes_refused += 1

    async def _shake(self) -> None:
        try:
            peer = str(self._stream.socket.getpeername()[0])
        except OSError:
            return
        received = bytearray()
        length = 0
        decision: upgrade.Upgraded | upgrade.Answered | None = None
        while decision is None:
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except trio.BrokenResourceError:
                return
            if not data:
                return
            self._server.bytes_in += len(data)
            received += data
            length = upgrade.head_length(received)
            if length:
                head = bytes(received[:length])
                decision = upgrade.answer(head, peer, self._server.host, self._limits, trio.current_time())
            else:
                decision = upgrade.hopeless(received, self._limits)
        if isinstance(decision, upgrade.Answered):
            self._server.handshakes_refused += decision.refused
            self._guard = _GuardedStream(self, self._stream, b"", b"")
            await self._guard.answer(decision.response)
            return
        self._remote = decision.remote
        early = received[length:]
        early = early[: self.inspect(early)]
        self._guard = _GuardedStream(self, self._stream, bytes(received[:length]), bytes(early))
        await self._converse(self._guard, decision.codec)

    async def _converse(self, guard: _GuardedStream, codec: FrameCodec) -> None:
        async with trio.open_nursery() as nursery:
            request = await trio_websocket.wrap_server_stream(
                nursery,
                guard,
                message_queue_size=1,
                max_message_size=self._limits.max_message_bytes,
                receive_buffer_size=RECEIVE_BYTES,
            )
            offered = codec.subprotocol in request.proposed_subprotocols
            self._websocket = await request.accept(subprotocol=codec.subprotocol if offered else None)
            self._codec = codec
            self._nursery = nursery
            if self._closing is None:
                self._scope.deadline = math.inf
            else:
                guard.mute = True
            guard.opened.set()
            nursery.start_soon(self._write, guard)
            await self._read()
            self.shorten_deadline()
            await guard.finished.wait()
            nursery.cancel_scope.cancel()

    # --- reading -----------------------------------------------------------------------------------------------------

    def inspect(self, data: bytes | bytearray) -> int:
        """Bytes from the peer → how many of them the library may see."""
        if self._closing is not None:
            return 0
        now = trio.current_time()
        if self._link is not None:
            self._server.bytes_in += len(data)
            self._link.heard(now)
        passed, refused = self._meter.measure(data, now)
        if refused is not None:
            self._end(refused)
        return passed

    async def _read(self) -> None:
        """Messages to the link, until the WebSocket is over."""
        try:
            now = trio.current_time()
            self._link = link = self._server.host.connected(self, self._codec, self._remote or "", now)
            while True:
                message = await self._websocket.get_message()
                if isinstance(message, str) is self._codec.binary:
                    self._end(CloseCode.UNSUPPORTED_DATA)
                if self._closing is not None:
                    continue
                payload = message.encode() if isinstance(message, str) else message
                self._server.frames_in += 1
                if not self._held and not link.blocked:
                    link.receive(payload, trio.current_time())
                elif self._held.append(payload, self._limits.held_bytes):
                    self._resumed = trio.Event()
                    await self._resumed.wait()
        except _ENDED:
            return
        except Exception as error:  # noqa: BLE001 - the boundary of one connection (R1)
            self._server.isolate(error, self._fail)

    def resume_nowait(self) -> None:
        """See `transport.Transport`."""
        link = self._link
        if link is None or self._releasing:
            return
        self._releasing = True
        try:
            while self._held and self._closing is None and not link.blocked:
                link.receive(self._held.pop(), trio.current_time())
        except Exception as error:  # noqa: BLE001 - the boundary of one connection; the caller serves another
            self._server.isolate(error, self._fail)
        finally:
            self._releasing = False
        if not self._held and self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    def check_unfinished(self, now: float) -> None:
        """End it if a message has been under way for too long, unless it is we who do not read."""
        since = self._meter.under_way_since
        if since is not None and self._resumed is None and now - since >= self._limits.message_seconds:
            self._end(CloseCode.AUTH_TIMEOUT)

    # --- writing -----------------------------------------------------------------------------------------------------

    def send_nowait(self, outgoing: Outgoing) -> None:
        """See `transport.Transport`."""
        if self._closing is not None:
            return
        self._server.frames_out += 1
        if self._outbox.append(outgoing.payload(self._codec)):
            if self._link is not None:
                self._link.overflowed()
        elif self._outbox.hopeless:
            self._closing = CloseCode.SLOW_CONSUMER
            self._scope.cancel()
        self._wake.set()

    def ping_nowait(self) -> None:
        """See `transport.Transport`. One at a time: the library keeps each until its pong comes."""
        if self._closing is None and not self._pinging:
            self._pinging = True
            self._nursery.start_soon(self._ping)

    async def _ping(self) -> None:
        try:
            await self._websocket.ping()
        except _ENDED:
            return
        finally:
            self._pinging = False

    async def _write(self, guard: _GuardedStream) -> None:
        try:
            while True:
                while self._outbox:
                    await self._write_one()
                if self._closing is not None:
                    await guard.digested()
                    await self._websocket.aclose(self._closing.value, self._closing.reason)
                    return
                await self._wake.wait()
                self._wake = trio.Event()
        except _ENDED:
            return
        except Exception as error:  # noqa: BLE001 - the boundary of one connection (R1)
            self._server.isolate(error, self._scope.cancel)

    async def _write_one(self) -> None:
        payload, drained = self._outbox.pop()
        with trio.move_on_after(self._limits.stuck_seconds) as patience:
            await self._websocket.send_message(bytes(payload) if self._codec.binary else bytes(payload).decode())
        if patience.cancelled_caught:
            self._scope.cancel()
        elif drained and self._link is not None:
            self._link.drained(trio.current_time())

    def failure(self) -> CloseCode | None:
        """Why the library has given the peer up, if it has."""
        reason = self._websocket.closed if self._link is not None else None
        return _FAILURES.get(reason.code) if reason is not None else None

    def count_out(self, size_bytes: int) -> None:
        """Bytes went to the peer."""
        self._server.bytes_out += size_bytes

    # --- ending ------------------------------------------------------------------------------------------------------

    def close_nowait(self, code: CloseCode) -> None:
        """See `transport.Transport`."""
        if self._closing is None:
            self._closing = code
            self.shorten_deadline()
            self._wake.set()
            if self._resumed is not None:
                self._resumed.set()

    def shorten_deadline(self) -> None:
        """From now the connection has `close_seconds` to live."""
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + self._limits.close_seconds)

    def _end(self, code: CloseCode) -> None:
        """The peer has passed a limit: what it sends from here on is not read."""
        if self._guard is not None:
            self._guard.mute = True
        self.close_nowait(code)

    def _fail(self) -> None:
        self._end(CloseCode.INTERNAL)
