"""Where a user stands: cursors, heads, unread; each rule of protocol.md's unread_count, at any state of the flush."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from protocol import keys, watermarks
from protocol.records import OpenHead, UserHead
from tests.workers.seeding import NOW_MS, START, Log
from workers.store.conversations import heads_pipeline
from workers.store.heads import ENDED_SWEPT, ENDED_TOLD, written_since
from workers.store.indexes import SEQUENCE_INDEX

if TYPE_CHECKING:
    from workers.store import Store

pytestmark = pytest.mark.anyio


async def open_one(store: Store, user_id: str, device: str = "phone", **cursors: int) -> tuple[int, OpenHead]:
    unread, heads = await store.heads.open_heads(user_id, device, cursors, NOW_MS)
    assert len(heads) == 1
    return unread, heads[0]


async def test_a_new_device_starts_before_the_first_visible_entry(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "a")
    assert await open_one(store, "b") == (3, OpenHead("c", 0, 3, log.digest))


async def test_a_known_device_goes_on_where_it_acknowledged(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "a")
    await log.mark("b", delivered=2, phone=2)
    assert (await open_one(store, "b"))[1].cursor == 2
    assert (await open_one(store, "b", "laptop"))[1].cursor == 0


async def test_device_names_with_dots_dollars_and_percents_keep_their_cursors(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "a")
    for position, device in enumerate(("web.1", "%2E", "$x"), start=1):
        await log.mark("b", **{device: position})
    for position, device in enumerate(("web.1", "%2E", "$x"), start=1):
        assert (await open_one(store, "b", device))[1].cursor == position


@pytest.mark.parametrize(("claimed", "cursor"), [(0, 2), (2, 2), (3, 3), (4, 4), (5, 5), (99, 5)])
async def test_a_claimed_cursor_is_clamped_to_what_the_member_may_see(store: Store, claimed: int, cursor: int) -> None:
    log = await Log(store, "c", ["a"]).create()
    await log.append("a", "a")
    await log.join("b", 3)
    await log.append("system", "a", "a")
    assert (await open_one(store, "b", c=claimed))[1].cursor == cursor


async def test_a_claimed_cursor_beats_the_stored_one_and_foreign_ones_are_ignored(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    other = await Log(store, "d", ["a", "x"]).create()
    await log.append("a", "a", "a")
    await other.append("a")
    await log.mark("b", delivered=3, phone=3)
    assert await open_one(store, "b", c=1, d=1, unknown=7) == (3, OpenHead("c", 1, 3, log.digest))


async def test_system_messages_never_count_as_unread(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("system", "a", "system", "a", "system")
    assert (await open_one(store, "b"))[0] == 2


async def test_reading_and_joining_late_leave_only_what_came_after(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "system", "a", "a")
    await log.mark("b", delivered=3, read=3, read_countable=2)
    await log.join("late", 5)
    await log.append("system", "a", "a")
    assert (await open_one(store, "b"))[0] == 3
    assert (await open_one(store, "late"))[0] == 2


async def test_an_own_message_reads_everything_before_it_even_before_the_flush(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "a")
    await log.flush()
    assert (await open_one(store, "b"))[0] == 3
    await log.append("b")
    assert (await open_one(store, "b"))[0] == 0
    await log.append("a")
    assert (await open_one(store, "b"))[0] == 1
    # What the flusher does, in its order; the answer never changes on the way.
    await log.mark("b", read=4, read_countable=4)
    assert (await open_one(store, "b"))[0] == 1
    await log.flush()
    assert (await open_one(store, "b"))[0] == 1


async def test_unread_is_the_sum_over_live_memberships_only(store: Store) -> None:
    for name in ("c", "d", "e"):
        log = await Log(store, name, ["a", "b"]).create()
        await log.append("a", "a")
        if name == "e":
            await log.leave("b", 2)
    unread, heads = await store.heads.open_heads("b", "phone", {}, NOW_MS)
    assert unread == 4
    assert sorted(head.conversation_id for head in heads) == ["c", "d"]


def ms_after_leaving(leave_seq: int, since: timedelta) -> int:
    return int((START + timedelta(seconds=leave_seq) + since).timestamp() * 1000)


async def test_who_was_removed_while_away_is_told_up_to_the_removal(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "system")
    await log.leave("b", 3)
    end = OpenHead("c", 1, 3, log.digest)
    await log.append("a", "a")
    await log.mark("b", delivered=1, phone=1, laptop=3)
    last_moment = ms_after_leaving(3, ENDED_TOLD)
    for now_ms in (NOW_MS, last_moment):
        assert await store.heads.open_heads("b", "phone", {}, now_ms) == (0, [end])
    assert await store.heads.open_heads("b", "phone", {}, last_moment + 1) == (0, [])
    # Who saw the end, or never had part of it, has nothing to hear.
    assert await store.heads.open_heads("b", "laptop", {}, NOW_MS) == (0, [])
    assert await store.heads.open_heads("b", "phone", {"c": 3}, NOW_MS) == (0, [])
    assert await store.heads.open_heads("b", "new", {}, NOW_MS) == (0, [])


async def test_who_names_a_conversation_that_they_left_is_told_however_long_ago_that_was(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "system")
    await log.leave("b", 3)
    later = ms_after_leaving(3, ENDED_TOLD * 2)
    assert await store.heads.open_heads("b", "new", {"c": 2}, later) == (0, [OpenHead("c", 2, 3, log.digest)])
    assert await store.heads.open_heads("stranger", "new", {"c": 2}, later) == (0, [])
    await log.append("a")
    await log.expire_through(3)
    assert await store.heads.open_heads("b", "new", {"c": 2}, later) == (0, [])


async def test_the_sweep_speaks_of_a_removal_for_some_minutes(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "system")
    await log.leave("b", 3)
    await log.append("a")
    last_moment = ms_after_leaving(3, ENDED_SWEPT)
    assert await store.heads.sweep_heads(["b"], last_moment) == [UserHead("b", "c", 3, ended=True)]
    assert await store.heads.sweep_heads(["b"], last_moment + 1) == []


async def test_nobody_knows_a_stranger(store: Store) -> None:
    assert await store.heads.open_heads("nobody", "phone", {"c": 3}, NOW_MS) == (0, [])
    assert await store.heads.sweep_heads(["nobody"], NOW_MS) == []


async def test_an_empty_conversation_stands_at_zero(store: Store) -> None:
    await Log(store, "c", ["a", "b"]).create()
    assert await open_one(store, "b") == (0, OpenHead("c", 0, 0, watermarks.NO_DIGEST))
    assert await store.heads.sweep_heads(["a", "b"], NOW_MS) == []


async def test_a_log_that_expired_altogether_ends_where_it_ended(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "a")
    await log.flush()
    await log.expire_through(3)
    assert await open_one(store, "b") == (0, OpenHead("c", 0, 3, log.digest))


async def test_the_sweep_reports_flushed_heads_of_live_members(store: Store) -> None:
    log = await Log(store, "c", ["a", "b", "gone"]).create()
    await log.append("a", "a")
    await log.leave("gone", 1)
    await log.flush()
    await log.append("a")
    long_after = ms_after_leaving(1, ENDED_SWEPT * 2)
    heads = await store.heads.sweep_heads(["a", "b", "gone", "nobody"], long_after)
    assert sorted(heads, key=lambda head: head.user_id) == [UserHead("a", "c", 2), UserHead("b", "c", 2)]


async def operations(store: Store, user_id: str) -> int:
    """How many operations the server carries out for one `open_heads`, by its own profiler."""
    await store.db.command("profile", 2)
    await store.heads.open_heads(user_id, "phone", {}, NOW_MS)
    await store.db.command("profile", 0)
    count = await store.db["system.profile"].count_documents({"command.profile": {"$exists": False}})
    await store.db.drop_collection("system.profile")
    return count


async def test_opening_takes_as_many_round_trips_for_thirty_conversations_as_for_one(store: Store) -> None:
    counts = []
    for first, end in ((0, 1), (1, 30)):
        for number in range(first, end):
            log = await Log(store, f"c{number}", ["a", "b"]).create()
            await log.append("a", "b", "a")
        counts.append(await operations(store, "b"))
    assert counts == [4, 4]
    unread, heads = await store.heads.open_heads("b", "phone", {}, NOW_MS)
    assert (unread, len(heads)) == (30, 30)


async def test_heads_come_from_a_distinct_scan_of_the_sequence_index(store: Store) -> None:
    for name in ("c", "d"):
        log = await Log(store, name, ["a", "b"]).create()
        await log.append(*["a"] * 50)
    plan = await store.db.command(
        "explain",
        {
            "aggregate": "messages",
            "pipeline": heads_pipeline(["c", "d"]),
            "cursor": {},
            "hint": SEQUENCE_INDEX,
        },
        verbosity="executionStats",
    )
    assert "DISTINCT_SCAN" in str(plan)
    assert plan["stages"][0]["$cursor"]["executionStats"]["totalDocsExamined"] == 2


async def test_of_other_shards_and_times_a_new_owner_fetches_nothing(store: Store) -> None:
    documents = [
        {
            "_id": keys.new_message_id(at_ms, shard, shard),
            "conversation_id": f"c{shard}",
            "sequence_number": at_ms,
            "sender_id": "a",
            "idempotency_key": str(at_ms),
        }
        for shard in (1, 26, 27)
        for at_ms in range(1000, 1020)
    ]
    await store.db["messages"].insert_many(documents)
    plan = await store.db.command(
        "explain", {"find": "messages", "filter": written_since([27, 1], 1015)}, verbosity="executionStats"
    )
    assert plan["executionStats"]["nReturned"] == 10
    assert plan["executionStats"]["totalDocsExamined"] == 10
    assert plan["executionStats"]["totalKeysExamined"] <= 17
