"""One Redis connection, multiplexed: RESP3 over a plain non-blocking socket, many commands in flight, replies in order.

Called by `broker.py` and `subscriptions.py`. The hot path posts commands whose bytes are already packed and gets each
reply in a plain function call; the control plane awaits `call`. A writer task sends whatever was posted during one pass
of the scheduler in one system call, a reader task hands the replies to their slots in order. A cancelled `call` leaves
its slot behind as a tombstone, so no reply can ever reach another caller. This module knows no key and no record.
"""

from __future__ import annotations

import random
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import hiredis
import msgspec
import structlog
import trio

_log = structlog.get_logger(__name__)

CONNECT_SECONDS: Final = 2.0
"""From connect() to the end of the handshake."""
_BACKOFF_FIRST_SECONDS: Final = 0.05
_BACKOFF_CAP_SECONDS: Final = 2.0
"""A returned Redis is used again within 2 s; the cap of reliability.md section 11 (5 s) would miss the 5 s recovery
bound."""
_WATCH_SECONDS: Final = 0.25
_RECEIVE_BYTES: Final = 64 * 1024
MAX_UNSENT_BYTES: Final = 32 * 1024 * 1024
"""Bytes that wait for a writable socket: 500 messages of the greatest size; past it Redis takes less than comes in."""
_NOTHING: Final = object()

OnReply = Callable[[Any, Any], None]
"""Called as `on_reply(context, reply)`; `reply` is the value, a `hiredis.ReplyError`, or a `WireError` that failed the
command."""


class WireError(Exception):
    """A command got no answer."""


class WireLost(WireError):
    """There is no connection, or it broke before the answer came: the command may or may not have been executed."""


class WireFull(WireError):
    """Too many commands are outstanding: this one was not sent."""


class ReplyFailed(WireError):
    """Redis answered with an error."""


class Address(msgspec.Struct, frozen=True):
    """Where a Redis is, from a `redis://[user[:password]@]host[:port][/database]` URL."""

    host: str
    port: int
    username: str
    password: str
    database: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ValueError for anything but a `redis://` URL."""
        parts = urlsplit(url)
        if parts.scheme != "redis" or not parts.hostname:
            raise ValueError("expected redis://[user:password@]host[:port][/database]")
        database = parts.path.strip("/") or "0"
        if not database.isdecimal():
            raise ValueError("the database of a redis:// URL is a number")
        return cls(
            parts.hostname,
            parts.port or 6379,
            unquote(parts.username or ""),
            unquote(parts.password or ""),
            int(database),
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class _Waiter:
    """The slot of one `call`; `task` None marks a tombstone."""

    __slots__ = ("reply", "task")

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.task: trio.lowlevel.Task | None = task
        self.reply: Any = None


def _wake(waiter: _Waiter, reply: Any) -> None:
    if waiter.task is not None:
        waiter.reply = reply
        task, waiter.task = waiter.task, None
        trio.lowlevel.reschedule(task)


def is_out_of_memory(reply: object) -> bool:
    """Did Redis refuse a write because it is full (maxmemory, noeviction)?"""
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("OOM")


def pack(*args: str | bytes | int) -> bytes:
    """The bytes of one command."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub knows 1-tuples
    return packed


class Wire:
    """One connection that is kept up. Every public method but `run`, `call` and `wait_connected` never awaits."""

    def __init__(
        self,
        address: Address,
        name: str,
        *,
        max_outstanding: int,
        deadline_seconds: float,
        on_connected: Callable[[dict[str, str]], None] | None = None,
        on_push: Callable[[Sequence[Any]], None] | None = None,
    ) -> None:
        """`on_connected` gets the fields of INFO server and memory right after each handshake, before any other
        command; `on_push` what Redis says unasked. Neither may raise.

        `deadline_seconds` is the longest a command may wait for its answer: then the connection is given up.
        """
        self.name = name
        self.address = address
        self.connected = False
        self.posted = 0
        """Commands accepted since the start."""
        self.answered = 0
        """Commands whose slot is done, whatever the answer."""
        self.connects = 0
        self._max_outstanding = max_outstanding
        self._deadline_seconds = deadline_seconds
        self._on_connected = on_connected
        self._on_push = on_push
        self._slots: deque[tuple[OnReply | None, Any]] = deque()
        self._output: list[bytes] = []
        self._unsent_bytes = 0
        self._writer: trio.lowlevel.Task | None = None
        self._serving: trio.CancelScope | None = None
        self._lost_because = "not connected yet"
        self._up = trio.Event()

    @property
    def outstanding(self) -> int:
        """Commands that wait for their answer."""
        return len(self._slots)

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait for a writable socket."""
        return self._unsent_bytes

    # --- commands ----------------------------------------------------------------------------------------------------

    def post(self, packed: bytes, on_reply: OnReply | None, context: Any = None) -> None:
        """Send one packed command; its reply goes to `on_reply(context, reply)`, later and in order.

        Raises WireLost or WireFull at once, and then nothing was sent. Atomic: never awaits.
        """
        self._check_room()
        self._slots.append((on_reply, context))
        self.posted += 1
        self._send(packed)

    def tell(self, packed: bytes) -> None:
        """Send one packed command that is answered by pushes alone (SUBSCRIBE, UNSUBSCRIBE).

        Raises WireLost or WireFull at once, and then nothing was sent. Atomic: never awaits.
        """
        self._check_room()
        self._send(packed)

    def _check_room(self) -> None:
        if not self.connected:
            raise WireLost(self._lost_because)
        if len(self._slots) >= self._max_outstanding or self._unsent_bytes > MAX_UNSENT_BYTES:
            raise WireFull(f"{len(self._slots)} commands outstanding")

    def _send(self, packed: bytes) -> None:
        self._output.append(packed)
        self._unsent_bytes += len(packed)
        if self._writer is not None:
            task, self._writer = self._writer, None
            trio.lowlevel.reschedule(task)

    async def call(self, *args: str | bytes | int) -> Any:
        """Send one command and wait for its reply.

        *Raises* WireLost, WireFull, ReplyFailed. *Cancellation*: the command may still be executed; its reply is
        dropped.
        """
        waiter = _Waiter(trio.lowlevel.current_task())
        await trio.lowlevel.checkpoint_if_cancelled()
        self.post(pack(*args), _wake, waiter)

        def leave_tombstone(_raise_cancel: object) -> trio.lowlevel.Abort:
            waiter.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave_tombstone)
        reply = waiter.reply
        if isinstance(reply, hiredis.ReplyError):
            raise ReplyFailed(str(reply))
        if isinstance(reply, WireError):
            raise reply
        return reply

    async def wait_connected(self) -> None:
        """Return as soon as the connection is up."""
        while not self.connected:
            await self._up.wait()

    def abort(self, reason: str) -> None:
        """Give the connection up; `run` opens another."""
        if self._serving is not None and self.connected:
            self._lost_because = reason
            self._serving.cancel()

    # --- the connection ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a connection open, until cancelled. Waits with backoff and says once what it waits for."""
        delay = _BACKOFF_FIRST_SECONDS
        waiting = False
        while True:
            try:
                with trio.fail_after(CONNECT_SECONDS):
                    sock, reader, info = await self._open()
            except (OSError, WireError, trio.TooSlowError) as error:
                self._lost_because = f"cannot reach Redis at {self.address}"
                if not waiting:
                    waiting = True
                    reason = str(error) or type(error).__name__
                    _log.warning("waiting_for_redis", wire=self.name, address=str(self.address), reason=reason)
                await trio.sleep(delay * random.uniform(0.8, 1.2))
                delay = min(delay * 2, _BACKOFF_CAP_SECONDS)
                continue
            delay, waiting = _BACKOFF_FIRST_SECONDS, False
            _log.info("redis_connected", wire=self.name, address=str(self.address))
            try:
                await self._serve(sock, reader, info)
            finally:
                self._lose(sock)
            _log.warning("redis_lost", wire=self.name, address=str(self.address), reason=self._lost_because)

    async def _open(self) -> tuple[socket.socket, hiredis.Reader, dict[str, str]]:
        stream = await trio.open_tcp_stream(self.address.host, self.address.port)
        trio_socket = stream.socket
        trio_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = socket.socket(trio_socket.family, trio_socket.type, trio_socket.proto, trio_socket.detach())
        sock.setblocking(False)
        try:
            reader = hiredis.Reader(notEnoughData=_NOTHING)
            hello: list[str | bytes | int] = ["HELLO", "3"]
            if self.address.password:
                hello += ["AUTH", self.address.username or "default", self.address.password]
            hello += ["SETNAME", f"trireme-{self.name}"]
            commands = pack(*hello) + pack("SELECT", self.address.database) + pack("INFO", "server", "memory")
            replies = await _exchange(sock, reader, commands, 3)
            return sock, reader, _info_fields(replies[2])
        except BaseException:
            sock.close()
            raise

    async def _serve(self, sock: socket.socket, reader: hiredis.Reader, info: dict[str, str]) -> None:
        self.connected = True
        self.connects += 1
        async with trio.open_nursery() as nursery:
            self._serving = nursery.cancel_scope
            if self._on_connected is not None:
                self._on_connected(info)
            self._up.set()
            nursery.start_soon(self._write, sock, name=f"wire-{self.name}-writer")
            nursery.start_soon(self._read, sock, reader, name=f"wire-{self.name}-reader")
            nursery.start_soon(self._watch, name=f"wire-{self.name}-watch")

    def _lose(self, sock: socket.socket) -> None:
        """The connection is over: every outstanding slot fails, in order."""
        self.connected = False
        self._serving = None
        self._up = trio.Event()
        trio.lowlevel.notify_closing(sock)
        sock.close()
        self._output.clear()
        self._unsent_bytes = 0
        slots, self._slots = self._slots, deque()
        for on_reply, context in slots:
            self.answered += 1
            if on_reply is not None:
                on_reply(context, WireLost(self._lost_because))

    async def _write(self, sock: socket.socket) -> None:
        def forget_writer(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        while True:
            if not self._output:
                self._writer = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(forget_writer)
            output, self._output = self._output, []
            rest = memoryview(b"".join(output) if len(output) > 1 else output[0])
            while rest:
                try:
                    sent = sock.send(rest)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(sock)
                except OSError as error:
                    return self.abort(f"send: {error}")
                else:
                    self._unsent_bytes -= sent
                    rest = rest[sent:]

    async def _read(self, sock: socket.socket, reader: hiredis.Reader) -> None:
        feed, gets = reader.feed, reader.gets
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                received = sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                return self.abort(f"receive: {error}")
            if not received:
                return self.abort("closed by Redis")
            try:
                feed(received)
                while (reply := gets()) is not _NOTHING:
                    if type(reply) is hiredis.PushNotification:
                        if self._on_push is not None:
                            self._on_push(reply)
                        continue
                    if not self._slots:
                        return self.abort("an answer nobody asked for")
                    self.answered += 1
                    on_reply, context = self._slots.popleft()
                    if on_reply is not None:
                        on_reply(context, reply)
            except hiredis.ProtocolError as error:
                return self.abort(f"not RESP3: {error}")

    async def _watch(self) -> None:
        """Give up when the oldest command is older than the deadline. Reads the clock here, not once per command."""
        marks: deque[tuple[float, int]] = deque()
        previous = trio.current_time()
        while True:
            now = trio.current_time()
            if now - previous > self._deadline_seconds / 2:
                marks.clear()  # this process stood still, not Redis: its answers may lie in the socket
            previous = now
            marks.append((now, self.posted))
            due = None
            while marks and marks[0][0] <= now + _WATCH_SECONDS - self._deadline_seconds:
                due = marks.popleft()[1]
            if due is not None and self.answered < due:
                return self.abort(f"no answer within {self._deadline_seconds:g} s")
            await trio.sleep(_WATCH_SECONDS)


async def _exchange(sock: socket.socket, reader: hiredis.Reader, commands: bytes, count: int) -> list[Any]:
    """Send a few commands on a connection nobody else uses yet and collect their replies. Raises WireError."""
    await trio.lowlevel.wait_writable(sock)
    if sock.send(commands) != len(commands):
        raise WireLost("the handshake did not fit into the socket")
    replies: list[Any] = []
    while len(replies) < count:
        await trio.lowlevel.wait_readable(sock)
        received = sock.recv(_RECEIVE_BYTES)
        if not received:
            raise WireLost("closed by Redis")
        reader.feed(received)
        while (reply := reader.gets()) is not _NOTHING:
            if isinstance(reply, hiredis.ReplyError):
                raise ReplyFailed(str(reply))
            replies.append(reply)
    return replies


def _info_fields(reply: Any) -> dict[str, str]:
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
