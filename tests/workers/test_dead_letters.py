"""Dead letters in a lane: what their senders hear, how they come back, and that no key has two outcomes (I10)."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import codec, records
from protocol.models import ConversationType, DLQErrorType, DLQStatus
from tests.workers.lanes import eventually, run_lane, settled
from tests.workers.letters import POISON, letters, postpone, refusing
from workers import replay, retry
from workers.broker import BrokerUnavailable
from workers.dead_letters import dead_letter_id, retry_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.workers.lanes import Yard
    from workers.settings import Settings

pytestmark = pytest.mark.anyio

GARBAGE = b"\xc1garbage"
FAR = timedelta(days=1)


@asynccontextmanager
async def retrying(yard: Yard, settings: Settings) -> AsyncIterator[None]:
    """The role that tries letters again."""
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(retry.run, settings, yard.store, yard.broker, stopping)
        yield
        stopping.set()


def now() -> datetime:
    return datetime.now(UTC)


async def letter(yard: Yard) -> dict[str, Any]:
    (found,) = await letters(yard.store)
    return found


async def has_status(yard: Yard, status: DLQStatus) -> bool:
    return [found["status"] for found in await letters(yard.store)] == [status.value]


async def test_a_message_that_the_store_refuses_is_queued_and_the_others_are_committed(yard: Yard) -> None:
    async with run_lane(yard), refusing(yard.store):
        conv = await yard.create("ann", "bob")
        for number in range(5):
            await yard.send(conv, "ann", f"k{number}", POISON if number == 2 else "fine")
        answers = {answer["client_message_id"]: answer for answer in await all_answers(yard, 5)}
        await eventually(lambda: settled(yard))
    assert sorted(a["payload"]["sequence_number"] for a in answers.values() if a["type"] == "message_ack") == [
        1,
        2,
        3,
        4,
    ]
    refusal = answers["c-k2"]["payload"]
    assert (refusal["code"], refusal["retryable"], refusal["idempotency_key"]) == ("queued_for_retry", True, "k2")
    assert refusal["retry_after_ms"] > 0
    found = await letter(yard)
    assert found["_id"] == dead_letter_id(conv, "ann", "k2")
    assert (found["status"], found["error_type"], found["retry_count"]) == ("pending", "storage_failed", 0)
    assert found["message"]["content"] == POISON
    assert found["message"]["sequence_number"] == 0
    assert timedelta(days=6) < found["expires_at"] - found["created_at"] <= timedelta(days=7)
    assert timedelta(milliseconds=79) < found["next_retry_at"] - found["created_at"] < timedelta(milliseconds=121)


async def all_answers(yard: Yard, count: int) -> list[dict[str, Any]]:
    """Acks and errors, both with their client_message_id at the top."""
    found = await yard.acks(count)
    for answer in found:
        answer.setdefault("client_message_id", answer["payload"].get("client_message_id"))
    return found


async def test_a_retry_of_what_is_queued_is_not_committed_behind_the_letter(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        await postpone(yard.store)
        await yard.send(conv, "ann", "k1", POISON)
        await yard.send(conv, "ann", "k2", "fine")
        first, second = await yard.acks(2)
    assert {first["payload"].get("code"), second["payload"].get("code")} == {"queued_for_retry", None}
    assert [message["idempotency_key"] for message in await yard.log(conv)] == ["k2"]


async def test_the_next_owner_knows_the_letters_of_its_shards(yard: Yard) -> None:
    async with run_lane(yard), refusing(yard.store):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", POISON)
        await yard.acks(1)
    await postpone(yard.store)
    async with run_lane(yard):
        await yard.send(conv, "ann", "k1", POISON)
        (answer,) = await yard.acks(1)
    assert answer["payload"]["code"] == "queued_for_retry"
    assert await yard.log(conv) == []


async def test_a_letter_that_time_mends_takes_the_next_number_and_its_sender_gets_the_ack(
    yard: Yard, settings: Settings
) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.send(conv, "ann", "k2", "fine")
            await yard.acks(2)
        await yard.next_down(records.Delivery, 1)
        async with retrying(yard, settings):
            (ack,) = await yard.acks(1)
            (delivery,) = await yard.next_down(records.Delivery, 1)
            await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
        await yard.send(conv, "ann", "k1", POISON)
        (again,) = await yard.acks(1)
    assert (ack["type"], ack["client_message_id"], ack["payload"]["sequence_number"]) == ("message_ack", "c-k1", 2)
    assert (delivery.from_sequence, delivery.users) == (2, ["ann", "bob"])
    assert again["payload"]["message_id"] == ack["payload"]["message_id"]
    found = await letter(yard)
    assert found["resolved_reason"] == f"committed as {ack['payload']['message_id']}, number 2"
    assert (found["retry_count"], found["next_retry_at"]) == (1, None)
    assert found["resolved_at"] is not None


async def test_after_five_tries_it_has_failed_and_its_sender_is_told_for_good(yard: Yard, settings: Settings) -> None:
    async with run_lane(yard), refusing(yard.store), retrying(yard, settings):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", POISON)
        (queued,) = await yard.acks(1)
        await eventually(lambda: has_status(yard, DLQStatus.FAILED), 10)
        await yard.send(conv, "ann", "k1", POISON)
        (refused,) = await yard.acks(1)
        await yard.send(conv, "ann", "k1", POISON)
        (again,) = await yard.acks(1)
    assert queued["payload"]["code"] == "queued_for_retry"
    assert refused["payload"] == again["payload"]
    assert (refused["payload"]["code"], refused["payload"]["retryable"]) == ("validation_failed", False)
    found = await letter(yard)
    assert (found["retry_count"], found["next_retry_at"]) == (5, None)
    assert found["refused_at"] is not None
    assert not [item for item in yard.down if isinstance(item, records.Outcome)], "tries tell nobody anything"


async def test_what_a_sender_was_told_for_good_is_never_replayed(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        await yard.store.db["dead_letter_queue"].update_one({}, {"$set": {"status": "failed", "next_retry_at": None}})
        await yard.send(conv, "ann", "k1", POISON)
        (refused,) = await yard.acks(1)
        assert refused["payload"]["retryable"] is False
        letter_id = (await letter(yard))["_id"]
        outcome = await replay.replay(yard.store, yard.broker, letter_id, now())
        assert isinstance(outcome, replay.Refused)
        assert await replay.resolve(yard.store, letter_id, "the sender knows", now()) is None
        await yard.send(conv, "ann", "k1", POISON)
        (still,) = await yard.acks(1)
    assert still["payload"]["retryable"] is False
    assert await yard.log(conv) == []


async def test_a_failed_letter_that_is_replayed_before_its_sender_asks_is_committed(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        await yard.store.db["dead_letter_queue"].update_one({}, {"$set": {"status": "failed", "next_retry_at": None}})
        outcome = await replay.replay(yard.store, yard.broker, (await letter(yard))["_id"], now())
        assert isinstance(outcome, replay.Replayed)
        (ack,) = await yard.acks(1)
        await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
    assert ack["payload"]["sequence_number"] == 1


async def test_of_two_replays_at_once_one_is_refused_and_one_message_results(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        await postpone(yard.store)
        letter_id = (await letter(yard))["_id"]
        outcomes: list[object] = []

        async def ask() -> None:
            outcomes.append(await replay.replay(yard.store, yard.broker, letter_id, now()))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(ask)
        await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
        late = await replay.replay(yard.store, yard.broker, letter_id, now())
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Refused"] * 4 + ["Replayed"]
    assert late == replay.Refused("it is resolved already")
    assert len(await yard.log(conv)) == 1


async def test_a_letter_whose_message_is_in_the_log_is_resolved_without_another(yard: Yard) -> None:
    """An owner died between commit and the word that it had."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", "fine")
        (ack,) = await yard.acks(1)
        letter_id = dead_letter_id(conv, "ann", "k1")
        raw = {"status": "pending", "conversation_id": conv, "sender_id": "ann", "idempotency_key": "k1", "shard": 0}
        document = {
            "_id": letter_id,
            "message": {**(await yard.log(conv))[0], "sequence_number": 0},
            "raw": b"",
            "error": "it was away",
            "error_type": "unknown",
            "retry_count": 0,
            "max_retries": 5,
            "next_retry_at": now() + FAR,
            "created_at": now(),
            "last_retry_at": None,
            "expires_at": now() + FAR,
            **raw,
        }
        await yard.store.db["dead_letter_queue"].insert_one(document)
    async with run_lane(yard):
        await yard.send(conv, "ann", "k1", "fine")
        (again,) = await yard.acks(1)
        assert await has_status(yard, DLQStatus.RESOLVED)
        await yard.store.db["dead_letter_queue"].update_one({}, {"$set": {"status": "pending"}})
        outcome = await replay.replay(yard.store, yard.broker, letter_id, now())
    assert again["payload"]["message_id"] == ack["payload"]["message_id"]
    assert isinstance(outcome, replay.Replayed)
    assert outcome.is_resolved
    assert await has_status(yard, DLQStatus.RESOLVED)
    assert len(await yard.log(conv)) == 1


async def test_a_replay_that_is_no_longer_allowed_is_rejected_once_and_for_all(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        async with refusing(yard.store):
            await yard.send(conv, "cat", "k1", POISON)
            await yard.acks(1)
        await postpone(yard.store)
        await yard.remove(conv, "ann", "cat")
        await yard.next_down(records.CommandOutcome, 2)
        await replay.replay(yard.store, yard.broker, (await letter(yard))["_id"], now())
        (told,) = await yard.acks(1)
        await eventually(lambda: has_status(yard, DLQStatus.FAILED))
    found = await letter(yard)
    assert told["payload"]["code"] == "conversation_not_found"
    assert found["error"].startswith("conversation_not_found")
    assert found["refused_at"] is not None


async def test_a_try_that_redis_forgot_is_tried_again_when_its_lease_ends(
    yard: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "LEASE_SECONDS", 0.5)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        append = yard.broker.append_replay
        lost: list[str] = []

        async def lose(shard: int, payload: bytes, letter_id: str) -> None:
            if lost:
                await append(shard, payload, letter_id)
            lost.append(letter_id)

        monkeypatch.setattr(yard.broker, "append_replay", lose)
        async with retrying(yard, settings):
            (ack,) = await yard.acks(1)
            await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
    assert ack["payload"]["sequence_number"] == 1
    assert len(lost) == 2
    assert (await letter(yard))["retry_count"] == 2


async def test_an_older_try_is_dropped_when_its_letter_was_decided(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        async with refusing(yard.store):
            await yard.send(conv, "ann", "k1", POISON)
            await yard.acks(1)
        await postpone(yard.store)
        found = await letter(yard)
        await yard.broker.append_replay(found["shard"], found["raw"], found["_id"])
        await eventually(lambda: settled(yard))
    assert await yard.log(conv) == []
    assert (await letter(yard))["status"] == "pending"


async def test_a_letter_that_redis_does_not_take_is_given_back_and_counts_no_try(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_lane(yard), refusing(yard.store):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", POISON)
        await yard.acks(1)
    await postpone(yard.store)

    async def away(*_: object) -> None:
        raise BrokerUnavailable("away")

    monkeypatch.setattr(yard.broker, "append_replay", away)
    with pytest.raises(BrokerUnavailable):
        await replay.replay(yard.store, yard.broker, dead_letter_id(conv, "ann", "k1"), now())
    found = await letter(yard)
    assert (found["status"], found["retry_count"], found["last_retry_at"]) == ("pending", 0, None)


async def test_what_cannot_be_read_waits_for_a_person_and_is_read_again_when_it_is_replayed(
    yard: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        async with retrying(yard, settings):
            with monkeypatch.context() as patched:
                decode = codec.decode_ingest

                def older(data: bytes) -> Any:
                    """A version that does not know what a newer one sends."""
                    return decode(GARBAGE if b"from tomorrow" in data else data)

                patched.setattr(codec, "decode_ingest", older)
                await yard.send(conv, "ann", "k1", "from tomorrow")
                await eventually(lambda: has_status(yard, DLQStatus.PENDING))
                found = await letter(yard)
                await replay.replay(yard.store, yard.broker, found["_id"], now())
                await eventually(lambda: tried(yard, 1))
                assert await has_status(yard, DLQStatus.PENDING)
                await anyio.sleep(0.5)
                assert (await letter(yard))["retry_count"] == 1, "nobody tries it by themselves"
            await replay.replay(yard.store, yard.broker, found["_id"], now())
            (ack,) = await yard.acks(1)
            await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
    assert found["error_type"] == DLQErrorType.VALIDATION_FAILED.value
    assert ack["payload"]["sequence_number"] == 1


async def tried(yard: Yard, times: int) -> bool:
    found = await letter(yard)
    return bool(found["retry_count"] == times and found["status"] == "pending")


async def test_an_error_nobody_foresaw_is_buried_by_its_kind_and_comes_back(
    yard: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = yard.store.messages.append
    broken = True

    async def append_unless_broken(documents: Any) -> None:
        if broken and any(document["content"] == "odd" for document in documents):
            raise TimeoutError("nobody foresaw this")
        await append(documents)

    monkeypatch.setattr(yard.store.messages, "append", append_unless_broken)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", "odd")
        (queued,) = await yard.acks(1)
        assert queued["payload"]["code"] == "queued_for_retry"
        assert (await letter(yard))["error_type"] == "timeout"
        broken = False
        async with retrying(yard, settings):
            (ack,) = await yard.acks(1)
    assert ack["payload"]["sequence_number"] == 1


async def test_a_command_that_cannot_be_stored_is_undecided_for_who_waits_and_done_later(
    yard: Yard, settings: Settings
) -> None:
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
        await yard.store.db.command("collMod", "messages", validator={"type": {"$ne": "system"}})
        try:
            await yard.add(group, "ann", "dan", request="add")
            (undecided,) = await yard.next_down(records.CommandOutcome, 1)
        finally:
            await yard.store.db.command("collMod", "messages", validator={})
        async with retrying(yard, settings):
            (done,) = await yard.next_down(records.CommandOutcome, 1)
            await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
    assert undecided.code == "storage_unavailable"
    assert (done.request, done.code) == ("add", None)


def test_backoff_doubles_up_to_five_minutes_with_a_fifth_of_jitter() -> None:
    at = datetime(2026, 11, 24, tzinfo=UTC)
    for retries, seconds in ((0, 0.1), (1, 0.2), (4, 1.6), (10, 102.4), (12, 300), (60, 300)):
        waits = [(retry_at(at, retries) - at).total_seconds() for _ in range(200)]
        assert seconds * 0.8 <= min(waits) < seconds * 0.9
        assert seconds * 1.1 < max(waits) <= seconds * 1.2


async def test_a_resolved_letter_opens_again_when_its_message_fails_again(yard: Yard) -> None:
    async with run_lane(yard), refusing(yard.store):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", POISON)
        await yard.acks(1)
        await postpone(yard.store)
        letter_id = (await letter(yard))["_id"]
        assert await replay.resolve(yard.store, letter_id, "let them try again", now()) is None
        assert await replay.resolve(yard.store, letter_id, "twice", now()) == replay.Refused("it is resolved already")
        await yard.send(conv, "ann", "k1", POISON)
        (queued,) = await yard.acks(1)
    assert queued["payload"]["code"] == "queued_for_retry"
    found = await letter(yard)
    assert found["status"] == "pending"
    assert "resolved_reason" not in found
