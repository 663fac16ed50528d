"""WebSocket frames between bytes and messages, for everything that is not the epoll transport's fast path.

Sans-IO. `FrameReader` is the `websockets` library's state machine fed one whole frame at a time: it answers pings,
echoes closes, judges headers and reserved bits; around it stand what the library leaves to its user: joining
fragments, their caps, UTF-8 of text. `frame_length` finds the frame at the head of a buffer. Nothing here knows a
socket or a Trireme frame.
"""

from __future__ import annotations

import codecs
import logging
from typing import Final

import msgspec
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State

from protocol.errors import CloseCode

LIBRARY_LOG: Final = logging.Logger("gateway.websocket", logging.WARNING)  # noqa: LOG001 -- out of the reach of any configuration
"""What the library may write. At DEBUG it would write down every URL and frame, and so tokens (W-16) and bodies."""
_NEW_UTF8_CHECK: Final = codecs.getincrementaldecoder("utf-8")

PING_FRAME: Final = b"\x89\x00"
MAX_CONTROL_BYTES: Final = 125
"""RFC 6455 section 5.5."""


class FrameRefused(Exception):
    """A frame header that ends the connection with `code` before its payload is read."""

    def __init__(self, code: CloseCode) -> None:
        super().__init__(code.reason)
        self.code = code


class Message(msgspec.Struct, frozen=True, gc=False):
    """A whole data message of the right kind, checked UTF-8 where it is text."""

    payload: bytes


class Reply(msgspec.Struct, frozen=True, gc=False):
    """Write this frame (a pong)."""

    frame: bytes


class Shut(msgspec.Struct, frozen=True, gc=False):
    """The WebSocket is over: write this Close frame as the last one and read nothing more."""

    frame: bytes


def close_frame(code: CloseCode) -> bytes:
    """A server's Close frame with the reason of `code`."""
    body = code.to_bytes(2) + code.reason.encode()
    return bytes((0x88, len(body))) + body


def frame_length(buffer: bytes | bytearray, start: int, room: int) -> int:
    """The frame at `start`: its length in bytes where it is all there, else minus the bytes that must be there to go
    on.

    Two bytes of an unmasked frame are enough: the library refuses it from them. Raises FrameRefused where the header
    alone decides: longer than `room` (1009), a control frame above 125 bytes or a 64-bit length with its top bit set
    (1002).
    """
    available = len(buffer) - start
    if available < 2:
        return -2
    second = buffer[start + 1]
    if second < 128:
        return 2
    size = second & 127
    if buffer[start] & 8:
        if size > MAX_CONTROL_BYTES:
            raise FrameRefused(CloseCode.PROTOCOL_ERROR)
        return 6 + size if available >= 6 + size else -(6 + size)
    header = 2 if size < 126 else 4 if size == 126 else 10
    if available < header:
        return -header
    if header > 2:
        size = int.from_bytes(buffer[start + 2 : start + header])
        if size >> 63:
            raise FrameRefused(CloseCode.PROTOCOL_ERROR)
    if size > room:
        raise FrameRefused(CloseCode.TOO_LARGE)
    whole = header + 4 + size
    return whole if available >= whole else -whole


class _Library(Protocol):
    """`websockets`' state machine, except that a Close inside a fragmented message is a normal one (RFC 6455 section
    5.4)."""

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)


class FrameReader:
    """One connection's protocol state while it does anything unusual. While `idle` it holds nothing and may serve any
    connection."""

    __slots__ = ("_fragments", "_library", "_max_fragments", "_message", "_utf8", "max_message_bytes")

    def __init__(self, max_message_bytes: int, max_fragments: int) -> None:
        self.max_message_bytes = max_message_bytes
        self._max_fragments = max_fragments
        # `frame_length` has judged every size before the library sees a frame; the library would count a ping inside a
        # fragmented message against the message's limit, hence the extra room.
        room = max_message_bytes + MAX_CONTROL_BYTES
        self._library = _Library(Side.SERVER, state=State.OPEN, max_size=room, logger=LIBRARY_LOG)
        self._message: bytearray | None = None
        """What has come of a fragmented message."""
        self._fragments = 0
        self._utf8 = _NEW_UTF8_CHECK()

    @property
    def idle(self) -> bool:
        """No message under way and nothing wrong: the next frame may belong to somebody else."""
        return self._message is None and self._library.state is State.OPEN

    @property
    def room(self) -> int:
        """The longest payload the next frame may announce, in bytes."""
        return self.max_message_bytes - len(self._message) if self._message is not None else self.max_message_bytes

    def feed(self, frame: bytes | bytearray, binary: bool) -> Message | Reply | Shut | None:
        """What `frame_length` measured → what to do. `binary` is the kind of message this connection speaks.

        Nothing may be fed after a `Shut`.
        """
        self._library.receive_data(frame)
        message: Message | Shut | None = None
        for event in self._library.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                message = self._join(event, binary)
        written = self._library.data_to_send()
        if self._library.state is not State.OPEN:
            return message if isinstance(message, Shut) else Shut(written[0] if written else b"")
        return message or (Reply(b"".join(written)) if written else None)

    def refuse(self, code: CloseCode) -> Shut:
        """Fail the WebSocket from this side."""
        self._library.fail(code.value, code.reason)
        return Shut(self._library.data_to_send()[0])

    def _join(self, frame: Frame, binary: bool) -> Message | Shut | None:
        if frame.opcode is not Opcode.CONT and (frame.opcode is Opcode.BINARY) is not binary:
            return self.refuse(CloseCode.UNSUPPORTED_DATA)
        if not binary:
            try:
                self._utf8.decode(frame.data, frame.fin)
            except UnicodeDecodeError:
                return self.refuse(CloseCode.INVALID_TEXT)
        if frame.opcode is not Opcode.CONT and frame.fin:
            return Message(bytes(frame.data))
        if self._message is None:
            self._message = bytearray()
            self._fragments = 0
        self._fragments += 1
        if self._fragments > self._max_fragments:
            return self.refuse(CloseCode.TOO_LARGE)
        self._message += frame.data
        if not frame.fin:
            return None
        whole = bytes(self._message)
        self._message = None
        return Message(whole)


class FrameMeter:
    """Counts the frames of a byte stream as they pass to a library that has no caps of its own: sizes, fragments,
    control frames."""

    __slots__ = (
        "_control_frames",
        "_controls",
        "_controls_since",
        "_fragments",
        "_header",
        "_max_fragments",
        "_max_message_bytes",
        "_message_bytes",
        "_payload_left",
        "under_way_since",
    )

    def __init__(self, max_message_bytes: int, max_fragments: int, control_frames: int, now: float) -> None:
        self._max_message_bytes = max_message_bytes
        self._max_fragments = max_fragments
        self._control_frames = control_frames
        self._controls = 0
        self._controls_since = now
        self._header = b""
        self._payload_left = 0
        self._message_bytes = 0
        self._fragments = 0
        """Frames of the unfinished message so far; 0 between messages."""
        self.under_way_since: float | None = None
        """When the unfinished message or frame began."""

    def measure(self, data: bytes | bytearray, now: float) -> tuple[int, CloseCode | None]:
        """How many bytes of `data` may pass, and why the rest may not. Nothing may be measured after a refusal."""
        position = 0
        began = self.under_way_since
        while position < len(data):
            if self._payload_left:
                step = min(self._payload_left, len(data) - position)
                self._payload_left -= step
                position += step
                if not self._payload_left and not self._fragments:
                    began = None  # a message is whole: what follows it starts a clock of its own
            else:
                start = position
                known = len(self._header)
                self._header += data[position : position + 10 - known]
                size = _announced(self._header)
                if size is None:
                    position = len(data)
                    break
                header, payload = size
                position += header - known
                try:
                    self._enter(self._header[0], payload, now)
                except FrameRefused as refused:
                    return start, refused.code
                self._header = b""
                self._payload_left = payload + 4
        if not (self._header or self._payload_left or self._fragments):
            self.under_way_since = None
        else:
            self.under_way_since = now if began is None else began
        return position, None

    def _enter(self, first: int, payload: int, now: float) -> None:
        if first & 8:
            if payload > MAX_CONTROL_BYTES:
                raise FrameRefused(CloseCode.PROTOCOL_ERROR)
            if now - self._controls_since >= 1.0:
                self._controls_since = now
                self._controls = 0
            self._controls += 1
            if self._controls > self._control_frames:
                raise FrameRefused(CloseCode.POLICY)
            return
        if payload >> 63:
            raise FrameRefused(CloseCode.PROTOCOL_ERROR)
        self._message_bytes += payload
        self._fragments += 1
        if self._message_bytes > self._max_message_bytes or self._fragments > self._max_fragments:
            raise FrameRefused(CloseCode.TOO_LARGE)
        if first & 0x80:
            self._message_bytes = self._fragments = 0


def _announced(header: bytes) -> tuple[int, int] | None:
    """(Length of the header up to the mask, announced payload length) of a masked frame; None: not enough bytes.

    Raises nothing: an unmasked frame reads like a masked one here and is refused by the library.
    """
    if len(header) < 2:
        return None
    size = header[1] & 127
    if size < 126:
        return 2, size
    length = 4 if size == 126 else 10
    if len(header) < length:
        return None
    return length, int.from_bytes(header[2:length])
