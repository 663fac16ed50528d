"""One simulated phone: the sans-IO client on a trio-websocket connection that breaks, comes back, can be switched off.

Called by the replay and the system tests. All behaviour of the protocol is in `client.py`; this file owns the socket,
the clock and who waits for what.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec
import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, wrap_client_stream

from bench import journal
from bench.client import Client, Habits, State
from protocol.codec import JSON, MAX_FRAME_BYTES, SUBPROTOCOL_JSON
from protocol.errors import AuthErrorCode, CloseCode, Reconnect
from protocol.frames import AuthSuccess, Migration, Typing, TypingPayload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from protocol.frames import ClientFrame, DeleteScope, ReactionOp, ServerFrame, TypingState

OPEN_SECONDS: Final = 15.0
WRITE_SECONDS: Final = 5.0
LEAVE_SECONDS: Final = 0.5
"""How long a phone still listens on the line it has migrated from; the draining gateway waits for it, up to 2 s."""
ALONE_SECONDS: Final = 1.5
"""How long a migration may still take when the line it leaves has ended."""
FIRST_BACKOFF_SECONDS: Final = 0.2
LAST_BACKOFF_SECONDS: Final = 5.0
QUEUED_FRAMES: Final = 32
"""What trio-websocket reads ahead; its default of 1 costs two task switches per frame."""
MAX_SERVER_FRAME_BYTES: Final = 100 * MAX_FRAME_BYTES
"""A page holds up to 100 messages, each of which may fill a frame of its own."""
_RETRIED_AUTH: Final = frozenset((AuthErrorCode.DRAINING, AuthErrorCode.SERVER_BUSY, AuthErrorCode.RATE_LIMITED))
_NEVER_AGAIN: Final = frozenset(
    int(code) for code in CloseCode if code.reconnect is Reconnect.NO and code is not CloseCode.NORMAL
)


class PhoneError(Exception):
    """The server will not have this phone: a bad token, say. Reconnecting would not help."""


class FrameCache:
    """Decoded `messages` frames by their text: in a group many phones of this process get the very same bytes."""

    def __init__(self, limit: int = 512) -> None:
        self._limit = limit
        self._frames: OrderedDict[str, ServerFrame] = OrderedDict()

    def decode(self, text: str) -> ServerFrame:
        """Raises msgspec.DecodeError."""
        if not text.startswith('{"type":"messages"'):
            return JSON.decode_server(text)
        frame = self._frames.get(text)
        if frame is None:
            frame = self._frames[text] = JSON.decode_server(text)
            if len(self._frames) > self._limit:
                self._frames.popitem(last=False)
        return frame


class Settled(msgspec.Struct, frozen=True):
    """What became of a send: acked with its message id and sequence, or refused with a code."""

    message_id: str = ""
    sequence_number: int = 0
    code: str = ""


class Line:
    """One WebSocket of a phone: the one it speaks on, one it is about to move to, or one it has left."""

    __slots__ = ("closed", "leaving", "number", "socket", "url")

    def __init__(self, url: str, socket: WebSocketConnection) -> None:
        self.url = url
        self.socket = socket
        self.number = 0
        """Which connection of the client it is."""
        self.closed = trio.Event()
        self.leaving = trio.Event()
        """Not set while somebody hangs up."""
        self.leaving.set()


class Phone:
    """One device. `run` it in a nursery; it is online until `go_offline`, and again after `go_online`."""

    def __init__(
        self,
        urls: Sequence[str],
        user_id: str,
        device_id: str,
        token: str,
        record: journal.Journal,
        *,
        habits: Habits | None = None,
        cache: FrameCache | None = None,
        seed: int = 0,
    ) -> None:
        self.client = Client(user_id, device_id, token, self._note, habits)
        self._urls = list(urls)
        self._record = record
        self._cache = cache or FrameCache()
        self._random = random.Random(f"{seed}:{user_id}:{device_id}")
        self._line: Line | None = None
        """The one it speaks on."""
        self._lines: set[Line] = set()
        self._moving = trio.CancelScope()
        self._gave_up_at = float("-inf")
        """When a second line ended before it was in: its gateway may let it in late and take the device from us."""
        self._tried = ""
        self._code = 1006
        self._writing = trio.Lock()
        self._wanted = trio.Event()
        self._wanted.set()
        self._watchers: list[tuple[Callable[[], bool], trio.Event]] = []
        self._waiting: dict[str, list[Callable[[Settled], None]]] = {}
        self._reader_scope: trio.CancelScope | None = None

    # --- for the owner of the phone ----------------------------------------------------------------------------------

    @property
    def online(self) -> bool:
        return self.client.state is State.LIVE

    @property
    def wanted(self) -> bool:
        """Switched on, whether connected at the moment or not."""
        return self._wanted.is_set()

    def go_online(self) -> None:
        self._wanted.set()

    async def go_offline(self) -> None:
        """Close the connection; sends are kept until the phone is online again."""
        self._wanted = trio.Event()
        self._moving.cancel()
        for line in list(self._lines):
            await _hang_up(line)

    @property
    def url(self) -> str:
        """Where it is connected; empty while it is not."""
        return "" if self._line is None else self._line.url

    async def send_nowait(
        self, conversation_id: str, content: str, *, receiver_id: str = "", reply_to_message_id: str | None = None
    ) -> str:
        """Send, or keep for later while offline. Returns the idempotency key without waiting for the ack."""
        key, out = self.client.send(
            conversation_id,
            content,
            now=trio.current_time(),
            wall_ms=wall_ms(),
            receiver_id=receiver_id,
            reply_to_message_id=reply_to_message_id,
        )
        await self._write(out)
        return key

    async def send(
        self, conversation_id: str, content: str, *, receiver_id: str = "", reply_to_message_id: str | None = None
    ) -> Settled:
        """Send and wait, across reconnects, until the server says what became of it."""
        key = await self.send_nowait(
            conversation_id, content, receiver_id=receiver_id, reply_to_message_id=reply_to_message_id
        )
        return await self.settled(key)

    async def edit_nowait(self, conversation_id: str, message_id: str, content: str) -> str:
        """Change one's own message; returns its key as `send_nowait` does, wait for it with `settled`."""
        key, out = self.client.edit(conversation_id, message_id, content, trio.current_time())
        await self._write(out)
        return key

    async def delete_nowait(self, conversation_id: str, message_id: str, scope: DeleteScope) -> str:
        """Delete a message, for everybody or for oneself."""
        key, out = self.client.delete(conversation_id, message_id, scope, trio.current_time())
        await self._write(out)
        return key

    async def react_nowait(self, conversation_id: str, message_id: str, emoji: str, op: ReactionOp) -> str:
        """React to a message, or take a reaction back."""
        key, out = self.client.react(conversation_id, message_id, emoji, op, trio.current_time())
        await self._write(out)
        return key

    async def typing(self, conversation_id: str, state: TypingState) -> None:
        """Say that the user writes, or has stopped."""
        await self._write([Typing(payload=TypingPayload(conversation_id=conversation_id, state=state))])

    async def settled(self, key: str) -> Settled:
        """Wait for the fate of a key of `send_nowait` that is still pending."""
        done = trio.Event()
        answers: list[Settled] = []

        def settle(answer: Settled) -> None:
            answers.append(answer)
            done.set()

        self._waiting.setdefault(key, []).append(settle)
        await done.wait()
        return answers[0]

    def when_settled(self, key: str, call: Callable[[Settled], None]) -> None:
        """Call back, once and without waiting, when the fate of this key is known."""
        self._waiting.setdefault(key, []).append(call)

    async def read(self, conversation_id: str) -> None:
        """Mark everything held of this conversation as read."""
        await self._write(self.client.read(conversation_id, trio.current_time(), wall_ms()))

    async def sync(self) -> None:
        """Ask for whatever is missing; wait for `sync_complete` with `wait_until(lambda: phone.client.synced)`."""
        await self._write(self.client.sync(trio.current_time()))

    async def write(self, frames: Sequence[ClientFrame]) -> None:
        """Any other frames, as they are."""
        await self._write(frames)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; looked at after everything that comes in. Bound it with a timeout."""
        if condition():
            return
        watcher = (condition, trio.Event())
        self._watchers.append(watcher)
        try:
            await watcher[1].wait()
        finally:
            self._watchers.remove(watcher)

    async def wait_online(self) -> None:
        """Until the server has let this phone in and its backlog has come."""
        await self.wait_until(lambda: self.online and self.client.synced)

    # --- the connection ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and connect again with jitter, until cancelled. Raises PhoneError when the server says never."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            await self._wanted.wait()
            code = await self._connect_once()
            if not self._wanted.is_set():
                backoff = FIRST_BACKOFF_SECONDS
                continue
            self._check_fate(code)
            if self.client.connection and code in (CloseCode.RESTART, CloseCode.GOING_AWAY):
                backoff = FIRST_BACKOFF_SECONDS
            await trio.sleep(backoff * self._random.uniform(0.5, 1.5))
            backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)

    def _check_fate(self, code: int) -> None:
        refusal = self.client.auth_error
        if refusal is not None and refusal.error not in _RETRIED_AUTH:
            raise PhoneError(f"{self.client.user_id}: {refusal.error.value}")
        if code == CloseCode.REPLACED and trio.current_time() - self._gave_up_at < OPEN_SECONDS:
            return
        if refusal is None and code in _NEVER_AGAIN:
            raise PhoneError(f"{self.client.user_id}: closed with {code}")

    async def _connect_once(self) -> int:
        """One connection, and those it moves to, until the last has closed. Returns its close code; 1006 without a
        close frame."""
        others = [url for url in self._urls if url != self._tried]
        self._tried = self._random.choice(others or self._urls)
        self._code = 1006
        async with trio.open_nursery() as lines:
            await self._open(lines, self._tried, "")
        return self._code

    async def _open(self, lines: trio.Nursery, url: str, session_token: str) -> None:
        """One line to the end. Where nobody is there, or somebody else, the caller tries again."""
        try:
            await self._serve(lines, url, session_token)
        except (OSError, HandshakeError, trio.TooSlowError):
            pass
        except BaseExceptionGroup as group:
            if group.split((OSError, HandshakeError, trio.TooSlowError))[1] is not None:
                raise

    async def _serve(self, lines: trio.Nursery, url: str, session_token: str) -> None:
        """One line from its handshake to its close. With a session token it takes over from the one before."""
        async with trio.open_nursery() as nursery:
            with trio.fail_after(OPEN_SECONDS) as opening:
                if session_token:
                    self._moving = opening
                stream = await open_stream(url)
                try:
                    line = Line(url, await open_websocket(nursery, stream, url, SUBPROTOCOL_JSON))
                except BaseException:
                    await trio.aclose_forcefully(stream)
                    raise
            self._lines.add(line)
            code = 1006
            try:
                if session_token:
                    await self._take_over(lines, line, session_token)
                else:
                    self._line = line
                    opening_frames = self.client.opened(trio.current_time())
                    line.number = self.client.connection
                    await self._write(opening_frames)
                await self._read(lines, line)
            except ConnectionClosed as error:
                code = int(error.reason.code) if error.reason is not None else 1006
                await line.leaving.wait()  # the close handshake needs the tasks of this nursery
            finally:
                self._lose(line, code)
                nursery.cancel_scope.cancel()
                await trio.aclose_forcefully(stream)

    async def _take_over(self, lines: trio.Nursery, line: Line, session_token: str) -> None:
        """Authenticate on a second line while the first goes on; then speak on this one, and hang up the other.

        Raises ConnectionClosed, TooSlowError: the first line goes on as if nothing had been.
        """
        with trio.fail_after(OPEN_SECONDS) as self._moving:
            for frame in self.client.migrating(session_token, trio.current_time()):
                await line.socket.send_message(JSON.encode(frame).decode())
            while not isinstance(success := JSON.decode_server(await line.socket.get_message()), AuthSuccess):
                pass
        async with self._writing:  # not between the frames of somebody who writes on the first
            before, self._line = self._line, line
            out = self.client.migrated(success, trio.current_time())
            line.number = self.client.connection
        if before is not None:
            lines.start_soon(_leave, before)
        await self._write(out)
        self._notify()

    def _lose(self, line: Line, code: int) -> None:
        """A line has ended. Only the end of the one we speak on is an event."""
        self._lines.discard(line)
        line.closed.set()
        if line.number == 0:
            self._gave_up_at = trio.current_time()
        if line is self._line:
            self._line = None
            self._code = code
            self._moving.deadline = min(self._moving.deadline, trio.current_time() + ALONE_SECONDS)
            self.client.closed(code, trio.current_time())
            self._notify()

    async def _read(self, lines: trio.Nursery, line: Line) -> None:
        client = self.client
        while True:
            is_ours = line is self._line
            deadline = client.deadline() if is_ours else float("inf")
            with trio.CancelScope(deadline=deadline) as scope:
                if is_ours:
                    self._reader_scope = scope
                while True:
                    frame = self._cache.decode(str(await line.socket.get_message()))
                    if line is self._line:
                        out = client.receive(frame, trio.current_time(), wall_ms())
                        if isinstance(frame, Migration):
                            payload = frame.payload
                            lines.start_soon(self._open, lines, payload.new_endpoint, payload.session_token)
                    else:
                        out = client.receive_late(frame, line.number, trio.current_time(), wall_ms())
                    if out:
                        await self._write(out)
                    if self._watchers:
                        self._notify()
                    due = client.deadline() if line is self._line else float("inf")
                    if due != deadline:  # most frames change nothing, and moving a deadline costs more than asking
                        deadline = scope.deadline = due
            await self._write(client.tick(trio.current_time(), wall_ms()))

    async def _write(self, frames: Sequence[ClientFrame]) -> None:
        """Write in order. A write that cannot finish ends the connection: half a frame would garble what follows."""
        if not frames:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + WRITE_SECONDS) as scope:
            async with self._writing:
                line = self._line
                if line is None:
                    return  # the client sends again what has no ack
                try:
                    for frame in frames:
                        await line.socket.send_message(JSON.encode(frame).decode())
                except ConnectionClosed:
                    return  # the reader sees it too
        if scope.cancelled_caught and self._line is not None:
            await self._line.socket.aclose()
        if self._reader_scope is not None:
            self._reader_scope.deadline = min(self._reader_scope.deadline, self.client.deadline())

    def _note(self, event: journal.Event) -> None:
        self._record(event)
        if isinstance(event, journal.Acked):
            self._settle(event.idempotency_key, Settled(event.message_id, event.sequence_number))
        elif isinstance(event, journal.Refused) and event.idempotency_key is not None and not event.retryable:
            self._settle(event.idempotency_key, Settled(code=event.code.value))

    def _settle(self, key: str, answer: Settled) -> None:
        for call in self._waiting.pop(key, ()):
            call(answer)

    def _notify(self) -> None:
        for condition, event in self._watchers:
            if condition():
                event.set()


async def _hang_up(line: Line) -> None:
    line.leaving = trio.Event()
    try:
        with trio.move_on_after(WRITE_SECONDS):
            await line.socket.aclose()
    finally:
        line.leaving.set()


async def _leave(line: Line) -> None:
    """The server ends what was left; where it does not, we do."""
    with trio.move_on_after(LEAVE_SECONDS):
        await line.closed.wait()
        return
    await _hang_up(line)


async def open_stream(url: str) -> trio.SocketStream:
    """A TCP connection to the host of this `ws://` address. Whoever opens it closes it: trio-websocket forgets to where
    its handshake fails."""
    address = urlsplit(url)
    return await trio.open_tcp_stream(address.hostname or "", address.port or 80)


async def open_websocket(
    nursery: trio.Nursery, stream: trio.SocketStream, url: str, subprotocol: str
) -> WebSocketConnection:
    """The WebSocket handshake on a stream of `open_stream`. Raises HandshakeError."""
    address = urlsplit(url)
    return await wrap_client_stream(
        nursery,
        stream,
        address.netloc,
        address.path,
        subprotocols=[subprotocol],
        message_queue_size=QUEUED_FRAMES,
        max_message_size=MAX_SERVER_FRAME_BYTES,
    )


def wall_ms() -> int:
    """The clock a phone shows: epoch milliseconds. The one place of the simulated clients that reads it."""
    return time.time_ns() // 1_000_000
