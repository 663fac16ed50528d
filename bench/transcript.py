"""A chat log as a script: who says what when, who comes and goes, who answers whom. Reads two IRC logging styles.

Called by the replay. A nickname is a person; whoever is renamed stays the same person.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

RAW_SUFFIX: Final = ".raw.txt"
ANNOTATION_SUFFIX: Final = ".annotation.txt"
HALF_DAY_MINUTES: Final = 12 * 60

_SAID = re.compile(r"\[(\d\d):(\d\d)\] (?:<([^>]+)> ?|\s?\* (\S+) )(.*)", re.DOTALL)
_JOINED = re.compile(r"=== (\S+)\s+\[[^\]]*\]\s+has joined #", re.IGNORECASE)
_LEFT = re.compile(r"=== (\S+)\s+\[[^\]]*\]\s+has (?:left #|quit)", re.IGNORECASE)
_RENAMED = re.compile(r"=== (\S+) is now known as (\S+)")
_CHANNEL = re.compile(r"=== (?:mode/|\.\.\[topic|\S+\s+\[[^\]]*\]\s)")
_ACTION = re.compile(r"=== (\S+) (.+)")


class Kind(Enum):
    SAY = "say"
    JOIN = "join"
    LEAVE = "leave"


class Line(msgspec.Struct, frozen=True):
    """One step of the script. `number`: its line in the file, from 0. `person`: index into `Transcript.people`.

    `minutes`: since the start of the log. `answers`: number of the line it answers.
    """

    number: int
    kind: Kind
    minutes: float
    person: int
    text: str = ""
    answers: int | None = None


class Transcript(msgspec.Struct, frozen=True):
    """A whole log in order. `people`: the first nickname of each person."""

    name: str
    lines: list[Line]
    people: list[str]

    @property
    def minutes(self) -> float:
        return self.lines[-1].minutes if self.lines else 0.0


class TranscriptError(Exception):
    """The directory or a file of it is not what the replay needs; one line."""


def read_directory(directory: Path) -> list[Transcript]:
    """All logs `NAME.raw.txt` with their `NAME.annotation.txt` (which may be missing). Raises TranscriptError."""
    paths = sorted(directory.glob(f"*{RAW_SUFFIX}"))
    if not paths:
        raise TranscriptError(f"no *{RAW_SUFFIX} in {directory}")
    transcripts = []
    for path in paths:
        name = path.name.removesuffix(RAW_SUFFIX)
        annotation = path.with_name(name + ANNOTATION_SUFFIX)
        try:
            raw = path.read_text("utf-8", "replace")
            links = annotation.read_text("utf-8") if annotation.exists() else ""
        except OSError as error:
            raise TranscriptError(f"{path}: {error.strerror}") from error
        transcripts.append(parse(name, raw, links))
    return transcripts


def parse(name: str, raw: str, annotation: str = "") -> Transcript:
    """The script of one log. Lines within a minute are spread over it; a clock of 12 hours is understood."""
    answers = parse_links(annotation)
    stamped = _stamp_lines(raw.split("\n"))
    people: list[str] = []
    known: dict[str, int] = {}
    lines: list[Line] = []

    def person(nick: str) -> int:
        if nick not in known:
            known[nick] = len(people)
            people.append(nick)
        return known[nick]

    for number, (text, minutes) in enumerate(stamped):
        if renamed := _RENAMED.match(text):
            known[renamed[2]] = person(renamed[1])
            del known[renamed[1]]
        elif came := _JOINED.match(text):
            lines.append(Line(number, Kind.JOIN, minutes, person(came[1])))
        elif left := _LEFT.match(text):
            lines.append(Line(number, Kind.LEAVE, minutes, person(left[1])))
        elif (said := _parse_saying(text)) is not None and said[1].strip():
            lines.append(Line(number, Kind.SAY, minutes, person(said[0]), said[1], answers.get(number)))
    return Transcript(name, lines, people)


def _parse_saying(text: str) -> tuple[str, str] | None:
    """Nickname and text of a message or an action; None for anything else."""
    if said := _SAID.match(text):
        return said[3] or said[4], said[5]
    if text.startswith("=== ") and not _CHANNEL.match(text) and (action := _ACTION.match(text)):
        return action[1], action[2]
    return None


def parse_links(annotation: str) -> dict[int, int]:
    """Line → the latest line it answers, from `EARLIER LATER -` rows; a line linked to itself starts a thread."""
    answers: dict[int, int] = {}
    for row in annotation.splitlines():
        words = row.split()
        if len(words) < 2:
            continue
        earlier, later = sorted((int(words[0]), int(words[1])))
        if earlier != later:
            answers[later] = max(earlier, answers.get(later, -1))
    return answers


def _stamp_lines(texts: list[str]) -> list[tuple[str, float]]:
    """Each line with its minutes since the first. A channel event has the minute of the line before it.

    A clock that goes back has passed noon on a 12-hour dial, or midnight: the smallest of these that fits.
    """
    minutes: list[int] = []
    offset = 0
    now: int | None = None
    for text in texts:
        if clock := re.match(r"\[(\d\d):(\d\d)\]", text):
            dial = int(clock[1]) * 60 + int(clock[2])
            while now is not None and dial + offset < now:
                offset += HALF_DAY_MINUTES
            now = dial + offset
        minutes.append(now if now is not None else -1)
    first = next((minute for minute in minutes if minute >= 0), 0)
    counts: dict[int, int] = {}
    for minute in minutes:
        counts[minute] = counts.get(minute, 0) + 1
    placed: dict[int, int] = {}
    stamped = []
    for text, minute in zip(texts, minutes, strict=True):
        place = placed.get(minute, 0)
        placed[minute] = place + 1
        stamped.append((text, max(0.0, minute - first + place / counts[minute])))
    return stamped
