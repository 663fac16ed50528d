"""What may happen to a message, over real processes and both gateways: changed, hidden, deleted, gone by itself, found,
received; and a device that was away ends with the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from msgspec import UNSET

from bench.http_api import Refusal
from protocol import codec, frames
from protocol.errors import ErrorCode
from protocol.frames import DeleteScope, ReactionOp
from protocol.models import EventKind, MessageType
from tests.system.crowd import PATIENCE_SECONDS, Talker, crowd, eventually, message, talker

if TYPE_CHECKING:
    from bench.phone import Phone
    from protocol.codec import FrameCodec
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]


async def test_a_device_that_was_away_ends_with_every_change(house: House) -> None:
    """The ledger holds every phone's digest chain against the log, and what each message looks like by now."""
    async with crowd(house) as people:
        ann, bob = await people.user(), await people.user()
        conversation_id = await people.direct(ann, bob)
        anns = await people.phone(ann, urls=[house.urls["epoll"]])
        bobs = await people.phone(bob, urls=[house.urls["trio-websocket"]])
        tablet = await people.phone(bob, "tablet", urls=[house.urls["epoll"]])
        with trio.fail_after(PATIENCE_SECONDS):
            await anns.send(conversation_id, "seen by all")
            await people.settle(conversation_id)
            await tablet.go_offline()
            edited, hidden, deleted = [
                (await anns.send(conversation_id, content)).message_id for content in ("edited", "hidden", "deleted")
            ]
            fates = [
                await anns.settled(await anns.edit_nowait(conversation_id, edited, "better")),
                await bobs.settled(await bobs.react_nowait(conversation_id, edited, "🚣", ReactionOp.ADD)),
                await bobs.settled(await bobs.delete_nowait(conversation_id, hidden, DeleteScope.ME)),
                await anns.settled(await anns.delete_nowait(conversation_id, deleted, DeleteScope.ALL)),
                await bobs.settled(await bobs.edit_nowait(conversation_id, edited, "mine")),
            ]
            assert [fate.code for fate in fates] == ["", "", "", "", "forbidden"]
            tablet.go_online()
            await tablet.wait_online()
            await people.settle(conversation_id)

        def look(phone: Phone, message_id: str) -> tuple[str | None, bool, int]:
            view = phone.client.logs[conversation_id].views[message_id]
            return view.content, view.deleted, len(view.reactions)

        for phone in (anns, bobs, tablet):
            assert phone.client.logs[conversation_id].cursor == 8
            assert look(phone, edited) == ("better", False, 1)
            assert look(phone, deleted) == ("", True, 0)
        assert look(bobs, hidden) == look(tablet, hidden) == ("", True, 0)
        assert hidden not in anns.client.logs[conversation_id].views, "a private matter"


async def test_the_others_are_not_told_what_somebody_has_hidden(house: House) -> None:
    async with crowd(house, judged=False) as people:
        group, (ann, bob) = await people.group(2)
        tablet_token = await people.api.create_token(bob, "tablet")
        async with (
            talker(house.urls["epoll"]) as anns,
            talker(house.urls["epoll"]) as bobs,
            talker(house.urls["trio-websocket"]) as tablet,
        ):
            await anns.log_in(ann, people.tokens[ann])
            await bobs.log_in(bob, people.tokens[bob])
            await tablet.log_in(bob, tablet_token, "tablet")
            first = await say(anns, group, "k1", "a forwarded one", forwarded=True)
            await anns.send(message(group, "k2", reply_to_message_id="msg_" + "0" * 30))
            assert (await anns.expect(frames.Error)).payload.code is ErrorCode.VALIDATION_FAILED
            second = await say(anns, group, "k2", "an answer", reply_to_message_id=first)
            entry = await stored(tablet, first)
            assert (entry.content, entry.forwarded) == ("a forwarded one", True)
            assert (await stored(tablet, second)).reply_to_message_id == first

            path = f"/v1/conversations/{group}/messages"
            body = {"content": "over HTTP", "type": "text", "timestamp": 1}
            sent: Any = await people.api.call("POST", path, people.tokens[ann], body)
            for talk in (anns, bobs, tablet):
                assert (await stored(talk, sent["message_id"])).content == "over HTTP", "also the sender's own devices"

            path = f"{path}/{first}"
            answer: Any = await people.api.call("DELETE", f"{path}?scope=me", people.tokens[bob])
            seen = [await stored(talk, answer["message_id"]) for talk in (anns, tablet)]
            assert [entry.target_message_id == first for entry in seen] == [False, True]
            veiled = codec.decode_system_event(seen[0].content)
            assert (veiled.event, veiled.actor, veiled.targets) == (EventKind.HIDDEN, "", [])
            assert first not in seen[0].content


async def say(talk: Talker, conversation_id: str, key: str, content: str, **payload: Any) -> str:
    """Send, and wait for the ack; the message's id."""
    await talk.send(message(conversation_id, key, content, **payload))
    ack: frames.MessageAck = await talk.expect(frames.MessageAck)
    return ack.payload.message_id


async def stored(talk: Talker, message_id: str) -> Any:
    """This entry of a log as it comes here."""
    while True:
        frame: frames.Messages = await talk.expect(frames.Messages)
        for entry in frame.payload.messages:
            if entry.message_id == message_id:
                return entry


async def test_messages_disappear_and_the_rest_is_found_by_metadata(house: House) -> None:
    async with crowd(house, judged=False) as people:
        group, (ann, bob) = await people.group(2)
        token, path = people.tokens[ann], f"/v1/conversations/{group}"

        async def send(content: str, **more: Any) -> str:
            body = {"content": content, "type": "text", "timestamp": 1} | more
            answer: Any = await people.api.call("POST", f"{path}/messages", token, body)
            return str(answer["message_id"])

        async def search(where: str, query: str, caller: str = bob) -> list[str]:
            answer: Any = await people.api.call("GET", f"{where}/search?{query}", people.tokens[caller])
            return [found["_id"] for found in answer["items"]]

        media_id = "med_" + "1" * 27
        with house.database() as database:
            # A finished upload, as `test_media.py` makes one.
            database["media_metadata"].insert_one(
                {"_id": media_id, "owner_id": ann, "status": "ready", "kind": "image"}
            )
        picture = await send("", type=MessageType.IMAGE.value, media_url=f"/v1/media/{media_id}")
        forwarded = await send("look", forwarded=True)
        answered = await send("nice", reply_to_message_id=picture)
        for where in (path, "/v1"):
            assert await search(where, f"sender_id={ann}") == [answered, forwarded, picture]
            assert await search(where, f"sender_id={bob}") == []
            assert await search(where, "has_media=true") == await search(where, "type=image") == [picture]
            assert await search(where, "forwarded=true&limit=1") == [forwarded]
            assert await search(where, f"reply_to={picture}") == [answered]
            assert await search(where, "before=1") == await search(where, "after=99999999999999") == []
        stranger = await people.user()
        refused = await people.api.call("GET", f"{path}/search", people.tokens[stranger])
        assert isinstance(refused, Refusal)
        assert await search("/v1", "", stranger) == []

        await people.api.call("PATCH", path, token, {"disappearing_seconds": 1})
        brief = await send("for a second")
        with house.database() as database:

            def kept(message_id: str) -> str:
                return str(database["messages"].find_one({"_id": message_id})["content"])

            assert kept(brief) == "for a second"
            await eventually(lambda: kept(brief) == "", "erased for good")
            assert kept(answered) == "nice", "sent before"
        shown: Any = await people.api.call("GET", f"{path}/messages/{brief}", people.tokens[bob])
        assert (shown["content"], "deleted_at" in shown) == ("", True)
        assert brief not in await search(path, "")


async def test_authors_alone_hear_how_many_of_a_group_have_their_message(house: House) -> None:
    async with crowd(house, judged=False) as people:
        group, users = await people.group(3)
        async with (
            talker(house.urls["epoll"]) as anns,
            talker(house.urls["trio-websocket"]) as bobs,
            talker(house.urls["epoll"]) as cats,
        ):
            for talk, user_id in zip((anns, bobs, cats), users, strict=True):
                await talk.log_in(user_id, people.tokens[user_id])
            message_id = await say(anns, group, "k1", "to all")
            told = []
            for talk in (bobs, cats):
                await talk.send(frames.DeliveryAck(message_id=message_id, timestamp=1))
                told.append((await anns.expect(frames.ReceiptUpdate)).payload)
            await bobs.send(frames.ReadReceipt(message_ids=[message_id], timestamp=1))
            told.append((await anns.expect(frames.ReceiptUpdate)).payload)
            assert [(one.user_id, one.delivered_count, one.read_count) for one in told] == [
                (users[1], 1, 0),
                (users[2], 2, 0),
                (users[1], 2, 1),
            ]
            assert {(one.participant_count, one.sequence_number) for one in told} == {(2, 2)}
            assert told[1].delivered_through == 2
            with trio.move_on_after(0.5) as quiet:
                await cats.expect(frames.ReceiptUpdate)
            assert quiet.cancelled_caught, "nobody else is told"
            path = f"/v1/conversations/{group}/messages/{message_id}/receipts"
            listed: Any = await people.api.call("GET", path, people.tokens[users[0]])
            assert {one["user_id"]: one["read"] for one in listed["items"]} == {users[1]: True, users[2]: False}


@pytest.mark.parametrize("frame_codec", [codec.JSON, codec.MSGPACK], ids=["json", "msgpack"])
async def test_nul_and_any_other_text_in_content_comes_back_as_it_went(
    house: House, transport: str, frame_codec: FrameCodec
) -> None:
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        content = "a\0b \u202e \U0001f6a3 e\u0301 \ufeff \uffff $where"
        async with (
            talker(house.urls[transport], frame_codec) as author,
            talker(house.urls["epoll"], codec.JSON) as reader,
        ):
            await author.log_in(user_a, people.tokens[user_a])
            await reader.log_in(user_b, people.tokens[user_b])
            await author.send(message(conversation_id, "k", content, receiver_id=user_b))
            frame: frames.Messages = await reader.expect(frames.Messages)
        assert [stored.content for stored in frame.payload.messages] == [content]
        assert frame.payload.messages[0].idempotency_key is UNSET
