"""`python -m bench drain`: every gateway in turn is stopped and started again under load, and nobody loses anything.

Brings up its own stack. Phones in pairs talk all the time; the ledger judges every message, and for every phone it is
measured how long it was without a connection that had let it in. Exit status 1 on any violation.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from bench import figures, journal
from bench.accounts import Community, SetupError, create_community
from bench.history import WritingLedger, audit
from bench.ledger import Ledger
from bench.phone import Phone, PhoneError
from bench.services import ServicesError
from bench.stack import Process, Stack, StackError, run_stack, start_again, wait_ready
from protocol.models import ConversationType

if TYPE_CHECKING:
    import argparse

TRANSPORTS: Final = {
    "epoll": ("epoll",),
    "trio-websocket": ("trio-websocket",),
    "both": ("epoll", "trio-websocket"),
}
LONGEST_GAP_SECONDS: Final = 2.0
"""No phone may be without a live connection for longer (reliability.md, I15 and the issue's demand)."""
BACK_SHARE: Final = 0.99
"""So many of a drained gateway's phones are let in elsewhere before the drain window ends (reliability.md, I15)."""
ONLINE_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 30.0
EXIT_SLACK_SECONDS: Final = 2.0
"""Past the drain window: interpreter shutdown on a busy machine."""
PAUSE_SECONDS: Final = 1.0
"""Load before the first drain, and between a gateway's return and the next drain."""
CURVE_ROWS: Final = 16
CURVE_WIDTH: Final = 40
SHOWN_VIOLATIONS: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `drain`."""
    parser.add_argument("--gateways", type=int, default=3, help="gateway processes, each drained once (at least 2)")
    parser.add_argument("--transport", choices=TRANSPORTS, default="epoll", help="`both`: by turns")
    parser.add_argument("--phones", type=int, default=200, help="connections, in pairs")
    parser.add_argument("--rate", type=float, default=100.0, help="messages per second of all phones together")
    parser.add_argument("--drain-seconds", type=float, default=4.0, help="TRIREME_DRAIN_SECONDS of the gateways")
    parser.add_argument("--seed", type=int, default=1, help="of who connects where")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="write what the phones saw there, and audit it all"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when everybody kept everything, 1 otherwise, 2 when the run could not even start."""
    if args.gateways < 2 or args.phones < 2 or args.rate <= 0:
        sys.stderr.write("bench drain: at least 2 gateways, 2 phones and some load\n")
        return 2
    settings = {"TRIREME_DRAIN_SECONDS": str(args.drain_seconds)}
    try:
        with run_stack(gateways=args.gateways, transport=TRANSPORTS[args.transport], settings=settings) as stack:
            sizes = [2] * (args.phones // 2)
            community = create_community(stack.rest_url, stack.admin_token, ConversationType.ONE_TO_ONE, sizes)
            ledger = WritingLedger(args.history) if args.history else Ledger()
            run = Run(stack, community, args.rate, args.drain_seconds, args.seed, ledger)
            trio.run(run.run)
            if args.history:
                run.audit(args.history)
    except (SetupError, StackError, ServicesError) as error:
        sys.stderr.write(f"bench drain: {error}\n")
        return 2
    report = run.report()
    report |= {
        "settings": {name: value for name, value in vars(args).items() if name not in ("command", "json", "history")}
    }
    report |= {"machine": figures.machine(), "load_average": os.getloadavg()[0], "commit": figures.commit()}
    print("\n".join(plot(report["curve"])))
    figures.print_table("bench drain", {name: value for name, value in report.items() if name != "curve"})
    if args.json:
        figures.write_json(args.json, report)
    return 0 if report["verdict"] == "ok" else 1


class Drain(msgspec.Struct):
    """One gateway's turn. Times in seconds after its SIGTERM; `back` by user: when, and whether by a ticket."""

    name: str
    began: float
    users: set[str]
    back: dict[str, tuple[float, bool]] = msgspec.field(default_factory=dict)
    exit_status: int | None = None
    ended_seconds: float = 0.0
    ready_seconds: float = 0.0

    def in_time(self, seconds: float) -> int:
        """How many of its phones were let in elsewhere by then."""
        return sum(at <= seconds for at, _ in self.back.values())


class Watch:
    """Takes every event of every phone: the ledger's, and when each phone was without a connection."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = ledger or Ledger()
        self.longest_gap: dict[str, float] = {}
        self.ack_latency = figures.Latencies()
        self.drain: Drain | None = None
        self._is_over = False
        self._away_since: dict[str, float] = {}
        self._sent_at: dict[tuple[str, str], float] = {}

    def record(self, event: journal.Event) -> None:
        """See `journal.Journal`."""
        if self._is_over:
            return
        self.ledger.record(event)
        user_id = event.user_id
        if isinstance(event, journal.Connected):
            self._end_gap(user_id, event.at)
            drain = self.drain
            if drain is not None and user_id in drain.users:
                drain.back.setdefault(user_id, (event.at - drain.began, event.migrated))
        elif isinstance(event, journal.Closed) and user_id in self.longest_gap:
            self._away_since.setdefault(user_id, event.at)
        elif isinstance(event, journal.Sent):
            self._sent_at.setdefault((user_id, event.idempotency_key), event.at)
        elif isinstance(event, journal.Acked):
            sent_at = self._sent_at.pop((user_id, event.idempotency_key), None)
            if sent_at is not None:
                self.ack_latency.add(event.at - sent_at)

    def _end_gap(self, user_id: str, now: float) -> None:
        gap = now - self._away_since.pop(user_id, now)
        self.longest_gap[user_id] = max(gap, self.longest_gap.get(user_id, 0.0))

    def close(self, now: float) -> None:
        """The run is over: whoever is still away has been so until now, and what comes is the end of the phones."""
        self._is_over = True
        for user_id in list(self._away_since):
            self._end_gap(user_id, now)
        if isinstance(self.ledger, WritingLedger):
            self.ledger.end(now)


class Run:
    """`run` drains every gateway of the stack in turn; `report` tells."""

    def __init__(
        self, stack: Stack, community: Community, rate: float, drain_seconds: float, seed: int, ledger: Ledger
    ) -> None:
        self.watch = Watch(ledger)
        self.drains: list[Drain] = []
        self._stack = stack
        self._drain_seconds = drain_seconds
        self._failures: list[str] = []
        self._phones: list[tuple[str, Phone]] = []
        """Conversation and phone."""
        for conversation_id, members in zip(community.conversations, community.members, strict=True):
            self.watch.ledger.declare_direct(conversation_id, (members[0].user_id, members[1].user_id))
            for account in members:
                phone = Phone(
                    stack.ws_urls, account.user_id, account.device_id, account.token, self.watch.record, seed=seed
                )
                self._phones.append((conversation_id, phone))
        self._period = len(self._phones) / rate
        self._random = random.Random(seed)
        self._lateness = figures.Latencies()
        """Of the phones themselves: where it is seconds, this process measures itself."""

    async def run(self) -> None:
        """Within a bound; what goes wrong becomes part of the verdict."""
        gateways = [process for process in self._stack.processes if process.role == "gateway"]
        turn_seconds = self._drain_seconds + EXIT_SLACK_SECONDS + PAUSE_SECONDS + 10.0
        bound = ONLINE_SECONDS + SETTLE_SECONDS + turn_seconds * len(gateways)
        with trio.move_on_after(bound) as scope:
            try:
                await self._run(gateways)
            except* (PhoneError, StackError, ServicesError, trio.TooSlowError) as group:
                self._failures += [repr(error) for error in group.exceptions]
        self.watch.close(trio.current_time())
        if scope.cancelled_caught:
            self._failures.append(f"timeout: not done after {bound:.0f} s")

    async def _run(self, gateways: list[Process]) -> None:
        async with trio.open_nursery() as nursery:
            for _, phone in self._phones:
                nursery.start_soon(phone.run)
            with trio.fail_after(ONLINE_SECONDS):
                for _, phone in self._phones:
                    await phone.wait_online()
            async with trio.open_nursery() as talking:
                for conversation_id, phone in self._phones:
                    talking.start_soon(self._talk, conversation_id, phone)
                await trio.sleep(PAUSE_SECONDS)
                for process in gateways:
                    await self._drain(process)
                    await trio.sleep(PAUSE_SECONDS)
                talking.cancel_scope.cancel()
            with trio.move_on_after(SETTLE_SECONDS) as scope:
                while not self._is_settled():  # noqa: ASYNC110 -- it depends on many phones
                    await trio.sleep(0.05)
            if scope.cancelled_caught:
                self._failures.append(f"not everybody had everything {SETTLE_SECONDS:.0f} s after the last send")
            self.watch.close(trio.current_time())
            nursery.cancel_scope.cancel()

    def audit(self, history: Path) -> None:
        """What the auditor finds becomes part of the verdict; what it says is shown."""
        status, told = audit(self._stack, [history])
        print("\n".join(told))
        if status:
            self._failures.append(f"audit: exit status {status}: {told[0] if told else 'nothing said'}")

    async def _talk(self, conversation_id: str, phone: Phone) -> None:
        """Say something at a steady pace, connected or not."""
        due = trio.current_time() + self._random.uniform(0.0, self._period)
        number = 0
        while True:
            await trio.sleep_until(due)
            self._lateness.add(trio.current_time() - due)
            due += self._period
            number += 1
            await phone.send_nowait(conversation_id, f"{phone.client.user_id}/{number}")

    async def _drain(self, process: Process) -> None:
        """SIGTERM, the end, the return."""
        users = {phone.client.user_id for _, phone in self._phones if phone.url == process.ws_url}
        drain = Drain(process.name, trio.current_time(), users)
        self.drains.append(drain)
        self.watch.drain = drain
        process.popen.terminate()
        with trio.move_on_after(self._drain_seconds + EXIT_SLACK_SECONDS) as scope:
            while process.popen.poll() is None:  # noqa: ASYNC110 -- another process
                await trio.sleep(0.02)
        if scope.cancelled_caught:
            process.popen.kill()
            await trio.to_thread.run_sync(process.popen.wait)
        drain.exit_status = process.popen.returncode
        drain.ended_seconds = trio.current_time() - drain.began
        successor = start_again(self._stack, process)
        await trio.to_thread.run_sync(wait_ready, [successor])
        drain.ready_seconds = trio.current_time() - drain.began
        if isinstance(self.watch.ledger, WritingLedger):
            self.watch.ledger.fault(f"{process.name} drained", drain.began, trio.current_time())

    def _is_settled(self) -> bool:
        ledger = self.watch.ledger
        for conversation_id, phone in self._phones:
            log = phone.client.logs.get(conversation_id)
            if phone.client.pending or not phone.online or not phone.client.synced:
                return False
            if log is None or log.cursor != ledger.head(conversation_id) or log.ahead:
                return False
        return True

    # --- what came of it ---------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """All figures and the verdict: "ok" or the list of violations."""
        counts = self.watch.ledger.counts
        back = [entry for drain in self.drains for entry in drain.back.values()]
        moved = sum(len(drain.users) for drain in self.drains)
        gaps = sorted(self.watch.longest_gap.values())
        return {
            "phones": len(self._phones),
            "messages_acked": counts["acked"] + counts["duplicate_acks"],
            "sent_again": counts["retried"],
            "frames_delivered": counts["pushed"],
            "ack_ms": self.watch.ack_latency.summary_ms(),
            "phones_late_ms": self._lateness.summary_ms(),
            "moved": moved,
            "by_ticket": sum(by_ticket for _, by_ticket in back),
            "by_reconnect": sum(not by_ticket for _, by_ticket in back),
            "back_seconds": quantiles(sorted(at for at, _ in back)),
            "without_connection_seconds": quantiles(gaps),
            "phones_never_without": sum(gap == 0.0 for gap in gaps),
            "gateways": [self._turn(drain) for drain in self.drains],
            "curve": curve([at for at, _ in back], moved, self._drain_seconds),
            "verdict": figures.verdict(self._violations()),
        }

    def _turn(self, drain: Drain) -> dict[str, Any]:
        return {
            "name": drain.name,
            "phones": len(drain.users),
            "by_ticket": sum(by_ticket for _, by_ticket in drain.back.values()),
            "by_reconnect": sum(not by_ticket for _, by_ticket in drain.back.values()),
            "in_time": drain.in_time(self._drain_seconds),
            "ended_seconds": round(drain.ended_seconds, 2),
            "ready_again_seconds": round(drain.ready_seconds, 2),
        }

    def _violations(self) -> list[str]:
        found = list(self._failures)
        for drain in self.drains:
            in_time = drain.in_time(self._drain_seconds)
            if in_time < BACK_SHARE * len(drain.users):
                found.append(f"{drain.name}: {in_time} of {len(drain.users)} phones were let in elsewhere in time")
            if drain.exit_status != 0:
                found.append(f"{drain.name} ended with status {drain.exit_status} (killed: it did not end in time)")
        for user_id, gap in self.watch.longest_gap.items():
            if gap > LONGEST_GAP_SECONDS:
                found.append(f"gap: {user_id} was without a connection for {gap:.2f} s")
        found += [str(violation) for violation in self.watch.ledger.verdict()]
        more = len(found) - SHOWN_VIOLATIONS
        return found if more <= 0 else [*found[:SHOWN_VIOLATIONS], f"and {more} more"]


def quantiles(ordered: list[float]) -> dict[str, float]:
    """p50, p90, p99 and max of sorted seconds; empty when nothing was measured."""
    if not ordered:
        return {}
    found = {f"p{percent}": figures.nearest_rank(ordered, percent / 100) for percent in (50, 90, 99)}
    return {name: round(seconds, 3) for name, seconds in {**found, "max": ordered[-1]}.items()}


def curve(back: list[float], moved: int, window: float) -> list[tuple[float, float]]:
    """(seconds after SIGTERM, share of the drained gateways' phones let in elsewhere by then) over the window."""
    times = [window * row / CURVE_ROWS for row in range(CURVE_ROWS + 1)]
    return [(round(at, 3), round(sum(seconds <= at for seconds in back) / max(moved, 1), 4)) for at in times]


def plot(points: list[tuple[float, float]]) -> list[str]:
    """The reconnect curve as lines of text."""
    head = "seconds after SIGTERM, share of the gateway's phones on another gateway"
    return [head, *(f"{at:6.2f} s {share:5.0%} {'#' * round(share * CURVE_WIDTH)}" for at, share in points)]
