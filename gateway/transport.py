"""The seam between a WebSocket transport and the hub, and the frame that is encoded once for all its recipients.

A transport (`epoll.py`, `trio_ws.py`) owns sockets, WebSocket framing and outboxes; it knows no Trireme frame. The
hub owns sessions; it knows no socket. They meet in the two protocols below, whose methods never await and so are
atomic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
import structlog
import trio

from gateway.arrivals import TrustedProxies
from protocol.codec import MAX_FRAME_BYTES, SUBPROTOCOL_JSON, FrameCodec, transcode_to_msgpack

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from gateway.buffers import Held, Outbox
    from protocol.errors import CloseCode

WEBSOCKET_PATH: Final = "/v1/ws"

NOBODY: Final = TrustedProxies("")

_log = structlog.get_logger()


class TransportLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Every number a transport obeys. Defaults are those of protocol.md; the gateway's settings may replace them."""

    max_message_bytes: int = MAX_FRAME_BYTES
    """Of one message, in one frame or many; beyond it 1009."""
    max_fragments: int = 1024
    """Frames of one message; beyond it 1009. Empty fragments cost the sender nothing, so bytes alone do not bound
    them."""
    control_frames: int = 20
    """Pings, pongs and closes per second; beyond it 1008."""
    max_head_bytes: int = 16 * 1024
    max_head_lines: int = 100
    held_bytes: int = 64 * 1024
    """Data frames kept while the link is blocked; beyond it the socket is not read."""
    outbox_bytes: int = 1024 * 1024
    outbox_frames: int = 256
    """Past either of these the link is told to stop; past twice of it the peer is cut off."""
    handshake_seconds: float = 5.0
    """From accept to the end of the handshake."""
    close_seconds: float = 2.0
    """From the start of a close to the end of the TCP connection."""
    stuck_seconds: float = 30.0
    """A peer that takes not one byte of a waiting outbox for so long is cut off."""
    message_seconds: float = 30.0
    """From the first byte of a message to its last; beyond it 4408."""
    ready_sockets: int = 128
    """Sockets served before other tasks run: 128 at about 15 us each are 2 ms."""
    accept_burst: int = 64
    unasked_subprotocol: str = SUBPROTOCOL_JSON
    """Spoken with a client that offers none of ours."""
    origins: frozenset[str] | None = None
    """Values of `Origin` that may connect; None: any. A client that sends none (no browser) is always welcome."""
    proxies: TrustedProxies = NOBODY
    """Whose `X-Forwarded-For` is believed."""


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
                self._binary_framed = framed(codec, transcode_to_msgpack(self.json))
            return self._binary_framed
        if self._text_framed is None:
            self._text_framed = framed(codec, self.json)
        return self._text_framed


def framed(codec: FrameCodec, payload: bytes) -> bytes:
    """A server's WebSocket frame around a whole message of the codec's kind."""
    first_byte = 0x82 if codec.binary else 0x81
    size = len(payload)
    if size < 126:
        return bytes((first_byte, size)) + payload
    if size < 65536:
        return bytes((first_byte, 126)) + size.to_bytes(2) + payload
    return bytes((first_byte, 127)) + size.to_bytes(8) + payload


class Transport(Protocol):
    """What the hub may ask of one connection's socket."""

    def send_nowait(self, outgoing: Outgoing) -> None:
        """Write now, or into the bounded outbox. Past the bound the transport calls `Link.overflowed` and drops
        nothing it took."""

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
        """True: hold further data frames back (at most 64 KiB of them, then stop reading); pings and closes are still
        served."""

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

    @property
    def status(self) -> int:
        """HTTP status code."""

    @property
    def content_type(self) -> str:
        """Value of `Content-Type`."""

    @property
    def body(self) -> bytes:
        """The whole body."""


class Host(Protocol):
    """The hub as a transport sees it."""

    def let_in(self, remote: str, now: float) -> float:
        """One more WebSocket of this address: 0.0, then `connected` or `gave_up` follows; or the seconds to wait."""

    def gave_up(self, remote: str) -> None:
        """The peer was let in and has gone before its handshake was over."""

    def connected(self, transport: Transport, codec: FrameCodec, remote: str, now: float) -> Link:
        """A WebSocket handshake succeeded."""

    def answer_http(self, path: str) -> HttpAnswer | None:
        """The answer to GET `path` where it is one of ours, None for 404."""


class Buffered(NamedTuple):
    """What the connections of a transport hold: in all, and the one that holds most."""

    outbox_bytes: int = 0
    greatest_outbox_bytes: int = 0
    greatest_outbox_frames: int = 0
    greatest_held_bytes: int = 0

    def and_of(self, outbox: Outbox | None, held: Held | None) -> Buffered:
        """With one more connection."""
        if outbox is None and held is None:
            return self
        size, frames = (outbox.size_bytes, len(outbox)) if outbox is not None else (0, 0)
        return Buffered(
            self.outbox_bytes + size,
            max(self.greatest_outbox_bytes, size),
            max(self.greatest_outbox_frames, frames),
            max(self.greatest_held_bytes, held.size_bytes if held is not None else 0),
        )


class TransportServer(ABC):
    """What the composition root, the timer role and the metrics know of a transport. The counters only grow."""

    def __init__(self, host: Host, limits: TransportLimits) -> None:
        self.host = host
        self.limits = limits
        self.accepted = 0
        """TCP connections taken."""
        self.handshakes_refused = 0
        """Connections that ended without a WebSocket or a health answer."""
        self.isolated_errors = 0
        """Bugs that ended one connection instead of the process; must stay 0."""
        self.bytes_in = 0
        self.bytes_out = 0
        self.frames_in = 0
        """Data messages from clients."""
        self.frames_out = 0
        """Data messages to clients."""

    def isolate(self, error: Exception, end: Callable[[], None]) -> None:
        """Contain a bug met while serving one connection: count it, log it, `end` that connection."""
        self.isolated_errors += 1
        _log.error("connection_isolated", exc_info=error)
        try:
            end()
        except Exception as second:  # noqa: BLE001 - the same boundary: the bug may show again while the connection is torn down
            self.isolated_errors += 1
            _log.error("connection_isolated", exc_info=second)

    @property
    @abstractmethod
    def connections(self) -> int:
        """Sockets in hand now, in any stage."""

    @property
    @abstractmethod
    def buffered(self) -> Buffered:
        """What they hold now; looks at each, so for whoever asks for metrics."""

    @abstractmethod
    async def serve(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept on `listener` and serve until cancelled; started once the listener is being watched.

        Resource handling: `listener` stays the caller's; every accepted socket is closed on the way out.
        Error handling: no client can make this raise.
        """

    @abstractmethod
    def stop_accepting(self) -> None:
        """Take no further connection; those in hand are served on. Atomic."""

    @abstractmethod
    def sweep(self, now: float) -> None:
        """End what is past its deadline. The timer role calls this once a second. Atomic."""

    @abstractmethod
    def close_all(self, code: CloseCode) -> None:
        """Start the close handshake of every connection. Atomic."""
