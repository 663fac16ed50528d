"""The block list on a real MongoDB: who takes nothing from whom."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tests.workers.seeding import START

if TYPE_CHECKING:
    from workers.store import Store

pytestmark = pytest.mark.anyio


async def test_a_block_has_a_direction_and_repeating_it_changes_nothing(store: Store) -> None:
    await store.blocks.block("ann", "bob", START)
    await store.blocks.block("ann", "bob", START + timedelta(days=1))
    await store.blocks.block("cat", "ann", START)
    assert await store.blocks.between("ann", "bob")
    assert await store.blocks.between("bob", "ann")
    assert not await store.blocks.between("bob", "cat")
    assert await store.blocks.who_blocks("bob", ["ann", "cat"]) == {"ann"}
    assert await store.blocks.who_blocks("ann", ["bob", "cat"]) == {"cat"}
    assert await store.blocks.apart("ann", ["bob", "cat", "dan"]) == {"bob", "cat"}
    (block,), more = await store.blocks.listed("ann", "", 10)
    assert (block.user_id, block.created_at, more) == ("bob", START, None)


async def test_a_block_list_is_paged_by_id_and_ends(store: Store) -> None:
    for name in ("eve", "bob", "dan", "cat"):
        await store.blocks.block("ann", name, START)
    await store.blocks.unblock("ann", "dan", START)
    await store.blocks.unblock("ann", "nobody", START)
    first, more = await store.blocks.listed("ann", "", 2)
    assert ([block.user_id for block in first], more) == (["bob", "cat"], "cat")
    rest, end = await store.blocks.listed("ann", "cat", 2)
    assert ([block.user_id for block in rest], end) == (["eve"], None)
