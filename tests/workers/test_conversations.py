"""The owner's memory: writer and teller of a lane load into it side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import keys
from tests.workers.lanes import SHARDS, eventually, run_lane, settled
from workers import consumer
from workers.conversations import INBOXED, Conversations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


class SlowLoads:
    """Loads that wait, once read, until they are let go: what they hold may be old by then."""

    def __init__(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = anyio.Event()
        self.go_on = anyio.Event()
        self.count = 0
        load = yard.store.conversations.load

        async def slow(names: Sequence[str]) -> Any:
            self.count += 1
            loaded = await load(names)
            self.read.set()
            await self.go_on.wait()
            return loaded

        monkeypatch.setattr(yard.store.conversations, "load", slow)


async def test_a_load_does_not_replace_what_another_has_moved_on(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k1", "hello")
    shard_of = {conv: keys.shard_of(conv, SHARDS)}
    conversations = Conversations(yard.store.conversations)
    loads = SlowLoads(yard, monkeypatch)
    async with anyio.create_task_group() as group:
        group.start_soon(conversations.load, shard_of)
        group.start_soon(conversations.load, shard_of)
        await loads.read.wait()
        await anyio.wait_all_tasks_blocked()
        loads.go_on.set()
    assert loads.count == 1, "who comes second takes what the first has brought"


async def test_what_was_forgotten_while_it_was_read_is_read_again(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k1", "hello")
    conversations = Conversations(yard.store.conversations)
    loads = SlowLoads(yard, monkeypatch)
    async with anyio.create_task_group() as group:
        group.start_soon(conversations.load, {conv: keys.shard_of(conv, SHARDS)})
        await loads.read.wait()
        conversations.forget([conv])
        loads.go_on.set()
    assert loads.count == 2
    owned = conversations.get(conv)
    assert owned is not None
    assert owned.last == 1


async def test_who_answers_while_the_conversation_is_read_again_has_read_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the read found of the sender's earlier messages took the place of the mark that the answer had moved."""
    monkeypatch.setattr(consumer, "HEADS_SECONDS", float("inf"))
    append = yard.store.messages.append
    appending, go_on = anyio.Event(), anyio.Event()

    async def append_late(documents: Any) -> None:
        appending.set()
        await go_on.wait()
        await append(documents)

    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k1")
        await yard.said(conv, "bob", "k2")
        monkeypatch.setattr(yard.store.messages, "append", append_late)
        await yard.send(conv, "bob", "k3")
        await appending.wait()
        loads = SlowLoads(yard, monkeypatch)
        lane._conversations.forget_shards(frozenset())
        async with anyio.create_task_group() as group:
            group.start_soon(lane._conversations.load, {conv: keys.shard_of(conv, SHARDS)})
            await loads.read.wait()
            go_on.set()
            await yard.acks(1)
            loads.go_on.set()
    member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert member is not None
    assert member["read_seq"] == 3


async def test_the_memory_of_an_inbox_is_bounded_and_its_newest_leave_it_with_their_receipt(yard: Yard) -> None:
    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        for number in range(INBOXED + 10):
            await yard.send(conv, "ann", f"k{number}")
        last = (await yard.acks(INBOXED + 10))[-1]["payload"]["message_id"]
        owned = lane._conversations.get(conv)
        assert owned is not None
        assert len(owned.inboxed["bob"]) == INBOXED
        await yard.delivered(last, "bob")
        await eventually(lambda: settled(yard))
        assert owned.inboxed == {}
        await eventually(lambda: waits_no_more(yard))


async def waits_no_more(yard: Yard) -> bool:
    """Only what was forgotten here waits until the user comes back (`query.py` tidies it)."""
    return await yard.broker.client.llen(keys.inbox("bob")) <= 10
