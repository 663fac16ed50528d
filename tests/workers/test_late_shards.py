"""What a lane knows of the dead letters of a shard that comes while it takes another one over."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from protocol import keys
from tests.workers.lanes import SHARDS, run_lane
from tests.workers.letters import POISON, postpone, refusing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def owner_that_gets(yard: Yard, first: int, later: int) -> AsyncIterator[None]:
    """A lane whose second shard comes while it takes the first one over."""
    async with run_lane(yard, frozenset()) as lane:
        read = lane._takeover.read
        begun, go_on = anyio.Event(), anyio.Event()

        async def slowly(shard: int) -> None:
            if not begun.is_set():
                begun.set()
                await go_on.wait()
            await read(shard)

        lane._takeover.read = slowly  # type: ignore[method-assign]
        lane.set_shards(frozenset((first,)))
        await begun.wait()
        lane.set_shards(frozenset((first, later)))
        go_on.set()
        yield


async def test_the_dead_letters_of_a_shard_that_comes_later_are_known_too(yard: Yard) -> None:
    async with run_lane(yard), refusing(yard.store):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1", POISON)
        await yard.acks(1)
    await postpone(yard.store)
    shard = keys.shard_of(conv, SHARDS)
    async with owner_that_gets(yard, (shard + 1) % SHARDS, shard):
        await yard.send(conv, "ann", "k1", POISON)
        (answer,) = await yard.acks(1)
    assert answer["payload"].get("code") == "queued_for_retry"
