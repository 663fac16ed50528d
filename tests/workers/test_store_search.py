"""Search by metadata on a real MongoDB: what fits, what the viewer may see, and what it costs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from protocol.models import ConversationType, MessageType
from tests.workers.seeding import START, Log
from workers.store import search
from workers.store.indexes import SEQUENCE_INDEX
from workers.store.logs import NotVisible
from workers.store.search import SearchReader, Spot, Wanted

if TYPE_CHECKING:
    from workers.store import Store

pytestmark = pytest.mark.anyio

HIGH = 2**53
PAST = START - timedelta(days=1)


async def change(store: Store, log: Log, sequence: int, **fields: Any) -> None:
    """What becomes of a message after its commit, or what it was sent with."""
    await store.db["messages"].update_one(
        {"conversation_id": log.conversation_id, "sequence_number": sequence}, {"$set": fields}
    )


async def sequences(store: Store, user_id: str, conversation_id: str, wanted: Wanted, limit: int = 100) -> list[int]:
    found = await store.search.in_conversation(user_id, conversation_id, wanted, HIGH, limit)
    assert not isinstance(found, NotVisible)
    return [message.sequence_number for message in found[0]]


@pytest.fixture
async def log(store: Store) -> Log:
    """1 system, 2 ann, 3 bob, 4 ann (image), 5 bob (forwarded), 6 ann (reply to the second)."""
    log = await Log(store, "conv_1", ["ann", "bob"]).create()
    await log.append("system", "ann", "bob", "ann", "bob", "ann")
    second = await store.db["messages"].find_one({"conversation_id": "conv_1", "sequence_number": 2})
    assert second is not None
    await change(store, log, 4, type="image", media_url="/v1/media/med_" + "0" * 27)
    await change(store, log, 5, forwarded=True)
    await change(store, log, 6, reply_to_message_id=second["_id"])
    await log.flush()
    return log


async def test_each_filter_finds_what_fits_newest_first(store: Store, log: Log) -> None:
    fourth = START + timedelta(seconds=4)
    reply = await store.db["messages"].find_one({"conversation_id": "conv_1", "sequence_number": 6})
    assert reply is not None
    cases: list[tuple[Wanted, list[int]]] = [
        (Wanted(), [6, 5, 4, 3, 2]),
        (Wanted(sender_id="ann"), [6, 4, 2]),
        (Wanted(message_type=MessageType.IMAGE), [4]),
        (Wanted(message_type=MessageType.SYSTEM), [1]),
        (Wanted(after=fourth), [6, 5, 4]),
        (Wanted(before=fourth), [3, 2]),
        (Wanted(after=fourth, before=fourth + timedelta(seconds=1)), [4]),
        (Wanted(after=START + timedelta(days=1)), []),
        (Wanted(has_media=True), [4]),
        (Wanted(has_media=False, sender_id="ann"), [6, 2]),
        (Wanted(reply_to=reply["reply_to_message_id"]), [6]),
        (Wanted(forwarded=True), [5]),
        (Wanted(forwarded=False, sender_id="bob"), [3]),
    ]
    for wanted, expected in cases:
        assert await sequences(store, "bob", "conv_1", wanted) == expected, wanted
        everywhere, more = await store.search.everywhere("bob", wanted, None, 100)
        assert ([message.sequence_number for message in everywhere], more) == (expected, None), wanted


async def test_nothing_is_found_that_the_viewer_may_not_see(store: Store, log: Log) -> None:
    await change(store, log, 3, hidden_by=["ann"])
    await change(store, log, 4, deleted_at=START, content="")
    await change(store, log, 5, expires_at=PAST)
    await log.join("cat", 6)
    await log.leave("bob", 3)
    assert await sequences(store, "ann", "conv_1", Wanted()) == [6, 2]
    assert await sequences(store, "bob", "conv_1", Wanted()) == [3, 2]
    assert await sequences(store, "cat", "conv_1", Wanted()) == [6]
    assert isinstance(await store.search.in_conversation("eve", "conv_1", Wanted(), HIGH, 9), NotVisible)
    found = {name: (await store.search.everywhere(name, Wanted(), None, 9))[0] for name in ("ann", "bob", "cat", "eve")}
    assert {name: [message.sequence_number for message in messages] for name, messages in found.items()} == {
        "ann": [6, 2],
        "bob": [],
        "cat": [6],
        "eve": [],
    }


async def test_pages_of_a_search_go_on_where_they_end(store: Store, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SPAN", 2)
    pages, before = [], HIGH
    while True:
        found = await store.search.in_conversation("ann", "conv_1", Wanted(sender_id="bob"), before, 1)
        assert not isinstance(found, NotVisible)
        pages.append([message.sequence_number for message in found[0]])
        if found[1] is None:
            break
        before = found[1]
    assert pages == [[5], [3], []], "a page covers two entries, and may hold nothing"

    other = await Log(store, "conv_2", ["ann", "cat"]).create(ConversationType.ONE_TO_ONE)
    await other.append("cat", "cat", "cat")
    await other.flush()
    seen: list[tuple[str, int]] = []
    spot: Spot | None = None
    while True:
        items, spot = await store.search.everywhere("ann", Wanted(), spot, 3)
        assert len(items) <= 3
        seen += [(message.conversation_id, message.sequence_number) for message in items]
        if spot is None:
            break
    in_time = sorted(seen, key=lambda at: at[1], reverse=True)
    assert [at[1] for at in seen] == [at[1] for at in in_time]
    assert sorted(seen) == [("conv_1", n) for n in range(2, 7)] + [("conv_2", n) for n in range(1, 4)]


async def test_no_search_scans_the_collection(store: Store, log: Log) -> None:
    """Both walk the log of the conversations concerned by their index, and nobody else's."""
    for number in range(2, 22):
        stranger = await Log(store, f"conv_{number}", ["eve"]).create()
        await stranger.append(*["eve"] * 10)
    fitting = Wanted(sender_id="bob").filter("ann", datetime.now(START.tzinfo))
    query = search.conversation_query("conv_1", 1, 6, fitting)
    order = [("conversation_id", -1), ("sequence_number", -1)]
    plan = await store.db["messages"].find(query, sort=order, hint=SEQUENCE_INDEX).explain()
    assert stages(plan["queryPlanner"]["winningPlan"]) == {"FETCH", "IXSCAN"}
    assert plan["executionStats"]["totalDocsExamined"] <= 6

    for wanted in (Wanted(), Wanted(after=PAST, before=START + timedelta(days=1))):
        pipeline = search.everywhere_pipeline(
            [("conv_1", 1), ("conv_2", 1)], wanted.filter("ann", START), wanted, Spot(START, "msg"), 10
        )
        explained = await store.db.command(
            "explain",
            {"aggregate": "messages", "pipeline": pipeline, "cursor": {}, "hint": SEQUENCE_INDEX},
            verbosity="executionStats",
        )
        first = explained["stages"][0]["$cursor"] if "stages" in explained else explained
        assert "COLLSCAN" not in stages(first["queryPlanner"]["winningPlan"])
        assert indexes(first["queryPlanner"]["winningPlan"]) == {"conversation_sequence"}
        assert first["executionStats"]["totalDocsExamined"] <= 16, "6 of one conversation, 10 of the other"


def stages(plan: Any) -> set[str]:
    return set(named(plan, "stage"))


def indexes(plan: Any) -> set[str]:
    return set(named(plan, "indexName"))


def named(plan: Any, field: str) -> list[str]:
    """Every value of a field anywhere in a plan."""
    if isinstance(plan, list):
        return [value for part in plan for value in named(part, field)]
    if not isinstance(plan, dict):
        return []
    own = [plan[field]] if isinstance(plan.get(field), str) else []
    return own + [value for part in plan.values() for value in named(part, field)]


async def test_the_last_message_is_the_newest_visible_one_that_changes_no_other(store: Store, log: Log) -> None:
    await log.append("system")
    await change(store, log, 7, target_message_id="msg_x")
    newest = await store.search.newest("ann", ["conv_1", "conv_unknown"])
    assert {name: message.sequence_number for name, message in newest.items()} == {"conv_1": 6}
    await log.leave("bob", 3)
    assert await store.search.newest("bob", ["conv_1"]) == {}


async def test_whoever_is_banned_during_a_search_finds_nothing_of_after(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await Log(store, "conv_1", ["ann", "bob"]).create()
    await log.append("ann")
    await log.flush()
    look = SearchReader._joined

    async def ban_meanwhile(self: SearchReader, user_id: str) -> list[tuple[str, int]]:
        joined = await look(self, user_id)
        await log.leave("bob", 1)
        await log.append("ann", content="of bob")
        return joined

    monkeypatch.setattr(SearchReader, "_joined", ban_meanwhile)
    found, _ = await store.search.everywhere("bob", Wanted(), None, 9)
    assert [message.sequence_number for message in found] == [1]
