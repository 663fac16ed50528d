"""Entries whose readers die, and those whose readers die of something else: which of them become dead letters."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import codec, keys, records
from protocol.models import DLQStatus
from tests.workers.lanes import SHARDS, crashing_lane, eventually, lose_its_lease, run_lane, settled
from tests.workers.letters import POISON, letters
from workers import replay, takeover
from workers.broker import BrokerUnavailable
from workers.dead_letters import dead_letter_id
from workers.store.messages import OutcomeUnknown
from workers.suspects import Suspects

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


def now() -> datetime:
    return datetime.now(UTC)


async def letter(yard: Yard) -> dict[str, Any]:
    (found,) = await letters(yard.store)
    return found


async def has_status(yard: Yard, status: DLQStatus) -> bool:
    return [found["status"] for found in await letters(yard.store)] == [status.value]


async def test_no_outage_of_the_store_makes_a_dead_letter(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a long one, nor one in which the shard changes owners again and again."""

    async def away(_: object) -> None:
        raise OutcomeUnknown("nobody answers")

    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    async with AsyncExitStack() as owners:
        with monkeypatch.context() as patched:
            patched.setattr(yard.store.messages, "append", away)
            await yard.send(conv, "ann", "k1")
            shard = keys.shard_of(conv, SHARDS)
            for number in range(1, 8):
                owner = await owners.enter_async_context(run_lane(yard))

                async def has_read_it(times: int = number) -> bool:
                    return any(found.times >= times for found in await Suspects(yard.broker).pending(shard, b"0", 10))

                await eventually(has_read_it, 10)
                await lose_its_lease(owner)
        async with run_lane(yard):
            (ack,) = await yard.acks(1)
    assert ack["payload"]["sequence_number"] == 1
    assert await letters(yard.store) == []
    assert await yard.broker.client.keys("trials:*") == []


class Dead(Exception):
    """What no part of a lane catches: its process ends."""


async def die(yard: Yard) -> None:
    """A lane that works until it dies."""
    died = False
    try:
        async with crashing_lane(yard):
            await anyio.sleep(10)
    except* Dead:
        died = True
    assert died


async def test_an_entry_that_kills_its_readers_is_tried_alone_then_buried_unread_and_the_rest_goes_on_in_order(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-W6. The system test does it with processes; here a dying lane is one that is cut off."""
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    decode = codec.decode_ingest
    deaths = 0

    def deadly(data: bytes) -> Any:
        nonlocal deaths
        if POISON.encode() in data:
            deaths += 1
            raise Dead
        return decode(data)

    for number in range(6):
        await yard.send(conv, "ann", f"k{number}", POISON if number == 2 else str(number))
    with monkeypatch.context() as patched:
        patched.setattr(codec, "decode_ingest", deadly)
        for _ in range(3):
            await die(yard)
        assert deaths == 3
        # Who buries it reads it once more when it is out of the stream, and dies of that too.
        await die(yard)
        found = await letter(yard)
        assert found["raw"]
        assert "conversation_id" not in found
        async with run_lane(yard):
            acks = await yard.acks(5)
            await eventually(lambda: settled(yard))
    assert [message["content"] for message in await yard.log(conv)] == ["0", "1", "3", "4", "5"]
    assert [ack["payload"]["sequence_number"] for ack in acks] == [1, 2, 3, 4, 5]
    assert await yard.broker.client.keys("trials:*") == []
    async with run_lane(yard):
        await replay.replay(yard.store, yard.broker, found["_id"], now())
        (ack,) = await yard.acks(1)
        await eventually(lambda: has_status(yard, DLQStatus.RESOLVED))
    assert ack["payload"]["sequence_number"] == 6


async def test_a_message_whose_owners_are_killed_while_the_store_is_away_is_not_taken_for_poison(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on trial, its readers die, and not of it."""
    monkeypatch.setattr(takeover, "AT_ONCE_SECONDS", 0.1)
    monkeypatch.setattr(takeover, "LOOK_SECONDS", 0.1)

    async def away(_: object) -> None:
        raise OutcomeUnknown("nobody answers")

    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    shard = keys.shard_of(conv, SHARDS)
    await yard.send(conv, "ann", "k1")
    with monkeypatch.context() as patched:
        patched.setattr(yard.store.messages, "append", away)
        for number in range(1, 5):
            async with crashing_lane(yard):

                async def has_read_it(times: int = number) -> bool:
                    suspects = Suspects(yard.broker)
                    return [
                        (found.times, await suspects.weight(shard, found.entry_id))
                        for found in await suspects.pending(shard, b"0", 10)
                    ] == [(times, max(0, times - 2))]

                await eventually(has_read_it, 10)
                await anyio.sleep(0.2)
    async with run_lane(yard):
        (ack,) = await yard.acks(1)
        await eventually(lambda: settled(yard))
    assert ack["payload"]["sequence_number"] == 1
    assert await letters(yard.store) == []
    assert await yard.broker.client.keys("trials:*") == []


async def test_who_lived_through_a_trial_while_redis_was_away_proves_nothing_against_its_entry(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    shard = keys.shard_of(conv, SHARDS)
    await yard.send(conv, "ann", "k1")
    await yard.broker.read_ingest([shard], 10, 100)
    await yard.broker.read_pending(shard, b"0", 10)
    read_pending = yard.broker.read_pending
    losses = 3

    async def lose(*words: Any) -> Any:
        nonlocal losses
        entries = await read_pending(*words)
        losses -= 1
        if losses >= 0:
            raise BrokerUnavailable("the reply is lost")
        return entries

    monkeypatch.setattr(yard.broker, "read_pending", lose)
    async with run_lane(yard):
        (ack,) = await yard.acks(1)
        await eventually(lambda: settled(yard))
    assert losses < 0
    assert ack["payload"]["sequence_number"] == 1
    assert await letters(yard.store) == []
    assert await yard.broker.client.keys("trials:*") == []


async def test_a_retry_of_what_killed_its_readers_is_held_back_once_it_is_known_whose_it_was(yard: Yard) -> None:
    async with run_lane(yard) as lane:
        assert lane is not None
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    shard = keys.shard_of(conv, SHARDS)
    await yard.send(conv, "ann", "k1")
    for _ in range(3):
        # Three owners that read it and were never heard of again.
        (entry,) = await yard.broker.read_ingest([shard], 10, 100) or await yard.broker.read_pending(shard, b"0", 10)
    await Suspects(yard.broker).begin_trial(shard, entry.entry_id)
    async with run_lane(yard):
        (queued,) = await yard.acks(1)
        await yard.send(conv, "ann", "k1")
        (again,) = await yard.acks(1)
        await eventually(lambda: settled(yard))
        found = await letter(yard)
        assert (found["_id"], found["status"], found["next_retry_at"]) == (
            dead_letter_id(conv, "ann", "k1"),
            "pending",
            None,
        )
        assert found["message"]["content"] == "hello"
        await replay.replay(yard.store, yard.broker, found["_id"], now())
        (ack,) = await yard.acks(1)
    assert [queued["payload"]["code"], again["payload"]["code"]] == ["queued_for_retry"] * 2
    assert ack["payload"]["sequence_number"] == 1
