"""Good sessions with flipped bytes, sent in pieces to real gateways: what the processes make of them. Called by `fuzz`
and a system test.
"""

from __future__ import annotations

import contextlib
import random
import re
import urllib.request
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from websockets.frames import Opcode

from bench.fuzz_targets import FRAMES, frame
from bench.http_api import HttpApi
from protocol import codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.stack import Stack

USERS: Final = 8
AT_ONCE: Final = 24
SESSION_SECONDS: Final = 5.0
QUIET_SECONDS: Final = 0.05
"""A gateway that has said nothing for so long has said what it had to."""
_ISOLATED: Final = re.compile(r"^gateway_isolated_errors_total (\S+)$", re.MULTILINE)


class Outcome(msgspec.Struct):
    """What came of a storm."""

    counts: dict[str, int]
    violations: list[str]


class _Person(msgspec.Struct, frozen=True):
    user_id: str
    token: str
    conversation_id: str


async def storm(stack: Stack, sessions: int, seed: int, urls: Sequence[str] = ()) -> Outcome:
    """So many broken sessions, spread over the gateways; afterwards each must be alive and have isolated no bug."""
    gateways = list(urls) or list(stack.ws_urls)
    counts = {"sessions": sessions, "answered": 0, "closed by the gateway": 0, "bytes flipped": 0}
    people = await _invite(stack)
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def play(number: int) -> None:
        async with limiter:
            generator = random.Random(f"{seed} {number}")
            with trio.move_on_after(SESSION_SECONDS):
                await _break_in(gateways[number % len(gateways)], generator.choice(people), generator, counts)

    async with trio.open_nursery() as nursery:
        for number in range(sessions):
            nursery.start_soon(play, number)
    violations = [line for url in gateways if (line := await trio.to_thread.run_sync(_complaint, url))]
    if not counts["answered"]:
        violations.append("no session got an answer: nothing was fuzzed")
    return Outcome(counts, [f"seed {seed}: {line}" for line in violations])


async def _invite(stack: Stack) -> list[_Person]:
    async with HttpApi(stack.rest_url, stack.admin_token) as api:
        users = [await api.create_user(f"user {number}") for number in range(USERS)]
        tokens = [await api.create_token(user_id, "d") for user_id in users]
        group = await api.create_conversation("group", users, tokens[0])
    return [_Person(user_id, token, group) for user_id, token in zip(users, tokens, strict=True)]


def script(person: _Person, generator: random.Random) -> bytes:
    """A session from the first frame on, in the order a client could choose."""
    payload = {
        "user_id": person.user_id,
        "auth_token": person.token,
        "device_id": "d",
        "platform": "p",
        "app_version": "1",
    }
    told = [{"type": "auth", "payload": payload}, *generator.choices(FRAMES[1:-1], k=generator.randrange(2, 12))]
    stream = b""
    for found in told:
        text = codec.JSON.encode(found).replace(b"conv_1", person.conversation_id.encode())
        text = text.replace(b'"k1"', b'"%08x"' % generator.getrandbits(32))
        if generator.random() < 0.2:
            cut = generator.randrange(len(text))
            stream += (
                frame(Opcode.TEXT, text[:cut], fin=False) + frame(Opcode.PING, b"p") + frame(Opcode.CONT, text[cut:])
            )
        else:
            stream += frame(Opcode.TEXT, text)
    return stream + (frame(Opcode.CLOSE, b"\x03\xe8") if generator.random() < 0.5 else b"")


async def _break_in(url: str, person: _Person, generator: random.Random, counts: dict[str, int]) -> None:
    host, port = url.split("/")[2].split(":")
    data = bytearray(script(person, generator))
    for _ in range(generator.choice((0, 1, 1, 2, 5, 20))):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        counts["bytes flipped"] += 1
    head = (
        f"GET /v1/ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(head.encode())
            at = 0
            while at < len(data):
                step = generator.choice((1, 7, 100, 4096))
                await stream.send_all(data[at : at + step])
                at += step
                await trio.lowlevel.checkpoint()
            await _listen(stream, counts)


async def _listen(stream: trio.SocketStream, counts: dict[str, int]) -> None:
    """Until the gateway has no more to say."""
    while True:
        with trio.move_on_after(QUIET_SECONDS) as patience:
            data = await stream.receive_some(65_536)
        if patience.cancelled_caught:
            return
        if not data:
            counts["closed by the gateway"] += 1
            return
        counts["answered"] += 1


def _complaint(url: str) -> str:
    """What a gateway has to complain of by its own figures; empty where all is well."""
    address = url.replace("ws://", "http://").removesuffix("/v1/ws")
    try:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            isolated = _ISOLATED.search(answer.read().decode())
    except OSError as error:
        return f"{url} is gone: {error}"
    if isolated is None:
        return f"{url} does not say how many bugs it met"
    return "" if float(isolated[1]) == 0 else f"{url} isolated {isolated[1]} bugs"
