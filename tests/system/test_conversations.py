"""Conversations over real processes and both gateways: who may do what in a group, what a member arranges for
themselves, who takes nothing from whom. The limit of a hundred has its test in `test_groups.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench.http_api import Refusal
from protocol import codec, frames
from protocol.errors import ErrorCode
from protocol.models import EventKind, Role, SystemEvent
from tests.system.crowd import Talker, crowd, message, talker

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]

LATER = "2999-01-01T00:00:00Z"


async def event(talk: Talker, kind: EventKind) -> SystemEvent:
    """The next system message of this kind that comes here."""
    while True:
        frame: frames.Messages = await talk.expect(frames.Messages)
        for stored in frame.payload.messages:
            if stored.sender_id == "system" and stored.content:
                found = codec.decode_system_event(stored.content)
                if found.event is kind:
                    return found


async def refused(talk: Talker) -> ErrorCode:
    error: frames.Error = await talk.expect(frames.Error)
    return error.payload.code


async def update(talk: Talker, wanted: str) -> frames.ConversationUpdatePayload:
    """The next `conversation_update` about this."""
    while True:
        frame: frames.ConversationUpdate = await talk.expect(frames.ConversationUpdate)
        if frame.payload.event == wanted:
            return frame.payload


async def test_a_group_lives_by_its_roles(house: House) -> None:
    async with crowd(house, judged=False) as people:
        ann, bob, cat = [await people.user() for _ in range(3)]
        owner, admin, member = (people.tokens[name] for name in (ann, bob, cat))
        body = {"type": "group", "participants": [bob, cat], "title": "rowers"}
        created: Any = await people.api.call("POST", "/v1/conversations", owner, body)
        group, path = created["_id"], f"/v1/conversations/{created['_id']}"

        async def step(token: str, method: str, suffix: str, body: object = None) -> Any:
            answer = await people.api.call(method, path + suffix, token, body)
            return answer.code if isinstance(answer, Refusal) else answer

        async with talker(house.urls["epoll"]) as bobs, talker(house.urls["trio-websocket"]) as cats:
            await bobs.log_in(bob, admin)
            await cats.log_in(cat, member)
            assert await step(member, "PATCH", "", {"title": "mine"}) is ErrorCode.FORBIDDEN
            await step(owner, "PATCH", f"/participants/{bob}", {"role": "admin"})
            await step(admin, "PATCH", "", {"title": "steerers"})
            await step(admin, "PATCH", f"/participants/{cat}", {"silenced_until": LATER})
            for talk in (bobs, cats):
                assert (await event(talk, EventKind.ROLES)).roles == {bob: Role.ADMIN}
                assert (await event(talk, EventKind.RENAMED)).title == "steerers"
                assert (await event(talk, EventKind.SILENCED)).targets == [cat]
            await cats.send(message(group, "k1"))
            assert await refused(cats) is ErrorCode.MUTED
            await step(admin, "PATCH", f"/participants/{cat}", {"silenced_until": None})
            await cats.send(message(group, "k1"))
            assert (await cats.expect(frames.MessageAck)).payload.sequence_number == 6

            await step(admin, "PUT", f"/bans/{cat}")
            assert (await event(bobs, EventKind.BANNED)).targets == [cat]
            assert (await update(cats, "removed")).conversation_id == group
            await cats.send(message(group, "k2"))
            assert await refused(cats) is ErrorCode.CONVERSATION_NOT_FOUND
            assert await step(owner, "POST", "/participants", {"user_ids": [cat]}) is ErrorCode.BANNED

            await step(owner, "DELETE", f"/participants/{ann}")
            left = await event(bobs, EventKind.LEFT)
            assert (left.targets, left.roles) == ([ann], {bob: Role.OWNER}), "somebody can still manage it"
            await step(admin, "DELETE", f"/bans/{cat}")
            again = await step(admin, "POST", "/participants", {"user_ids": [cat]})
            assert again["participants"] == [bob, cat]
            assert (await update(cats, "created")).conversation_id == group
    assert house.sequences(group) == list(range(1, 11))


async def test_what_a_member_arranges_shows_on_their_other_device(house: House) -> None:
    async with crowd(house, judged=False) as people:
        group, (ann, bob) = await people.group(2)
        tablet_token = await people.api.create_token(ann, "tablet")
        path, token = f"/v1/conversations/{group}", people.tokens[ann]
        async with (
            talker(house.urls["epoll"]) as phone,
            talker(house.urls["trio-websocket"]) as tablet,
            talker(house.urls["epoll"]) as other,
        ):
            await phone.log_in(ann, token)
            await tablet.log_in(ann, tablet_token, "tablet")
            await other.log_in(bob, people.tokens[bob])
            body = {"archived": True, "pinned": True, "muted_until": LATER}
            assert await people.api.call("PATCH", f"{path}/settings", token, body) == body
            for talk in (phone, tablet):
                for kind in ("archived", "pinned", "muted"):
                    told = await update(talk, kind)
                    assert (told.conversation_id, told.archived, told.pinned) == (group, True, True)
                    assert told.muted_until == 32_472_144_000_000
            await other.send(message(group, "k1", "hello"))
            await other.expect(frames.MessageAck)
            listed: Any = await people.api.call("GET", "/v1/conversations?archived=true", token)
            (shown,) = listed["items"]
            assert (shown["unread_count"], shown["last_message"]["content"]) == (1, "hello")
            assert shown["pinned"] is True
            unlisted: Any = await people.api.call("GET", "/v1/conversations?archived=false", token)
            assert unlisted["items"] == []


async def test_who_is_blocked_gets_nothing_through(house: House) -> None:
    async with crowd(house, judged=False) as people:
        ann, bob = await people.user(), await people.user()
        conversation_id = await people.direct(ann, bob)
        token = people.tokens[ann]
        async with talker(house.urls["trio-websocket"]) as bobs:
            await bobs.log_in(bob, people.tokens[bob])
            assert await people.api.call("PUT", f"/v1/blocks/{bob}", token) == {}
            await bobs.send(message(conversation_id, "k1"))
            assert await refused(bobs) is ErrorCode.BLOCKED
            body = {"type": "group", "participants": [ann]}
            answer = await people.api.call("POST", "/v1/conversations", people.tokens[bob], body)
            assert isinstance(answer, Refusal)
            assert answer.code is ErrorCode.BLOCKED
            assert await people.api.call("DELETE", f"/v1/blocks/{bob}", token) == {}
            await bobs.send(message(conversation_id, "k1"))
            assert (await bobs.expect(frames.MessageAck)).payload.sequence_number == 1
