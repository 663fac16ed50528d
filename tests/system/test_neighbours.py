"""C7 and C8: slow, hostile and unlucky clients beside healthy ones; nothing is lost, nothing outgrows its bound."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from bench.services import HOST
from protocol import codec, frames, keys
from tests.system.crowd import PATIENCE_SECONDS, Crowd, crowd, eventually, message, talker
from tests.system.house import STUCK_SECONDS, House

if TYPE_CHECKING:
    from bench.phone import Phone

pytestmark = [pytest.mark.trio, pytest.mark.slow]

BIG = "x" * 40_000


async def chat(phone: Phone, conversation_id: str, count: int, content: str = "") -> None:
    for number in range(count):
        with trio.fail_after(PATIENCE_SECONDS):
            assert (await phone.send(conversation_id, f"{number} {content}")).sequence_number


async def test_c7_a_reader_that_takes_nothing_costs_the_others_nothing(house: House, transport: str) -> None:
    """12 MB go to a group in which one member does not take what it is sent, on the same gateway as the others."""
    async with crowd(house) as people:
        url = house.urls[transport]
        conversation_id, users = await people.group(3)
        here = [await people.phone(user_id, urls=[url]) for user_id in users[:2]]
        pair_id, ann, bob = await healthy_pair(people, url)
        resident_kib = house.resident_kib(transport)
        async with talker(url) as slow:
            await slow.log_in(users[2], people.tokens[users[2]])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chat, here[0], conversation_id, 300, BIG)
                nursery.start_soon(chat, ann, pair_id, 100)
                nursery.start_soon(chat, bob, pair_id, 100)
            await people.settle(conversation_id, pair_id)
            assert house.resident_kib(transport) - resident_kib < 30_000
        assert here[1].client.logs[conversation_id].cursor == 301
        assert house.is_alive(transport)

        device = await people.phone(users[2], "another-device")
        await people.settle(conversation_id)
        assert device.client.logs[conversation_id].cursor == 301


async def healthy_pair(people: Crowd, url: str) -> tuple[str, Phone, Phone]:
    user_a, user_b = await people.user(), await people.user()
    conversation_id = await people.direct(user_a, user_b)
    return conversation_id, await people.phone(user_a, urls=[url]), await people.phone(user_b, urls=[url])


async def test_c7_a_stuck_socket_is_given_up(house: House, transport: str) -> None:
    """A peer whose kernel takes nothing more is cut off after its deadline, and what was held for it is freed."""
    async with crowd(house) as people:
        url = house.urls[transport]
        conversation_id, users = await people.group(2)
        sender = await people.phone(users[0], urls=[url])
        async with raw_member(people, url, users[1]) as stream:
            files = house.open_files(transport)
            await chat(sender, conversation_id, 150, BIG)
            with trio.fail_after(STUCK_SECONDS + PATIENCE_SECONDS):
                while house.open_files(transport) >= files:  # noqa: ASYNC110 - it happens in another process
                    await trio.sleep(0.2)
            assert stream is not None
        assert house.is_alive(transport)


def raw_member(people: Crowd, url: str, user_id: str) -> RawMember:
    return RawMember(url, user_id, people.tokens[user_id])


class RawMember:
    """A logged-in WebSocket on a socket with a tiny receive buffer that is never read again."""

    def __init__(self, url: str, user_id: str, token: str) -> None:
        self._port = int(url.split(":")[2].split("/")[0])
        self._user_id = user_id
        self._token = token

    async def __aenter__(self) -> trio.SocketStream:
        self._stream = await open_raw(self._port, receive_buffer=4096)
        await self._stream.send_all(HANDSHAKE)
        text = (
            f'{{"type":"auth","payload":{{"user_id":"{self._user_id}","auth_token":"{self._token}",'
            f'"device_id":"phone-1","platform":"raw","app_version":"1"}}}}'
        ).encode()
        await self._stream.send_all(masked(0x81, text))
        seen = b""
        with trio.fail_after(10):
            while b"sync_complete" not in seen:
                chunk = await self._stream.receive_some(4096)
                assert chunk, seen
                seen += chunk
        return self._stream

    async def __aexit__(self, *error: object) -> None:
        await self._stream.aclose()


async def open_raw(port: int, receive_buffer: int = 0) -> trio.SocketStream:
    """A TCP connection; with a small receive buffer the sender soon learns that nobody reads."""
    sock = trio.socket.socket()
    if receive_buffer:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
    await sock.connect((HOST, port))
    return trio.SocketStream(sock)


HANDSHAKE = (
    b"GET /v1/ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def masked(first_byte: int, payload: bytes) -> bytes:
    """One client frame; a mask of zeros is a mask."""
    size = len(payload)
    if size < 126:
        head = bytes((first_byte, 0x80 | size))
    elif size < 65_536:
        head = bytes((first_byte, 0x80 | 126)) + size.to_bytes(2)
    else:
        head = bytes((first_byte, 0x80 | 127)) + size.to_bytes(8)
    return head + bytes(4) + payload


async def test_c7_a_hostile_client_does_not_disturb_its_neighbours(house: House, transport: str) -> None:
    """A pair talks while sixty connections throw garbage at the same gateway."""
    async with crowd(house) as people:
        url = house.urls[transport]
        conversation_id, ann, bob = await healthy_pair(people, url)
        files = house.open_files(transport)

        async def attack(number: int) -> None:
            async with await open_raw(int(url.split(":")[2].split("/")[0])) as stream:
                with trio.move_on_after(5):
                    try:
                        await stream.send_all(ATTACKS[number % len(ATTACKS)])
                        while await stream.receive_some(65_536):
                            pass
                    except trio.BrokenResourceError:
                        pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(chat, ann, conversation_id, 100)
            nursery.start_soon(chat, bob, conversation_id, 100)
            for number in range(60):
                nursery.start_soon(attack, number)
        await people.settle(conversation_id)
        assert ann.client.connection == bob.client.connection == 1
        assert house.is_alive(transport)
        with trio.fail_after(15):
            while house.open_files(transport) > files:  # noqa: ASYNC110 - it happens in another process
                await trio.sleep(0.1)


ATTACKS = [
    b"\0" * 5_000,
    b"GET / HTTP/1.1\r\n\r\n" * 10,
    b"GET /v1/ws HTTP/1.1\r\nX: " + b"a" * 200_000,
    HANDSHAKE + os.urandom(3_000),
    HANDSHAKE + masked(0x81, b"x" * 65_537) + masked(0x89, b"ping"),
    HANDSHAKE + masked(0x81, b"x" * 70_000) * 2,
    HANDSHAKE + masked(0x01, b"") + masked(0x00, b"") * 100_000,
    HANDSHAKE + masked(0x89, b"p") * 5_000,
    HANDSHAKE + b"\x81\xff" + b"\x7f" + b"\xff" * 7 + bytes(4),
    HANDSHAKE + masked(0x81, b"{}") * 2_000,
]


async def test_c8_a_push_that_vanished_is_repaired_without_the_client_doing_anything(house: House) -> None:
    """The last message is trimmed from the gateway's stream before the gateway, held still, has read it."""
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        sender = await people.phone(user_a, urls=[house.urls["trio-websocket"]])
        async with talker(house.urls["epoll"]) as reader:
            await reader.log_in(user_b, people.tokens[user_b])
            with house.redis() as client:
                registry: Any = client.hgetall(keys.connection(user_b))
                (value,) = registry.values()
                down = keys.down(codec.decode_registry(value).instance_id)
                house.pause("epoll")
                try:
                    # The first wakes the read that is waiting; the others are nowhere but in the stream.
                    await chat(sender, conversation_id, 3)
                    await eventually(lambda: client.xlen(down) >= 2, "pushes")
                    client.xtrim(down, maxlen=0, approximate=False)
                finally:
                    house.resume("epoll")
            seen: list[int] = []
            with trio.fail_after(30):
                while len(seen) < 3:
                    frame: frames.Messages = await reader.expect(frames.Messages, 30)
                    seen.extend(stored.sequence_number for stored in frame.payload.messages)
        assert seen == [1, 2, 3]
        await people.settle()


async def test_c8_a_group_message_whose_push_vanished_reaches_all_members(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(4)
        sender = await people.phone(users[0], urls=[house.urls["trio-websocket"]])
        readers = [await people.phone(user_id, urls=[house.urls["epoll"]]) for user_id in users[1:]]
        house.pause("epoll")
        try:
            await chat(sender, conversation_id, 4)
            with house.redis() as client:
                instances: Any = client.smembers(keys.INSTANCES)
                for instance in instances:
                    if client.xlen(keys.down(instance)):
                        client.xtrim(keys.down(instance), maxlen=0, approximate=False)
        finally:
            house.resume("epoll")
        with trio.fail_after(30):
            for phone in readers:
                log = phone.client.logs[conversation_id]
                await phone.wait_until(lambda log=log: log.cursor == 5)  # type: ignore[misc]


async def test_a_full_window_is_back_pressure_and_not_an_error(house: House, transport: str) -> None:
    """W-79: a thousand messages written at once; the gateway reads them as fast as they are committed, in order."""
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        async with talker(house.urls[transport]) as talk:
            await talk.log_in(user_a, people.tokens[user_a])

            async def write() -> None:
                for number in range(1_000):
                    await talk.send(message(conversation_id, f"k{number}", "y" * 200))

            acks: list[frames.MessageAck] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                while len(acks) < 1_000:
                    frame = await talk.receive(PATIENCE_SECONDS)
                    assert not isinstance(frame, frames.Error), frame
                    if isinstance(frame, frames.MessageAck):
                        acks.append(frame)
        assert [ack.payload.idempotency_key for ack in acks] == [f"k{number}" for number in range(1_000)]
        assert [ack.payload.sequence_number for ack in acks] == list(range(1, 1_001))
