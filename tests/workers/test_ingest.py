"""The ingest path on real servers: records in, committed log, down records out, crashes in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pymongo.errors import AutoReconnect

from protocol import codec, keys, records
from protocol.errors import ErrorCode
from protocol.models import ConversationType
from protocol.watermarks import chain_digest
from tests.workers.lanes import SHARDS, crashing_lane, open_yard, run_lane, shown
from workers.broker import BrokerUnavailable
from workers.store.messages import OutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


@pytest.fixture
async def yard(redis_url: str, mongodb_url: str) -> AsyncIterator[Yard]:
    async with open_yard(redis_url, mongodb_url) as opened:
        yield opened


async def settled(yard: Yard) -> bool:
    """Nothing is pending in any shard."""
    for shard in range(SHARDS):
        pending = await yard.broker.client.xpending(keys.ingest(shard), keys.INGEST_GROUP)
        if pending["pending"]:
            return False
    return True


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    with anyio.fail_after(seconds):
        while not await check():  # noqa: ASYNC110 - the servers tell nobody
            await anyio.sleep(0.05)


async def test_a_message_is_stored_then_acked_then_delivered(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        (delivery,) = await yard.next_down(records.Delivery, 1)
        stored = await yard.log(conv)
    assert ack["type"] == "message_ack"
    assert ack["client_message_id"] == "c-k1"
    assert ack["payload"]["sequence_number"] == 1
    assert ack["payload"]["status"] == "sent"
    assert "duplicate" not in ack["payload"]
    assert [(m["_id"], m["sequence_number"], m["content"]) for m in stored] == [
        (ack["payload"]["message_id"], 1, "hello")
    ]
    assert delivery.users == ["ann", "bob"]
    assert delivery.skip == 7
    payload = shown(delivery.frame)
    assert payload.messages[0].message_id == stored[0]["_id"]
    assert b"idempotency_key" not in delivery.frame
    assert stored[0]["digest"] == chain_digest(bytes(16), stored[0]["_id"], "ann", 1, "hello")
    assert keys.shard_of_message(stored[0]["_id"], SHARDS) == keys.shard_of(conv, SHARDS)


async def test_everything_is_acknowledged_once_it_has_an_outcome(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        for number in range(20):
            await yard.send(conv, "ann", f"k{number}")
        await yard.send("conv_unknown", "ann", "x")
        acks = await yard.acks(21)
        (message_id,) = {a["payload"]["message_id"] for a in acks if a["payload"].get("sequence_number") == 20}
        await yard.delivered(message_id, "bob")
        await eventually(lambda: settled(yard))
    groups = await yard.broker.client.xinfo_consumers(keys.ingest(keys.shard_of(conv, SHARDS)), keys.INGEST_GROUP)
    assert [consumer["name"] for consumer in groups] == [b"owner"]


async def test_the_same_key_again_is_acked_with_the_first_place(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (first,) = await yard.acks(1)
        for _ in range(3):
            await yard.send(conv, "ann", "k1")
        again = await yard.acks(3)
        assert len(await yard.log(conv)) == 1
    for ack in again:
        assert ack["payload"]["duplicate"] is True
        assert ack["payload"]["message_id"] == first["payload"]["message_id"]
        assert ack["payload"]["sequence_number"] == 1


async def test_a_retry_after_a_take_over_finds_the_first_by_majority_read(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (first,) = await yard.acks(1)
    async with run_lane(yard):
        await yard.send(conv, "ann", "k1")
        await yard.send(conv, "ann", "k2")
        again, second = await yard.acks(2)
    assert again["payload"]["message_id"] == first["payload"]["message_id"]
    assert again["payload"]["duplicate"] is True
    assert second["payload"]["sequence_number"] == 2


async def test_a_retry_after_idempotency_keys_expired_is_still_a_duplicate(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        await yard.acks(1)
    assert await yard.store.db["idempotency_keys"].count_documents({}) == 1
    await yard.store.db["idempotency_keys"].delete_many({})
    async with run_lane(yard):
        await yard.send(conv, "ann", "k1")
        (again,) = await yard.acks(1)
        assert len(await yard.log(conv)) == 1
    assert again["payload"]["duplicate"] is True
    assert await yard.store.db["dead_letter_queue"].count_documents({}) == 0


async def test_the_same_key_with_another_payload_is_a_conflict_and_the_first_stays(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", "one")
        await yard.send(conv, "ann", "k1", "two")
        _, refused = await yard.acks(2)
        stored = await yard.log(conv)
    assert refused["payload"]["code"] == "idempotency_conflict"
    assert refused["payload"]["idempotency_key"] == "k1"
    assert [m["content"] for m in stored] == ["one"]


async def test_keys_are_scoped_by_conversation_and_sender(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        other = await yard.create("ann", "cat")
        await yard.send(conv, "ann", "k1", "a")
        await yard.send(conv, "bob", "k1", "b")
        await yard.send(other, "ann", "k1", "c")
        acks = await yard.acks(3)
    assert all(ack["type"] == "message_ack" and "duplicate" not in ack["payload"] for ack in acks)
    assert len({ack["payload"]["message_id"] for ack in acks}) == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"sender_id": "eve"}, "conversation_not_found"),
        ({"receiver_id": "eve"}, "validation_failed"),
        ({"receiver_id": "ann"}, "validation_failed"),
        ({"reply_to_message_id": "msg_nowhere"}, "validation_failed"),
    ],
)
async def test_what_may_not_be_sent_gets_its_code_and_takes_no_number(
    yard: Yard, changes: dict[str, Any], code: str
) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, **{"sender_id": "ann", "key": "k1", **changes})
        await yard.send(conv, "ann", "k2")
        refused, ack = await yard.acks(2)
    assert refused["payload"]["code"] == code
    assert ack["payload"]["sequence_number"] == 1


async def test_a_foreign_and_an_unknown_conversation_get_the_same_answer(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "eve", "k1")
        await yard.send("conv_nowhere", "eve", "k1")
        answers = await yard.acks(2)
    for answer in answers:
        answer["payload"].pop("conversation_id")
    assert answers[0] == answers[1]


async def test_a_reply_must_name_a_message_of_the_same_conversation(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        other = await yard.create("ann", "cat")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        target = ack["payload"]["message_id"]
        await yard.send(conv, "bob", "k2", reply_to_message_id=target)
        await yard.send(other, "ann", "k3", reply_to_message_id=target)
        answers = await yard.acks(2)
        stored = await yard.log(conv)
    assert {a["type"] for a in answers} == {"message_ack", "error"}
    assert stored[1]["reply_to_message_id"] == target


async def test_a_crash_between_commit_and_acknowledgement_is_invisible(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c6 and c7 of the crash table: the next owner commits nothing twice and tells everybody again."""
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)

    stuck = anyio.Event()

    async def never(*_: object) -> None:
        stuck.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.broker, "publish_and_settle", never)
        async with crashing_lane(yard):
            for number in range(5):
                await yard.send(conv, "ann", f"k{number}")
            with anyio.fail_after(5):
                await stuck.wait()
    committed = [m["_id"] for m in await yard.log(conv)]
    assert committed
    async with run_lane(yard):
        acks = await yard.acks(5)
        await eventually(lambda: settled(yard))
        deliveries = await yard.next_down(records.Delivery, 1)
    stored = await yard.log(conv)
    assert [m["sequence_number"] for m in stored] == [1, 2, 3, 4, 5]
    assert [m["_id"] for m in stored][: len(committed)] == committed
    assert sorted(a["payload"]["sequence_number"] for a in acks) == [1, 2, 3, 4, 5]
    assert deliveries[0].from_sequence == 1


async def test_an_insert_whose_reply_is_lost_burns_and_repeats_no_number(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c4: the outcome is unknown, a prefix or all of it is stored."""
    append = yard.store.messages.append
    losses = 0

    async def append_and_lose(documents: Any) -> None:
        nonlocal losses
        if losses < 3 and len(documents) > 1:
            losses += 1
            await append(documents[: len(documents) // 2])
            raise OutcomeUnknown("the reply was lost") from AutoReconnect()
        await append(documents)

    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        monkeypatch.setattr(yard.store.messages, "append", append_and_lose)
        for number in range(60):
            await yard.send(conv, "ann", f"k{number}", content=str(number))
        acks = await yard.acks(60)
        stored = await yard.log(conv)
    assert losses == 3
    assert [m["sequence_number"] for m in stored] == list(range(1, 61))
    assert [m["content"] for m in stored] == [str(number) for number in range(60)]
    assert {a["client_message_id"]: a["payload"]["message_id"] for a in acks} == {
        f"c-{m['idempotency_key']}": m["_id"] for m in stored
    }
    assert not any("duplicate" in a["payload"] for a in acks)


async def test_two_owners_at_once_are_fenced_by_the_indexes(yard: Yard) -> None:
    """z1: a zombie still writes; no number is doubled or skipped, no key stored twice."""
    async with run_lane(yard) as one:
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "before")
        await yard.acks(1)
        async with run_lane(yard):
            for number in range(200):
                await yard.send(conv, ("ann", "bob")[number % 2], f"k{number}")
            acks = await yard.acks(200)
        stored = await yard.log(conv)
        assert one is not None
    assert [m["sequence_number"] for m in stored] == list(range(1, 202))
    assert len({m["idempotency_key"] for m in stored}) == 201
    by_key = {m["idempotency_key"]: m["sequence_number"] for m in stored}
    for ack in acks:
        assert by_key[ack["client_message_id"].removeprefix("c-")] == ack["payload"]["sequence_number"]


async def test_an_unreadable_entry_becomes_a_dead_letter_with_its_bytes(yard: Yard) -> None:
    async with run_lane(yard):
        await yard.broker.client.xadd(keys.ingest(1), {keys.FIELD: b"\xc1garbage"})
        await eventually(lambda: settled(yard))
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        await yard.acks(1)
    letters = await yard.store.db["dead_letter_queue"].find().to_list()
    assert [(letter["raw"], letter["status"], letter["error_type"]) for letter in letters] == [
        (b"\xc1garbage", "pending", "validation_failed")
    ]
    assert letters[0]["next_retry_at"] is None


async def test_a_batch_that_fails_for_an_unforeseen_reason_buries_only_the_culprit(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = yard.store.messages.append

    async def append_unless_poison(documents: Any) -> None:
        if any(document["content"] == "poison" for document in documents):
            raise ZeroDivisionError("nobody foresaw this")
        await append(documents)

    monkeypatch.setattr(yard.store.messages, "append", append_unless_poison)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        for number in range(6):
            await yard.send(conv, "ann", f"k{number}", content="poison" if number == 3 else "fine")
        acks = await yard.acks(5)
        await eventually(lambda: settled(yard))
        stored = await yard.log(conv)
    assert [m["sequence_number"] for m in stored] == [1, 2, 3, 4, 5]
    assert sorted(a["payload"]["sequence_number"] for a in acks) == [1, 2, 3, 4, 5]
    letters = await yard.store.db["dead_letter_queue"].find().to_list()
    assert len(letters) == 1
    assert b"poison" in letters[0]["raw"]


async def test_redis_coming_back_empty_loses_no_committed_message_and_no_number(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        await yard.acks(1)
        await yard.broker.client.flushall()
        await yard.open()
        yard.down.clear()
        await yard.send(conv, "ann", "k1")
        await yard.send(conv, "ann", "k2")
        again, second = await yard.acks(2)
    assert again["payload"]["sequence_number"] == 1
    assert second["payload"]["sequence_number"] == 2


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_membership_is_part_of_the_log(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.send(group, "bob", "k1")
        await yard.add(group, "ann", "cat")
        await yard.send(group, "cat", "k2")
        await yard.remove(group, "ann", "bob")
        await yard.send(group, "bob", "k3")
        await yard.send(group, "bob", "k1")
        outcomes = await yard.next_down(records.CommandOutcome, 3)
        acks = {a["payload"]["idempotency_key"]: a for a in await yard.acks(3)}
        (late,) = await yard.acks(1) if len(acks) == 3 and "k3" in acks else [None]
        stored = await yard.log(group)
        members = {m["user_id"]: m async for m in yard.store.db["memberships"].find({"conversation_id": group})}
        document = await yard.store.db["conversations"].find_one({"_id": group})
    assert [o.code for o in outcomes] == [None, None, None]
    assert [m["type"] for m in stored] == ["system", "text", "system", "text", "system"]
    assert [m["sequence_number"] for m in stored] == [1, 2, 3, 4, 5]
    events = [codec.decode_system_event(m["content"]) for m in stored if m["type"] == "system"]
    assert [(e.event, e.actor, e.targets) for e in events] == [
        ("created", "ann", ["ann", "bob"]),
        ("added", "ann", ["cat"]),
        ("removed", "ann", ["bob"]),
    ]
    assert (members["cat"]["join_seq"], members["bob"]["leave_seq"]) == (3, 5)
    assert document is not None
    assert document["participants"] == ["ann", "cat"]
    assert acks["k3"]["payload"]["code"] == "conversation_not_found"
    assert late is not None
    assert late["payload"]["duplicate"] is True, "the retry of an acked message keeps its ack"


async def test_the_hundred_and_first_participant_is_refused_under_concurrency(yard: Yard) -> None:
    users = [f"u{number}" for number in range(99)]
    async with run_lane(yard):
        group = await yard.create(*users, kind=ConversationType.GROUP)
        for number in range(10):
            await yard.add(group, "u0", f"late{number}", request=f"r{number}")
        outcomes = await yard.next_down(records.CommandOutcome, 11)
        document = await yard.store.db["conversations"].find_one({"_id": group})
        live = await yard.store.db["memberships"].count_documents(
            {"conversation_id": group, "leave_seq": {"$exists": False}}
        )
    codes = [o.code for o in outcomes[1:]]
    assert codes == [None] + [ErrorCode.GROUP_FULL] * 9
    assert document is not None
    assert len(document["participants"]) == 100 == live


async def test_a_group_of_101_is_never_created(yard: Yard) -> None:
    async with run_lane(yard):
        group = await yard.create(*[f"u{number}" for number in range(101)], kind=ConversationType.GROUP)
        (outcome,) = await yard.next_down(records.CommandOutcome, 1)
    assert outcome.code is ErrorCode.GROUP_FULL
    assert await yard.store.db["conversations"].find_one({"_id": group}) is None


async def test_a_crash_before_the_projection_is_repaired_from_the_log(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system message is committed, memberships are not written, and Redis has lost the entry too."""
    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)

    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.conversations, "apply", never)
        async with crashing_lane(yard):
            await yard.add(group, "ann", "cat")
            with anyio.fail_after(5):
                await reached.wait()
    assert await yard.store.db["memberships"].find_one({"_id": f"{group}:cat"}) is None
    await yard.broker.client.flushall()
    await yard.open()
    async with run_lane(yard):
        await yard.send(group, "cat", "k1")
        (ack,) = await yard.acks(1)
    assert ack["payload"]["sequence_number"] == 3
    stay = await yard.store.db["memberships"].find_one({"_id": f"{group}:cat"})
    assert stay is not None
    assert stay["join_seq"] == 2


async def test_a_crash_between_conversation_and_first_entry_is_repaired(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.messages, "append", never)
        async with crashing_lane(yard):
            group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
            with anyio.fail_after(5):
                await reached.wait()
    async with run_lane(yard):
        (outcome,) = await yard.next_down(records.CommandOutcome, 1)
        stored = await yard.log(group)
    assert outcome.code is None
    assert [m["type"] for m in stored] == ["system"]
    assert await yard.store.db["memberships"].count_documents({"conversation_id": group}) == 2


async def test_the_last_owner_leaving_leaves_an_owner(yard: Yard) -> None:
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.remove(group, "ann", "ann", request="leave")
        await yard.add(group, "cat", "dan", request="by-cat")
        await yard.add(group, "bob", "dan", request="by-bob")
        outcomes = await yard.next_down(records.CommandOutcome, 4)
    assert [o.code for o in outcomes] == [None, None, ErrorCode.FORBIDDEN, None]


# --- receipts --------------------------------------------------------------------------------------------------------


async def test_receipts_reach_the_author_and_only_move_forward(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        for number in range(3):
            await yard.send(conv, "ann", f"k{number}")
        ids = [a["payload"]["message_id"] for a in await yard.acks(3)]
        seen = []
        for message_id in (ids[1], ids[0], ids[2]):
            await yard.delivered(message_id, "bob")
            await anyio.sleep(0.15)
        await yard.read(ids[1], "bob")
        await yard.read(ids[0], "bob")
        for notice in await yard.next_down(records.Notice, 3):
            assert notice.users == ["ann"]
            seen.append(shown(notice.frame))
        await eventually(lambda: settled(yard))
        member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert [update.delivered_through for update in seen] == [2, 3, 3]
    assert seen[-1].read_through == 2
    assert member is not None
    assert (member["delivered_seq"], member["read_seq"], member["devices"]) == (3, 2, {"d1": 3})


async def test_receipts_survive_a_crash_before_their_flush(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.marks, "flush_marks", never)
        async with crashing_lane(yard):
            await yard.delivered(ack["payload"]["message_id"], "bob")
            with anyio.fail_after(5):
                await reached.wait()
    async with run_lane(yard):
        await eventually(lambda: settled(yard))
    member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert member is not None
    assert member["delivered_seq"] == 1


async def test_a_strangers_receipt_is_ignored(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        message_id = ack["payload"]["message_id"]
        await yard.delivered(message_id, "eve")
        await yard.read(message_id, "eve")
        await yard.delivered(message_id[:-4] + "f" + message_id[-3:], "bob")
        await eventually(lambda: settled(yard))
        await anyio.sleep(0.1)
    assert not [item for item in yard.down if isinstance(item, records.Notice)]
    assert await yard.store.db["memberships"].find_one({"_id": f"{conv}:eve"}) is None
    member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert member is not None
    assert member["delivered_seq"] == 0


async def test_a_group_message_is_delivered_when_all_have_it(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.send(group, "ann", "k1")
        (ack,) = await yard.acks(1)
        message_id = ack["payload"]["message_id"]
        await yard.delivered(message_id, "bob")
        await eventually(lambda: settled(yard))
        await anyio.sleep(0.2)
        assert not [i for i in yard.down if isinstance(i, records.Notice)]
        await yard.delivered(message_id, "cat")
        (notice,) = await yard.next_down(records.Notice, 1)
    update = shown(notice.frame)
    assert notice.users == ["ann"]
    assert (update.user_id, update.delivered_through) == ("cat", 2)


async def test_a_device_id_with_dots_has_a_cursor(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        await yard.delivered(ack["payload"]["message_id"], "bob", "phone.1%2E")
        await eventually(lambda: settled(yard))
    async with run_lane(yard):
        pass
    _, heads = await yard.store.heads.open_heads("bob", "phone.1%2E", {})
    assert [head.cursor for head in heads] == [1]


# --- delivery and inboxes --------------------------------------------------------------------------------------------


async def test_offline_users_have_an_inbox_until_they_acknowledge(yard: Yard) -> None:
    await yard.connect("ann")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        await yard.send(conv, "ann", "k2")
        ids = [a["payload"]["message_id"] for a in await yard.acks(2)]

        async def boxed() -> bool:
            return await yard.broker.read_inbox("bob", 10) == ids

        await eventually(boxed)
        lifetime = await yard.broker.client.ttl(keys.inbox("bob"))
        await yard.delivered(ids[1], "bob")

        async def emptied() -> bool:
            return await yard.broker.read_inbox("bob", 10) == []

        await eventually(emptied)
    assert 30 * 86400 - 10 <= lifetime <= 30 * 86400
    assert await yard.broker.read_inbox("ann", 10) == []


async def test_a_connection_that_appears_is_delivered_to_at_once(yard: Yard) -> None:
    """The registry cache follows Redis: no time to live has to pass."""
    await yard.connect("ann")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (first,) = await yard.next_down(records.Delivery, 1)
        assert first.users == ["ann"]
        await yard.connect("bob")
        await anyio.sleep(0.1)
        await yard.send(conv, "ann", "k2")
        (second,) = await yard.next_down(records.Delivery, 1)
        assert second.users == ["ann", "bob"]
        await yard.broker.client.delete(keys.connection("bob"))
        await anyio.sleep(0.1)
        await yard.send(conv, "ann", "k3")
        (third,) = await yard.next_down(records.Delivery, 1)
        assert third.users == ["ann"]


async def test_a_burst_from_several_senders_travels_as_one_frame(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    for number in range(10):
        await yard.send(conv, ("ann", "bob")[number % 2], f"k{number}", connection=number % 2 + 1)
    async with run_lane(yard):
        await yard.acks(10)
        (delivery,) = await yard.next_down(records.Delivery, 1)
    assert (delivery.from_sequence, delivery.to_sequence, delivery.skip) == (1, 10, 0)
    assert [m.sequence_number for m in shown(delivery.frame).messages] == list(range(1, 11))


async def test_nothing_is_committed_behind_a_removal_before_memberships_show_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the removed member could page one message too far."""
    append = yard.store.messages.append
    ends: list[str] = []

    async def note_the_end(documents: Any) -> None:
        ends.append(documents[-1]["type"])
        await append(documents)

    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
    monkeypatch.setattr(yard.store.messages, "append", note_the_end)
    await yard.send(group, "ann", "k1")
    await yard.remove(group, "ann", "bob")
    await yard.send(group, "ann", "k2")
    async with run_lane(yard):
        acks = await yard.acks(2)
    assert [ack["payload"]["sequence_number"] for ack in acks] == [2, 4]
    assert ends == ["system", "text"]


async def test_receipts_reach_the_author_when_both_people_send(yard: Yard) -> None:
    """Own sends moved the delivered mark past the other's message, and its author never heard of its delivery."""
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (first,) = await yard.acks(1)
        await yard.send(conv, "bob", "k2")
        await yard.acks(1)
        (replied,) = await yard.next_down(records.Notice, 1)
        before = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
        await yard.delivered(first["payload"]["message_id"], "bob")
        (told,) = await yard.next_down(records.Notice, 1)
        await eventually(lambda: settled(yard))
    assert replied.users == ["ann"]
    assert shown(replied.frame).read_through == 2, "who answers has read what came before"
    assert before is not None
    assert before["delivered_seq"] == 0, "only a delivery_ack makes delivered"
    assert (shown(told.frame).user_id, shown(told.frame).delivered_through) == ("bob", 2)


async def test_entries_whose_read_reply_was_lost_are_found_among_the_pending(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis had made them pending, nobody had them, and the owner never looked."""
    read = yard.broker.read_ingest
    lost = 0

    async def read_and_lose(shards: Any, count: int, block_ms: int) -> Any:
        nonlocal lost
        entries = await read(shards, count, block_ms)
        if entries and lost < 2:
            lost += len(entries)
            raise BrokerUnavailable("blocking read got no answer")
        return entries

    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        monkeypatch.setattr(yard.broker, "read_ingest", read_and_lose)
        for number in range(5):
            await yard.send(conv, "ann", f"k{number}")
        acks = await yard.acks(5)
        await eventually(lambda: settled(yard))
    assert lost
    assert [ack["payload"]["sequence_number"] for ack in acks] == [1, 2, 3, 4, 5]
