"""W-20 to W-36: bytes after the handshake that are no frame, no message or no end."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Final

import pytest
import trio

from bench import figures
from gateway.transport import TransportLimits
from protocol import codec, frames, keys
from protocol.limits import Limits
from protocol.models import UserStatus
from tests.gateway.peers import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Peer, frame
from tests.hostile.rows import BOTH, Row, by_row, judge
from tests.system.crowd import eventually, message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio

HEARTBEAT: Final = b'{"type":"heartbeat","timestamp":1,"more":"'


def heartbeat(size: int) -> bytes:
    """A heartbeat of exactly so many bytes, most of them in a field nobody knows."""
    return HEARTBEAT + b"m" * (size - len(HEARTBEAT) - 2) + b'"}'


def fragments(payload: bytes, count: int) -> bytes:
    """One message in so many frames; the last ones are empty where there is too little of it."""
    pieces = [payload[at : at + 1] for at in range(count - 1)] + [payload[count - 1 :]]
    return b"".join(frame(CONTINUATION if at else TEXT, piece, fin=at == count - 1) for at, piece in enumerate(pieces))


async def answer(peer: Peer) -> str | int:
    """What the server says next: the tag of a message, or its close code. Pongs are passed over."""
    while True:
        opcode, payload = await peer.receive()
        if opcode == CLOSE:
            assert await peer.ended()
            return int.from_bytes(payload[:2])
        if opcode == TEXT:
            tag: str = json.loads(payload)["type"]
            return tag


def says(data: bytes) -> Play:
    """The first answer of a live session to these bytes."""

    async def play(scene: Scene) -> str | int:
        peer = await scene.enter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_regardless, peer, data)
            got = await answer(peer)
            nursery.cancel_scope.cancel()
        return got

    return play


async def send_regardless(peer: Peer, data: bytes) -> None:
    """It may be cut off before all of it is sent."""
    with contextlib.suppress(trio.BrokenResourceError):
        await peer.send(data)


def within(data: bytes, *, cpu_ms: dict[str, float] | None = None, memory_kib: int = 4096) -> Play:
    """(The answer, did it cost the gateway no more than this)."""

    async def play(scene: Scene) -> tuple[str | int, bool, bool]:
        pid = scene.house.pids[scene.transport]
        peer = await scene.enter()
        cpu, memory = figures.cpu_seconds(pid), scene.house.resident_kib(scene.transport)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_regardless, peer, data)
            got = await answer(peer)
            nursery.cancel_scope.cancel()
        spent_ms = (figures.cpu_seconds(pid) - cpu) * 1000
        grown_kib = scene.house.resident_kib(scene.transport) - memory
        return got, cpu_ms is None or spent_ms <= cpu_ms[scene.transport], grown_kib <= memory_kib

    return play


def lives_on_after(*steps: bytes) -> Play:
    """Bytes after a Close, then: does a neighbour still get its answers."""

    async def play(scene: Scene) -> tuple[int | str, str | int]:
        neighbour, peer = await scene.enter(), await scene.enter()
        for data in steps:
            await send_regardless(peer, data)
        code = await answer(peer)
        await neighbour.send(frame(TEXT, heartbeat(100)))
        return code, await answer(neighbour)

    return play


async def unfinished(scene: Scene) -> tuple[str | int, float]:
    """A message that gets another byte now and then but never its end: (how it ends, the default)."""
    peer = await scene.enter()
    await peer.send(frame(TEXT, b"{", fin=False))

    async def drip() -> None:
        while True:
            await trio.sleep(0.5)
            await send_regardless(peer, frame(CONTINUATION, b" ", fin=False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        got = await answer(peer)
        nursery.cancel_scope.cancel()
    return got, TransportLimits().message_seconds


async def mute(scene: Scene) -> tuple[str | int, bool, float]:
    """Nothing at all, not even pongs: (how it ends, is the user offline then, the default)."""
    user_id = await scene.people.user()
    peer = await scene.enter(user_id)
    with trio.fail_after(float(scene.house.stack.environment["TRIREME_DEAD_SECONDS"]) + 4):
        opcode, payload = await peer.receive()
        while opcode != CLOSE:
            opcode, payload = await peer.receive()
    with scene.house.redis() as client:

        def is_offline() -> bool:
            known = client.get(keys.presence(user_id))
            return known is None or codec.decode_presence(str(known).encode()).status is UserStatus.OFFLINE

        await eventually(is_offline, "offline")
    return int.from_bytes(payload[:2]), True, Limits().dead_seconds


async def never_reads(scene: Scene) -> tuple[bool, bool, float]:
    """6 MB for somebody whose kernel takes 4 KiB: (cut off in time, is memory bounded, the default)."""
    limit = float(scene.house.stack.environment["TRIREME_STUCK_SECONDS"])
    conversation_id, users = await scene.people.group(4)
    await scene.enter(users[0], receive_bytes=4096)
    files, memory = scene.house.open_files(scene.transport), scene.house.resident_kib(scene.transport)
    async with trio.open_nursery() as nursery:
        for user_id in users[1:]:
            nursery.start_soon(flood, scene, conversation_id, user_id)
    grown_kib = scene.house.resident_kib(scene.transport) - memory
    await eventually(lambda: scene.house.open_files(scene.transport) < files, "cut off", limit + 10)
    return True, grown_kib < 12_000, TransportLimits().stuck_seconds


async def flood(scene: Scene, conversation_id: str, user_id: str) -> None:
    """50 long messages, a user's burst being 60; from another gateway, so that only the reader is in this one."""
    elsewhere = next(name for name in BOTH if name != scene.transport)
    async with scene.talk(transport=elsewhere) as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for number in range(50):
            await talk.send(message(conversation_id, f"k{number}", "x" * 40_000))
        for _ in range(50):
            await talk.expect(frames.MessageAck)


def closing(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2) + reason)


def closed(row_id: str, sent: str, code: int, data: bytes) -> Row:
    return Row(row_id, sent, code, says(data), BOTH)


EMPTY_FRAGMENTS: Final = frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 1_000_000
CPU_MS: Final = {"epoll": 60.0, "trio-websocket": 300.0}
AFTER_CLOSE: Final = closing(1000) + frame(TEXT, b"{}") + frame(PING)
ROWS: Final = [
    Row("W-20", "a text frame of 65,536 bytes", "heartbeat_ack", says(frame(TEXT, heartbeat(65_536))), BOTH),
    closed("W-20", "a text frame of 65,537 bytes", 1009, frame(TEXT, heartbeat(65_537))),
    Row(
        "W-21",
        "a header that announces 2^62 bytes",
        (1009, True, True),
        within(b"\x81\xff" + (1 << 62).to_bytes(8), memory_kib=1024),
        BOTH,
    ),
    closed("W-22", "a 64-bit length with its top bit set", 1002, b"\x81\xff" + (1 << 63).to_bytes(8)),
    Row("W-23", "1,024 fragments", "heartbeat_ack", says(fragments(heartbeat(900), 1024)), BOTH),
    closed("W-23", "1,025 fragments", 1009, fragments(heartbeat(900), 1025)),
    Row(
        "W-24",
        "a million empty continuations",
        (1009, True, True),
        within(
            EMPTY_FRAGMENTS,
            cpu_ms=CPU_MS,
        ),
        BOTH,
    ),
    Row("W-25", "fragments without an end", (4408, 30.0), unfinished, BOTH),
    closed("W-26", "an unmasked frame", 1002, frame(TEXT, b"{}", masked=False)),
    *(closed("W-27", f"reserved bit {bit}", 1002, frame(TEXT, b"{}", rsv=bit)) for bit in (1, 2, 4)),
    *(closed("W-27", f"opcode {opcode}", 1002, frame(opcode, b"x")) for opcode in (*range(3, 8), *range(11, 16))),
    closed("W-27", "a fragmented ping", 1002, frame(PING, b"p", fin=False)),
    closed("W-27", "a ping of 126 bytes", 1002, frame(PING, b"p" * 126)),
    closed("W-28", "a continuation of nothing", 1002, frame(CONTINUATION, b"{}")),
    closed("W-28", "a message inside a fragmented one", 1002, frame(TEXT, b"{", fin=False) + frame(TEXT, b"{}")),
    closed("W-29", "a byte that is no UTF-8", 1007, frame(TEXT, b'{"a":"\xff"}')),
    closed("W-29", "a surrogate", 1007, frame(TEXT, b'{"a":"\xed\xa0\x80"}')),
    closed("W-29", "an overlong slash", 1007, frame(TEXT, b'{"a":"\xc0\xaf"}')),
    closed("W-29", "a character cut at the end", 1007, frame(TEXT, b'{"a":"\xe2\x82')),
    closed(
        "W-29",
        "a bad byte in the second fragment",
        1007,
        frame(TEXT, b"\xe2", fin=False) + frame(CONTINUATION, b"\x28"),
    ),
    closed("W-30", "a binary frame where JSON is spoken", 1003, frame(BINARY, b"\x80")),
    *(closed("W-31", f"close code {code}", 1002, closing(code)) for code in (1005, 1006, 999, 5000)),
    closed("W-31", "a close of one byte", 1002, frame(CLOSE, b"\x03")),
    closed("W-31", "a close whose reason is no UTF-8", 1007, closing(1000, b"\xff")),
    Row(
        "W-32",
        "data after one's own Close",
        (1000, "heartbeat_ack"),
        lives_on_after(closing(1000) + frame(TEXT, b"{}") + frame(PING)),
        BOTH,
    ),
    Row(
        "W-32",
        "a ping after the server's Close",
        (1002, "heartbeat_ack"),
        lives_on_after(frame(TEXT, b"{}", rsv=1), frame(PING, b"late"), frame(TEXT, b"late")),
        BOTH,
    ),
    closed("W-33", "21 pings in a second", 1008, frame(PING) * 21),
    closed("W-34", "100 pongs in a second", 1008, frame(PONG) * 100),
    Row("W-35", "silence", (4408, True, 60.0), mute, BOTH),
    Row("W-36", "a client that never reads", (True, True, 30.0), never_reads, BOTH),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
