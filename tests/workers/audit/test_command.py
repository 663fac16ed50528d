"""The audit of a real database: what a lane has written is clean, and what is altered behind its back is named."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import keys, records
from protocol.models import ConversationType, Role
from tests.workers.audit.scenes import quiet_run
from tests.workers.audit.test_auditor import SEEDED as SEEDED_RUNS
from tests.workers.audit.test_auditor import repeat_a_number, store_it_twice
from tests.workers.lanes import eventually, run_lane, settled
from workers.audit import command
from workers.audit.history import HistoryWriter
from workers.audit.report import lines
from workers.store import open_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.workers.audit.scenes import Scene
    from tests.workers.lanes import Yard
    from workers.audit.report import Report
    from workers.settings import Settings

pytestmark = pytest.mark.anyio


class Town:
    """A database with everything in it that a lane can make of messages, groups and changes."""

    def __init__(self, yard: Yard) -> None:
        self.yard = yard
        self.pair = ""
        self.group = ""

    async def build(self) -> None:
        yard = self.yard
        await yard.connect("ann", "ben")
        async with run_lane(yard):
            self.pair = await yard.create("ann", "ben")
            await yard.next_down(records.CommandOutcome, 1)
            for number in range(6):
                sender = ("ann", "ben")[number % 2]
                last = await yard.said(self.pair, sender, f"p{number}", f"pair {number}")
            await yard.delivered(last, "ann")
            await yard.read(last, "ben")
            self.group = await yard.create("cid", "ann", "ben", kind=ConversationType.GROUP)
            await yard.next_down(records.CommandOutcome, 1)
            await self._live()
            await eventually(lambda: settled(yard))
            await anyio.sleep(1.2)  # the slower flush

    async def _live(self) -> None:
        yard, group = self.yard, self.group
        first = await yard.said(group, "ann", "g1", "group 1")
        second = await yard.said(group, "ben", "g2", "group 2")
        third = await yard.said(group, "cid", "g3", "group 3")
        await yard.changed(group, "ann", "e1", first, records.Edit("group 1, better"))
        await yard.changed(group, "ann", "e2", first, records.Edit("group 1, best"))
        await yard.changed(group, "ben", "r1", first, records.React("+", True))
        await yard.changed(group, "cid", "r2", first, records.React("-", True))
        await yard.changed(group, "cid", "r3", first, records.React("-", False))
        await yard.changed(group, "cid", "e3", third, records.Edit("group 3, regretted"))
        await yard.changed(group, "cid", "d1", third, records.Delete(True))
        await yard.changed(group, "ann", "h1", second, records.Delete(False))
        assert await yard.decided(group, "cid", records.SetRole("ann", Role.ADMIN), "role") is None
        assert await yard.decided(group, "cid", records.Rename("title"), "rename") is None
        assert await yard.decided(group, "cid", records.Silence("ben", 4_000_000_000_000), "silence") is None
        assert await yard.decided(group, "cid", records.Ban("ben"), "ban") is None
        assert await yard.decided(group, "cid", records.Unban("ben"), "unban") is None
        await yard.add(group, "cid", "ben", "dan", request="add")
        await yard.next_down(records.CommandOutcome, 1)
        await yard.remove(group, "cid", "dan", request="out")
        await yard.next_down(records.CommandOutcome, 1)
        assert await yard.decided(group, "cid", records.SetDisappearing(1), "disappear") is None
        await yard.said(group, "ben", "g4", "this will disappear")
        assert await yard.decided(group, "cid", records.SetDisappearing(0), "stay") is None
        await yard.said(group, "ann", "g5", "group 5")

    async def alter(self, collection: str, wanted: dict[str, Any], change: dict[str, Any]) -> None:
        result = await self.yard.store.db[collection].update_one(wanted, change)
        assert result.modified_count == 1

    async def entry(self, conversation_id: str, sequence: int) -> dict[str, Any]:
        wanted = {"conversation_id": conversation_id, "sequence_number": sequence}
        document = await self.yard.store.db["messages"].find_one(wanted)
        assert document is not None
        return document


_built: dict[str, list[dict[str, Any]]] = {}
"""What the first town of this run is stored as: the others are put there as they are."""


@pytest.fixture
async def town(yard: Yard) -> Town:
    built = Town(yard)
    if not _built:
        await built.build()
        for name in await yard.store.db.list_collection_names():
            _built[name] = await yard.store.db[name].find().to_list()
        return built
    for name, documents in _built.items():
        if documents:
            await yard.store.db[name].insert_many(documents)
    names = {document["type"]: document["_id"] for document in _built["conversations"]}
    built.pair, built.group = names["1:1"], names["group"]
    return built


async def audited(settings: Settings, *options: str) -> Report:
    return await command.audit(settings, command.parse(options))


async def test_what_a_lane_has_written_is_clean_and_counted(
    settings: Settings, town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = await audited(settings)
    assert report.violations == [], lines(report)
    stored = await town.yard.store.db["messages"].count_documents({})
    assert report.counts["messages"] == stored == 6 + 23
    assert report.counts["conversations"] == 2
    assert report.counts["unique indexes"] >= 6
    assert {"I2", "I12", "I13", "digest", "keys", "indexes"} <= set(report.judged)
    assert "--history" in report.unjudged["I1"]
    monkeypatch.setattr(command, "AT_ONCE", 1)
    assert (await audited(settings)).counts == report.counts


async def test_a_disappeared_message_is_erased_and_nothing_is_missed(settings: Settings, town: Town) -> None:
    erased = await town.yard.store.changes.erase_expired(datetime(2030, 1, 1, tzinfo=UTC), 100)
    assert erased == 1
    assert (await audited(settings)).violations == []


async def test_retention_takes_a_prefix_of_an_old_log_only(settings: Settings, town: Town) -> None:
    """The same removal is retention in an old conversation, and a loss in a young one."""
    first = {"sequence_number": {"$lte": 3}}
    await town.yard.store.db["messages"].delete_many(first)
    report = await audited(settings)
    assert {violation.invariant for violation in report.violations} == {"I2", "keys"}
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    await town.yard.store.db["conversations"].update_many({}, {"$set": {"created_at": long_ago}})
    await town.yard.store.db["idempotency_keys"].delete_many({})
    assert (await audited(settings)).violations == []


async def test_a_conversation_whose_every_message_has_expired_is_clean(settings: Settings, town: Town) -> None:
    await town.yard.store.db["messages"].delete_many({})
    await town.yard.store.db["idempotency_keys"].delete_many({})
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    await town.yard.store.db["conversations"].update_many({}, {"$set": {"created_at": long_ago}})
    assert (await audited(settings)).violations == []


async def alter_content(town: Town) -> None:
    await town.alter("messages", {"_id": (await town.entry(town.pair, 2))["_id"]}, {"$set": {"content": "altered"}})


async def alter_sequence(town: Town) -> None:
    await town.alter("messages", {"_id": (await town.entry(town.pair, 6))["_id"]}, {"$set": {"sequence_number": 7}})


async def delete_message(town: Town) -> None:
    await town.yard.store.db["messages"].delete_one({"_id": (await town.entry(town.pair, 4))["_id"]})


async def swap_ids(town: Town) -> None:
    """Two messages of one sender change places."""
    messages = town.yard.store.db["messages"]
    one, other = await town.entry(town.pair, 1), await town.entry(town.pair, 3)
    await messages.delete_many({"_id": {"$in": [one["_id"], other["_id"]]}})
    await messages.insert_many([one | {"_id": other["_id"]}, other | {"_id": one["_id"]}])
    await town.yard.store.db["idempotency_keys"].delete_many({})


async def alter_edited(town: Town) -> None:
    await town.alter("messages", {"edited_seq": {"$gt": 0}, "deleted_at": None}, {"$set": {"content": "never said"}})


async def undo_deletion(town: Town) -> None:
    wanted = {"type": "text", "deleted_at": {"$exists": True}}
    await town.alter("messages", wanted, {"$set": {"content": "here again"}, "$unset": {"deleted_at": ""}})


async def show_hidden(town: Town) -> None:
    await town.alter("messages", {"hidden_by": "ann"}, {"$set": {"hidden_by": []}})


async def drop_reaction(town: Town) -> None:
    await town.alter("messages", {"reactions.user_id": "ben"}, {"$set": {"reactions": []}})


async def alter_key_owner(town: Town) -> None:
    await town.alter("messages", {"idempotency_key": "p2"}, {"$set": {"idempotency_key": "mine"}})


async def raise_counter(town: Town) -> None:
    await town.alter("sequence_numbers", {"_id": town.pair}, {"$set": {"last_sequence_number": 9}})


async def lower_counter(town: Town) -> None:
    await town.alter("sequence_numbers", {"_id": town.pair}, {"$set": {"last_sequence_number": 5}})


async def make_owner(town: Town) -> None:
    await town.alter("memberships", {"_id": f"{town.group}:ben"}, {"$set": {"role": "owner"}})


async def move_join(town: Town) -> None:
    await town.alter("memberships", {"_id": f"{town.group}:ben"}, {"$set": {"join_seq": 1}})


async def smuggle_in(town: Town) -> None:
    document = await town.yard.store.db["memberships"].find_one({"_id": f"{town.group}:ann"})
    assert document is not None
    await town.yard.store.db["memberships"].insert_one(document | {"_id": f"{town.group}:eve", "user_id": "eve"})


async def lift_ban(town: Town) -> None:
    await town.alter("conversations", {"_id": town.group}, {"$set": {"banned": ["zoe"]}})


async def read_too_much(town: Town) -> None:
    await town.alter("memberships", {"_id": f"{town.pair}:ann"}, {"$inc": {"read_countable": 2}})


async def device_ahead(town: Town) -> None:
    await town.alter("memberships", {"_id": f"{town.pair}:ann"}, {"$set": {"devices.d9": 60}})


async def status_ahead(town: Town) -> None:
    await town.alter("messages", {"idempotency_key": "g5"}, {"$set": {"status": "read"}})


async def date_back(town: Town) -> None:
    await town.alter("messages", {"idempotency_key": "p3"}, {"$set": {"created_at": datetime(2020, 1, 1, tzinfo=UTC)}})


async def drop_sequence_index(town: Town) -> None:
    await town.yard.store.db["messages"].drop_index("conversation_sequence")


async def unfence(town: Town) -> None:
    """An index of the same name that lets two writers in."""
    messages = town.yard.store.db["messages"]
    await messages.drop_index("scoped_idempotency_key")
    wanted = [("conversation_id", 1), ("sender_id", 1), ("idempotency_key", 1)]
    await messages.create_index(wanted, name="scoped_idempotency_key")


async def two_with_one_number(town: Town) -> None:
    messages = town.yard.store.db["messages"]
    await messages.drop_index("conversation_sequence")
    entry = await town.entry(town.pair, 6)
    await messages.insert_one(entry | {"_id": "msg_twin", "idempotency_key": "twin"})


async def bury_stored(town: Town) -> None:
    message = await town.entry(town.pair, 1)
    await town.yard.store.db["dead_letter_queue"].insert_one(
        {"_id": "dlq_1", "message": message, "status": "pending", "retry_count": 0, "max_retries": 5}
    )


async def leave_entry_unread(town: Town) -> None:
    await town.yard.send(town.pair, "ann", "nobody-reads-it")


async def add_consumer(town: Town) -> None:
    for name in (keys.INGEST_CONSUMER, "another"):
        await town.yard.broker.client.xgroup_createconsumer(keys.ingest(0), keys.INGEST_GROUP, name)


async def fill_inbox(town: Town) -> None:
    await town.yard.broker.client.rpush(keys.inbox("ann"), *[f"msg_{number}" for number in range(keys.INBOX_LIMIT + 1)])


SEEDED: list[tuple[Callable[[Town], Awaitable[None]], set[str]]] = [
    (alter_content, {"digest"}),
    (alter_sequence, {"I2", "counters"}),
    (delete_message, {"I2", "keys"}),
    (swap_ids, {"digest"}),
    (alter_edited, {"effects"}),
    (undo_deletion, {"effects"}),
    (show_hidden, {"effects"}),
    (drop_reaction, {"effects"}),
    (alter_key_owner, {"keys"}),
    (raise_counter, {"I2"}),
    (lower_counter, {"I2", "counters"}),
    (make_owner, {"projection"}),
    (move_join, {"projection"}),
    (smuggle_in, {"projection"}),
    (lift_ban, {"projection"}),
    (read_too_much, {"I6"}),
    (device_ahead, {"I9"}),
    (status_ahead, {"I9"}),
    (date_back, {"I20"}),
    (drop_sequence_index, {"indexes"}),
    (unfence, {"indexes"}),
    (two_with_one_number, {"I2", "indexes"}),
    (bury_stored, {"I13"}),
    (leave_entry_unread, {"I12"}),
    (add_consumer, {"I16"}),
    (fill_inbox, {"I16"}),
]


@pytest.mark.parametrize(("seed", "expected"), SEEDED, ids=[seed.__name__ for seed, _ in SEEDED])
async def test_what_is_altered_behind_its_back_is_named(
    settings: Settings, town: Town, seed: Callable[[Town], Awaitable[None]], expected: set[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(command, "LOOK_AGAIN_SECONDS", 0.0)
    await seed(town)
    try:
        report = await audited(settings)
    finally:
        if "indexes" in expected:
            await _restore_indexes_of(town.yard)
    assert set(report.found) == expected, lines(report)
    assert all(violation.evidence for violation in report.violations)


_IN_REDIS = {"I12", "I16", "I19"}
"""Broken by `scene.queues` in a run in memory; in Redis above."""
_ON_FILE = [
    (seed, expected) for seed, expected in SEEDED_RUNS if not _IN_REDIS & expected and seed is not repeat_a_number
]


@pytest.mark.parametrize(("seed", "expected"), _ON_FILE, ids=[seed.__name__ for seed, _ in _ON_FILE])
async def test_a_run_in_a_real_database_with_its_history_on_file_is_judged_as_in_memory(
    settings: Settings,
    yard: Yard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: Callable[[Scene], None],
    expected: set[str],
) -> None:
    monkeypatch.setattr(command, "LOOK_AGAIN_SECONDS", 0.0)
    scene = quiet_run()
    seed(scene)
    if seed is store_it_twice:
        await yard.store.db["messages"].drop_index("scoped_idempotency_key")  # it would prevent that
    for name, documents in scene.collections.items():
        if documents:
            await yard.store.db[name].insert_many(documents)
    with HistoryWriter(tmp_path / "history") as writer:
        for event in scene.events:
            writer.write(event)
    try:
        report = await audited(settings, "--history", str(tmp_path / "history"))
    finally:
        if seed is store_it_twice:
            await _restore_indexes_of(yard)
    assert set(report.found) - {"indexes"} == expected, lines(report)


async def _restore_indexes_of(yard: Yard) -> None:
    """The database of the tests is emptied, not dropped."""
    await yard.store.db["messages"].delete_many({})
    names = {"conversation_sequence", "scoped_idempotency_key"}
    async for index in await yard.store.db["messages"].list_indexes():
        if index["name"] in names and not index.get("unique"):
            await yard.store.db["messages"].drop_index(index["name"])
    await yard.store.ensure_indexes()


async def test_a_running_system_is_audited_without_a_false_alarm(settings: Settings, yard: Yard) -> None:
    """Messages, members and receipts are on their way all the time."""
    await yard.connect("ann", "ben")
    async with run_lane(yard):
        group = await yard.create("ann", "ben", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_chat, yard, group)
            for _ in range(5):
                report = await audited(settings, "--live")
                assert report.violations == [], lines(report)
                assert "I12" in report.unjudged
            tasks.cancel_scope.cancel()
    assert report.counts["messages"] > 20


async def _chat(yard: Yard, group: str) -> None:
    number = 0
    while True:
        number += 1
        ids = [await yard.said(group, "ann", f"{number}-{place}", "text") for place in range(5)]
        await yard.changed(group, "ann", f"e{number}", ids[0], records.Edit("changed"))
        await yard.read(ids[-1], "ben")
        await yard.add(group, "ann", f"new-{number}", request=f"add-{number}")
        await yard.remove(group, "ann", f"new-{number}", request=f"out-{number}")
        await yard.next_down(records.CommandOutcome, 2)


async def test_one_conversation_is_looked_at_alone(settings: Settings, town: Town) -> None:
    await alter_content(town)
    assert (await audited(settings, "--conversation", town.group)).violations == []
    report = await audited(settings, "--conversation", town.pair)
    assert [violation.invariant for violation in report.violations] == ["digest"]
    assert report.counts["messages"] == 6


async def test_nothing_is_written_not_even_an_index(settings: Settings, new_mongodb_url: str) -> None:
    report = await audited(msgspec.structs.replace(settings, mongodb_url=new_mongodb_url))
    assert {violation.statement for violation in report.violations} == {"a unique index is missing"}
    again = await audited(msgspec.structs.replace(settings, mongodb_url=new_mongodb_url))
    assert again.found == report.found


@pytest.fixture
def prepared(settings: Settings) -> Settings:
    """A database with its indexes and nothing else."""

    async def prepare() -> None:
        async with open_store(settings.mongodb_url):
            pass

    anyio.run(prepare)
    return settings


def test_the_door_says_what_it_found(prepared: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {
        "TRIREME_REDIS_URL": prepared.redis_url,
        "TRIREME_MONGODB_URL": prepared.mongodb_url,
    }
    file = tmp_path / "report.json"
    assert command.main(["--json", str(file)], environ) == 0
    assert capsys.readouterr().out.endswith("clean: no violation\n")
    assert msgspec.json.decode(file.read_bytes())["mode"] == "settled"


def test_what_cannot_be_read_is_said_in_one_line(
    prepared: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {
        "TRIREME_ENV": "dev",
        "TRIREME_REDIS_URL": prepared.redis_url,
        "TRIREME_MONGODB_URL": "mongodb://127.0.0.1:1/x",
    }
    assert command.main([], environ) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (
        command.main(
            [], environ | {"TRIREME_MONGODB_URL": prepared.mongodb_url, "TRIREME_REDIS_URL": "redis://127.0.0.1:1"}
        )
        == 2
    )
    assert (
        command.main(["--history", str(tmp_path / "none")], environ | {"TRIREME_MONGODB_URL": prepared.mongodb_url})
        == 2
    )
    bad = tmp_path / "bad"
    bad.write_bytes(b"nonsense\n")
    assert command.main(["--history", str(bad)], environ | {"TRIREME_MONGODB_URL": prepared.mongodb_url}) == 2
    assert f"{bad} line 1 is no event" in capsys.readouterr().out
