"""The owner's memory: writer and teller of a lane load into it side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import keys
from tests.workers.lanes import SHARDS, run_lane
from workers.conversations import Conversations

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
