"""The history file: what was written is read, what a killed writer left behind is named and nothing else is lost."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from workers.audit import history
from workers.audit.history import (
    AnyEvent,
    BadLine,
    HistoryWriter,
    decode_event,
    encode_event,
    read_histories,
    read_history,
)
from workers.audit.report import INVARIANTS

SHA = "0" * 32
EVENTS: list[AnyEvent] = [
    history.Connect(t=1.0, user="a", dev="d", conn=1, opened=0.5),
    history.Send(t=2.0, user="a", dev="d", conn=1, conv="c", key="k", payload_sha=SHA, canary="x"),
    history.Ack(t=3.0, user="a", dev="d", conn=1, conv="c", key="k", mid="m", seq=1),
    history.Push(
        t=4.0, user="b", dev="d", conn=1, conv="c", rows=[history.Row(seq=1, mid="m", sha=SHA)], first=1, last=1
    ),
    history.Fault(t=5.0, what="worker killed", since=5.0, until=6.0),
]


def write(path: Path, events: list[AnyEvent]) -> Path:
    with HistoryWriter(path) as writer:
        for event in events:
            writer.write(event)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert list(read_history(write(tmp_path / "h", EVENTS))) == EVENTS


def test_a_line_is_on_its_way_before_the_client_acts(tmp_path: Path) -> None:
    """Nothing waits in a buffer of the process: another one reads it although nobody flushed or closed."""
    writer = HistoryWriter(tmp_path / "h")
    writer.write(EVENTS[0])
    assert (tmp_path / "h").read_bytes() == encode_event(EVENTS[0]) + b"\n"
    writer.close()


def test_a_second_writer_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    write(tmp_path / "h", EVENTS[:2])
    assert list(read_history(write(tmp_path / "h", EVENTS[2:]))) == EVENTS


def test_lines_have_the_names_of_the_reliability_document() -> None:
    assert b'"event":"send"' in encode_event(EVENTS[1])
    assert b'"payload_sha":' in encode_event(EVENTS[1])
    assert b'"from":5.0,"to":6.0' in encode_event(EVENTS[4])
    tags = {kind.__struct_config__.tag for kind in get_args(AnyEvent)}
    assert {"send", "ack", "error", "push", "dack", "rack", "unread", "connect", "close", "fault"} <= tags


def test_a_torn_last_line_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "h", EVENTS)
    path.write_bytes(path.read_bytes()[:-10])
    *read, torn = read_history(path)
    assert read == EVENTS[:-1]
    assert isinstance(torn, BadLine)
    assert (torn.number, torn.torn) == (5, True)


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b'{"event":"nothing","t":1}',
        b'{"event":"send","t":1}',
        b'{"event":"ack","t":"now","user":"a","dev":"d","conv":"c","key":"k","mid":"m","seq":1}',
        b'{"event":"send","t":1,"user":"a","dev":"d","conv":"c","key":"k","payload_sha":"the content itself"}',
        b"\xff\xfe\x00",
        b"[" * 10_000,
        b'{"event":"end","t":1e999}',
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "h", EVENTS[:1])
    path.write_bytes(path.read_bytes() + line + b"\n\n")
    write(path, EVENTS[1:2])
    first, bad, last = read_history(path)
    assert [first, last] == EVENTS[:2]
    assert isinstance(bad, BadLine)
    assert (bad.path, bad.number, bad.torn) == (str(path), 2, False)
    assert len(bad.reason) < 300


def test_files_of_one_run_are_one_history_by_time(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", EVENTS[::2]), write(tmp_path / "b", EVENTS[1::2])]
    assert list(read_histories(paths)) == EVENTS


def test_an_unknown_field_is_ignored() -> None:
    assert decode_event(b'{"event":"end","t":1.0,"why":"later"}') == history.End(t=1.0)


def test_no_event_has_a_place_for_a_content() -> None:
    for kind in get_args(AnyEvent):
        assert not {"content", "text", "body"} & {field.name for field in msgspec.structs.fields(kind)}


def test_the_document_names_every_event_and_every_invariant() -> None:
    text = (Path(__file__).parents[3] / "docs" / "audit.md").read_text()
    written = [line for line in text.splitlines() if line.startswith('{"event"')]
    read = [decode_event(line.replace("…", SHA).encode()) for line in written]
    assert {type(event) for event in read} == set(get_args(AnyEvent))
    assert [name for name in INVARIANTS if f"\n| {name} | " not in text] == []
