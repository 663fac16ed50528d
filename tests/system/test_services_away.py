"""Valkey or MongoDB away: the gateways keep their connections, say so with retryable errors, and everything resumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from protocol import frames
from protocol.errors import ErrorCode
from tests.system.crowd import PATIENCE_SECONDS, Talker, crowd, message, talker

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]

RETRYABLE = (ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.OVERLOADED)


async def outcome(
    talk: Talker, conversation_id: str, key: str, seconds: float = 15.0
) -> frames.MessageAck | frames.Error:
    """Send one message and wait for what becomes of it."""
    await talk.send(message(conversation_id, key, "same content"))
    with trio.fail_after(seconds):
        while True:
            frame = await talk.receive(seconds)
            if isinstance(frame, (frames.MessageAck, frames.Error)) and frame.payload.idempotency_key == key:
                return frame


async def until_acked(talk: Talker, conversation_id: str, key: str) -> frames.MessageAck:
    """What a careful client does: the same key again after every retryable error."""
    with trio.fail_after(PATIENCE_SECONDS):
        while True:
            frame = await outcome(talk, conversation_id, key)
            if isinstance(frame, frames.MessageAck):
                return frame
            assert frame.payload.retryable, frame
            await trio.sleep(0.3)


@pytest.mark.parametrize("service", ["valkey", "mongod"])
async def test_a_service_that_hangs_costs_retries_only(house: House, service: str, transport: str) -> None:
    """SIGSTOP: connections stay open and nothing answers."""
    async with crowd(house, judged=False) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        receiver = await people.phone(user_b)
        async with talker(house.urls[transport]) as talk:
            await talk.log_in(user_a, people.tokens[user_a])
            await until_acked(talk, conversation_id, "k1")
            house.pause(service)
            try:
                frame = await outcome(talk, conversation_id, "k2")
                assert isinstance(frame, frames.Error)
                assert frame.payload.code in RETRYABLE
                assert frame.payload.retryable
                assert frame.payload.idempotency_key == "k2"
                await talk.send(frames.Heartbeat(timestamp=1))
                await talk.expect(frames.HeartbeatAck, 2.0)
            finally:
                house.resume(service)
            ack = await until_acked(talk, conversation_id, "k2")
            assert ack.payload.sequence_number == 2
            assert (await until_acked(talk, conversation_id, "k3")).payload.sequence_number == 3
        with trio.fail_after(PATIENCE_SECONDS):
            log = receiver.client.logs[conversation_id]
            await receiver.wait_until(lambda: log.cursor == 3)
        assert receiver.client.connection == 1
        assert house.sequences(conversation_id) == [1, 2, 3]


@pytest.mark.parametrize("service", ["valkey", "mongod"])
async def test_a_service_that_is_killed_and_comes_back_costs_retries_only(house: House, service: str) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(4)
        phones = [await people.phone(user_id) for user_id in users]

        async def chat(number: int) -> None:
            for count in range(30):
                await phones[number].send_nowait(conversation_id, f"{number}/{count}")
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(chat, number)
            await trio.sleep(0.5)
            house.kill(service)
            await trio.sleep(2.0)
            house.start(service)
        await people.settle(conversation_id)
        assert house.sequences(conversation_id) == list(range(1, 4 * 30 + 2))
        assert {phone.client.connection for phone in phones} == {1}


async def test_a_new_connection_while_valkey_hangs_is_told_to_come_back_later(house: House) -> None:
    async with crowd(house) as people:
        user_id = await people.user()
        house.pause("valkey")
        try:
            async with talker(house.urls["epoll"]) as talk:
                await talk.send(frames_auth(people.tokens[user_id], user_id))
                refusal: frames.AuthError = await talk.expect(frames.AuthError, 20.0)
                assert refusal.error == "server_busy"
                assert await talk.close_code() == 4503
        finally:
            house.resume("valkey")
        await people.phone(user_id)


def frames_auth(token: str, user_id: str) -> frames.Auth:
    payload = frames.AuthPayload(user_id=user_id, auth_token=token, device_id="phone-1", platform="t", app_version="1")
    return frames.Auth(payload=payload)
