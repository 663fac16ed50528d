"""What a lane holds is bounded whatever MongoDB does, and nothing is lost for it: the stream keeps the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyio
import pytest

from protocol import keys, records
from tests.workers.lanes import SHARDS, Yard, eventually, run_lane, settled
from workers import consumer
from workers.store.errors import StoreUnavailable

pytestmark = pytest.mark.anyio

BATCH = 5
READ_AHEAD = consumer.QUEUE_BATCHES * BATCH


async def pairs(yard: Yard, count: int) -> list[str]:
    """So many 1:1 conversations of ann, created."""
    made = [await yard.create("ann", f"bob{number}") for number in range(count)]
    await yard.next_down(records.CommandOutcome, count)
    return made


async def one_per_shard(yard: Yard) -> list[str]:
    """A conversation in each shard."""
    found: dict[int, str] = {}
    for conversation_id in await pairs(yard, 24):
        found.setdefault(keys.shard_of(conversation_id, SHARDS), conversation_id)
    assert len(found) == SHARDS
    return list(found.values())


async def pending(yard: Yard) -> int:
    """Entries read from Redis and without an outcome."""
    read = 0
    for shard in range(SHARDS):
        (group,) = await yard.broker.client.xinfo_groups(keys.ingest(shard))
        read += group["pending"]
    return read


def hold(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> anyio.Event:
    """MongoDB takes no document until the event is set."""
    released = anyio.Event()
    append = yard.store.messages.append

    async def waiting(documents: Any) -> None:
        await released.wait()
        await append(documents)

    monkeypatch.setattr(yard.store.messages, "append", waiting)
    return released


async def test_with_mongodb_away_a_lane_reads_no_more_than_its_bound_over_all_shards(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis counts entries per stream: 32 shards gave 16,000 entries in one read, some hundred megabytes."""
    async with run_lane(yard, batch=BATCH) as lane:
        logs = await one_per_shard(yard)
        await eventually(lambda: settled(yard))
        released = hold(monkeypatch, yard)
        for number in range(2 * READ_AHEAD):
            await yard.send(logs[number % len(logs)], "ann", f"k{number}")
        await anyio.sleep(0.5)
        assert READ_AHEAD - BATCH < await pending(yard) <= READ_AHEAD + BATCH
        assert lane.queued <= READ_AHEAD
        lengths = [await yard.broker.client.xlen(keys.ingest(shard)) for shard in range(SHARDS)]
        assert sum(lengths) >= 2 * READ_AHEAD, "nothing is trimmed"
        released.set()
        acks = await yard.acks(2 * READ_AHEAD)
        await eventually(lambda: settled(yard))
    assert Counter(ack["type"] for ack in acks) == {"message_ack": 2 * READ_AHEAD}
    for log in logs:
        stored = [document["sequence_number"] for document in await yard.log(log)]
        assert stored == list(range(1, 2 * READ_AHEAD // len(logs) + 1))


async def test_one_busy_shard_gets_the_room_the_quiet_ones_leave(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_lane(yard, batch=BATCH) as lane:
        log = (await one_per_shard(yard))[0]
        await eventually(lambda: settled(yard))
        released = hold(monkeypatch, yard)
        for number in range(2 * READ_AHEAD):
            await yard.send(log, "ann", f"k{number}")
        await eventually(lambda: _is(lane.queued > READ_AHEAD - BATCH))
        assert lane.queued <= READ_AHEAD
        released.set()


async def _is(condition: bool) -> bool:
    return condition


async def test_receipts_that_cannot_be_flushed_stop_the_reading(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait in no queue, so with MongoDB away a lane read and kept all that came."""
    monkeypatch.setattr(consumer, "MARKS_WAITING", 10)
    await yard.connect("ann", "bob0")
    async with run_lane(yard, batch=BATCH) as lane:
        (log,) = await pairs(yard, 1)
        message_id = await yard.said(log, "ann", "k1")
        await eventually(lambda: settled(yard))
        with monkeypatch.context() as away:

            async def unavailable(*_: object) -> None:
                raise StoreUnavailable("away")

            away.setattr(yard.store.marks, "flush_marks", unavailable)
            for _ in range(60):
                mark = records.DeliveredMark("bob0", "d1", message_id)
                await yard.put(records.Receipts([mark], []), log)
            await anyio.sleep(0.5)
            read = await pending(yard)
            assert 10 <= read <= 10 + READ_AHEAD
            assert lane.marks_waiting == read
        await eventually(lambda: settled(yard))
        assert lane.marks_waiting == 0


async def test_conversations_past_the_bound_are_forgotten_and_go_on_where_they_were(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "HEADS_SECONDS", 0.1)
    async with run_lane(yard, conversations=4) as lane:
        logs = await pairs(yard, 9)
        for log in logs:
            await yard.said(log, "ann", "k1")
        await eventually(lambda: _is(lane.conversations_held <= 4))
        for log in logs:
            await yard.said(log, "ann", "k2")
            await yard.said(log, "ann", "k1")
        await eventually(lambda: _is(lane.conversations_held <= 4))
    for log in logs:
        assert [document["sequence_number"] for document in await yard.log(log)] == [1, 2]


async def test_the_bound_on_conversations_is_met_exactly(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "HEADS_SECONDS", 0.1)
    async with run_lane(yard, conversations=4) as lane:
        for log in await pairs(yard, 4):
            await yard.said(log, "ann", "k1")
        await anyio.sleep(0.5)
        assert lane.conversations_held == 4


async def test_a_commit_holds_a_bounded_number_of_bytes(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "BATCH_BYTES", 1000)
    async with run_lane(yard):
        (log,) = await pairs(yard, 1)
        sizes: list[int] = []
        append = yard.store.messages.append

        async def noted(documents: Any) -> None:
            sizes.append(len(documents))
            await anyio.sleep(0.1)
            await append(documents)

        monkeypatch.setattr(yard.store.messages, "append", noted)
        for number in range(21):
            await yard.send(log, "ann", f"k{number}", "x" * 250)
        await yard.acks(21)
        await eventually(lambda: settled(yard))
    assert max(sizes) == 4
    assert [document["sequence_number"] for document in await yard.log(log)] == list(range(1, 22))


async def test_keys_that_cannot_be_written_are_dropped_past_the_bound_and_their_messages_still_answer(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "KEYS_WAITING", 3)
    async with run_lane(yard) as lane:
        (log,) = await pairs(yard, 1)
        with monkeypatch.context() as away:

            async def unavailable(*_: object) -> None:
                raise StoreUnavailable("away")

            away.setattr(yard.store.messages, "remember_keys", unavailable)
            for number in range(5):
                await yard.said(log, "ann", f"k{number}")
            await eventually(lambda: _is(lane.keys_waiting == 3))
        await eventually(lambda: _is(lane.keys_waiting == 0))
        await yard.send(log, "ann", "k0")
        (again,) = await yard.acks(1)
        assert again["payload"]["duplicate"] is True
        assert await yard.store.db["idempotency_keys"].count_documents({}) == 3
