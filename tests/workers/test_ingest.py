"""The ingest path on real servers: records in, committed log, down records out, crashes in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pymongo.errors import AutoReconnect

from protocol import keys, records
from protocol.models import ConversationType
from protocol.watermarks import chain_digest, content_hash
from tests.workers.lanes import INSTANCE, SHARDS, crashing_lane, eventually, run_lane, settled, shown
from tests.workers.seeding import membership
from workers import consumer, takeover
from workers.broker import BrokerUnavailable
from workers.consumer import BLOCK_MS
from workers.store.messages import OutcomeUnknown

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


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
    assert stored[0]["digest"] == chain_digest(bytes(16), stored[0]["_id"], "ann", 1, content_hash("hello"))
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
        answers = await yard.acks(6)
        await eventually(lambda: settled(yard))
        stored = await yard.log(conv)
    assert [m["sequence_number"] for m in stored] == [1, 2, 3, 4, 5]
    acks = [answer for answer in answers if answer["type"] == "message_ack"]
    assert sorted(a["payload"]["sequence_number"] for a in acks) == [1, 2, 3, 4, 5]
    letters = await yard.store.db["dead_letter_queue"].find().to_list()
    assert len(letters) == 1
    assert b"poison" in letters[0]["raw"]


async def test_a_record_of_any_kind_that_no_code_handles_is_buried_and_ends_no_worker(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = keys.direct_conversation_id("ann", "bob")
    command = (INSTANCE, "r", "cmd", conv, "ann")
    kinds: list[Any] = [
        records.ChangeMessage(INSTANCE, 7, "", "ann", "d1", conv, "", "e1", "msg_x", records.Delete(for_all=True)),
        records.CreateConversation(
            INSTANCE, "r", "cmd", conv, ConversationType.ONE_TO_ONE, "ann", ["ann", "bob"], "agent", ""
        ),
        records.AddParticipants(*command, ["cat"]),
        records.RemoveParticipant(*command, "bob"),
        records.ChangeConversation(*command, records.Rename("x")),
        records.LookAtAccount(INSTANCE, "r", conv, "ann"),
    ]
    async with run_lane(yard) as lane:
        await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k0")
        planner = lane._committer._planner
        plan = planner.plan

        def trip_over(batch: Any, *rest: Any) -> Any:
            if any(type(entry.record) is not records.SendMessage for entry in batch):
                raise ZeroDivisionError("nobody foresaw this")
            return plan(batch, *rest)

        monkeypatch.setattr(planner, "plan", trip_over)
        for number, record in enumerate(kinds, 1):
            await yard.put(record, conv)
            if isinstance(record, records.ChangeMessage):
                (queued,) = await yard.acks(1)
                assert queued["payload"]["code"] == "queued_for_retry"
            await yard.said(conv, "ann", f"k{number}")
        await eventually(lambda: settled(yard))
    letters = await yard.store.db["dead_letter_queue"].count_documents({})
    assert (letters, len(await yard.log(conv))) == (3, len(kinds) + 1), "one letter for each key"


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


async def test_a_lane_that_may_own_nothing_any_more_reads_nothing(yard: Yard) -> None:
    """A process that had stood still took messages that the new owner was to commit, before it looked at its leases."""
    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        lane.may_read = lambda: False
        await anyio.sleep(2 * BLOCK_MS / 1000)
        await yard.send(conv, "ann", "k1")
        await anyio.sleep(0.5)
        shard = keys.shard_of(conv, SHARDS)
        pending: Any = await yard.broker.client.xpending(keys.ingest(shard), keys.INGEST_GROUP)
        assert pending[0] == 0
        lane.may_read = lambda: True
        (ack,) = await yard.acks(1)
    assert ack["payload"]["sequence_number"] == 1


async def test_a_worker_outlives_a_flush_while_its_leases_move(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUSHALL takes the leases too: others may take shards while this lane makes its streams again."""
    create = yard.broker.create_group
    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        await yard.acks(1)
        home = frozenset({keys.shard_of(conv, SHARDS)})

        async def create_while_leases_move(stream: str, group: str) -> None:
            lane.set_shards(home)
            await create(stream, group)

        monkeypatch.setattr(yard.broker, "create_group", create_while_leases_move)
        await yard.broker.client.flushall()

        async def is_back() -> bool:
            return bool(await yard.broker.client.exists(*(keys.ingest(shard) for shard in home)))

        await eventually(is_back)
        monkeypatch.setattr(yard.broker, "create_group", create)
        await yard.open()
        yard.down.clear()
        await yard.send(conv, "ann", "k2")
        (ack,) = await yard.acks(1)
    assert ack["payload"]["sequence_number"] == 2


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


async def test_a_message_whose_read_reply_was_lost_survives_the_settling_of_later_ones(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream was trimmed up to the first entry that the owner had in memory: it had never heard of this one.
    Simulator, seed 625."""
    monkeypatch.setattr(takeover, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(consumer, "STALE_SECONDS", 2.0)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        with monkeypatch.context() as patched:
            read = yard.broker.read_ingest
            lost = anyio.Event()

            async def lose(shards: Any, count: int, block_ms: int) -> Any:
                if await read(shards, count, block_ms):
                    lost.set()
                return []

            patched.setattr(yard.broker, "read_ingest", lose)
            await anyio.sleep(2 * BLOCK_MS / 1000)  # the read that is under way ends
            await yard.send(conv, "ann", "k0")
            with anyio.fail_after(5):
                await lost.wait()
        await anyio.sleep(2 * BLOCK_MS / 1000)
        for number in range(1, 251):  # more than a node of the stream holds: it is trimmed by whole nodes
            await yard.send(conv, "ann", f"k{number}")
        await yard.acks(251)
        await eventually(lambda: settled(yard))
    assert {entry["idempotency_key"] for entry in await yard.log(conv)} == {f"k{n}" for n in range(251)}


async def test_an_entry_that_came_to_who_no_longer_owns_its_shard_is_found(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that is under way when a shard moves takes entries along: its receipts were never told, a message waited
    for its sender to repeat it. Simulator, seed 79."""
    monkeypatch.setattr(takeover, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(consumer, "STALE_SECONDS", 0.2)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        with monkeypatch.context() as patched:
            read = yard.broker.read_ingest
            robbed = anyio.Event()

            async def rob(shards: Any, count: int, block_ms: int) -> Any:
                entries = await read(shards, count, block_ms)
                if entries:
                    robbed.set()
                return []

            patched.setattr(yard.broker, "read_ingest", rob)
            await anyio.sleep(2 * BLOCK_MS / 1000)  # the read that is under way ends
            await yard.send(conv, "ann", "k1")
            with anyio.fail_after(5):
                await robbed.wait()
        (ack,) = await yard.acks(1)
        await eventually(lambda: settled(yard))
    assert ack["payload"]["sequence_number"] == 1


async def test_who_sent_has_read_so_far_though_the_state_was_forgotten_during_the_commit(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their unread count stayed too great for good: the head was flushed and their mark was not. Simulator, seed 72."""
    append = yard.store.messages.append
    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "bob", "k1")

        async def append_and_forget(documents: Any) -> None:
            await append(documents)
            lane._conversations.forget_shards(frozenset())  # as `_start_over` does when Redis came back empty

        monkeypatch.setattr(yard.store.messages, "append", append_and_forget)
        await yard.said(conv, "ann", "k2")
    flushed = await yard.store.db["sequence_numbers"].find_one({"_id": conv})
    assert flushed is not None
    assert flushed["last_sequence_number"] == 2
    assert (await membership(yard.store, conv, "ann")).read_seq == 2


async def test_after_a_flush_nothing_is_read_of_a_shard_that_another_worker_took(yard: Yard) -> None:
    """Two workers read it in turn until the one heard that it is the other's: later messages were committed first."""
    taken = keys.shard_of(keys.direct_conversation_id("ann", "bob"), SHARDS)
    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k1")
        async with yard.broker.client.pipeline(transaction=True) as pipe:
            pipe.flushall()
            pipe.set(keys.lease(taken), "somebody else")
            await pipe.execute()
        await anyio.sleep(0.1)
        await yard.open()
        await yard.send(conv, "ann", "k2")
        await anyio.sleep(0.5)
        (group,) = await yard.broker.client.xinfo_groups(keys.ingest(taken))
        assert group["last-delivered-id"] == b"0-0"
        lane.set_shards(frozenset(range(SHARDS)) - {taken})
        await eventually(lambda: _owns_the_rest(yard, taken))


async def _owns_the_rest(yard: Yard, taken: int) -> bool:
    owners = await yard.broker.client.mget([keys.lease(shard) for shard in range(SHARDS) if shard != taken])
    return None not in owners


async def test_a_message_is_not_refused_because_its_conversation_was_forgotten_during_the_reads(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender was told for good that there is no such conversation. Simulator, seed 449."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "bob", "k1")
    locate = yard.store.messages.locate
    async with run_lane(yard) as lane:

        async def locate_and_forget(message_ids: Any) -> Any:
            lane._conversations.forget_shards(frozenset())  # as when leases move, or Redis came back empty
            return await locate(message_ids)

        monkeypatch.setattr(yard.store.messages, "locate", locate_and_forget)
        await yard.said(conv, "ann", "k2", reply_to_message_id=target)
