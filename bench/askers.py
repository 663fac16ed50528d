"""People who talk to an agent: `python -m bench.askers`, picows on uvloop, one connection each, in one process.

Started by `agents`, which writes one command per line (JSON) to its standard input and reads one answer per line from
its standard output. Checks every frame: each question is acknowledged once, answered once, in the order of the log.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread
import msgspec
import picows

from bench import templates
from bench.driver import READ_BUFFER_BYTES
from bench.figures import Latencies
from protocol import frames
from protocol.codec import FRAME_CODECS, SUBPROTOCOL_JSON, FrameCodec
from protocol.models import MessagePayload, MessageType

if TYPE_CHECKING:
    from collections.abc import Callable

_CONNECTING_AT_ONCE: Final = 64
_SHOWN: Final = 20
"""Violations that are told word for word."""


class Asker(msgspec.Struct):
    """One person, their conversation with the agent, and where they connect."""

    url: str
    conversation_id: str
    user_id: str
    device_id: str
    token: str
    agent_id: str


class Meet(msgspec.Struct, tag="meet", tag_field="do"):
    """Connect and authenticate all; answers when every backlog has come."""

    askers: list[Asker]
    timeout_seconds: float = 60.0


class Ask(msgspec.Struct, tag="ask", tag_field="do"):
    """So many questions each, one every `every_seconds`, their beginnings spread over it; answers when all have their
    answers."""

    questions: int
    every_seconds: float
    timeout_seconds: float


class Part(msgspec.Struct, tag="part", tag_field="do"):
    """Close all connections and end."""


Command = Meet | Ask | Part


class Talk(picows.WSListener):
    """One asker's connection."""

    def __init__(self, crowd: Crowd, asker: Asker, codec: FrameCodec) -> None:
        super().__init__()
        self.transport: Any = None
        self.ready = anyio.Event()
        self._crowd = crowd
        self._asker = asker
        self._codec = codec
        self._decode = templates.lean_decoder(codec)
        self._asked: dict[str, float] = {}
        """Content of what has no answer yet → when it was to be asked."""
        self._unacked: set[str] = set()
        self._last = 0
        """The highest sequence number seen."""
        self._number = 0

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        asker = self._asker
        payload = frames.AuthPayload(
            user_id=asker.user_id,
            auth_token=asker.token,
            device_id=asker.device_id,
            platform="bench",
            app_version="1",
        )
        self._send(frames.Auth(payload=payload))

    def _send(self, frame: frames.Frame) -> None:
        self.transport.send(picows.WSMsgType.TEXT, self._codec.encode(frame))

    def ask(self, intended: float) -> None:
        """The next question, due at `intended` (monotonic seconds)."""
        self._number += 1
        key = f"q{self._number}"
        content = f"{self._asker.user_id} asks {key}"
        self._asked[content] = intended
        self._unacked.add(key)
        payload = MessagePayload(
            conversation_id=self._asker.conversation_id,
            receiver_id=self._asker.agent_id,
            content=content,
            message_type=MessageType.TEXT,
            timestamp=_wall_ms(),
        )
        self._send(frames.Message(client_message_id=key, idempotency_key=key, payload=payload))

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            self._crowd.violate(f"{self._asker.user_id} was closed: {frame.get_close_code()}")
            transport.disconnect()
            return
        got = self._decode(frame.get_payload_as_memoryview())
        if isinstance(got, templates.Ack):
            self._on_ack(got)
        elif isinstance(got, templates.Messages):
            for row in got.payload.messages:
                self._on_row(row)
        elif isinstance(got, templates.SyncComplete):
            self.ready.set()
        elif isinstance(got, templates.Error | templates.AuthError):
            self._crowd.violate(f"{self._asker.user_id} was refused: {got}")

    def _on_ack(self, got: templates.Ack) -> None:
        key = str(got.client_message_id)
        if key not in self._unacked:
            self._crowd.violate(f"{self._asker.user_id} {key} was acknowledged twice")
        self._unacked.discard(key)

    def _on_row(self, row: templates.Row) -> None:
        if row.sequence_number <= self._last:
            return  # sent again, and known by its place
        self._last = row.sequence_number
        if row.sender_id == self._asker.user_id:
            return
        intended = self._asked.pop(row.content, None) if row.sender_id == self._asker.agent_id else None
        if intended is None:
            self._crowd.violate(f"{self._asker.user_id} heard unasked from {row.sender_id}: {row.content[:60]}")
            return
        self._crowd.answered(intended)
        self._send(frames.DeliveryAck(message_id=row.message_id, timestamp=_wall_ms()))

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.ready.set()
        if not self._crowd.parting:
            self._crowd.violate(f"{self._asker.user_id} lost the connection")

    @property
    def owed(self) -> int:
        """Questions without an answer."""
        return len(self._asked)

    @property
    def unacked(self) -> int:
        return len(self._unacked)


class Crowd:
    """All askers of this process."""

    def __init__(self, call_at: Callable[..., Any]) -> None:
        self.parting = False
        self._call_at = call_at
        self._talks: list[Talk] = []
        self._violations: list[str] = []
        self._latencies = Latencies()
        self._owed = 0
        self._over = anyio.Event()

    def violate(self, what: str) -> None:
        """Something that must not be has happened."""
        self._violations.append(what)

    def answered(self, intended: float) -> None:
        """One more question has its answer."""
        self._latencies.add(time.perf_counter() - intended)
        self._owed -= 1
        if self._owed == 0:
            self._over.set()

    async def meet(self, command: Meet) -> dict[str, Any]:
        codec = FRAME_CODECS[SUBPROTOCOL_JSON]
        limiter = anyio.CapacityLimiter(_CONNECTING_AT_ONCE)
        with anyio.move_on_after(command.timeout_seconds) as scope:
            async with anyio.create_task_group() as tasks:
                for asker in command.askers:
                    talk = Talk(self, asker, codec)
                    self._talks.append(talk)
                    tasks.start_soon(_open, talk, asker.url, limiter)
        return {"met": not scope.cancelled_caught, "violations": self._violations[:_SHOWN]}

    async def ask(self, command: Ask) -> dict[str, Any]:
        self._latencies = Latencies()
        self._owed = command.questions * len(self._talks)
        self._over = anyio.Event()
        began = time.perf_counter()
        for place, talk in enumerate(self._talks):
            first = began + place * command.every_seconds / len(self._talks)
            self._next(talk, first, command.questions, command.every_seconds)
        with anyio.move_on_after(command.timeout_seconds):
            await self._over.wait()
        seconds = time.perf_counter() - began
        await anyio.sleep(0.5)  # what nobody asked for would come now
        owed = sum(talk.owed for talk in self._talks)
        unacked = sum(talk.unacked for talk in self._talks)
        for what, number in (("without an answer", owed), ("without an acknowledgement", unacked)):
            if number:
                self.violate(f"{number} questions {what}")
        return {
            "seconds": seconds,
            "answered": len(self._latencies.samples_seconds),
            "latency_ms": self._latencies.summary_ms(),
            "violations": self._violations[:_SHOWN],
            "violation_count": len(self._violations),
        }

    def _next(self, talk: Talk, at: float, left: int, every: float) -> None:
        def now() -> None:
            talk.ask(at)
            if left > 1:
                self._next(talk, at + every, left - 1, every)

        self._call_at(at, now)

    def part(self) -> None:
        """Hang up."""
        self.parting = True
        for talk in self._talks:
            if talk.transport is not None:
                talk.transport.disconnect()


async def _open(talk: Talk, url: str, limiter: anyio.CapacityLimiter) -> None:
    async with limiter:
        await picows.ws_connect(
            lambda: talk,
            url,
            extra_headers={"Sec-WebSocket-Protocol": SUBPROTOCOL_JSON},
            read_buffer_init_size=READ_BUFFER_BYTES,
        )
        await talk.ready.wait()


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


async def main() -> None:
    """Obey until told to part, or the parent is gone."""
    loop = asyncio.get_running_loop()
    ahead = loop.time() - time.perf_counter()
    crowd = Crowd(lambda at, call: loop.call_at(at + ahead, call))
    while line := await anyio.to_thread.run_sync(sys.stdin.buffer.readline):
        command = msgspec.json.decode(line, type=Command)
        if isinstance(command, Part):
            break
        answer = await (crowd.meet(command) if isinstance(command, Meet) else crowd.ask(command))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
    crowd.part()


if __name__ == "__main__":
    anyio.run(main, backend_options={"use_uvloop": True})
