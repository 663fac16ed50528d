"""A shard that comes to a lane: what its previous owner had read is committed first, whenever the shard comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from pymongo.errors import AutoReconnect

from protocol import keys, records
from tests.workers.lanes import SHARDS, crashing_lane, eventually, run_lane, settled
from tests.workers.seeding import membership
from workers import consumer
from workers.store.messages import OutcomeUnknown

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


async def left_behind(yard: Yard) -> str:
    """A conversation with one message that a previous owner has read and never acknowledged, and one behind it that
    nobody has read."""
    async with run_lane(yard):
        conversation_id = await yard.create("ann", "ben")
        await yard.next_down(records.CommandOutcome, 1)
        await eventually(lambda: settled(yard))
    await yard.send(conversation_id, "ann", "first")
    shard = keys.shard_of(conversation_id, SHARDS)
    assert len(await yard.broker.read_ingest([shard], 10, 10)) == 1
    await yard.send(conversation_id, "ann", "second")
    return conversation_id


async def keys_in_order(yard: Yard, conversation_id: str) -> list[str]:
    async def both() -> bool:
        return len(await yard.log(conversation_id)) == 2

    await eventually(both)
    return [entry["idempotency_key"] for entry in await yard.log(conversation_id)]


async def test_messages_of_one_connection_keep_their_order_when_a_shard_comes_while_the_reader_waits(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused worker's shards came while the reader waited for room: what was new was committed before what was
    pending."""
    conversation_id = await left_behind(yard)
    others = frozenset(range(SHARDS)) - {keys.shard_of(conversation_id, SHARDS)}
    async with run_lane(yard, others) as lane:
        wait = lane.wait_for_room

        async def meanwhile() -> None:
            await wait()
            lane.set_shards(frozenset(range(SHARDS)))

        await anyio.sleep(0.3)  # it has taken over the others, and reads
        monkeypatch.setattr(lane, "wait_for_room", meanwhile)
        assert await keys_in_order(yard, conversation_id) == ["first", "second"]


async def test_messages_keep_their_order_when_a_shard_goes_and_comes_back_during_a_read(yard: Yard) -> None:
    """The read that was under way brings what is new; what another owner read meanwhile is before it."""
    async with run_lane(yard) as lane:
        conversation_id = await yard.create("ann", "ben")
        await yard.next_down(records.CommandOutcome, 1)
        await eventually(lambda: settled(yard))
        shard = keys.shard_of(conversation_id, SHARDS)
        read = lane._broker.read_ingest

        async def changing_hands(shards: list[int], count: int, block_ms: int | None) -> object:
            """Another owner reads the first message; this one has the shard again when its own read ends."""
            lane._broker.read_ingest = read  # type: ignore[method-assign]
            lane.set_shards(frozenset(range(SHARDS)) - {shard})
            await yard.send(conversation_id, "ann", "first")
            assert len(await read([shard], 10, 10)) == 1
            await yard.send(conversation_id, "ann", "second")
            lane.set_shards(frozenset(range(SHARDS)))
            return await read(shards, count, block_ms)

        lane._broker.read_ingest = changing_hands  # type: ignore[assignment, method-assign]
        assert await keys_in_order(yard, conversation_id) == ["first", "second"]


@pytest.mark.parametrize("looks_back_ms", [20_000, 100], ids=["soon", "after an outage of all workers"])
async def test_the_end_of_a_log_is_known_though_its_owner_died_between_acknowledging_and_flushing_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, looks_back_ms: int
) -> None:
    """A push that was lost then stayed lost: the gateways' sweep never heard of the last messages, until somebody spoke
    there again. Simulator, seed 430; and for ever where all workers were away for longer than one looks back (F-W4)."""
    monkeypatch.setattr(consumer, "REPAIR_MS", looks_back_ms)
    async with run_lane(yard):
        conv = await yard.create("ann", "ben")
        await yard.said(conv, "ben", "k1")
        await eventually(lambda: settled(yard))

    async def never(_: object) -> None:
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.marks, "flush_heads", never)
        patched.setattr(yard.store.marks, "flush_marks", never)
        async with crashing_lane(yard):
            await yard.said(conv, "ann", "k2")
            await yard.said(conv, "ann", "k3")
            await eventually(lambda: settled(yard))

    async def flushed() -> int:
        document = await yard.store.db["sequence_numbers"].find_one({"_id": conv})
        assert document is not None
        last: int = document["last_sequence_number"]
        return last

    async def is_known() -> bool:
        return await flushed() == 3

    assert await flushed() == 1
    await anyio.sleep(0.3)  # more than the shorter one looks back
    async with run_lane(yard):
        await eventually(is_known)
        assert (await membership(yard.store, conv, "ann")).read_seq == 3
        conversation = await yard.store.db["conversations"].find_one({"_id": conv})
    last = (await yard.log(conv))[-1]
    assert conversation is not None
    assert conversation["last_message_at"] == last["created_at"]


async def test_a_message_that_is_confirmed_between_two_reads_moves_the_end_of_its_log(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knew what became of its insert; it was not there yet when the log was read again, and was when its key was
    looked up. What the log ended with by then was taken for its end: no sweep mended a lost push, and who was added by
    it was no member to the owner. Simulator, seed 12195 of d38c469."""
    append, find_keys = yard.store.messages.append, yard.store.messages.find_keys
    on_their_way: list[Any] = []

    async def append_later(documents: Any) -> None:
        on_their_way.append(documents)
        raise OutcomeUnknown("the reply was lost") from AutoReconnect()

    async def confirm_and_find(wanted: Any) -> Any:
        while on_their_way:
            await append(on_their_way.pop())
        return await find_keys(wanted)

    async def flushed() -> bool:
        document = await yard.store.db["sequence_numbers"].find_one({"_id": conv})
        return document is not None and document["last_sequence_number"] == 2

    async with run_lane(yard):
        conv = await yard.create("ann", "ben")
        await yard.said(conv, "ben", "k1")
        with monkeypatch.context() as patched:
            patched.setattr(yard.store.messages, "append", append_later)
            patched.setattr(yard.store.messages, "find_keys", confirm_and_find)
            await yard.said(conv, "ann", "k2")
        await eventually(flushed)
