"""One phone of the crowd: the sans-IO client on picows, so that one process can carry hundreds that say a lot.

What `bench.phone` is to the replay. It reconnects with jitter to another gateway, resumes, sends again what has no ack,
follows a `migration` before it leaves, and takes a line on which nothing comes any more for dead after 10 s.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import picows

from bench.client import Client, Habits, State
from protocol.codec import JSON, SUBPROTOCOL_JSON
from protocol.errors import AuthErrorCode
from protocol.frames import AuthSuccess, Migration

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from bench import journal
    from protocol.frames import ClientFrame, ServerFrame

OPEN_SECONDS: Final = 5.0
IDLE_SECONDS: Final = 5.0
"""Silence after which the phone pings, and again so long until it gives the line up."""
LEAVE_SECONDS: Final = 0.5
FIRST_BACKOFF_SECONDS: Final = 0.3
LAST_BACKOFF_SECONDS: Final = 3.0
"""reliability.md, F-G1: clients come back with a jitter of 0.5 to 3 s."""
READ_BUFFER_BYTES: Final = 8192
MAX_SERVER_FRAME_BYTES: Final = 100 * 65536
NO_CLOSE_FRAME: Final = 1006
_RETRIED_AUTH: Final = frozenset((AuthErrorCode.DRAINING, AuthErrorCode.SERVER_BUSY, AuthErrorCode.RATE_LIMITED))
_HABITS: Final = Habits()


class Line(picows.WSListener):
    """One WebSocket of a handset. `session_token`: it takes over from the one before."""

    def __init__(self, handset: Handset, url: str, session_token: str) -> None:
        super().__init__()
        self.handset = handset
        self.url = url
        self.session_token = session_token
        self.number = 0
        """Which connection of the client it is; 0 until it is one."""
        self.code = NO_CLOSE_FRAME
        self.transport: Any = None
        self.over = anyio.Event()

    def write(self, frames: Sequence[ClientFrame]) -> None:
        """In order. A line that is gone swallows them: what has no ack goes again."""
        transport = self.transport
        if transport is None or self.over.is_set():
            return
        for frame in frames:
            transport.send(picows.WSMsgType.TEXT, JSON.encode(frame))

    def end(self) -> None:
        if self.transport is not None:
            self.transport.disconnect(False)

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        self.handset.line_opened(self)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            self.code = frame.get_close_code().value
            transport.disconnect()
            return
        if frame.msg_type == picows.WSMsgType.TEXT:
            self.handset.heard(self, JSON.decode_server(frame.get_payload_as_bytes()))

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.over.set()
        self.handset.line_lost(self)


class Handset:
    """One device of one user. `run` it in a task group until cancelled."""

    def __init__(
        self,
        urls: Sequence[str],
        user_id: str,
        device_id: str,
        token: str,
        record: journal.Journal,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        call_later: Callable[[float, Callable[[], None]], object],
        seed: int,
    ) -> None:
        self.client = Client(user_id, device_id, token, record, _HABITS)
        self.refused: list[str] = []
        """Why the server would not have it; it has stopped then."""
        self._urls = list(urls)
        self._spawn = spawn
        self._call_later = call_later
        self._random = random.Random(f"{seed}:{user_id}")
        self._line: Line | None = None
        self._next: Line | None = None
        """Where it is moving to."""
        self._tried = ""

    @property
    def online(self) -> bool:
        return self.client.state is State.LIVE

    def say(self, conversation_id: str, content: str, receiver_id: str) -> str:
        """Send, or keep for later. Returns the idempotency key."""
        key, out = self.client.send(
            conversation_id, content, now=time.monotonic(), wall_ms=wall_ms(), receiver_id=receiver_id
        )
        self._write(out)
        return key

    def sync(self) -> None:
        """Ask for what is missing and for the digests."""
        self._write(self.client.sync(time.monotonic()))

    def tick(self, now: float) -> None:
        """Whatever is due by now."""
        if now >= self.client.deadline():
            self._write(self.client.tick(now, wall_ms()))

    def hang_up(self) -> None:
        if self._line is not None:
            self._line.end()

    def _write(self, frames: Sequence[ClientFrame]) -> None:
        if frames and self._line is not None:
            self._line.write(frames)

    # --- lines -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and connect again, until the server says never (`refused`)."""
        backoff = FIRST_BACKOFF_SECONDS
        while not self.refused:
            others = [url for url in self._urls if url != self._tried]
            self._tried = self._random.choice(others or self._urls)
            connections = self.client.connection
            line = Line(self, self._tried, "")
            await _open(line)
            current: Line | None = line
            while current is not None and current.transport is not None:  # it may have moved on to another one
                await current.over.wait()
                current = self._line
            if self.client.connection > connections and not self.client.auth_error:
                backoff = FIRST_BACKOFF_SECONDS
            self._check_refusal()
            await anyio.sleep(backoff * self._random.uniform(0.5, 1.5))
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)

    def _check_refusal(self) -> None:
        refusal = self.client.auth_error
        if refusal is not None and refusal.error not in _RETRIED_AUTH:
            self.refused.append(f"{self.client.user_id}: {refusal.error.value}")

    def line_opened(self, line: Line) -> None:
        """The handshake is done: authenticate."""
        now = time.monotonic()
        if line is self._next:
            line.write(self.client.migrating(line.session_token, now))
            return
        if line.session_token:  # too late: what it would have taken over from is gone
            line.end()
            return
        self._line = line
        line.write(self.client.opened(now))
        line.number = self.client.connection

    def line_lost(self, line: Line) -> None:
        """Only the end of the one it speaks on is an event. It ends a move that has not been done by then too."""
        if line is self._next:
            self._next = None
        if line is self._line:
            self._line = None
            if self._next is not None:
                self._next.end()
                self._next = None
            self.client.closed(line.code, time.monotonic())

    def heard(self, line: Line, frame: ServerFrame) -> None:
        """One frame on one of its lines."""
        now = time.monotonic()
        if line is self._line:
            out = self.client.receive(frame, now, wall_ms())
            if isinstance(frame, Migration) and self._next is None:
                payload = frame.payload
                self._next = Line(self, payload.new_endpoint, payload.session_token)
                self._spawn(_open(self._next))
            if out:
                line.write(out)
        elif line is self._next:
            if isinstance(frame, AuthSuccess):
                self._take_over(line, frame, now)
        elif line.number:
            self._write(self.client.receive_late(frame, line.number, now, wall_ms()))

    def _take_over(self, line: Line, success: AuthSuccess, now: float) -> None:
        before, self._line, self._next = self._line, line, None
        out = self.client.migrated(success, now)
        line.number = self.client.connection
        line.write(out)
        if before is not None:
            self._call_later(LEAVE_SECONDS, before.end)


async def _open(line: Line) -> None:
    """The handshake; where it fails the line stays without a transport."""
    try:
        await picows.ws_connect(
            lambda: line,
            line.url,
            extra_headers={"Sec-WebSocket-Protocol": SUBPROTOCOL_JSON},
            read_buffer_init_size=READ_BUFFER_BYTES,
            max_frame_size=MAX_SERVER_FRAME_BYTES,
            websocket_handshake_timeout=OPEN_SECONDS,
            enable_auto_ping=True,
            auto_ping_idle_timeout=IDLE_SECONDS,
            auto_ping_reply_timeout=IDLE_SECONDS,
            logger_name=None,
        )
    except (OSError, TimeoutError, picows.WSError):
        if line.session_token:
            line.handset.line_lost(line)


def wall_ms() -> int:
    """The clock a phone shows: epoch milliseconds. The one place of this process that reads it."""
    return time.time_ns() // 1_000_000
