"""Parsing of the chat logs: both logging styles, their clocks, renames, and who answers whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.transcript import Kind, Transcript, TranscriptError, parse, parse_links, read_directory

if TYPE_CHECKING:
    from pathlib import Path

LOG = """\
[12:58] <anna> hello
=== bert [~b@example.net]  has joined #ubuntu
[12:59] <bert> hi  anna
=== bert is now known as bert_away
=== bert_away shrugs
=== mode/#ubuntu [+b *!*@example.net]  by anna
[01:00] <bert_away> back
[01:00]  * anna waves
[01:00] <anna>\x20
=== anna [~a@example.net]  has left #ubuntu []
"""


def parsed(raw: str = LOG, links: str = "") -> Transcript:
    return parse("log", raw, links)


def test_says_actions_joins_and_leaves() -> None:
    lines = [(line.kind, parsed().people[line.person], line.text) for line in parsed().lines]
    assert lines == [
        (Kind.SAY, "anna", "hello"),
        (Kind.JOIN, "bert", ""),
        (Kind.SAY, "bert", "hi  anna"),
        (Kind.SAY, "bert", "shrugs"),
        (Kind.SAY, "bert", "back"),
        (Kind.SAY, "anna", "waves"),
        (Kind.LEAVE, "anna", ""),
    ]


def test_a_renamed_person_stays_the_same_person() -> None:
    assert parsed().people == ["anna", "bert"]


def test_a_twelve_hour_clock_goes_on_after_noon() -> None:
    minutes = [int(line.minutes) for line in parsed().lines]
    assert minutes == sorted(minutes)
    assert minutes[-1] == 2


def test_midnight_is_a_minute_like_any_other() -> None:
    lines = parsed("[23:59] <a> x\n[00:00] <a> y\n").lines
    assert [line.minutes for line in lines] == [0.0, 1.0]


def test_lines_of_one_minute_are_spread_over_it() -> None:
    lines = parsed("[10:00] <a> 1\n[10:00] <a> 2\n[10:00] <a> 3\n[10:00] <a> 4\n[10:05] <a> 5").lines
    assert [line.minutes for line in lines] == [0.0, 0.25, 0.5, 0.75, 5.0]


def test_answers_carry_the_line_they_answer() -> None:
    answers = {line.number: line.answers for line in parsed(links="0 2 -\n2 2 -\n").lines}
    assert answers[2] == 0
    assert answers[0] is None


def test_the_latest_of_several_parents_counts() -> None:
    assert parse_links("1002 1003 -\n1000 1003 -\n1004 1004 -\n") == {1003: 1002}


def test_a_directory_without_logs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TranscriptError, match=r"no \*\.raw\.txt"):
        read_directory(tmp_path)


def test_a_directory_of_logs(tmp_path: Path) -> None:
    (tmp_path / "b.raw.txt").write_bytes(b"[10:00] <a> caf\xc3\xa9 \xff\n")
    (tmp_path / "a.raw.txt").write_text("[10:00] <a> x\n[10:00] <b> y\n")
    (tmp_path / "a.annotation.txt").write_text("0 1 -\n")
    first, second = read_directory(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.lines[1].answers == 0
    assert second.lines[0].text == "café \ufffd"
