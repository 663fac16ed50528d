"""Receipts on real servers: marks only move forward, authors hear of them, crashes lose none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from msgspec import UNSET

from protocol import frames, keys, records
from protocol.models import ConversationType
from tests.workers.lanes import SHARDS, crashing_lane, eventually, lose_its_lease, run_lane, settled, shown
from workers import consumer
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


async def test_receipts_of_an_owner_that_was_cut_off_do_not_take_back_what_the_next_one_told(yard: Yard) -> None:
    """What it had to say waited in a broken line, or in a process that stood still, while another owner went on."""
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        home = keys.lease(keys.shard_of(conv, SHARDS))
        await yard.broker.client.set(home, "somebody else")
        await yard.delivered(ack["payload"]["message_id"], "bob")
        await eventually(lambda: settled(yard))
        await yard.broker.client.delete(home)
        await yard.read(ack["payload"]["message_id"], "bob")
        ((users, update),) = await receipts(yard, 1)
    assert (users, update.delivered_through, update.read_through) == (["ann"], 1, 1)


async def test_a_shard_that_another_owns_costs_the_others_no_receipt(yard: Yard) -> None:
    """All that was told in one tick was lost with it."""
    await yard.connect("ann", "bob", "cat", "dan", "eve")
    async with run_lane(yard):
        taken = await yard.create("ann", "bob")
        kept = [await yard.create("ann", other) for other in ("cat", "dan", "eve")]
        home = keys.shard_of(taken, SHARDS)
        conv = next(name for name in kept if keys.shard_of(name, SHARDS) != home)
        reader = ("cat", "dan", "eve")[kept.index(conv)]
        await yard.send(taken, "ann", "k1")
        await yard.send(conv, "ann", "k2")
        first, second = await yard.acks(2)
        await yard.broker.client.set(keys.lease(home), "somebody else")
        for ack in (first, second):
            for user_id in ("bob", reader):
                await yard.delivered(ack["payload"]["message_id"], user_id)
        ((users, update),) = await receipts(yard, 1)
    assert (users, update.conversation_id, update.delivered_through) == (["ann"], conv, 1)


async def test_marks_that_are_being_flushed_while_their_conversation_is_read_again_are_not_forgotten(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After FLUSHALL every state is read again, what was read before a flush came behind it: receipts went back."""
    await yard.connect("ann", "bob")
    load, flush = yard.store.conversations.load, yard.store.marks.flush_marks
    flushing, was_read, flushed = anyio.Event(), anyio.Event(), anyio.Event()

    async def flush_late(marks: Any) -> None:
        flushing.set()
        with anyio.move_on_after(0.5):
            await was_read.wait()
        await flush(marks)
        flushed.set()

    async def load_slowly(conversation_ids: Any) -> Any:
        found = await load(conversation_ids)
        was_read.set()
        with anyio.move_on_after(1.0):
            await flushed.wait()
        return found

    async with run_lane(yard) as lane:
        conv = await yard.create("ann", "bob")
        for key in ("k1", "k2"):
            await yard.send(conv, "ann", key)
        first, second = [ack["payload"]["message_id"] for ack in await yard.acks(2)]
        await yard.delivered(first, "bob")
        await receipts(yard, 1)
        await eventually(lambda: settled(yard))
        monkeypatch.setattr(yard.store.marks, "flush_marks", flush_late)
        monkeypatch.setattr(yard.store.conversations, "load", load_slowly)
        await yard.delivered(second, "bob")
        await flushing.wait()
        lane._conversations.forget_shards(frozenset())
        await yard.send(conv, "ann", "k3")  # not bob's: it would move his marks, and hide what is forgotten
        await yard.acks(1)
        monkeypatch.undo()
        await eventually(lambda: settled(yard))
        await yard.read(second, "bob")
        told = await receipts(yard, 1)
    assert [(users, update.delivered_through) for users, update in told] == [(["ann"], 2)]


async def test_receipts_do_not_go_back_for_an_owner_that_comes_while_the_one_before_writes_its_marks(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After FLUSHALL shards change hands while both owners live. Members were read first, then how far their marks are
    flushed: what was flushed in between was in neither."""
    await yard.connect("ann", "bob")
    monkeypatch.setattr(consumer, "HEADS_SECONDS", float("inf"))
    log = yard.store.conversations._messages
    find_heads = log.aggregate
    async with run_lane(yard) as before:
        conv = await yard.create("ann", "bob")
        question = await yard.said(conv, "ann", "k1")
        await yard.said(conv, "bob", "k2")
        ((_, answered),) = await receipts(yard, 1)
        await lose_its_lease(before)

        async def find_heads_late(*words: Any, **options: Any) -> Any:
            monkeypatch.setattr(log, "aggregate", find_heads)
            await before._tick(force=True)
            return await find_heads(*words, **options)

        monkeypatch.setattr(log, "aggregate", find_heads_late)
        async with run_lane(yard):
            await yard.delivered(question, "bob")
            ((_, delivered),) = await receipts(yard, 1)
        assert log.aggregate == find_heads, "it flushed meanwhile"
    assert (answered.user_id, answered.read_through) == ("bob", 2)
    assert (delivered.delivered_through, delivered.read_through) == (2, 2)


async def test_receipts_do_not_go_back_when_a_worker_gets_a_shard_again_that_another_had_meanwhile(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch in hand, as the lease ended, brought its conversations back into memory, and there they grew old."""
    await yard.connect("ann", "bob")
    load = yard.store.conversations.load
    reading, lost = anyio.Event(), anyio.Event()

    async def load_late(names: Any) -> Any:
        reading.set()
        await lost.wait()
        return await load(names)

    async with run_lane(yard) as first:
        conv = await yard.create("ann", "bob")
        await yard.said(conv, "ann", "k1")
        monkeypatch.setattr(yard.store.conversations, "load", load_late)
        first._conversations.forget([conv])
        await yard.send(conv, "ann", "k2")
        await reading.wait()
        await lose_its_lease(first)
        lost.set()
        (ack,) = await yard.acks(1)
        async with run_lane(yard):
            await yard.read(ack["payload"]["message_id"], "bob")
            ((_, read),) = await receipts(yard, 1)
            await yard.acks(1)  # it has taken the message over, and found it
        first.set_shards(frozenset(range(SHARDS)))
        await yard.delivered(await yard.said(conv, "ann", "k3"), "bob")
        ((_, delivered),) = await receipts(yard, 1)
    assert (read.delivered_through, read.read_through) == (2, 2)
    assert (delivered.delivered_through, delivered.read_through) == (3, 2)


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


async def test_the_author_of_a_group_message_hears_how_many_have_it(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.send(group, "ann", "k1")
        (ack,) = await yard.acks(1)
        message_id = ack["payload"]["message_id"]
        told = []
        for mark in (
            yard.delivered(message_id, "bob"),
            yard.delivered(message_id, "cat"),
            yard.read(message_id, "bob"),
        ):
            await mark
            told += await receipts(yard, 1)
    assert [users for users, _ in told] == [["ann"]] * 3, "nobody but the author"
    first, second, third = (update for _, update in told)
    assert (first.user_id, first.delivered_count, first.read_count, first.participant_count) == ("bob", 1, 0, 2)
    assert (first.sequence_number, first.delivered_through, first.read_through) == (2, UNSET, UNSET)
    assert (second.user_id, second.delivered_count, second.delivered_through) == ("cat", 2, 2)
    assert (third.delivered_count, third.read_count, third.read_through) == (2, 1, UNSET)


async def test_a_tick_tells_each_author_once_about_their_newest_message_concerned(yard: Yard) -> None:
    people = ["ann", "bob", "cat", "dan"]
    await yard.connect(*people)
    async with run_lane(yard):
        group = await yard.create(*people, kind=ConversationType.GROUP)
        for number, sender in enumerate(("ann", "ann", "bob", "ann")):
            await yard.send(group, sender, f"k{number}")
        ids = [ack["payload"]["message_id"] for ack in await yard.acks(4)]
        answered = await receipts(yard, 2)
        both = [records.DeliveredMark(name, "d1", ids[2]) for name in ("cat", "dan")]
        shard = keys.shard_of(group, SHARDS)
        await yard.broker.append_ingest(shard, records.Receipts(both, []))
        told = await receipts(yard, 2)
        await eventually(lambda: settled(yard))
        await anyio.sleep(0.2)
    assert not [item for item in yard.down if is_receipt(item)]
    assert sorted((users[0], update.sequence_number, update.read_count) for users, update in answered) == [
        ("ann", 3, 1),
        ("bob", 4, 1),
    ], "who answers has read what came before"
    by_author = {users[0]: update for users, update in told}
    assert set(by_author) == {"ann", "bob"}
    assert (by_author["ann"].sequence_number, by_author["ann"].delivered_count) == (3, 3), "Bob has read it"
    assert (by_author["bob"].sequence_number, by_author["bob"].delivered_count) == (4, 3), "Ann too"


async def test_who_came_later_is_not_counted(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.send(group, "ann", "k1")
        (ack,) = await yard.acks(1)
        await yard.add(group, "ann", "cat")
        await yard.next_down(records.CommandOutcome, 2)
        await yard.delivered(ack["payload"]["message_id"], "bob")
        ((_, update),) = await receipts(yard, 1)
    assert (update.delivered_count, update.participant_count, update.delivered_through) == (1, 1, 2)


async def test_who_hides_what_they_read_moves_no_read_mark_but_their_own_badge(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.hide("bob", conv, group)
        await yard.send(conv, "ann", "k1")
        (direct,) = await yard.acks(1)
        await yard.send(group, "ann", "k2")
        (shared,) = await yard.acks(1)
        told = []
        for ack in (direct, shared):
            await yard.delivered(ack["payload"]["message_id"], "bob")
            told += await receipts(yard, 1)
            await yard.read(ack["payload"]["message_id"], "bob")
            await eventually(lambda: settled(yard))
        await anyio.sleep(0.2)
        assert not [item for item in yard.down if is_receipt(item)], "reading tells nobody"
        await yard.read(shared["payload"]["message_id"], "cat")
        told += await receipts(yard, 1)
        standing = {at.membership["conversation_id"]: at.unread for at in await yard.store.heads.standings("bob")}
    assert [(update.delivered_through, update.read_through) for _, update in told] == [
        (1, UNSET),
        (UNSET, UNSET),
        (2, UNSET),
    ]
    assert (told[2][1].delivered_count, told[2][1].read_count) == (2, 1)
    assert standing == {conv: 0, group: 0}


async def test_no_receipt_goes_back_when_somebody_stops_hiding_what_they_read(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.hide("bob", conv)
        ids = []
        for number, sender in enumerate(("ann", "ann", "bob", "ann")):
            await yard.send(conv, sender, f"k{number}")
            ids += [ack["payload"]["message_id"] for ack in await yard.acks(1)]
        ((users, _),) = await receipts(yard, 1)
        assert users == ["bob"], "ann has answered; bob, who hides, has told nothing by answering"
        await yard.delivered(ids[0], "bob")
        updates = [update for _, update in await receipts(yard, 1)]
        await yard.hide("bob", conv, hides=False)
        await eventually(lambda: settled(yard))
        await yard.delivered(ids[1], "bob")
        updates += [update for _, update in await receipts(yard, 1)]
    assert [(update.delivered_through, update.read_through) for update in updates] == [(1, UNSET), (3, UNSET)]


async def test_what_was_shown_stays_shown_and_what_was_read_in_hiding_is_never_shown(yard: Yard) -> None:
    """Off, on, off again; the live updates, the status of acks and pages, and what REST lists say the same."""
    await yard.connect("ann", "bob")
    told: list[Any] = []

    async def read(number: int) -> None:
        ids.append(await yard.said(conv, "ann", f"k{number}"))
        await yard.delivered(ids[-1], "bob")
        told.extend(update.read_through for _, update in await receipts(yard, 1))
        await yard.read(ids[-1], "bob")
        await eventually(lambda: settled(yard))

    async def check(*wanted: str) -> None:
        """Per message: its status in a page, in the ack of a repeat, and as REST lists it."""
        found = await yard.seen("ann", conv)
        assert [found[name].status.value for name in ids] == list(wanted)
        for number, (message_id, status) in enumerate(zip(ids, wanted, strict=True), 1):
            await yard.send(conv, "ann", f"k{number}")
            (ack,) = await yard.acks(1)
            assert ack["payload"]["status"] == status, number
            listed = await yard.store.search.receipts("ann", conv, message_id, "", 10)
            assert isinstance(listed, tuple)
            assert [receipt.read for receipt in listed[0]] == [status == "read"], number

    ids: list[str] = []
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        await read(1)
        await receipts(yard, 1)
        await yard.hide("bob", conv)
        await read(2)
        await check("read", "delivered")
    async with run_lane(yard):  # the next owner shows no more and no less
        await check("read", "delivered")
        await yard.hide("bob", conv, hides=False)
        await eventually(lambda: settled(yard))
        await check("read", "delivered")
        await yard.read(ids[1], "bob")
        await eventually(lambda: settled(yard))
        await check("read", "delivered")
    async with run_lane(yard):
        await check("read", "delivered")
        await read(3)
        ((_, last),) = await receipts(yard, 1)
        await check("read", "read", "read")
        await yard.hide("bob", conv)
        await eventually(lambda: settled(yard))
        await check("read", "read", "read")
    assert told == [UNSET, 1, 1]
    assert last.read_through == 3


async def test_who_read_it_has_got_it_in_the_counts_of_a_group(yard: Yard) -> None:
    """Who answers has read what came before, though no device has said it got it: "read by 1, delivered to 0"."""
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.said(group, "ann", "k1")
        await yard.said(group, "bob", "k2")
        ((_, update),) = await receipts(yard, 1)
    assert (update.delivered_count, update.read_count, update.participant_count) == (1, 1, 2)


def is_receipt(item: records.DownItem) -> bool:
    return isinstance(item, records.Notice) and isinstance(shown(item.frame), frames.ReceiptUpdatePayload)


async def receipts(yard: Yard, count: int) -> list[tuple[list[str], frames.ReceiptUpdatePayload]]:
    """The next receipt updates, with whom they are for; other notices are passed over."""
    found: list[tuple[list[str], frames.ReceiptUpdatePayload]] = []
    while len(found) < count:
        (notice,) = await yard.next_down(records.Notice, 1)
        if is_receipt(notice):
            found.append((notice.users, shown(notice.frame)))
    return found


async def test_a_reader_who_is_removed_while_they_are_looked_up_harms_nobody(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard) as lane:
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.send(group, "ann", "k1")
        (ack,) = await yard.acks(1)

        async def removed_meanwhile(user_id: str) -> int:
            owned = lane._conversations.get(group)
            assert owned is not None
            owned.members.pop(user_id, None)
            return 2

        monkeypatch.setattr(lane._courier, "devices", removed_meanwhile)
        await yard.read(ack["payload"]["message_id"], "bob")
        await eventually(lambda: settled(yard))
        await anyio.sleep(0.3)
        await yard.send(group, "ann", "k2")
        await yard.acks(1)


async def test_a_device_id_with_dots_has_a_cursor(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        await yard.delivered(ack["payload"]["message_id"], "bob", "phone.1%2E")
        await eventually(lambda: settled(yard))
    async with run_lane(yard):
        pass
    _, heads = await yard.store.heads.open_heads("bob", "phone.1%2E", {}, 0)
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
