"""Groups: exactly a hundred, whoever comes at once; who sees what; devices; the inbox of those who are away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from bench.http_api import Refusal
from protocol import codec, frames, keys
from protocol.errors import ErrorCode
from tests.system.crowd import PATIENCE_SECONDS, crowd, eventually, message, talker

if TYPE_CHECKING:
    from bench.phone import Phone
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]


async def test_a_group_holds_exactly_a_hundred_however_many_come_at_once(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(97)
        owner = people.tokens[users[0]]
        comers = [await people.user() for _ in range(9)]
        answers: list[Refusal | None] = []

        async def add(user_ids: list[str]) -> None:
            answers.append(await people.api.add_participants(conversation_id, user_ids, owner))

        async with trio.open_nursery() as nursery:
            for user_id in comers:
                nursery.start_soon(add, [user_id])
        refusals = [answer for answer in answers if answer is not None]
        assert len(refusals) == 6
        assert {refusal.code for refusal in refusals} == {ErrorCode.GROUP_FULL}
        assert await participants(people.api, conversation_id, owner) == 100

        assert await people.api.remove_participant(conversation_id, users[50], owner) is None
        present = await members(people.api, conversation_id, owner)
        missing = [user_id for user_id in comers if user_id not in present]
        assert await people.api.add_participants(conversation_id, missing[:2], owner) is not None
        assert await people.api.add_participants(conversation_id, missing[:1], owner) is None
        assert await participants(people.api, conversation_id, owner) == 100


async def members(api: Any, conversation_id: str, token: str) -> list[str]:
    answer = await api.call("GET", f"/v1/conversations/{conversation_id}", token)
    found: list[str] = answer["participants"]
    return found


async def participants(api: Any, conversation_id: str, token: str) -> int:
    return len(set(await members(api, conversation_id, token)))


async def test_a_group_of_a_hundred_and_one_is_not_created(house: House) -> None:
    async with crowd(house) as people:
        users = [await people.user() for _ in range(101)]
        body = {"type": "group", "participants": users}
        answer = await people.api.call("POST", "/v1/conversations", people.tokens[users[0]], body)
        assert isinstance(answer, Refusal)
        assert answer.code in (ErrorCode.GROUP_FULL, ErrorCode.VALIDATION_FAILED)


async def test_w72_who_was_removed_sees_and_says_nothing_more(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(3)
        owner = people.tokens[users[0]]
        sender = await people.phone(users[0])
        async with talker(house.urls["epoll"]) as talk:
            await talk.log_in(users[2], people.tokens[users[2]])
            assert await people.api.remove_participant(conversation_id, users[2], owner) is None
            with trio.fail_after(PATIENCE_SECONDS):
                await sender.send(conversation_id, "between us")
            await talk.send(message(conversation_id, "k"))
            error: frames.Error = await talk.expect(frames.Error)
            assert error.payload.code in (ErrorCode.CONVERSATION_NOT_FOUND, ErrorCode.FORBIDDEN)
            await talk.send(frames.Retransmit(conversation_id=conversation_id, from_sequence=1, to_sequence=9))
            seen = [error]
            with trio.move_on_after(2):
                while True:
                    frame = await talk.receive()
                    if isinstance(frame, frames.Messages):
                        assert all(stored.content != "between us" for stored in frame.payload.messages)
                    seen.append(frame)  # type: ignore[arg-type]
            assert len(seen) > 1
        await people.settle()


async def test_w72_who_was_removed_while_away_is_told_of_it_and_of_nothing_after(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(3)
        owner = people.tokens[users[0]]
        sender, away = await people.phone(users[0]), await people.phone(users[2])
        with trio.fail_after(PATIENCE_SECONDS):
            await sender.send(conversation_id, "for all")
            await away.wait_until(lambda: cursor_of(away, conversation_id) == cursor_of(sender, conversation_id))
            await away.go_offline()
            await sender.send(conversation_id, "before the removal")
            assert await people.api.remove_participant(conversation_id, users[2], owner) is None
            await sender.wait_until(lambda: cursor_of(sender, conversation_id) == 4)
            await sender.send(conversation_id, "between us")
            away.go_online()
            await away.wait_online()
            await away.wait_until(lambda: cursor_of(away, conversation_id) == 4)
            await away.wait_until(lambda: away.client.synced)
        assert cursor_of(away, conversation_id) == 4
        # It names what it holds; so it hears nothing twice, and nothing of what came after.
        await away.go_offline()
        away.go_online()
        with trio.fail_after(PATIENCE_SECONDS):
            await away.wait_online()
            await away.wait_until(lambda: away.client.synced)
        assert cursor_of(away, conversation_id) == 4


def cursor_of(phone: Phone, conversation_id: str) -> int:
    """The last entry of this conversation that the phone holds."""
    log = phone.client.logs.get(conversation_id)
    return 0 if log is None or log.cursor is None else log.cursor


async def test_each_device_of_the_sender_gets_its_copy_and_the_sending_one_only_its_ack(house: House) -> None:
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        tablet_token = await people.api.create_token(user_a, "tablet")
        async with (
            talker(house.urls["epoll"]) as phone,
            talker(house.urls["trio-websocket"], codec.MSGPACK) as tablet,
            talker(house.urls["trio-websocket"]) as other,
        ):
            await phone.log_in(user_a, people.tokens[user_a])
            await tablet.log_in(user_a, tablet_token, "tablet")
            await other.log_in(user_b, people.tokens[user_b])
            await phone.send(message(conversation_id, "k1", "copied"))
            ack: frames.MessageAck = await phone.expect(frames.MessageAck)
            for reader in (tablet, other):
                frame: frames.Messages = await reader.expect(frames.Messages)
                assert [stored.content for stored in frame.payload.messages] == ["copied"]
                assert frame.payload.messages[0].message_id == ack.payload.message_id
            with trio.move_on_after(1.0) as quiet:
                await phone.expect(frames.Messages)
            assert quiet.cancelled_caught


async def test_w51_the_same_device_again_replaces_the_older_connection_on_any_gateway(house: House) -> None:
    async with crowd(house) as people:
        user_id = await people.user()
        token = people.tokens[user_id]
        for older, newer in ((0, 0), (0, 1), (1, 0), (1, 1)):
            async with talker(house.gateways[older]) as first, talker(house.gateways[newer]) as second:
                await first.log_in(user_id, token)
                await second.log_in(user_id, token)
                error: frames.Error = await first.expect(frames.Error)
                assert error.payload.code is ErrorCode.REPLACED
                assert await first.close_code() == 4409
                await second.send(frames.Heartbeat(timestamp=1))
                await second.expect(frames.HeartbeatAck)


# --- Redis keys ------------------------------------------------------------------------------------------------------


async def test_connection_and_presence_keys_have_their_lifetimes_and_go_with_the_connection(house: House) -> None:
    async with crowd(house) as people:
        user_id = await people.user()
        tablet_token = await people.api.create_token(user_id, "tablet")

        def connections(client: Any) -> set[str]:
            return set(client.hgetall(keys.connection(user_id)))

        with house.redis() as client:
            async with talker(house.urls["epoll"]) as phone:
                await phone.log_in(user_id, people.tokens[user_id])
                async with talker(house.urls["trio-websocket"]) as tablet:
                    await tablet.log_in(user_id, tablet_token, "tablet")
                    await eventually(lambda: connections(client) == {"phone-1", "tablet"}, "both devices")
                    registered: Any = client.hget(keys.connection(user_id), "tablet")
                    registry = codec.decode_registry(registered)
                    assert client.exists(keys.instance(registry.instance_id))
                    lifetimes: Any = [client.ttl(keys.connection(user_id)), client.ttl(keys.presence(user_id))]
                    assert 3_500 < lifetimes[0] <= 3_600
                    assert 240 < lifetimes[1] <= 300
                    shown: Any = client.get(keys.presence(user_id))
                    assert codec.decode_presence(shown).status == "online"
                await eventually(lambda: connections(client) == {"phone-1"}, "one device")
            await eventually(lambda: connections(client) == set(), "no device")

            def is_offline() -> bool:
                shown: Any = client.get(keys.presence(user_id))
                return shown is None or codec.decode_presence(shown).status == "offline"

            await eventually(is_offline, "offline")


async def test_the_inbox_of_somebody_away_is_kept_for_thirty_days_and_emptied_by_delivery(house: House) -> None:
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        sender = await people.phone(user_a)
        with trio.fail_after(PATIENCE_SECONDS):
            ids = [(await sender.send(conversation_id, f"{number}")).message_id for number in range(3)]
        with house.redis() as client:
            await eventually(lambda: client.lrange(keys.inbox(user_b), 0, -1) == ids, "inbox")
            lifetime: Any = client.ttl(keys.inbox(user_b))
            assert 30 * 86_400 - 60 < lifetime <= 30 * 86_400
            assert not client.exists(keys.inbox(user_a))

            await people.phone(user_b)
            await people.settle(conversation_id)
            await eventually(lambda: client.llen(keys.inbox(user_b)) == 0, "empty inbox")
