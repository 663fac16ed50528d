"""A run of real processes, its clients' history and the auditor's command: clean, and then not what it was."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pymongo
import pytest
import trio

from bench import load
from bench.__main__ import parse as parse_bench
from bench.history import audit
from bench.pastimes import Shares
from bench.replay import Replay
from bench.stack import Stack, run_stack
from bench.transcript import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

OFTEN = Shares(edits=0.2, deletions=0.1, reactions=0.5, admin=0.3, settings=0.1, churn=0.1)
LINES = [f"[10:{minute % 60:02}] <{'abcdefgh'[minute % 8]}> line {minute}\n" for minute in range(110)]


class Ran:
    """A stack that has been talked on, and what its clients wrote down."""

    def __init__(self, stack: Stack, history: Path) -> None:
        self.stack = stack
        self.history = history

    def audit(self) -> tuple[int, list[str]]:
        return audit(self.stack, [self.history])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    history = tmp_path_factory.mktemp("audit") / "history.jsonl"
    with run_stack(workers=2) as stack:
        replay = Replay(stack, [parse("busy", "".join(LINES))], None, 5, OFTEN, history)
        trio.run(replay.run)
        assert replay.report()["verdict"] == "ok"
        yield Ran(stack, history)


def test_a_run_is_clean_and_says_how_much_it_was(ran: Ran) -> None:
    status, told = ran.audit()
    assert (status, told[-1]) == (0, "clean: no violation"), told
    counted = next(line for line in told if line.startswith("audited"))
    assert "64 shards" in counted
    judged = next(line for line in told if line.startswith("judged")).split()
    assert {"I1", "I2", "I2b", "I3", "I4", "I5", "I7", "I8", "I9", "I10", "I12", "I14", "I17", "digest"} <= set(judged)


def _said(database: Any, place: int) -> dict[str, Any]:
    """An unchanged message of somebody."""
    wanted = {"type": "text", "changed_seq": {"$exists": False}}
    found: dict[str, Any] = database["messages"].find(wanted).sort("sequence_number", 1)[place]
    return found


def alter_content(database: Any) -> None:
    database["messages"].update_one({"_id": _said(database, 0)["_id"]}, {"$set": {"content": "altered"}})


def alter_sequence(database: Any) -> None:
    last = database["messages"].find().sort("sequence_number", -1)[0]
    database["messages"].update_one({"_id": last["_id"]}, {"$inc": {"sequence_number": 5}})


def delete_message(database: Any) -> None:
    database["messages"].delete_one({"_id": _said(database, 3)["_id"]})


def swap_ids(database: Any) -> None:
    one, other = _said(database, 1), _said(database, 2)
    database["messages"].delete_many({"_id": {"$in": [one["_id"], other["_id"]]}})
    database["messages"].insert_many([one | {"_id": other["_id"]}, other | {"_id": one["_id"]}])


def deliver_unconfirmed(database: Any) -> None:
    head = database["messages"].find().sort("sequence_number", -1)[0]["sequence_number"]
    behind = {"leave_seq": {"$exists": False}, "read_seq": {"$lt": head}}
    database["memberships"].update_one(behind, {"$set": {"read_seq": head}})


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (alter_content, {"I1", "I2b", "digest"}),
        (alter_sequence, {"I1", "I2"}),
        (delete_message, {"I1", "I2"}),
        (swap_ids, {"I1", "I2b", "digest"}),
        (deliver_unconfirmed, {"I9"}),
    ],
)
def test_what_is_altered_behind_its_back_is_named(ran: Ran, alter: Callable[[Any], None], named: set[str]) -> None:
    with pymongo.MongoClient[dict[str, Any]](ran.stack.mongodb_url) as client:
        database = client.get_default_database()
        before = {name: list(database[name].find()) for name in ("messages", "memberships")}
        alter(database)
        try:
            status, told = ran.audit()
        finally:
            for name, documents in before.items():
                database[name].delete_many({})
                database[name].insert_many(documents)
    assert status == 1
    broken = next(line for line in told if line.startswith("VIOLATED"))
    assert named <= {word.rstrip(",") for word in broken.split()}, told
    assert ran.audit()[0] == 0


def test_a_load_is_audited(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lean driver's connections write a history too; one that says something else is not believed."""
    monkeypatch.setattr(load, "open_stack", lambda *_: nullcontext(ran.stack))
    history = tmp_path / "load.jsonl"
    options = ["--pairs", "4", "--messages", "400", "--no-latency-run", "--history", str(history)]
    assert load.main(parse_bench(["direct", *options])[1]) == 0
    lines = history.read_bytes().splitlines(keepends=True)
    assert sum(b'"event":"send"' in line for line in lines) == 400 + load.WARM_UP_MESSAGES
    place = next(number for number, line in enumerate(lines) if b'"event":"ack"' in line)
    lines[place] = lines[place].replace(b'"mid":"msg_', b'"mid":"msg_0')
    history.write_bytes(b"".join(lines))
    status, told = audit(ran.stack, [history])
    assert status == 1
    assert {"I1", "I2b"} <= {line.split(" ", 1)[0] for line in told}
