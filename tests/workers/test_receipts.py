"""Receipts on real servers: marks only move forward, authors hear of them, crashes lose none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import records
from protocol.models import ConversationType
from tests.workers.lanes import crashing_lane, eventually, run_lane, settled, shown
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


async def test_receipts_reach_the_author_and_only_move_forward(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        for number in range(3):
            await yard.send(conv, "ann", f"k{number}")
        ids = [a["payload"]["message_id"] for a in await yard.acks(3)]
        seen = []
        for message_id in (ids[1], ids[0], ids[2]):
            await yard.delivered(message_id, "bob")
            await anyio.sleep(0.15)
        await yard.read(ids[1], "bob")
        await yard.read(ids[0], "bob")
        for notice in await yard.next_down(records.Notice, 3):
            assert notice.users == ["ann"]
            seen.append(shown(notice.frame))
        await eventually(lambda: settled(yard))
        member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert [update.delivered_through for update in seen] == [2, 3, 3]
    assert seen[-1].read_through == 2
    assert member is not None
    assert (member["delivered_seq"], member["read_seq"], member["devices"]) == (3, 2, {"d1": 3})


async def test_receipts_survive_a_crash_before_their_flush(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.marks, "flush_marks", never)
        async with crashing_lane(yard):
            await yard.delivered(ack["payload"]["message_id"], "bob")
            with anyio.fail_after(5):
                await reached.wait()
    async with run_lane(yard):
        await eventually(lambda: settled(yard))
    member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert member is not None
    assert member["delivered_seq"] == 1


async def test_a_strangers_receipt_is_ignored(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        message_id = ack["payload"]["message_id"]
        await yard.delivered(message_id, "eve")
        await yard.read(message_id, "eve")
        another = "0" if message_id[-4] != "0" else "1"
        await yard.delivered(message_id[:-4] + another + message_id[-3:], "bob")
        await eventually(lambda: settled(yard))
        await anyio.sleep(0.1)
    assert not [item for item in yard.down if isinstance(item, records.Notice)]
    assert await yard.store.db["memberships"].find_one({"_id": f"{conv}:eve"}) is None
    member = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
    assert member is not None
    assert member["delivered_seq"] == 0


async def test_a_group_message_is_delivered_when_all_have_it(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.send(group, "ann", "k1")
        (ack,) = await yard.acks(1)
        message_id = ack["payload"]["message_id"]
        await yard.delivered(message_id, "bob")
        await eventually(lambda: settled(yard))
        await anyio.sleep(0.2)
        assert not [i for i in yard.down if isinstance(i, records.Notice)]
        await yard.delivered(message_id, "cat")
        (notice,) = await yard.next_down(records.Notice, 1)
    update = shown(notice.frame)
    assert notice.users == ["ann"]
    assert (update.user_id, update.delivered_through) == ("cat", 2)


async def test_a_device_id_with_dots_has_a_cursor(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        await yard.delivered(ack["payload"]["message_id"], "bob", "phone.1%2E")
        await eventually(lambda: settled(yard))
    async with run_lane(yard):
        pass
    _, heads = await yard.store.heads.open_heads("bob", "phone.1%2E", {})
    assert [head.cursor for head in heads] == [1]


async def test_receipts_reach_the_author_when_both_people_send(yard: Yard) -> None:
    """Own sends moved the delivered mark past the other's message, and its author never heard of its delivery."""
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (first,) = await yard.acks(1)
        await yard.send(conv, "bob", "k2")
        await yard.acks(1)
        (replied,) = await yard.next_down(records.Notice, 1)
        before = await yard.store.db["memberships"].find_one({"_id": f"{conv}:bob"})
        await yard.delivered(first["payload"]["message_id"], "bob")
        (told,) = await yard.next_down(records.Notice, 1)
        await eventually(lambda: settled(yard))
    assert replied.users == ["ann"]
    assert shown(replied.frame).read_through == 2, "who answers has read what came before"
    assert before is not None
    assert before["delivered_seq"] == 0, "only a delivery_ack makes delivered"
    assert (shown(told.frame).user_id, shown(told.frame).delivered_through) == ("bob", 2)


async def test_nobody_is_told_a_mark_that_is_not_flushed(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that knows only the store would announce less: the author saw receipts go backwards."""
    await yard.connect("ann", "bob")
    flush = yard.store.marks.flush_marks
    refused = 0

    async def refuse(marks: Any) -> None:
        nonlocal refused
        if marks:
            refused += 1
            raise StoreUnavailable("no majority")

    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        await anyio.sleep(1.3)
        monkeypatch.setattr(yard.store.marks, "flush_marks", refuse)
        await yard.delivered(ack["payload"]["message_id"], "bob")
        with pytest.raises(TimeoutError):
            await yard.next_down(records.Notice, 1, 1.0)
        monkeypatch.setattr(yard.store.marks, "flush_marks", flush)
        (notice,) = await yard.next_down(records.Notice, 1)
    assert refused
    assert shown(notice.frame).delivered_through == 1
