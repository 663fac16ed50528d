"""What accounts say comes into force with the owners of conversations, whatever dies or is lost on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import keys, records
from tests.workers.seeding import Rest, membership
from workers.rest import upkeep
from workers.rest.desk import Desk, now_ms
from workers.rest.shapes import moment_at
from workers.store.users import READ_RECEIPTS

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.store import Store

pytestmark = pytest.mark.anyio


class Pair:
    """Ann and Bob, and their conversation. Bob tries to write."""

    def __init__(self, rest: Rest, ann: tuple[str, str], bob: tuple[str, str], conversation_id: str) -> None:
        self.rest = rest
        (self.ann, self.ann_token), (self.bob, self.bob_token) = ann, bob
        self.conversation_id = conversation_id
        self._number = 0

    @classmethod
    async def meet(cls, rest: Rest) -> Pair:
        ann, bob = await rest.user("Ann"), await rest.user("Bob")
        begun = await rest.call("POST", "/v1/conversations", bob[1], {"type": "1:1", "participants": [ann[0]]})
        pair = cls(rest, ann, bob, begun.json()["_id"])
        assert await pair.write() == 201
        return pair

    async def write(self) -> int:
        """The status of Bob's next message."""
        self._number += 1
        body = {"content": "hello", "type": "text", "timestamp": 1}
        path = f"/v1/conversations/{self.conversation_id}/messages"
        sent = await self.rest.call("POST", path, self.bob_token, body, Idempotency_Key=f"k{self._number}")
        return sent.status_code

    async def block(self, method: str) -> int:
        return (await self.rest.call(method, f"/v1/blocks/{self.bob}", self.ann_token)).status_code

    async def listed(self) -> bool:
        return bool((await self.rest.call("GET", "/v1/blocks", self.ann_token)).json()["items"])


async def test_a_block_comes_into_force_though_the_process_that_stored_it_died(
    rest: Rest, store: Store, desk: Desk
) -> None:
    pair = await Pair.meet(rest)
    await store.blocks.block(pair.ann, pair.bob, moment_at(now_ms()))
    assert await pair.write() == 201, "nobody has told the owner"
    assert not await upkeep.finish_one(desk, 60), "its process may be at it still"
    assert await upkeep.finish_one(desk, -1)
    assert await pair.write() == 403
    await store.blocks.unblock(pair.ann, pair.bob, moment_at(now_ms()))
    assert await pair.write() == 403
    assert not await pair.listed()
    assert await upkeep.finish_one(desk, -1)
    assert await pair.write() == 201
    assert not await upkeep.finish_one(desk, -1)
    assert await store.db["blocks"].count_documents({}) == 0


async def test_a_block_comes_into_force_though_redis_was_lost_before_its_owner_heard(
    rest: Rest, broker: Broker, store: Store, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is taken, and then Redis comes back empty."""
    pair = await Pair.meet(rest)
    append = broker.append_ingest

    async def lose(shard: int, record: Any) -> None:
        if isinstance(record, records.LookAtAccount):
            await broker.client.flushall()
        else:
            await append(shard, record)

    with monkeypatch.context() as patched:
        patched.setattr(broker, "append_ingest", lose)
        assert await pair.block("PUT") == 503, "stored, not in force"
    assert await pair.listed()
    with anyio.fail_after(20):
        while True:
            try:
                await upkeep.finish_one(desk, -1)
                break
            except upkeep.Undecided:
                await anyio.sleep(0.2)
        while (status := await pair.write()) == 503:  # noqa: ASYNC110 - the servers tell nobody
            await anyio.sleep(0.2)
    assert status == 403
    assert await store.db["blocks"].count_documents({"unfinished_since": {"$exists": True}}) == 0


async def test_blocks_put_and_lifted_at_once_end_as_the_list_says(rest: Rest) -> None:
    pair = await Pair.meet(rest)
    for _ in range(10):
        async with anyio.create_task_group() as group:
            for method in ("PUT", "DELETE", "PUT", "DELETE"):
                group.start_soon(pair.block, method)
        assert await pair.write() == (403 if await pair.listed() else 201)


async def test_a_block_of_the_moment_in_which_the_conversation_begins_is_in_force(
    rest: Rest, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored behind every look of REST, and told to no owner, since there was no conversation."""
    ann, bob = await rest.user("Ann"), await rest.user("Bob")
    create = store.conversations.create

    async def block_first(created: Any) -> None:
        change = await store.blocks.block(ann[0], bob[0], moment_at(now_ms()))
        await store.blocks.finished(change)
        await create(created)

    monkeypatch.setattr(store.conversations, "create", block_first)
    begun = await rest.call("POST", "/v1/conversations", bob[1], {"type": "1:1", "participants": [ann[0]]})
    assert begun.status_code == 201
    assert await Pair(rest, ann, bob, begun.json()["_id"]).write() == 403


async def test_hiding_what_one_reads_comes_into_force_though_the_process_that_stored_it_died(
    rest: Rest, store: Store, desk: Desk
) -> None:
    pair = await Pair.meet(rest)
    change = {"privacy.read_receipts": False}
    await store.users.change(pair.ann, change, (), READ_RECEIPTS, moment_at(now_ms()))
    assert await upkeep.finish_one(desk, -1)
    assert not await upkeep.finish_one(desk, -1)
    stay = await membership(store, pair.conversation_id, pair.ann)
    assert stay.shown_read_seq == stay.read_seq


async def test_who_finishes_a_change_leaves_the_next_one_unfinished(
    rest: Rest, store: Store, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes at once: the first is told, the process of the second dies. It was forgotten with the first."""
    pair = await Pair.meet(rest)

    async def change(shown: bool) -> None:
        values = {"privacy.read_receipts": shown}
        await store.users.change(pair.ann, values, (), READ_RECEIPTS, moment_at(now_ms()))

    tell = upkeep.tell_owners

    async def overtaken(desk: Desk, user_id: str) -> None:
        await tell(desk, user_id)
        await change(True)

    await change(False)
    with monkeypatch.context() as patched:
        patched.setitem(upkeep.STEPS, READ_RECEIPTS, (overtaken,))
        await upkeep.finish(desk, pair.ann)
    assert await upkeep.finish_one(desk, -1)
    assert not await upkeep.finish_one(desk, -1)


async def test_a_deleted_account_blocks_nobody(rest: Rest, store: Store, desk: Desk) -> None:
    pair = await Pair.meet(rest)
    assert await pair.block("PUT") == 204
    await upkeep.forget_blocks(desk, pair.ann)
    assert await pair.write() == 201
    assert await store.db["blocks"].count_documents({}) == 0
    assert keys.direct_conversation_id(pair.ann, pair.bob) == pair.conversation_id
