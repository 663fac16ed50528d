"""`python -m bench chaos`: the door of the chaos run. Brings the rig up, plays chapters, judges each, reports.

A chapter is a crowd of its own: new people, new conversations, some faults, rest, verdict. So memory is bounded, and
what is judged is judged while it is fresh. Exit status 1 on any violation, with `--strict-recovery` also on a recovery
past its bound.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import figures
from bench.accounts import SetupError, create_community
from bench.chaos.crowd import Enter, Pace, Settle, Talk
from bench.chaos.faults import FAULTS, absent, chosen
from bench.chaos.nemesis import GIVE_UP_SECONDS, Episode, Nemesis, chapters, schedule
from bench.chaos.report import Chapter, summary, write_html
from bench.chaos.rig import Rig, open_rig, phone_urls
from bench.driver_process import DriverError, open_driver
from bench.history import audit
from bench.services import ServicesError
from bench.stack import StackError
from protocol.models import ConversationType
from workers.audit.history import Fault, HistoryWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.chaos import faults
    from bench.chaos.samples import Sample

CHAPTER_FAULTS: Final = 10
GROUP_SIZE: Final = 8
ENTER_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 90.0
CALM_SECONDS: Final = 5.0
"""Load before the first fault of a chapter: what undisturbed latency is."""
PUSHED_SECONDS: Final = 1.0
SHOWN_VIOLATIONS: Final = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chaos`."""
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of which faults, in which order, where")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no new fault after so long")
    parser.add_argument("--give-up", type=float, default=GIVE_UP_SECONDS, help="seconds to watch for a recovery")
    parser.add_argument("--messages", type=int, default=0, help="go on without faults until so many are stored")
    parser.add_argument("--rate", type=float, default=600.0, help="messages per second of all phones together")
    parser.add_argument("--pairs", type=int, default=100, help="1:1 conversations")
    parser.add_argument("--groups", type=int, default=4, help=f"groups of {GROUP_SIZE}")
    parser.add_argument("--group-share", type=float, default=0.1, help="part of the messages that go to groups")
    parser.add_argument("--only", default="", help="rows to run, comma-separated (F-W1,F-M4)")
    parser.add_argument("--audit", action=argparse.BooleanOptionalAction, default=True, help="the auditor's word too")
    parser.add_argument("--strict-recovery", action="store_true", help="a recovery past its bound is a violation")
    parser.add_argument("--data-dir", type=Path, help="keep data and logs there")
    parser.add_argument("--json", metavar="FILE", help="write the summary there")
    parser.add_argument("--html", metavar="FILE", help="write the timeline there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0: nothing lost, doubled, reordered or invented. 2: the run could not even start."""
    try:
        with _directory(args.data_dir) as directory, open_rig(directory) as rig:
            campaign = Campaign(rig, args)
            campaign.run()
            if args.audit:
                campaign.audit()
            found = campaign.report()
    except (SetupError, StackError, ServicesError, DriverError) as error:
        sys.stderr.write(f"bench chaos: {error}\n")
        return 2
    if args.html:
        write_html(Path(args.html), found, campaign.nemesis.episodes, campaign.chapters)
    if args.json:
        figures.write_json(args.json, found)
    figures.print_table("bench chaos", {name: value for name, value in found.items() if name != "faults"})
    return 0 if found["verdict"] == "ok" else 1


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="trireme-chaos-") as directory:
        yield Path(directory)


class Campaign:
    """`run` plays, `report` tells."""

    def __init__(self, rig: Rig, args: argparse.Namespace) -> None:
        self.nemesis = Nemesis(rig, args.seed, args.give_up)
        self.chapters: list[Chapter] = []
        self._rig = rig
        self._args = args
        self._began = time.monotonic()
        self._seconds = 0.0
        self._histories: list[Path] = []
        self._audit: list[str] = []
        """What the auditor said."""
        self._is_clean = True

    def run(self) -> None:
        """All chapters. Raises DriverError, SetupError."""
        args = self._args
        faults = self._faults()
        for part in chapters(schedule(faults, args.faults, args.seed), CHAPTER_FAULTS):
            if self._minutes() >= args.minutes:
                break
            self._play(part)
        while self._stored() < args.messages and self._minutes() < args.minutes:
            self._play([])
        self._seconds = time.monotonic() - self._began

    def _faults(self) -> list[faults.Fault]:
        """Those that are asked for and possible here. Raises StackError where none is, or a row is none."""
        rows = {row for row in self._args.only.split(",") if row}
        if unknown := rows - {fault.row for fault in FAULTS}:
            raise StackError(f"no such rows: {', '.join(sorted(unknown))}")
        reasons = {row: reason for row, reason in absent(self._rig).items() if not rows or row in rows}
        for row, reason in reasons.items():
            print(f"{row} is not run: {reason}", flush=True)
        found = [fault for fault in chosen(self._rig) if not rows or fault.row in rows]
        if not found:
            raise StackError(f"nothing to run: {'; '.join(f'{row}: {reason}' for row, reason in reasons.items())}")
        return found

    def _minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def _stored(self) -> int:
        return sum(chapter.result["stored"] for chapter in self.chapters)

    def _play(self, planned: list[faults.Fault]) -> None:
        """One chapter: a crowd, its faults, its end."""
        rig, args, number = self._rig, self._args, len(self.chapters) + 1
        talks = rig.talks = self._make_talks()
        rig.samples, rig.acked = [], 0
        with open_driver("bench.chaos.crowd") as crowd:
            rest_url, token = rig.stack.rest_url, rig.stack.admin_token
            seed = args.seed * 1000 + number
            history = str(self._history(f"phones-{number}")) if args.audit else ""
            enter = Enter(talks, phone_urls(rig), rest_url, token, seed, args.group_share, history)
            answer = crowd.command(enter, ENTER_SECONDS)
            if answer["online"] < answer["phones"]:
                rig.troubles.append(f"chapter {number}: {answer['online']} of {answer['phones']} phones came in")
            rig.crowd = crowd
            crowd.command(Pace(args.rate, leaves=True), ENTER_SECONDS)
            rig.sleep(CALM_SECONDS)
            crowd.command(Pace(args.rate), ENTER_SECONDS)
            rig.sleep(PUSHED_SECONDS)
            for fault in planned:
                if self._minutes() >= args.minutes:
                    break
                self._tell(self.nemesis.strike(fault, number))
            if not planned:
                self._fill()
            rig.look()
            rig.crowd = None
            result = crowd.command(Settle(SETTLE_SECONDS), SETTLE_SECONDS + ENTER_SECONDS)
        samples: list[Sample] = rig.samples
        self.chapters.append(Chapter(number=number, samples=samples, result=result))
        print(
            f"chapter {number}: {result['stored']:,} stored, {result['violation_count']} violations, "
            f"{len(result['open_ends'])} open ends",
            *self.chapters[-1].violations()[:SHOWN_VIOLATIONS],
            sep="\n  ",
            flush=True,
        )

    def _history(self, name: str) -> Path:
        path = self._rig.directory / f"{name}.jsonl"
        self._histories.append(path)
        return path

    def audit(self) -> None:
        """The auditor reads everything that is stored, and what the phones of all chapters saw."""
        with HistoryWriter(self._history("faults")) as history:
            for episode in self.nemesis.episodes:
                history.write(Fault(t=episode.began, what=episode.name, since=episode.began, until=episode.over))
        began = time.monotonic()
        status, self._audit = audit(self._rig.stack, self._histories)
        self._is_clean = status == 0
        self._audit.append(f"status {status} after {time.monotonic() - began:.0f} s")

    def _fill(self) -> None:
        """Load without faults, up to what is asked for."""
        enough = min(self._args.messages - self._stored(), int(self._args.rate * 120))
        while self._rig.acked < enough and self._minutes() < self._args.minutes:
            self._rig.sleep(1.0)

    def _tell(self, episode: Episode) -> None:
        told = "not recovered" if episode.recovery_seconds is None else f"{episode.recovery_seconds:.1f} s"
        bound = "-" if episode.bound_seconds is None else f"{episode.bound_seconds:.0f} s"
        print(
            f"{self._minutes():5.1f} min  {episode.row:5} {episode.name} ({episode.detail}): {told} / {bound}, "
            f"{self._rig.acked:,} acked{'  LATE' if episode.is_late else ''}",
            flush=True,
        )

    def _make_talks(self) -> list[Talk]:
        """New people in new conversations. Raises SetupError."""
        rig, args = self._rig, self._args
        talks: list[Talk] = []
        for kind, sizes in (
            (ConversationType.ONE_TO_ONE, [2] * args.pairs),
            (ConversationType.GROUP, [GROUP_SIZE] * args.groups),
        ):
            made = create_community(rig.stack.rest_url, rig.stack.admin_token, kind, sizes)
            is_group = kind is ConversationType.GROUP
            pairs = zip(made.conversations, made.members, strict=True)
            talks += [Talk(conversation_id, members, is_group) for conversation_id, members in pairs]
        return talks

    def report(self) -> dict[str, Any]:
        """Everything but the samples, and the verdict."""
        settings = {
            name: value
            for name, value in vars(self._args).items()
            if name not in ("command", "json", "html", "data_dir") and value not in ("", float("inf"))
        }
        found = summary(self.nemesis.episodes, self.chapters, self._seconds)
        violations = [text for chapter in self.chapters for text in chapter.violations()] + self._rig.troubles
        if not self._is_clean:
            violations += [f"auditor: {text}" for text in self._audit]
        if self._args.strict_recovery:
            violations += [
                f"late: {episode.row} {episode.name} ({episode.detail}): {episode.recovery_seconds} s"
                for episode in self.nemesis.episodes
                if episode.is_late
            ]
        found |= {
            "rollbacks": self._rig.replica_set.rollbacks(),
            "valkey_files_cut": sum(valkey.cuts for valkey in (self._rig.valkey, self._rig.standby)),
            "not_run": absent(self._rig),
        }
        found |= {"audit": self._audit, "settings": settings}
        found |= {"machine": figures.machine(), "load_average": os.getloadavg()[0], "commit": figures.commit()}
        found["verdict"] = figures.verdict(violations)
        return found
