"""The lean load driver: `python -m bench.driver`, picows on uvloop, many connections in one process.

Started by `load` and `gateway_cost`, which write one command per line (JSON) to its standard input, read one answer per
line from its standard output, and may read its CPU time between the two. Checks every message (`tally`). It never
retries: a refused message is a violation, since the bench sets the limits out of the way.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import msgspec
import picows

from bench import templates
from bench.driver_history import ConnectionHistory, DriverHistory
from bench.echo import EchoConnect, EchoLoad, EchoRun
from bench.phases import Closed, Flood, Paced, Phase, PhaseCommand, Rounds, Settle
from bench.tally import COUNTS, MARK_DIGITS, NO_MARK, Log, Reader, Violations, check_all
from protocol import frames
from protocol.codec import FRAME_CODECS, FrameCodec
from protocol.errors import ErrorCode
from protocol.models import SYSTEM_SENDER

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTING_AT_ONCE = 64
"""Connections between their handshake and the end of their backlog: a load is no reconnect storm."""
AMBIENT_STEP_SECONDS = 0.05
AMBIENT_SECONDS = 120.0
"""Longest wait for the answers to new subscriptions."""
TYPING_SECONDS = 3.0
"""As often as a gateway passes it on."""
STALLED_BUFFER_BYTES = 4096
READING_BUFFER_BYTES = 1024 * 1024
"""What the kernel keeps for a connection that is stalled, and for one that reads again."""
READ_BUFFER_BYTES = 4096
"""picows' own default of 16 KiB would cost 160 MB at 10,000 connections."""


class Member(msgspec.Struct):
    """One connection to make: a user with a device in the conversation with this place in `Connect.conversations`."""

    conversation: int
    user_id: str
    device_id: str
    token: str
    receiver_id: str
    sends: bool
    is_noise: bool = False
    """What it sends is checked like everything else, but how long that takes is nobody's figure."""


class Connect(msgspec.Struct, tag="connect", tag_field="do"):
    """Connect and authenticate all members, more of them each time it is given; answers when every backlog has come."""

    urls: list[str]
    """The gateways; members take them in turn, so that the two of a pair are at different ones."""
    subprotocol: str
    conversations: list[str]
    members: list[Member]
    content_bytes: int = 120
    ack_every: int = 20
    ack_after_seconds: float = 0.2
    receipts: bool = True
    """Every message must be receipted; False: receipts are only checked for going backwards."""
    history: str = ""
    """File for the auditor's events; "": none."""
    timeout_seconds: float = 60.0


class Ambient(msgspec.Struct, tag="ambient", tag_field="do"):
    """What clients do beside messages, from now on. Answers with what came of it since the last time."""

    heartbeat_seconds: float = 0.0
    """Between two heartbeats of a connection; 0: none."""
    social: bool = False
    """Each watches the other of its conversation, and types before it sends, once per `TYPING_SECONDS`."""


class Stall(msgspec.Struct, tag="stall", tag_field="do"):
    """These connections, by the order they were made in, take nothing from their sockets any more, or do again."""

    connections: list[int]
    stalled: bool


class Check(msgspec.Struct, tag="check", tag_field="do"):
    """The final verdict over everything since the first `connect`."""


class Quit(msgspec.Struct, tag="quit", tag_field="do"):
    """Close all connections and end."""


Command = Connect | Ambient | Closed | Paced | Flood | Rounds | Settle | Stall | Check | Quit | EchoConnect | EchoRun


class Connection(picows.WSListener):
    """One member's connection: authenticates, then checks all that comes and acknowledges what is delivered."""

    def __init__(self, load: Load, reader: Reader, member: Member, command: Connect, codec: FrameCodec) -> None:
        super().__init__()
        self.reader = reader
        self.sends = member.sends
        self.is_noise = member.is_noise
        self.in_flight = 0
        self.transport: Any = None
        self.ready = anyio.Event()
        self._load = load
        self._member = member
        self._codec = codec
        self._kind = picows.WSMsgType.BINARY if codec.binary else picows.WSMsgType.TEXT
        self._decode = templates.lean_decoder(codec)
        now_ms = _wall_ms()
        self._message = templates.message_template(
            codec, reader.log.conversation_id, member.receiver_id, command.content_bytes, load.run, now_ms
        )
        self._delivery_ack = templates.delivery_ack_template(codec, now_ms)
        self._heartbeat = codec.encode(frames.Heartbeat(timestamp=now_ms))
        self._typing = codec.encode(
            frames.Typing(
                payload=frames.TypingPayload(conversation_id=reader.log.conversation_id, state=frames.TypingState.START)
            )
        )
        self.types_at = float("inf")
        """When the next message is announced by typing."""
        self._ack_every = command.ack_every
        self._ack_after_seconds = command.ack_after_seconds
        self._unacked = 0
        self._newest_id = ""
        self._newest = 0
        self._content_bytes = command.content_bytes
        self._history: ConnectionHistory | None = None
        self._timer: Any = None
        self._first_mark = reader.index * COUNTS

    # --- out ---------------------------------------------------------------------------------------------------------

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        member = self._member
        if self._load.history is not None:
            self._history = ConnectionHistory(
                self._load.history,
                member.user_id,
                member.device_id,
                self.reader.log.conversation_id,
                member.receiver_id,
            )
        payload = frames.AuthPayload(
            user_id=member.user_id,
            auth_token=member.token,
            device_id=member.device_id,
            platform="bench",
            app_version="1",
        )
        self._send(self._codec.encode(frames.Auth(payload=payload)))

    def _send(self, frame: bytes) -> None:
        self.transport.send(self._kind, frame)

    def send_message(self, intended: float) -> None:
        """Send the next message of this member, due at `intended` (monotonic seconds)."""
        if intended >= self.types_at:
            self.types_at = intended + TYPING_SECONDS
            self._load.typed += 1
            self._send(self._typing)
        self._write(self.reader.sends(intended))

    def send_again(self, count: int, intended: float) -> None:
        """Send a message that was refused."""
        self.reader.sends_again(count, intended)
        self._write(count)

    def _write(self, count: int) -> None:
        mark = self._first_mark + count
        if self._history is not None:
            self._history.sent(mark, self._content_bytes)
        self.in_flight += 1
        self.transport.send(self._kind, self._message(b"%0*d" % (MARK_DIGITS, mark)))

    def send_heartbeat(self) -> None:
        self._send(self._heartbeat)

    def watch_other(self, watches: bool) -> None:
        """Watch the other of a 1:1 conversation, or no more."""
        kind = frames.PresenceSubscribe if watches else frames.PresenceUnsubscribe
        if self._member.receiver_id:
            self._send(self._codec.encode(kind(payload=frames.PeoplePayload(user_ids=[self._member.receiver_id]))))

    def _acknowledge(self) -> None:
        self._unacked = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._history is not None:
            self._history.confirmed(self._newest_id, self._newest)
        self.transport.send(self._kind, self._delivery_ack(self._newest_id.encode()))

    # --- in ----------------------------------------------------------------------------------------------------------

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            self._load.violations.add("closed", f"member {self.reader.index}: {frame.get_close_code()}")
            transport.disconnect()
            return
        got = self._decode(frame.get_payload_as_memoryview())
        if isinstance(got, templates.Ack):
            self._on_ack(got)
        elif isinstance(got, templates.Messages):
            self._on_messages(got.payload)
        elif isinstance(got, templates.Receipt):
            self._on_receipt(got.payload)
        else:
            self._on_rare(got)

    def _on_ack(self, got: templates.Ack) -> None:
        payload = got.payload
        if self._history is not None:
            self._history.acked(int(got.client_message_id), payload)
        count = self.reader.ack(int(got.client_message_id), payload.sequence_number, payload.message_id)
        if count is not None:
            self.in_flight -= 1
            self._load.phase.acked(self, count)

    def _on_messages(self, payload: templates.MessagesPayload) -> None:
        reader = self.reader
        if self._history is not None:
            self._history.pushed(payload, [_mark(row) for row in payload.messages])
        phase = self._load.phase
        phase.message_frames += 1
        for row in payload.messages:
            mark = _mark(row)
            if reader.saw(row.sequence_number, row.message_id, mark) and mark != NO_MARK:
                member, count = divmod(mark, COUNTS)
                if member == reader.index:
                    continue
                phase.delivered(member, count)
                self._unacked += 1
                self._newest_id, self._newest = row.message_id, row.sequence_number
                if self._unacked >= self._ack_every:
                    self._acknowledge()
        if self._unacked and self._timer is None:
            self._timer = self._load.call_later(self._ack_after_seconds, self._acknowledge)

    def _on_receipt(self, payload: templates.ReceiptPayload) -> None:
        if self._history is not None:
            self._history.receipt(payload)
        covered = self.reader.receipt(payload.delivered_through, payload.read_through)
        if covered:
            self._load.phase.receipted(self, covered)

    def _on_rare(self, got: templates.LeanFrame) -> None:
        load = self._load
        if isinstance(got, templates.AuthSuccess):
            if self._history is not None:
                self._history.connected()
        elif isinstance(got, templates.SyncComplete):
            if self._history is not None:
                self._history.synced()
            load.one_ready()
            self.ready.set()
        elif isinstance(got, templates.HeartbeatAck):
            load.heartbeats += 1
            load.phase.heartbeat()
        elif isinstance(got, templates.Typing):
            load.typing_heard += 1
        elif isinstance(got, templates.Presence):
            load.presence_heard += 1
        elif isinstance(got, templates.AuthError):
            load.violations.add("refused", f"member {self.reader.index} auth: {got.error}")
        elif isinstance(got, templates.Error):
            payload = got.payload
            if self._history is not None:
                mark = payload.client_message_id
                self._history.refused(int(mark) if isinstance(mark, str) and mark else None, payload)
            if payload.code == ErrorCode.OVERLOADED and load.phase.takes_refusals:
                self._on_refusal(payload)
                return
            load.violations.add("refused", f"member {self.reader.index}: {payload.code}: {payload.message}")
            load.phase.fail()

    def _on_refusal(self, payload: templates.ErrorPayload) -> None:
        mark = 0 if payload.client_message_id is msgspec.UNSET else int(payload.client_message_id)
        count = self.reader.refuse(mark)
        if count is not None:
            self.in_flight -= 1
            self._load.phase.refused(self, count, payload.retry_after_ms)

    def stall(self, stalled: bool) -> None:
        """Take nothing from the socket, or take it again."""
        below = self.transport.underlying_transport
        # So that soon the other side knows, not only this kernel, that nobody reads.
        below.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, STALLED_BUFFER_BYTES if stalled else READING_BUFFER_BYTES
        )
        if stalled:
            below.pause_reading()
        else:
            below.resume_reading()

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.ready.set()
        if not self._load.closing:
            if self._history is not None:
                self._history.closed()
            self._load.violations.add("closed", f"member {self.reader.index} lost its connection")
            self._load.phase.fail()


def _mark(row: templates.Row) -> int:
    return NO_MARK if row.sender_id == SYSTEM_SENDER else int(row.content[:MARK_DIGITS])


class Load:
    """All connections of this process and the phase that is under way."""

    def __init__(self, call_later: Callable[..., Any]) -> None:
        self.call_later = call_later
        self.run = secrets.token_hex(6)
        self.history: DriverHistory | None = None
        self.violations = Violations()
        self.connections: list[Connection] = []
        self.closing = False
        self.receipts = True
        self.phase = Phase(self, 0)
        self.typed = self.typing_heard = self.presence_heard = self.heartbeats = 0
        self._ambient = Ambient()
        self._beaten = 0.0
        self._logs: dict[str, Log] = {}
        self._waiting = 0

    def one_ready(self) -> None:
        """A connection has its backlog."""
        self._waiting -= 1

    async def connect(self, command: Connect) -> dict[str, Any]:
        codec = FRAME_CODECS[command.subprotocol]
        self.receipts = command.receipts
        if command.history and self.history is None:
            self.history = DriverHistory(command.history, self.run)
        self._waiting = len(command.members)
        limiter = anyio.CapacityLimiter(CONNECTING_AT_ONCE)
        began = time.perf_counter()
        with anyio.move_on_after(command.timeout_seconds):
            async with anyio.create_task_group() as tasks:
                for member in command.members:
                    conversation_id = command.conversations[member.conversation]
                    log = self._logs.setdefault(conversation_id, Log(conversation_id, self.violations))
                    reader = Reader(len(self.connections), log, self.violations)
                    connection = Connection(self, reader, member, command, codec)
                    self.connections.append(connection)
                    url = command.urls[reader.index % len(command.urls)]
                    tasks.start_soon(_open, connection, url, command, limiter)
        gc.collect()
        gc.freeze()
        return {"connected": len(command.members) - self._waiting, "seconds": time.perf_counter() - began}

    async def set_ambient(self, command: Ambient) -> dict[str, Any]:
        """From now on, once everybody has been told of the other; typing begins spread over its period."""
        was, self._ambient = self._ambient, command
        names = ("typed", "typing_heard", "presence_heard", "heartbeats")
        counted = {name: getattr(self, name) for name in names}
        self.typed = self.typing_heard = self.presence_heard = self.heartbeats = 0
        if command.social != was.social:
            for connection in self.connections:
                connection.watch_other(command.social)
        if command.social and not was.social:
            with anyio.move_on_after(AMBIENT_SECONDS):
                while self.presence_heard < len(self.connections):  # noqa: ASYNC110 - answers to many connections
                    await anyio.sleep(AMBIENT_STEP_SECONDS)
        now, spread = time.perf_counter(), TYPING_SECONDS / max(1, len(self.connections))
        for place, connection in enumerate(self.connections):
            connection.types_at = now + place * spread if command.social else float("inf")
        if command.heartbeat_seconds and not was.heartbeat_seconds:
            self._beat()
        return counted

    def _beat(self) -> None:
        """Heartbeats of the connections whose turn it is: each once per period, evenly."""
        period = self._ambient.heartbeat_seconds
        if self.closing or not period:
            return
        count = len(self.connections)
        first, self._beaten = self._beaten, self._beaten + count * AMBIENT_STEP_SECONDS / period
        for place in range(int(first), int(self._beaten)):
            self.connections[place % count].send_heartbeat()
        self.call_later(AMBIENT_STEP_SECONDS, self._beat)

    def stall(self, command: Stall) -> dict[str, Any]:
        for index in command.connections:
            self.connections[index].stall(command.stalled)
        return {"stalled": len(command.connections) if command.stalled else 0}

    async def run_phase(self, command: PhaseCommand) -> dict[str, Any]:
        """Drive one phase to its end or its deadline."""
        phase = self.phase = command.phase(self, self.phase)
        phase.start()
        with anyio.move_on_after(command.timeout_seconds):
            await phase.over.wait()
        return phase.result()

    def check(self) -> dict[str, Any]:
        if self.history is not None:
            self.history.end()
        if not self.violations.count:
            readers = [connection.reader for connection in self.connections]
            check_all(self._logs.values(), readers, self.violations, self.receipts)
        return {"violations": self.violations.listed(), "count": self.violations.count}

    def close(self) -> None:
        self.closing = True
        for connection in self.connections:
            if connection.transport is not None:
                connection.transport.disconnect(False)


async def _open(connection: Connection, url: str, command: Connect, limiter: anyio.CapacityLimiter) -> None:
    async with limiter:
        await picows.ws_connect(
            lambda: connection,
            url,
            extra_headers={"Sec-WebSocket-Protocol": command.subprotocol},
            read_buffer_init_size=READ_BUFFER_BYTES,
            websocket_handshake_timeout=command.timeout_seconds,
        )
        await connection.ready.wait()


def _wall_ms() -> int:
    """The one place where this process reads the wall clock."""
    return time.time_ns() // 1_000_000


# --- commands in, answers out ----------------------------------------------------------------------------------------

_decode_command = msgspec.json.Decoder(Command).decode


async def main() -> None:
    """Serve commands until `quit` or the end of the input."""
    load = Load(asyncio.get_running_loop().call_later)
    echo = EchoLoad()
    while True:
        line = await anyio.to_thread.run_sync(sys.stdin.buffer.readline)
        command = _decode_command(line) if line.strip() else Quit()
        match command:
            case Connect():
                answer = await load.connect(command)
            case Ambient():
                answer = await load.set_ambient(command)
            case EchoConnect():
                answer = await echo.connect(command)
            case EchoRun():
                answer = await echo.run(command)
            case Stall():
                answer = load.stall(command)
            case Check():
                answer = load.check()
            case Quit():
                load.close()
                echo.close()
                return
            case _:
                answer = await load.run_phase(command)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    anyio.run(main, backend_options={"use_uvloop": True})
