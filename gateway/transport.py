"""The seam between a WebSocket transport and the hub, and the frame that is encoded once for all its recipients.

A transport (`epoll.py`, `trio_ws.py`) owns sockets, WebSocket framing and outboxes; it knows no Trireme frame. The hub owns sessions; it
knows no socket. They meet in the two protocols below, whose methods never await and so are atomic.
"""

from __future__ import annotations

from typing import Protocol

from protocol.codec import FrameCodec, transcode_to_msgpack
from protocol.errors import CloseCode


class Outgoing:
    """One server frame on its way to any number of connections: encoded and framed at most once per codec.

    Server frames are not masked (RFC 6455 section 5.1), so the framed bytes are the same for every recipient.
    """

    __slots__ = ("_binary_framed", "_text_framed", "json")

    def __init__(self, json: bytes) -> None:
        self.json = json
        self._text_framed: bytes | None = None
        self._binary_framed: bytes | None = None

    def payload(self, codec: FrameCodec) -> bytes:
        """The bytes inside the WebSocket frame."""
        return transcode_to_msgpack(self.json) if codec.binary else self.json

    def framed(self, codec: FrameCodec) -> bytes:
        """The whole WebSocket frame: header and payload."""
        if codec.binary:
            if self._binary_framed is None:
                self._binary_framed = _frame(0x82, transcode_to_msgpack(self.json))
            return self._binary_framed
        if self._text_framed is None:
            self._text_framed = _frame(0x81, self.json)
        return self._text_framed


def _frame(first_byte: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((first_byte, size)) + payload
    if size < 65536:
        return bytes((first_byte, 126)) + size.to_bytes(2) + payload
    return bytes((first_byte, 127)) + size.to_bytes(8) + payload


class Transport(Protocol):
    """What the hub may ask of one connection's socket."""

    def send_nowait(self, outgoing: Outgoing) -> None:
        """Write now, or into the bounded outbox. Past the bound the transport calls `Link.overflowed` and drops nothing it took."""

    def ping_nowait(self) -> None:
        """Send a WebSocket ping."""

    def close_nowait(self, code: CloseCode) -> None:
        """Flush what is in the outbox, start the close handshake, abort after its deadline."""

    def resume_nowait(self) -> None:
        """`Link.blocked` has become False: hand over the frames that were held back and read the socket again."""


class Link(Protocol):
    """What a transport tells the hub about one connection. Implemented by `hub.Connection`."""

    @property
    def blocked(self) -> bool:
        """True: hold further data frames back (at most 64 KiB of them, then stop reading); pings and closes are still served."""

    def heard(self, now: float) -> None:
        """Bytes came from the peer."""

    def receive(self, payload: bytes | bytearray | memoryview, now: float) -> None:
        """One whole data message of the codec's kind. Only called while not `blocked`."""

    def overflowed(self) -> None:
        """The outbox is past its bound: no live frame will be sent until `drained`."""

    def drained(self, now: float) -> None:
        """The outbox has fallen below half its bound: more may be sent."""

    def lost(self) -> None:
        """The socket is gone; called exactly once."""


class HttpAnswer(Protocol):
    """What a plain HTTP request on the gateway's port gets (health, metrics)."""

    status: int
    content_type: str
    body: bytes


class Host(Protocol):
    """The hub as a transport sees it."""

    def connected(self, transport: Transport, codec: FrameCodec, remote: str, now: float) -> Link:
        """A WebSocket handshake succeeded."""

    def answer_http(self, path: str) -> HttpAnswer | None:
        """The answer to GET `path` where it is one of ours, None for 404."""
