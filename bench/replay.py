"""`python -m bench replay DIR`: real chat logs as groups on a real system, and a verdict on every single message.

One group per log, one connection per nickname; answers, joins, leaves, the cap of 100 and people who go offline and
come back are in it; and, unless told otherwise, edits, deletions, reactions, roles, silences, bans and own settings.
Exit status 1 on any violation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import figures
from bench.history import WritingLedger, audit
from bench.http_api import ApiError, HttpApi
from bench.inspection import inspect
from bench.ledger import Ledger
from bench.pastimes import PastimeCounts, Shares
from bench.phone import FrameCache, PhoneError
from bench.room import CATCH_UP_SECONDS, Resources, Room, RoomCounts, RoomError
from bench.services import ServicesError
from bench.stack import Stack, StackError, attach, run_stack
from bench.transcript import Transcript, TranscriptError, read_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

SLACK_SECONDS: Final = 120.0
MAX_SPEED_SECONDS: Final = 600.0
"""`--speed max` may take as long as this."""
SHOWN_VIOLATIONS: Final = 50
_FAILURES: Final = (ApiError, RoomError, PhoneError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `replay`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory with NAME.raw.txt chat logs")
    parser.add_argument("--speed", type=_speed, default=600.0, help="log time per real time, or `max` (default 600)")
    parser.add_argument("--attach", action="store_true", help="use the running system instead of one of its own")
    parser.add_argument("--gateways", type=int, default=1, help="gateway processes of the own system")
    parser.add_argument("--transport", choices=("epoll", "trio-websocket"), default="epoll")
    parser.add_argument("--logs", type=int, default=None, help="only the first so many logs")
    parser.add_argument("--seed", type=int, default=1, help="of who goes offline when, and of who does what else")
    parser.add_argument("--plain", action="store_true", help="people only talk, come and go")
    for name, share in msgspec.structs.asdict(Shares()).items():
        parser.add_argument(f"--{name}", type=_share, default=share, metavar="SHARE", help=f"per message ({share})")
    parser.add_argument("--data-dir", type=Path, help="keep data and logs of the own system there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="write what the phones saw there, and audit it all"
    )


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    speed = float(text)
    if not speed > 0:
        raise argparse.ArgumentTypeError("a speed is a positive number or max")
    return speed


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("a share is from 0 to 1")
    return share


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when the ledger found nothing, 1 otherwise, 2 when the run could not even start."""
    try:
        transcripts = read_directory(args.directory)[: args.logs]
        if args.attach:
            return _run(attach(), transcripts, args)
        with run_stack(gateways=args.gateways, transport=args.transport, data_dir=args.data_dir) as stack:
            return _run(stack, transcripts, args)
    except (TranscriptError, StackError, ServicesError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _run(stack: Stack, transcripts: Sequence[Transcript], args: argparse.Namespace) -> int:
    shares = None if args.plain else Shares(**{name: getattr(args, name) for name in Shares.__struct_fields__})
    replay = Replay(stack, transcripts, args.speed, args.seed, shares, args.history)
    trio.run(replay.run)
    if args.history:
        replay.audit(args.history)
    report = replay.report()
    show_rooms(replay.rooms)
    figures.print_table("replay", {name: value for name, value in report.items() if name != "rooms"})
    if args.json:
        figures.write_json(args.json, report)
    return 0 if report["verdict"] == "ok" else 1


class Replay:
    """One run over all logs. `run` plays, `report` tells."""

    def __init__(
        self,
        stack: Stack,
        transcripts: Sequence[Transcript],
        speed: float | None,
        seed: int,
        shares: Shares | None = None,
        history: Path | None = None,
    ) -> None:
        self.rooms: list[Room] = []
        self._stack = stack
        self._transcripts = transcripts
        self._speed = speed
        self._seed = seed
        self._shares = shares
        self._ledger = Ledger() if history is None else WritingLedger(history)
        self._ack_latency = figures.Latencies()
        self._lateness = figures.Latencies()
        self._seconds = 0.0
        self._cpu = figures.RoleClock({**stack.pids, "phones": [os.getpid()]})
        self._cpu_seconds: dict[str, float] = {}
        self._failures: list[str] = []
        self._complete = False

    async def run(self) -> None:
        """Play everything within a bound; a failure ends the run and becomes part of the verdict."""
        longest = max(transcript.minutes for transcript in self._transcripts) * 60
        # The phones share one process: what they do beside talking may keep them as long as at full speed.
        planned = max(MAX_SPEED_SECONDS, 0.0 if self._speed is None else 2 * longest / self._speed)
        bound = planned + CATCH_UP_SECONDS + SLACK_SECONDS
        with trio.move_on_after(bound):
            try:
                await self._play()
                self._complete = True
            except BaseExceptionGroup as group:
                expected, rest = group.split(_FAILURES)
                if rest is not None:
                    raise
                assert expected is not None
                self._failures += [f"{type(error).__name__}: {error}" for error in _leaves(expected)]
                return
        if not self._complete:
            self._failures.append(f"timeout: not done after {bound:.0f} s")

    async def _play(self) -> None:
        async with HttpApi(self._stack.rest_url, self._stack.admin_token) as api:
            shared = Resources(
                api,
                self._stack.ws_urls,
                self._ledger,
                FrameCache(),
                self._ack_latency,
                self._lateness,
                self._seed,
                self._speed,
                self._shares,
            )
            self.rooms = [Room(transcript, shared) for transcript in self._transcripts]
            async with trio.open_nursery() as phones:
                with _progress() as progress:
                    phones.start_soon(self._show_progress, progress)
                    for room in self.rooms:
                        await room.prepare()
                    self._cpu.start()
                    started_at = trio.current_time()
                    async with trio.open_nursery() as nursery:
                        for room in self.rooms:
                            nursery.start_soon(room.play, phones, started_at)
                    async with trio.open_nursery() as nursery:
                        for room in self.rooms:
                            nursery.start_soon(room.catch_up)
                    self._seconds = trio.current_time() - started_at
                    self._cpu_seconds = self._cpu.used_seconds()
                    for room in self.rooms:
                        room.violations += await inspect(room)
                    if isinstance(self._ledger, WritingLedger):
                        self._ledger.end(trio.current_time())
                    phones.cancel_scope.cancel()

    def audit(self, history: Path) -> None:
        """What the auditor finds becomes part of the verdict; what it says is shown."""
        status, told = audit(self._stack, [history])
        sys.stdout.write("\n".join(told) + "\n")
        if status:
            self._failures.append(f"audit: exit status {status}: {told[0] if told else 'nothing said'}")

    async def _show_progress(self, progress: Progress) -> None:
        total = sum(len(transcript.lines) for transcript in self._transcripts)
        task = progress.add_task("replay", total=total, counts="")
        while True:
            played = sum(room.lines_played for room in self.rooms)
            online = sum(phone.online for room in self.rooms for phone in room.phones)
            counts = self._ledger.counts
            shown = f"{online} online, {counts['acked']} acked, {counts['pushed']} delivered"
            progress.update(task, completed=played, counts=shown)
            await trio.sleep(0.25)

    def report(self) -> dict[str, Any]:
        """All figures and the verdict: "ok" or the list of violations, the first ones with their evidence."""
        violations = [*self._failures, *(text for room in self.rooms for text in room.violations)]
        violations += [str(violation) for violation in self._ledger.verdict()]
        if len(violations) > SHOWN_VIOLATIONS:
            kinds = Counter(text.partition(":")[0] for text in violations)
            told = ", ".join(f"{times} {kind}" for kind, times in kinds.most_common())
            violations = [*violations[:SHOWN_VIOLATIONS], f"all together: {told}"]
        rooms = {room.transcript.name: msgspec.structs.asdict(room.counts) for room in self.rooms}
        pastimes = {
            room.transcript.name: msgspec.structs.asdict(room.pastimes.counts)
            for room in self.rooms
            if room.pastimes is not None
        }
        totals = _total([room.counts for room in self.rooms], RoomCounts)
        phones = [phone for room in self.rooms for phone in room.phones if phone.client.connection]
        counts = self._ledger.counts
        return {
            "logs": len(self.rooms),
            "seconds": round(self._seconds, 1),
            "speed": self._speed or "max",
            "users": len(phones),
            "events": totals,
            "pastimes": _total(
                [room.pastimes.counts for room in self.rooms if room.pastimes is not None], PastimeCounts
            ),
            "acked": counts["acked"] + counts["duplicate_acks"],
            "delivered": counts["pushed"],
            "deliveries_per_second": round(counts["pushed"] / self._seconds) if self._seconds else 0,
            "connections": counts["connections"],
            "retried": counts["retried"],
            "duplicate_acks": counts["duplicate_acks"],
            "deferred": counts["deferred"],
            "retransmits": counts["asked"],
            "digest_proven": sum(len(phone.client.proven) > 0 for phone in phones),
            "ack_ms": self._ack_latency.summary_ms(),
            "lateness_ms": self._lateness.summary_ms(),
            "cpu_seconds": {role: round(seconds, 1) for role, seconds in self._cpu_seconds.items()},
            "machine": figures.machine(),
            "commit": figures.commit(),
            "rooms": {name: counts | pastimes.get(name, {}) for name, counts in rooms.items()},
            "verdict": figures.verdict(violations),
        }


def _total(structs: Sequence[msgspec.Struct], kind: type[msgspec.Struct]) -> dict[str, int]:
    return {field: sum(getattr(struct, field) for struct in structs) for field in kind.__struct_fields__}


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}"),
        console=Console(stderr=True),
    )


def show_rooms(rooms: Sequence[Room]) -> None:
    """One row per log."""
    table = Table(title="rooms", title_justify="left")
    table.add_column("log")
    for field in RoomCounts.__struct_fields__:
        table.add_column(field.replace("_", "\n"), justify="right")
    for room in rooms:
        table.add_row(room.transcript.name, *(str(value) for value in msgspec.structs.astuple(room.counts)))
    Console().print(table)
