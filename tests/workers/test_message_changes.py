"""Edits, deletions and reactions in the stream: entries of the log whose effects survive crashes and late owners."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import codec, records
from protocol.errors import ErrorCode
from protocol.models import ConversationType, MessageType, StoredMessage
from protocol.watermarks import chain_digest, content_hash
from tests.workers.lanes import crashing_lane, eventually, lose_its_lease, run_lane, settled, shown
from workers import janitor
from workers.consumer import Lane

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio

FOR_ALL = records.Delete(for_all=True)
FOR_ME = records.Delete(for_all=False)


def hexed(content: str) -> str:
    return content_hash(content).hex()


def thumb(add: bool = True) -> records.React:
    return records.React("👍", add)


async def test_an_edit_is_an_entry_and_its_target_says_the_new_thing(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "first")
        ack = await yard.changed(conv, "ann", "e1", target, records.Edit("second"))
        again = await yard.changed(conv, "ann", "e1", target, records.Edit("second"))
        other = await yard.changed(conv, "ann", "e1", target, records.Edit("third"))
        _, told = await yard.next_down(records.Delivery, 2)
        entry = await yard.stored(ack["message_id"])
        page = await yard.seen("bob", conv)
    assert (ack["sequence_number"], ack["idempotency_key"]) == (2, "e1")
    assert (again["message_id"], again["duplicate"]) == (ack["message_id"], True)
    assert other["code"] == "idempotency_conflict"
    event = codec.decode_system_event(entry["content"])
    assert (event.event, event.actor, event.targets, event.content) == ("edited", "ann", [target], "second")
    assert (entry["sender_id"], entry["target_message_id"], entry["countable"]) == ("system", target, 1)
    assert (page[target].content, page[target].content_hash) == ("second", hexed("first"))
    assert page[target].edited_at == entry["created_at"]
    (live,) = shown(told.frame).messages
    assert (live.message_id, live.target_message_id) == (ack["message_id"], target)
    assert (told.users, told.skip) == (["ann", "bob"], 0)


async def test_the_chain_holds_over_what_changed_content(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "first")
        await yard.changed(conv, "ann", "e1", target, records.Edit("second"))
        await yard.changed(conv, "ann", "d1", target, FOR_ALL)
        page = await yard.seen("bob", conv)
        head = (await yard.log(conv))[-1]
    digest = bytes(16)
    for message in page.values():
        hashed = message.content_hash
        piece = content_hash(message.content) if hashed is msgspec.UNSET else bytes.fromhex(hashed)
        digest = chain_digest(digest, str(message.message_id), message.sender_id, message.sequence_number, piece)
    assert digest == head["digest"]


async def test_deleting_for_all_leaves_a_place_and_no_content_anywhere(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(
            conv, "ann", "k1", "secret one", message_type=MessageType.IMAGE, media_url=await yard.upload("ann")
        )
        edit = await yard.changed(conv, "ann", "e1", target, records.Edit("secret two"))
        ack = await yard.changed(conv, "ann", "d1", target, FOR_ALL)
        stored = await yard.log(conv)
        page = await yard.seen("bob", conv)
        late = [
            await yard.changed(conv, "ann", "e2", target, records.Edit("again")),
            await yard.changed(conv, "bob", "r1", target, thumb()),
            await yard.changed(conv, "ann", "d2", target, FOR_ALL),
        ]
    assert b"secret" not in msgspec.json.encode([document["content"] for document in stored])
    assert "media_url" not in stored[0]
    gone = page[target]
    assert (gone.content, gone.content_hash, gone.media_url) == ("", hexed("secret one"), msgspec.UNSET)
    assert gone.deleted_at == page[ack["message_id"]].created_at == page[edit["message_id"]].deleted_at
    assert page[edit["message_id"]].content == ""
    assert [answer["code"] for answer in late] == ["not_found"] * 3


async def test_deleting_for_oneself_shows_the_others_nothing(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "hello")
        ack = await yard.changed(conv, "bob", "h1", target, FOR_ME)
        again = await yard.changed(conv, "bob", "h2", target, FOR_ME)
        _, *told = await yard.next_down(records.Delivery, 3)
        mine, theirs = await yard.seen("bob", conv), await yard.seen("ann", conv)
    entry = ack["message_id"]
    assert (again["message_id"], again["sequence_number"]) == (target, 1), "nothing left to change: no entry"
    frames = {delivery.users[0]: delivery.frame for delivery in told}
    assert [len(delivery.users) for delivery in told] == [1, 1]
    assert shown(frames["bob"]).messages[0].target_message_id == target
    assert target.encode() not in frames["ann"]
    assert b"bob" not in frames["ann"]
    assert (mine[target].content, mine[target].content_hash) == ("", hexed("hello"))
    assert isinstance(mine[target].deleted_at, type(mine[target].created_at))
    assert mine[entry].target_message_id == target
    assert (theirs[target].content, theirs[target].deleted_at) == ("hello", msgspec.UNSET)
    assert theirs[entry].target_message_id is msgspec.UNSET
    event = codec.decode_system_event(theirs[entry].content)
    assert (event.event, event.actor, event.targets) == ("hidden", "", [])
    assert isinstance(event.commitment, str)
    assert "hidden" not in msgspec.json.encode(list(theirs.values())).decode().replace('"hidden\\"', "")


async def test_deleting_for_oneself_takes_the_edits_along(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "secret one")
        before = await yard.changed(conv, "ann", "e1", target, records.Edit("secret two"))
        await yard.changed(conv, "bob", "h1", target, FOR_ME)
        after = await yard.changed(conv, "ann", "e2", target, records.Edit("secret three"))
        mine, theirs = await yard.seen("bob", conv), await yard.seen("ann", conv)
    assert "secret" not in msgspec.json.encode(list(mine.values())).decode()
    assert [mine[ack["message_id"]].content for ack in (before, after)] == ["", ""]
    assert "secret three" in theirs[after["message_id"]].content
    assert theirs[target].content == "secret three"


async def test_who_has_left_sees_nothing_of_later_in_a_message_of_their_stay(yard: Yard) -> None:
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        edited = await yard.said(group, "ann", "k1", "first")
        reacted = await yard.said(group, "ann", "k2", "plain")
        early = await yard.said(group, "ann", "k3", "before")
        await yard.changed(group, "ann", "e0", early, records.Edit("edited in time"))
        await yard.remove(group, "ann", "bob")
        await yard.next_down(records.CommandOutcome, 2)
        await yard.changed(group, "ann", "e1", edited, records.Edit("not for bob"))
        await yard.changed(group, "cat", "r1", reacted, thumb())
        left, stayed = await yard.seen("bob", group), await yard.seen("cat", group)
    assert (left[edited].content, left[edited].content_hash) == ("", hexed("first"))
    assert (left[reacted].content, left[reacted].reactions) == ("plain", msgspec.UNSET)
    assert left[early].content == "edited in time"
    assert stayed[edited].content == "not for bob"
    assert stayed[reacted].reactions is not msgspec.UNSET


async def test_reactions_come_and_go_one_entry_each(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
        added = await yard.changed(conv, "bob", "r1", target, thumb())
        same = await yard.changed(conv, "bob", "r2", target, thumb())
        both = await yard.changed(conv, "ann", "r3", target, thumb())
        between = await yard.seen("ann", conv)
        removed = await yard.changed(conv, "bob", "r4", target, thumb(add=False))
        await yard.changed(conv, "ann", "r5", target, thumb(add=False))
        after = await yard.seen("ann", conv)
    assert [answer["sequence_number"] for answer in (added, same, both, removed)] == [2, 1, 3, 4]
    assert same["message_id"] == target
    assert [(r.user_id, r.emoji) for r in between[target].reactions or ()] == [("bob", "👍"), ("ann", "👍")]
    assert after[target].reactions is msgspec.UNSET


async def test_what_was_deleted_for_all_shows_no_reactions(yard: Yard) -> None:
    """In pages, alone and in the store; also where the deletion found them there and its own effect was late."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target, older = [await yard.said(conv, "ann", key) for key in ("k1", "k2")]
        for message_id in (target, older):
            await yard.changed(conv, "bob", f"r{message_id}", message_id, thumb())
        await yard.changed(conv, "ann", "d1", target, FOR_ALL)
    deleted = {"content": "", "deleted_at": datetime.now(UTC)}
    await yard.store.db["messages"].update_one({"_id": older}, {"$set": deleted})
    page = await yard.seen("bob", conv)
    alone = await yard.store.search.message("bob", conv, older)
    assert isinstance(alone, StoredMessage)
    assert [shown.reactions for shown in (page[target], page[older], alone)] == [msgspec.UNSET] * 3
    assert "reactions" not in await yard.stored(target)


async def test_the_last_message_of_a_list_is_not_looked_for_through_a_whole_history(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.store.search.CHANGES", 3)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
        for number in range(2):
            await yard.changed(conv, "bob", f"r{number}", target, records.React(f"{number}", add=True))
        near = await yard.store.search.newest("bob", [conv])
        await yard.changed(conv, "bob", "r2", target, thumb())
        far = await yard.store.search.newest("bob", [conv])
    assert near[conv].message_id == target
    assert far == {}


async def test_a_batch_of_reactions_knows_what_its_earlier_entries_did(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
    for number in range(11):
        await yard.change(conv, "bob", f"r{number}", target, records.React(f"e{number}", add=True))
    await yard.change(conv, "bob", "r-again", target, records.React("e0", add=True))
    await yard.change(conv, "ann", "d1", target, FOR_ALL)
    await yard.send(conv, "bob", "k2", reply_to_message_id=target)
    async with run_lane(yard):
        answers = [answer["payload"] for answer in await yard.acks(14)]
    assert [answer.get("code") for answer in answers[10:]] == ["validation_failed", None, None, "validation_failed"]
    assert answers[11]["sequence_number"] == 1


@pytest.mark.parametrize(
    ("sender", "change", "code"),
    [
        ("bob", records.Edit("mine now"), "forbidden"),
        ("bob", FOR_ALL, "forbidden"),
        ("eve", thumb(), "conversation_not_found"),
        ("eve", FOR_ME, "conversation_not_found"),
    ],
)
async def test_what_may_not_be_changed_gets_its_code(yard: Yard, sender: str, change: Any, code: str) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
        answer = await yard.changed(conv, sender, "x1", target, change)
        stored = await yard.log(conv)
    assert answer["code"] == code
    assert [m["content"] for m in stored] == ["hello"]


async def test_no_other_conversation_and_no_system_message_is_changed(yard: Yard) -> None:
    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        other = await yard.create("ann", "cat")
        foreign = await yard.said(other, "ann", "k1")
        before = await yard.said(group, "ann", "k1")
        await yard.add(group, "ann", "cat")
        await yard.next_down(records.CommandOutcome, 3)
        created = (await yard.log(group))[0]["_id"]
        codes = [
            (await yard.changed(group, user, f"x{number}", target, thumb())).get("code")
            for number, (user, target) in enumerate(
                [("ann", foreign), ("ann", created), ("cat", before), ("ann", "msg_nowhere"), ("ann", before)]
            )
        ]
        await yard.send(group, "ann", "k2", reply_to_message_id=created)
        (reply,) = await yard.acks(1)
    assert codes == ["not_found"] * 4 + [None]
    assert reply["payload"]["code"] == "validation_failed", "nobody replies to a system message"


async def test_an_edit_that_comes_too_late_is_refused(yard: Yard) -> None:
    async with run_lane(yard, edit_seconds=0):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
        await anyio.sleep(0.01)
        late = await yard.changed(conv, "ann", "e1", target, records.Edit("new"))
        deleted = await yard.changed(conv, "ann", "d1", target, FOR_ALL)
    assert late["code"] == "too_late"
    assert deleted["sequence_number"] == 2


async def test_media_without_content_has_nothing_to_edit(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(
            conv, "ann", "k1", "", message_type=MessageType.IMAGE, media_url=await yard.upload("ann")
        )
        answer = await yard.changed(conv, "ann", "e1", target, records.Edit("caption"))
    assert answer["code"] == "validation_failed"


async def test_both_doors_get_the_same_answers(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", request="r1")
        await yard.send(conv, "ann", "k1", "other", request="r2")
        created, sent, conflict = await yard.next_down(records.CommandOutcome, 3)
        assert created.code is None
        payload = msgspec.json.decode(sent.body)
        await yard.change(conv, "bob", "e1", payload["message_id"], thumb(), request="r3")
        await yard.change(conv, "bob", "e2", payload["message_id"], FOR_ALL, request="r4")
        reacted, refused = await yard.next_down(records.CommandOutcome, 2)
    assert (sent.request, payload["sequence_number"], payload["idempotency_key"]) == ("r1", 1, "k1")
    assert (conflict.request, conflict.code) == ("r2", ErrorCode.IDEMPOTENCY_CONFLICT)
    assert msgspec.json.decode(reacted.body)["sequence_number"] == 2
    assert (refused.request, refused.code) == ("r4", ErrorCode.FORBIDDEN)


async def test_a_retry_after_an_edit_or_deletion_keeps_its_ack_and_brings_nothing_back(yard: Yard) -> None:
    """In memory and after a take-over: the fingerprint is of what was sent, and nobody gets the old content again."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        picture = await yard.upload("ann")
        edited = await yard.said(conv, "ann", "k1", "first")
        deleted = await yard.said(conv, "ann", "k2", "gone", message_type=MessageType.IMAGE, media_url=picture)
        await yard.changed(conv, "ann", "e1", edited, records.Edit("second"))
        await yard.changed(conv, "ann", "d1", deleted, FOR_ALL)
        await yard.connect("bob")
        yard.down.clear()
        for _ in range(2):
            await yard.send(conv, "ann", "k1", "first")
            await yard.send(conv, "ann", "k2", "gone", message_type=MessageType.IMAGE, media_url=picture)
        in_memory = await yard.acks(4)
    async with run_lane(yard):
        await yard.send(conv, "ann", "k1", "first")
        await yard.send(conv, "ann", "k2", "gone", message_type=MessageType.IMAGE, media_url=picture)
        await yard.send(conv, "ann", "k2", "other")
        *after, conflict = await yard.acks(3)
        await eventually(lambda: settled(yard))
    for first, second in [in_memory[:2], in_memory[2:], after]:
        assert (first["payload"]["message_id"], second["payload"]["message_id"]) == (edited, deleted)
        assert first["payload"]["duplicate"] is second["payload"]["duplicate"] is True
    assert conflict["payload"]["code"] == "idempotency_conflict"
    assert not [item for item in yard.down if isinstance(item, records.Delivery)]


async def test_a_retried_change_keeps_its_ack_where_nothing_is_left_to_do(yard: Yard) -> None:
    """After a take-over the key is looked up: the reaction is there, the target gone, and yet it is no refusal."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
        first = [
            await yard.changed(conv, "bob", "r1", target, thumb()),
            await yard.changed(conv, "bob", "h1", target, FOR_ME),
            await yard.changed(conv, "ann", "d1", target, FOR_ALL),
        ]
    async with run_lane(yard):
        again = [
            await yard.changed(conv, "bob", "r1", target, thumb()),
            await yard.changed(conv, "bob", "h1", target, FOR_ME),
            await yard.changed(conv, "ann", "d1", target, FOR_ALL),
        ]
    assert [a["message_id"] for a in again] == [a["message_id"] for a in first]
    assert [a["sequence_number"] for a in again] == [2, 3, 4]


async def test_forwarded_is_stored_and_shown(yard: Yard) -> None:
    await yard.connect("bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k1", forwarded=True)
        plain = await yard.said(conv, "ann", "k2")
        first, second = await yard.next_down(records.Delivery, 2)
        page = await yard.seen("bob", conv)
    assert shown(first.frame).messages[0].forwarded is True
    assert shown(second.frame).messages[0].forwarded is msgspec.UNSET
    assert [message.forwarded for message in page.values()] == [True, msgspec.UNSET]
    assert not {"expires_at", "content_hash", "forwarded", "target_message_id"} & (await yard.stored(plain)).keys()


# --- crashes and late owners -----------------------------------------------------------------------------------------


async def lose_the_projection(yard: Yard, monkeypatch: pytest.MonkeyPatch, put: Any) -> None:
    """A lane commits what `put` appends, is cut off before it writes the effects, and Redis loses the entry too."""
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.conversations, "apply", never)
        await put()
        async with crashing_lane(yard):
            with anyio.fail_after(5):
                await reached.wait()
    await yard.broker.client.flushall()
    await yard.open()


async def test_the_head_of_a_change_nobody_heard_of_is_flushed_for_the_sweep(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "first")
        await eventually(lambda: settled(yard))
    stored = anyio.Event()

    async def never(self: Lane, *_: object) -> None:
        stored.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(Lane, "_deliver", never)
        async with crashing_lane(yard):
            await yard.change(conv, "ann", "e1", target, records.Edit("second"))
            with anyio.fail_after(5):
                await stored.wait()
    async with run_lane(yard):
        await eventually(lambda: settled(yard))

    async def is_flushed() -> bool:
        """Where the sweep looks, and nowhere else."""
        head = await yard.store.db["sequence_numbers"].find_one({"_id": conv})
        return head is not None and head["last_sequence_number"] == 2

    await eventually(is_flushed)


async def test_an_edit_without_its_projection_is_repaired_from_the_log(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "first")
    await lose_the_projection(yard, monkeypatch, lambda: yard.change(conv, "ann", "e1", target, records.Edit("second")))
    assert (await yard.stored(target))["content"] == "first"
    async with run_lane(yard):
        await yard.said(conv, "bob", "k2")
        page = await yard.seen("bob", conv)
        retried = await yard.changed(conv, "ann", "e1", target, records.Edit("second"))
    assert (page[target].content, page[target].content_hash) == ("second", hexed("first"))
    assert (retried["sequence_number"], retried["duplicate"]) == (2, True)
    assert (await yard.store.db["conversations"].find_one({"_id": conv}) or {})["membership_seq"] == 2


async def test_a_deletion_without_its_projection_is_repaired_from_the_log(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit and a reaction before it were lost with it: all three are redone, in their order."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(
            conv, "ann", "k1", "secret", message_type=MessageType.IMAGE, media_url=await yard.upload("ann")
        )

    async def three() -> None:
        await yard.change(conv, "ann", "e1", target, records.Edit("secret too"))
        await yard.change(conv, "bob", "h1", target, FOR_ME)
        await yard.change(conv, "ann", "d1", target, FOR_ALL)

    await lose_the_projection(yard, monkeypatch, three)
    committed = [(document["type"], document["content"][:7]) for document in await yard.log(conv)]
    async with run_lane(yard):
        await three()
        acks = await yard.acks(3)
        stored = await yard.log(conv)
    assert committed == [("image", "secret")] + [("system", '{"event')] * 3
    assert [ack["payload"]["sequence_number"] for ack in acks] == [2, 3, 4]
    assert b"secret" not in msgspec.json.encode([document["content"] for document in stored])
    assert (stored[0]["content_hash"], stored[0]["hidden_by"]) == (hexed("secret"), ["bob"])
    assert "media_url" not in stored[0]


async def test_an_owner_that_comes_too_late_undoes_no_later_change(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two owners: the first is held up between the log and the target, the second repairs and goes on."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1", "first")
    apply = yard.store.conversations.apply
    reached, go_on = anyio.Event(), anyio.Event()
    held: list[Any] = []

    async def held_up(projected: Any) -> None:
        if not held:
            held.append(projected)
            reached.set()
            await go_on.wait()
        await apply(projected)

    monkeypatch.setattr(yard.store.conversations, "apply", held_up)
    async with run_lane(yard) as late:
        await yard.change(conv, "ann", "e1", target, records.Edit("second"))
        with anyio.fail_after(5):
            await reached.wait()
        await lose_its_lease(late)
        async with run_lane(yard):
            await yard.change(conv, "ann", "e2", target, records.Edit("third"))
            await yard.change(conv, "bob", "r1", target, thumb())
            await yard.change(conv, "bob", "r2", target, thumb(add=False))
            sequences = [ack["payload"]["sequence_number"] for ack in await yard.acks(4)]
            go_on.set()
            await eventually(lambda: settled(yard))
    document = await yard.stored(target)
    assert sequences == [2, 3, 4, 5]
    assert (document["content"], document["content_hash"], document["reactions"]) == ("third", hexed("first"), [])
    assert [m["sequence_number"] for m in await yard.log(conv)] == [1, 2, 3, 4, 5]


# --- disappearing ----------------------------------------------------------------------------------------------------


async def test_what_disappears_is_masked_at_once_and_erased_for_good(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        before = await yard.said(conv, "ann", "k0", "stays")
        await yard.next_down(records.CommandOutcome, 1)
        assert await yard.decided(conv, "bob", records.SetDisappearing(1), "on") is None
        target = await yard.said(
            conv, "ann", "k1", "secret", message_type=MessageType.IMAGE, media_url=await yard.upload("ann")
        )
        edit = await yard.changed(conv, "ann", "e1", target, records.Edit("secret too"))
        shown_first = await yard.seen("bob", conv)
        await anyio.sleep(1.01)
        masked = await yard.seen("bob", conv)
        unerased = await yard.stored(target)
        late = await yard.changed(conv, "ann", "e2", target, records.Edit("again"))
        erased = [await janitor.erase(yard.store), await janitor.erase(yard.store)]
        stored = await yard.log(conv)
        after = await yard.seen("bob", conv)
    # Whoever loads the conversation next meets the erased entry of the edit.
    await yard.store.db["conversations"].update_one({"_id": conv}, {"$set": {"membership_seq": 0}})
    async with run_lane(yard):
        again = await yard.said(conv, "ann", "k2")
    assert shown_first[target].content == "secret too"
    expires_at = shown_first[target].expires_at
    assert expires_at == shown_first[edit["message_id"]].expires_at
    assert unerased["content"] == "secret too"
    for page in (masked, after):
        for message_id, original in [(target, hexed("secret")), (edit["message_id"], None)]:
            message = page[message_id]
            assert (message.content, message.expires_at, message.deleted_at) == ("", expires_at, expires_at)
            assert original is None or (message.content_hash, message.media_url) == (original, msgspec.UNSET)
        assert page[before].content == "stays"
    assert masked == after
    assert late["code"] == "not_found"
    assert erased == [2, 0]
    assert b"secret" not in msgspec.json.encode([document["content"] for document in stored])
    assert (await yard.stored(again))["sequence_number"] == 5


async def test_what_disappears_answers_its_repeat_and_is_not_told_again(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        await yard.decided(conv, "ann", records.SetDisappearing(60), "on")
        await yard.connect("bob")
        target = await yard.said(conv, "ann", "k1", "secret")
        (live,) = await yard.next_down(records.Delivery, 1)
        await yard.send(conv, "ann", "k1", "secret")
        (again,) = await yard.acks(1)
        await eventually(lambda: settled(yard))
    (message,) = shown(live.frame).messages
    assert (message.content, message.content_hash) == ("secret", hexed("secret"))
    assert (message.expires_at - message.created_at).total_seconds() == 60
    assert (again["payload"]["message_id"], again["payload"]["duplicate"]) == (target, True)
    assert not [item for item in yard.down if isinstance(item, records.Delivery)]
