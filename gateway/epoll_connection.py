"""One client socket of the epoll transport: handshake, fast path, held messages, outbox, close handshake.

Called by the reactor (`handle`, `settle`, `abort`, `time_out`) and by the hub (the `Transport` methods). Nothing here
awaits, so every method is atomic; the hub may call back into a connection from inside `Link.receive`. A connection owns
its socket from accept to `lose`.

Whatever is not a complete, masked, unfragmented message of the connection's kind goes to `websocket.FrameReader`.
"""

from __future__ import annotations

import contextlib
import select
import socket
from enum import Enum
from typing import TYPE_CHECKING, Final

import trio
from websockets.speedups import apply_mask

from gateway import upgrade
from gateway.buffers import Deadlines, Held, Outbox
from gateway.websocket import PING_FRAME, FrameReader, FrameRefused, Message, Reply, Shut, close_frame, frame_length
from protocol.codec import JSON
from protocol.errors import CloseCode

if TYPE_CHECKING:
    from gateway.transport import Buffered, Link, Outgoing, TransportServer

RECEIVE_BYTES: Final = 64 * 1024
"""One recv per ready socket and pass: level-triggered epoll brings the rest, after the others. 256 KiB cost 16 us
more per recv (malloc takes it from mmap), 4 KiB saved nothing."""
_LINGER_NONE: Final = b"\x01\x00\x00\x00\x00\x00\x00\x00"
_BROKEN_EVENTS: Final = select.EPOLLHUP | select.EPOLLERR


class Stage(Enum):
    HANDSHAKE = "handshake"
    OPEN = "open"
    CLOSING = "closing"
    """The last frame is written or waits in the outbox; what the peer still sends is not read as frames any more."""
    BROKEN = "broken"
    """To be closed without ceremony at the next `settle`."""
    GONE = "gone"


_OPEN: Final = Stage.OPEN


class _Nobody:
    """The link before the handshake and after the end: nobody listens."""

    blocked = False

    def heard(self, now: float) -> None: ...

    def receive(self, payload: bytes | bytearray | memoryview, now: float) -> None: ...

    def overflowed(self) -> None: ...

    def drained(self, now: float) -> None: ...

    def lost(self) -> None: ...


_NOBODY: Final = _Nobody()


class Reactor:
    """What the connections of one server share."""

    def __init__(self, server: TransportServer, epoll: select.epoll) -> None:
        limits = server.limits
        self.server = server
        self.limits = limits
        self.epoll = epoll
        self.connections: dict[int, Connection] = {}
        self.unsettled: list[Connection] = []
        """Connections whose end the reactor has still to tell their links."""
        self.shaking: Deadlines[Connection] = Deadlines(limits.handshake_seconds)
        self.closing: Deadlines[Connection] = Deadlines(limits.close_seconds)
        self.stuck: Deadlines[Connection] = Deadlines(limits.stuck_seconds)
        self.unfinished: Deadlines[Connection] = Deadlines(limits.message_seconds)
        self._spare: FrameReader | None = None

    def borrow_reader(self) -> FrameReader:
        """The frame reader no connection needs at the moment; idle ones are all alike, so one serves everybody's
        pings."""
        spare, self._spare = self._spare, None
        return spare or FrameReader(self.limits.max_message_bytes, self.limits.max_fragments)

    def return_reader(self, reader: FrameReader) -> None:
        """Give back an idle one."""
        self._spare = reader


class Connection:
    """Implements `transport.Transport`."""

    __slots__ = (
        "_busy",
        "_codec",
        "_controls",
        "_controls_since",
        "_held",
        "_link",
        "_need",
        "_opening",
        "_outbox",
        "_paused",
        "_reactor",
        "_reader",
        "_rest",
        "_server",
        "_socket",
        "_stage",
        "fd",
    )

    def __init__(self, reactor: Reactor, sock: socket.socket, now: float) -> None:
        self.fd = sock.fileno()
        self._reactor = reactor
        self._server = reactor.server
        self._socket = sock
        self._stage = Stage.HANDSHAKE
        self._link: Link = _NOBODY
        self._codec = JSON
        self._opening = 0
        """First byte of a whole data frame of the codec's kind."""
        self._rest: bytearray | None = None
        """Received and not consumed: a partial head or frame; while paused, anything."""
        self._need = 0
        """Bytes `_rest` must have before it is worth looking at again; not 0 exactly while a message is under way."""
        self._reader: FrameReader | None = None
        self._held: Held | None = None
        self._outbox: Outbox | None = None
        self._paused = False
        self._busy = False
        self._controls = 0
        self._controls_since = now
        reactor.shaking.start(self, now)

    def add_to(self, buffered: Buffered) -> Buffered:
        """With what this connection holds."""
        return buffered.and_of(self._outbox, self._held)

    # --- reading -----------------------------------------------------------------------------------------------------

    def handle(self, events: int, now: float) -> None:
        """The socket is ready."""
        if events & select.EPOLLOUT:
            self._flush(now)
        if events & select.EPOLLIN:
            self._read(now)
        elif events & _BROKEN_EVENTS:
            self.lose()

    def _read(self, now: float) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.lose()
            return
        if not data:
            self.lose()
            return
        self._server.bytes_in += len(data)
        if self._stage is _OPEN:
            self._link.heard(now)
            rest = self._rest
            if rest is None:
                self._consume(data, now)
            else:
                rest += data
                if len(rest) >= self._need:
                    self._rest = None
                    self._consume(rest, now)
        elif self._stage is Stage.HANDSHAKE:
            self._shake(data, now)

    def _shake(self, data: bytes, now: float) -> None:
        if self._rest is None:
            self._rest = bytearray()
        head = self._rest
        head += data
        server = self._server
        length = upgrade.head_length(head)
        if length:
            try:
                address = self._socket.getpeername()
            except OSError:
                self.lose()
                return
            peer = address[0] if address else ""
            decision = upgrade.answer(bytes(head[:length]), peer, server.host, server.limits, now)
        elif (refusal := upgrade.hopeless(head, server.limits)) is not None:
            decision = refusal
        else:
            return
        self._rest = None
        self._reactor.shaking.clear(self)
        if isinstance(decision, upgrade.Answered):
            server.handshakes_refused += decision.refused
            self._finish(decision.response)
            return
        self._codec = decision.codec
        self._opening = 0x82 if decision.codec.binary else 0x81
        self._stage = Stage.OPEN
        self._write(decision.response)
        self._link = server.host.connected(self, decision.codec, decision.remote, now)
        if len(head) > length:
            self._consume(bytes(head[length:]), now)

    def _consume(self, data: bytes | bytearray, now: float) -> None:
        """Every frame in `data`, in order. The fast path stands inline: a call per frame would be a tenth of its
        cost."""
        link = self._link
        opening = self._opening
        longest = self._reactor.limits.max_message_bytes
        position = 0
        end = len(data)
        need = 0
        moved = False
        self._busy = True
        while position < end and self._stage is _OPEN and not self._paused:
            if end - position >= 8 and data[position] == opening and self._reader is None:
                body = position + 6
                size = data[position + 1] - 128
                if size == 126:
                    body = position + 8
                    size = data[position + 2] << 8 | data[position + 3]
                if 0 <= size <= longest and size != 127:
                    finish = body + size
                    if finish > end:
                        need = finish - position
                        break
                    payload = apply_mask(data[body:finish], data[body - 4 : body])
                    position = finish
                    if opening == 0x82 or payload.isascii() or _is_utf8(payload):
                        moved = True
                        self._server.frames_in += 1
                        if self._held is None and not link.blocked:
                            link.receive(payload, now)
                        else:
                            self._hold(payload)
                    else:
                        self._end(close_frame(CloseCode.INVALID_TEXT))
                    continue
            step = self._step(data, position, now)
            if step <= 0:
                need = -step
                break
            position += step
        self._busy = False
        if self._stage is _OPEN:
            self._keep(data, position, need, moved, now)
            if self._held is not None and not link.blocked:
                self._release(now)

    def _step(self, data: bytes | bytearray, position: int, now: float) -> int:
        """One frame off the fast path → its length; 0 or less: minus the bytes to wait for, or the connection has
        ended."""
        reader = self._reader or self._reactor.borrow_reader()
        try:
            length = frame_length(data, position, reader.room)
        except FrameRefused as refused:
            self._end(close_frame(refused.code))
            return 0
        if length <= 0:
            if self._reader is None:
                self._reactor.return_reader(reader)
            return length
        if data[position] & 8 and self._flooded(now):
            self._end(close_frame(CloseCode.POLICY))
            return 0
        outcome = reader.feed(data[position : position + length], self._codec.binary)
        if reader.idle:
            self._reader = None
            self._reactor.return_reader(reader)
        else:
            self._reader = reader
        match outcome:
            case Message(payload):
                self._server.frames_in += 1
                if self._held is None and not self._link.blocked:
                    self._link.receive(payload, now)
                else:
                    self._hold(payload)
            case Reply(frame):
                self._write(frame)
            case Shut(frame):
                self._end(frame)
        return length

    def _flooded(self, now: float) -> bool:
        if now - self._controls_since >= 1.0:
            self._controls_since = now
            self._controls = 0
        self._controls += 1
        return self._controls > self._reactor.limits.control_frames

    def _keep(self, data: bytes | bytearray, position: int, need: int, moved: bool, now: float) -> None:
        """Remember what is left of `data`, and since when a message is under way. `moved`: one was completed just
        now."""
        if position < len(data):
            self._rest = bytearray(memoryview(data)[position:])
        if self._paused:
            # The peer is not to blame for what we do not read.
            self._need = 0
            self._reactor.unfinished.clear(self)
        elif need or self._reader is not None:
            if moved or not self._need:
                self._reactor.unfinished.start(self, now)
            self._need = need or 1
        elif self._need:
            self._need = 0
            self._reactor.unfinished.clear(self)

    # --- messages the link is not ready for --------------------------------------------------------------------------

    def _hold(self, payload: bytes) -> None:
        if self._held is None:
            self._held = Held()
        if self._held.append(payload, self._reactor.limits.held_bytes):
            self._paused = True
            self._watch()

    def resume_nowait(self) -> None:
        """See `transport.Transport`."""
        # While busy, the loop that is under way looks at `blocked` again by itself.
        if not self._busy and self._held is not None and self._stage is _OPEN:
            try:
                self._release(trio.current_time())
            except Exception as error:  # noqa: BLE001 - the boundary of one connection; the caller is the hub serving another
                self._server.isolate(error, self.fail)

    def _release(self, now: float) -> None:
        """Hand the held messages over until the link blocks again, then go on with what was not consumed."""
        held = self._held
        if held is None:
            return
        link = self._link
        self._busy = True
        while held and self._stage is _OPEN and not link.blocked:
            link.receive(held.pop(), now)
        self._busy = False
        if held or self._stage is not _OPEN:
            return
        self._held = None
        if self._paused:
            self._paused = False
            self._watch()
        rest, self._rest = self._rest, None
        if rest is not None:
            self._consume(rest, now)

    # --- writing -----------------------------------------------------------------------------------------------------

    def send_nowait(self, outgoing: Outgoing) -> None:
        """See `transport.Transport`."""
        if self._stage is _OPEN:
            self._server.frames_out += 1
            self._write(outgoing.framed(self._codec))

    def ping_nowait(self) -> None:
        """See `transport.Transport`."""
        if self._stage is _OPEN:
            self._write(PING_FRAME)

    def _write(self, data: bytes) -> None:
        outbox = self._outbox
        if outbox is not None:
            self._queue(outbox, data)
            return
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return
        self._server.bytes_out += sent
        if sent != len(data):
            self._outbox = Outbox(self._reactor.limits)
            self._reactor.stuck.start(self, trio.current_time())
            self._watch()
            self._queue(self._outbox, memoryview(data)[sent:])

    def _queue(self, outbox: Outbox, chunk: bytes | memoryview) -> None:
        if outbox.append(chunk):
            self._link.overflowed()
        elif outbox.hopeless:
            self._break()

    def _flush(self, now: float) -> None:
        outbox = self._outbox
        if outbox is None:
            return
        try:
            sent = self._socket.sendmsg(outbox.oldest())
        except BlockingIOError:
            return
        except OSError:
            self.lose()
            return
        self._server.bytes_out += sent
        drained = outbox.written(sent)
        if outbox:
            self._reactor.stuck.start(self, now)
        else:
            self._outbox = None
            self._reactor.stuck.clear(self)
            self._watch()
            if self._stage is Stage.CLOSING:
                self._half_close()
        if drained:
            self._link.drained(now)

    def _watch(self) -> None:
        """Tell epoll what this connection waits for now."""
        events = 0 if self._paused else select.EPOLLIN
        if self._outbox is not None:
            events |= select.EPOLLOUT
        self._reactor.epoll.modify(self.fd, events)

    # --- ending ------------------------------------------------------------------------------------------------------

    def close_nowait(self, code: CloseCode) -> None:
        """See `transport.Transport`."""
        if self._stage is _OPEN:
            self._finish(close_frame(code))
        elif self._stage is Stage.HANDSHAKE:
            self._break()

    def _end(self, last: bytes) -> None:
        """The peer has ended it, by a Close or by an error: the link is told before the socket is gone."""
        self._finish(last)
        self._reactor.unsettled.append(self)

    def _finish(self, last: bytes) -> None:
        """Write `last`, half-close, wait for the peer's end of stream.

        The half-close lets a client that answered our Close go at once; since what it answers is not read as frames,
        nothing it sends after our Close can matter.
        """
        self._stage = Stage.CLOSING
        self._held = self._rest = self._reader = None
        self._need = 0
        self._reactor.unfinished.clear(self)
        self._reactor.closing.start(self, trio.current_time())
        if self._paused:
            self._paused = False
            self._watch()
        self._write(last)
        if self._outbox is None and self._stage is Stage.CLOSING:
            self._half_close()

    def _half_close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._break()

    def _break(self) -> None:
        if self._stage is not Stage.GONE:
            self._stage = Stage.BROKEN
            self._reactor.unsettled.append(self)

    def settle(self) -> None:
        """Tell the link what was decided outside the reactor or in the middle of a frame."""
        if self._stage is Stage.BROKEN:
            self.abort()
        elif self._stage is Stage.CLOSING:
            link, self._link = self._link, _NOBODY
            link.lost()

    def fail(self) -> None:
        """A bug was met while serving this connection: 1011 where it can still be said."""
        self._busy = False
        if self._stage is _OPEN and self._outbox is None:
            self._end(close_frame(CloseCode.INTERNAL))
        else:
            self._break()

    def time_out(self) -> None:
        """A message was not finished in time."""
        if self._stage is _OPEN:
            self._end(close_frame(CloseCode.AUTH_TIMEOUT))

    def give_up(self) -> None:
        """The peer has taken nothing for too long. Where it wakes before the close's deadline, it reads why."""
        if self._stage is _OPEN:
            self._end(close_frame(CloseCode.SLOW_CONSUMER))
        else:
            self.abort()

    def abort(self) -> None:
        """Reset the connection, so that the kernel does not go on offering unsent bytes to a peer that takes none."""
        if self._stage is not Stage.GONE:
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            self.lose()

    def lose(self) -> None:
        """Close the socket and tell the link. Only from the reactor and its sweep. Idempotent."""
        if self._stage is Stage.GONE:
            return
        if self._stage is Stage.HANDSHAKE:
            self._server.handshakes_refused += 1
        self._stage = Stage.GONE
        reactor = self._reactor
        for deadlines in (reactor.shaking, reactor.closing, reactor.stuck, reactor.unfinished):
            deadlines.clear(self)
        reactor.connections.pop(self.fd, None)
        self._socket.close()
        self._held = self._rest = self._reader = self._outbox = None
        link, self._link = self._link, _NOBODY
        link.lost()


def _is_utf8(payload: bytes) -> bool:
    # Called only for payloads with a byte above 127; `isascii` has passed the others at a tenth of the cost.
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True
