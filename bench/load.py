"""`python -m bench direct`: durable 1:1 messages with delivery receipts, every one checked.

Brings up its own stack (or attaches to a running one), makes the users and conversations through the HTTP API, and has
the load driver apply two phases: saturation (closed loop) for throughput and CPU per message, then half of that rate
(open loop, timed from the intended send) for latency.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import figures, social
from bench.accounts import Community, SetupError, create_community
from bench.driver import Ambient, Check, Connect, Member
from bench.driver_process import DriverError, DriverProcess, open_driver
from bench.history import audit
from bench.phases import Closed, Paced
from bench.services import ServicesError
from bench.stack import Stack, StackError, attach, run_stack
from protocol.codec import FRAME_CODECS
from protocol.models import ConversationType

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WARM_UP_MESSAGES: Final = 2000
"""Sent before anything is timed, so that caches, connections and indexes are those of a running system."""
WARM_UP_SECONDS: Final = 30.0
LATENCY_SECONDS: Final = 10.0
"""The paced run lasts about so long, within the number of messages asked for."""
PHASE_SECONDS: Final = 180.0
MIN_CONTENT_BYTES: Final = 16
MESSAGES_PER_ACK: Final = {"each": 1, "coalesced": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `direct`."""
    parser.add_argument("--pairs", type=int, default=200, help="1:1 conversations, one sender and one receiver each")
    parser.add_argument("--messages", type=int, default=30_000)
    parser.add_argument("--window", type=int, default=8, help="unacknowledged messages per sender (at most 32)")
    parser.add_argument("--both", action="store_true", help="both of a pair send, not only the first")
    parser.add_argument(
        "--rate", type=float, help="messages per second of the latency run (default: half of the measured)"
    )
    parser.add_argument("--latency-run", action=argparse.BooleanOptionalAction, default=True)
    social.add_arguments(parser)
    add_load_arguments(parser)


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all message loads share."""
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--attach", action="store_true", help="use the running stack; CPU is then not accounted")
    parser.add_argument("--gateways", type=int, default=1, help="gateway processes of the own stack")
    parser.add_argument("--content-bytes", type=int, default=120)
    parser.add_argument(
        "--ack", choices=MESSAGES_PER_ACK, default="coalesced", help="one delivery_ack per message or per 20"
    )
    parser.add_argument("--codec", choices=("json", "msgpack"), default="json")
    parser.add_argument("--history", metavar="FILE", help="write what the connections saw there, and audit it all")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when no message broke the contract, 1 otherwise."""
    return run_and_report("direct", args, lambda stack, driver: _direct(args, stack, driver))


def run_and_report(title: str, args: argparse.Namespace, load: Any, settings: Mapping[str, str] | None = None) -> int:
    """Open stack and driver, run `load(stack, driver)`, print and write its figures. Returns the exit status.

    `settings`: of the own stack's processes, over its defaults.
    """
    if args.content_bytes < MIN_CONTENT_BYTES:
        print(f"--content-bytes must be at least {MIN_CONTENT_BYTES}: the content carries a mark", file=sys.stderr)
        return 2
    try:
        with open_stack(args.attach, args.gateways, settings) as stack, open_driver() as driver:
            found = load(stack, driver)
            if args.history:
                found |= _audit(stack, args.history, found["verdict"])
    except (SetupError, DriverError, StackError, ServicesError) as error:
        print(f"bench {title}: {error}", file=sys.stderr)
        return 1
    found |= {"settings": _settings(args), "machine": figures.machine(), "commit": figures.commit()}
    figures.print_table(f"bench {title}", found)
    if args.json:
        figures.write_json(args.json, found)
    return 0 if found["verdict"] == "ok" else 1


def _audit(stack: Stack, file: str, verdict: str | list[str]) -> dict[str, Any]:
    """What the auditor says of this load is shown, and becomes part of the verdict."""
    status, told = audit(stack, [Path(file)])
    print("\n".join(told))
    if status == 0:
        return {}
    found = [] if isinstance(verdict, str) else verdict
    return {"verdict": [*found, f"audit: exit status {status}: {told[0] if told else 'nothing said'}"]}


@contextmanager
def open_stack(attached: bool, gateways: int = 1, settings: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """The running stack, or one of our own for as long as the block lasts. Raises StackError, ServicesError."""
    if attached:
        yield attach()
    else:
        with run_stack(gateways=gateways, settings=settings) as stack:
            yield stack


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("command", "json") and value is not None}


def _direct(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> dict[str, Any]:
    community = create_community(stack.rest_url, stack.admin_token, ConversationType.ONE_TO_ONE, [2] * args.pairs)
    problems = connect_all(args, stack, driver, community, senders=2 if args.both else 1)
    if not problems:
        problems = warm_up(driver, args.window)
    if problems:
        return {"verdict": problems}
    driver.command(Ambient(args.heartbeat_seconds), PHASE_SECONDS)
    if args.social:
        found = social.compare(args, stack, driver)
        return {"verdict": verdict(driver, {"finished": True}), **found}
    found, rate = saturate(args, stack, driver)
    if args.latency_run and found["verdict"] == "ok":
        found |= _latency(args, stack, driver, args.rate or rate / 2)
    return found


def connect_all(
    args: argparse.Namespace,
    stack: Stack,
    driver: DriverProcess,
    community: Community,
    senders: int,
    *,
    receipts: bool = True,
) -> list[str]:
    """Connect every account; the first `senders` of each conversation send. Returns what went wrong.

    `receipts`: must every message have its receipt in the end?
    """
    members = [
        Member(
            conversation=index,
            user_id=account.user_id,
            device_id=account.device_id,
            token=account.token,
            receiver_id=accounts[1 - place].user_id if len(accounts) == 2 else "",
            sends=place < senders,
        )
        for index, accounts in enumerate(community.members)
        for place, account in enumerate(accounts)
    ]
    subprotocol = next(name for name in FRAME_CODECS if name.endswith(args.codec))
    command = Connect(
        urls=list(stack.ws_urls),
        subprotocol=subprotocol,
        conversations=community.conversations,
        members=members,
        content_bytes=args.content_bytes,
        ack_every=MESSAGES_PER_ACK[args.ack],
        history=args.history or "",
        receipts=receipts,
    )
    answer = driver.command(command, command.timeout_seconds)
    if answer["connected"] == len(members):
        return []
    checked = driver.command(Check(), PHASE_SECONDS)
    return [f"refused: {answer['connected']} of {len(members)} connections opened", *checked["violations"]]


def warm_up(driver: DriverProcess, window: int) -> list[str]:
    """Load that is not timed, but checked. Returns what went wrong."""
    command = Closed(messages=WARM_UP_MESSAGES, window=window, timeout_seconds=WARM_UP_SECONDS)
    found = verdict(driver, driver.command(command, WARM_UP_SECONDS))
    return [] if isinstance(found, str) else found


def saturate(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> tuple[dict[str, Any], float]:
    """The closed loop: figures of throughput and CPU, and the messages per second."""
    command = Closed(messages=args.messages, window=args.window, timeout_seconds=PHASE_SECONDS)
    with cpu_of(stack, driver) as clock:
        answer = driver.command(command, PHASE_SECONDS)
        used, elsewhere = clock.used_seconds(), clock.elsewhere_cores()
    rate = args.messages / answer["seconds"]
    found = {
        "verdict": verdict(driver, answer),
        "messages": args.messages,
        "messages_per_second": round(rate, 1),
        "delivered_per_second": round(args.messages / max(answer["delivered_seconds"], 1e-9), 1),
        "message_frames": answer["message_frames"],
        "cpu_us_per_message": figures.cpu_us_per_message(used, args.messages),
        "cpu_seconds": {role: round(seconds, 2) for role, seconds in used.items()},
        "elsewhere_cores": elsewhere,
        "saturated": {name: answer[name] for name in ("ack_ms", "delivered_ms", "receipt_ms")},
    }
    return found, rate


@contextmanager
def cpu_of(stack: Stack, driver: DriverProcess) -> Iterator[figures.RoleClock]:
    """The CPU clock over all server roles and the driver, started."""
    clock = figures.RoleClock({**stack.pids, "driver": [driver.pid]})
    clock.start()
    yield clock


def verdict(driver: DriverProcess, answer: dict[str, Any]) -> str | list[str]:
    """The driver's judgement over everything so far, with what an unfinished phase still owes."""
    violations = driver.command(Check(), PHASE_SECONDS)["violations"]
    if not answer["finished"] and not violations:
        owed = {name: answer[name] for name in ("acks_left", "deliveries_left", "receipts_left") if answer[name]}
        violations = [f"lost: the phase did not finish, still owed: {owed}"]
    return figures.verdict(violations)


def _latency(args: argparse.Namespace, stack: Stack, driver: DriverProcess, rate: float) -> dict[str, Any]:
    messages = min(args.messages, int(rate * LATENCY_SECONDS))
    command = Paced(messages=messages, rate=rate, timeout_seconds=PHASE_SECONDS)
    with cpu_of(stack, driver) as clock:
        answer = driver.command(command, PHASE_SECONDS)
        used, elsewhere = clock.used_seconds(), clock.elsewhere_cores()
    return {
        "verdict": verdict(driver, answer),
        "paced": {
            "messages": messages,
            "messages_per_second": round(rate, 1),
            "message_frames": answer["message_frames"],
            "cpu_us_per_message": figures.cpu_us_per_message(used, messages),
            "elsewhere_cores": elsewhere,
        },
        "ack_ms": answer["ack_ms"],
        "delivered_ms": answer["delivered_ms"],
        "receipt_ms": answer["receipt_ms"],
    }
