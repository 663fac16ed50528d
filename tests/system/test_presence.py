"""Presence, typing and channels over two gateways, one per transport, one of which dies."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from protocol import codec, frames, keys, records
from protocol.errors import AuthErrorCode
from protocol.models import UserStatus
from tests.system.crowd import Crowd, Talker, crowd, eventually, talker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]

HERE, THERE = "epoll", "trio-websocket"
START, STOP = frames.TypingState.START, frames.TypingState.STOP
ONLINE, OFFLINE = UserStatus.ONLINE, UserStatus.OFFLINE


@asynccontextmanager
async def online(
    people: Crowd, user_id: str, gateway: str, frame_codec: codec.FrameCodec = codec.JSON
) -> AsyncIterator[Talker]:
    async with talker(people.house.urls[gateway], frame_codec) as talk:
        await talk.log_in(user_id, people.tokens[user_id])
        yield talk


async def friends(people: Crowd) -> tuple[str, str, str]:
    """Two new users and their conversation."""
    user_a, user_b = await people.user(), await people.user()
    return user_a, user_b, await people.direct(user_a, user_b)


async def watch(talk: Talker, *user_ids: str) -> None:
    await talk.send(frames.PresenceSubscribe(payload=frames.PeoplePayload(user_ids=list(user_ids))))


async def presence(talk: Talker, seconds: float = 10.0) -> tuple[str, UserStatus, bool]:
    """The next change this client hears of: who, how, and whether it says since when."""
    payload = (await talk.expect(frames.PresenceNotice, seconds)).payload
    return payload.user_id, payload.status, isinstance(payload.last_seen, int)


async def nothing(talk: Talker, seconds: float) -> None:
    """No frame but answers to heartbeats for so long."""
    with trio.move_on_after(seconds):
        frame = await talk.receive(seconds + 1)
        raise AssertionError(f"unexpected: {frame}")


async def typing(talk: Talker, conversation_id: str, state: frames.TypingState) -> None:
    await talk.send(frames.Typing(payload=frames.TypingPayload(conversation_id=conversation_id, state=state)))


# --- one scenario each -----------------------------------------------------------------------------------------------


async def who_stays_away_is_offline_and_who_comes_back_at_once_is_not(people: Crowd) -> None:
    user_a, user_b, _ = await friends(people)
    stranger = await people.user()
    async with online(people, user_a, HERE) as watcher:
        async with online(people, user_b, HERE):
            await watch(watcher, user_b, stranger)
            assert await presence(watcher) == (user_b, ONLINE, True)
        async with online(people, user_b, HERE):
            await nothing(watcher, 5.0)
        began = trio.current_time()
        assert await presence(watcher) == (user_b, OFFLINE, True)
        assert 2.5 < trio.current_time() - began < 6
        await watcher.send(frames.PresenceUnsubscribe(payload=frames.PeoplePayload(user_ids=[user_b])))
        async with online(people, user_b, HERE):
            await nothing(watcher, 1.0)


async def typing_that_is_not_ended_ends_by_itself(people: Crowd) -> None:
    user_a, user_b, conversation_id = await friends(people)
    async with online(people, user_a, HERE) as writer, online(people, user_b, HERE) as reader:
        await typing(writer, conversation_id, START)
        began = trio.current_time()
        assert (await reader.expect(frames.TypingNotice)).payload.state is START
        assert (await reader.expect(frames.TypingNotice)).payload.state is STOP
        assert 5.5 < trio.current_time() - began < 9


async def the_users_of_a_dead_gateway_are_offline_within_fifteen_seconds(people: Crowd) -> None:
    user_a, user_b, _ = await friends(people)
    async with online(people, user_a, HERE) as watcher:
        async with talker(people.house.urls[THERE]) as victim:
            await victim.log_in(user_b, people.tokens[user_b])
            await watch(watcher, user_b)
            assert await presence(watcher) == (user_b, ONLINE, True)
            people.house.kill(THERE)
            began = trio.current_time()
            assert await presence(watcher, 20) == (user_b, OFFLINE, True)
            assert trio.current_time() - began < 15
        with people.house.redis() as client:
            assert not client.exists(keys.connection(user_b))
        people.house.start(THERE)
        async with online(people, user_b, THERE):
            assert await presence(watcher) == (user_b, ONLINE, True)


async def test_people_come_go_and_type_while_a_gateway_dies(house: House) -> None:
    async with crowd(house, judged=False) as people, trio.open_nursery() as nursery:
        nursery.start_soon(who_stays_away_is_offline_and_who_comes_back_at_once_is_not, people)
        nursery.start_soon(typing_that_is_not_ended_ends_by_itself, people)
        nursery.start_soon(the_users_of_a_dead_gateway_are_offline_within_fifteen_seconds, people)


async def test_typing_crosses_gateways_and_ends_with_the_connection(house: House) -> None:
    async with crowd(house, judged=False) as people:
        user_a, user_b, conversation_id = await friends(people)
        async with online(people, user_b, THERE, codec.MSGPACK) as reader:

            async def heard() -> tuple[str, str, frames.TypingState]:
                payload = (await reader.expect(frames.TypingNotice)).payload
                return payload.conversation_id, payload.user_id, payload.state

            async with online(people, user_a, HERE) as writer:
                await typing(writer, conversation_id, START)
                assert await heard() == (conversation_id, user_a, START)
                await typing(writer, conversation_id, STOP)
                assert await heard() == (conversation_id, user_a, STOP)
                await trio.sleep(3.0)
                await typing(writer, conversation_id, START)
                assert await heard() == (conversation_id, user_a, START)
            assert await heard() == (conversation_id, user_a, STOP)
        assert house.sequences(conversation_id) == []


async def test_who_hides_or_blocks_is_seen_no_more(house: House) -> None:
    async with crowd(house, judged=False) as people:
        user_a, user_b, _ = await friends(people)
        user_c = await people.user()
        await people.direct(user_a, user_c)
        async with (
            online(people, user_a, HERE) as watcher,
            online(people, user_b, THERE),
            online(people, user_c, THERE) as other,
        ):
            await watch(watcher, user_b, user_c)
            await watch(other, user_a)
            assert {await presence(watcher), await presence(watcher)} == {
                (user_b, ONLINE, True),
                (user_c, ONLINE, True),
            }
            assert await presence(other) == (user_a, ONLINE, True)
            hide = {"privacy": {"last_seen": "nobody"}}
            assert isinstance(await people.api.call("PATCH", "/v1/users/me", people.tokens[user_b], hide), dict)
            assert await presence(watcher) == (user_b, OFFLINE, False)
            assert isinstance(await people.api.call("PUT", f"/v1/blocks/{user_a}", people.tokens[user_c]), dict)
            assert await presence(watcher) == (user_c, OFFLINE, False)
            assert await presence(other) == (user_a, OFFLINE, False)
            await watch(watcher, user_b, user_c)
            await nothing(watcher, 1.0)


def is_listed(house: House, user_id: str, device_id: str) -> bool:
    with house.database() as database:
        return database["devices"].find_one({"user_id": user_id, "device_id": device_id}) is not None


async def test_channels_reach_a_user_on_every_gateway(house: House) -> None:
    async with crowd(house, judged=False) as people:
        user_id = await people.user()
        tablet_token = await people.api.create_token(user_id, "tablet")
        async with online(people, user_id, HERE) as phone, talker(house.urls[THERE]) as tablet:
            await tablet.log_in(user_id, tablet_token, "tablet")
            frame: Any = frames.KeysLow(payload=frames.KeysLowPayload(device_id="tablet", remaining=3))
            raw = msgspec.Raw(codec.JSON.encode(frame))
            with house.redis() as client:
                client.publish(keys.user_channel(user_id), b"\xff nonsense")
                client.publish(keys.user_channel(user_id), codec.encode_value(records.Tell(raw, "tablet")))
                assert await tablet.expect(frames.KeysLow) == frame
                client.publish(keys.notification_channel(user_id), codec.encode_value(records.Tell(raw)))
                assert await tablet.expect(frames.KeysLow) == frame
                assert await phone.expect(frames.KeysLow) == frame
            # Which devices there are is written down behind the answer that let them in.
            await eventually(lambda: is_listed(house, user_id, "tablet"), "the tablet")
            answer = await people.api.call("DELETE", "/v1/devices/tablet", people.tokens[user_id])
            assert isinstance(answer, dict), answer
            refused: frames.AuthError = await tablet.expect(frames.AuthError)
            assert refused.error is AuthErrorCode.REVOKED
            assert await tablet.close_code() == 4401
            await phone.send(frames.Heartbeat(timestamp=1))
            await phone.expect(frames.HeartbeatAck)
