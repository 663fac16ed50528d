"""`python -m bench slow-readers`: what those who read nothing cost those who do (reliability.md L-7).

Pairs talk at a fixed rate; beside them a group is flooded with great messages, of which 50 members are the slow ones.
In turns of one run the slow ones read like everybody else, or take nothing from their sockets until the turn is over.
The verdict: nothing broke the contract, so every slow reader has everything after it reads again; the p99 of the pairs
is the same in both kinds of turns, within 10 %; and the gateway grew by no more than an outbox per slow reader.
"""

from __future__ import annotations

import urllib.request
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from bench import figures
from bench.accounts import Community, create_community
from bench.driver import Connect, Member, Stall
from bench.load import PHASE_SECONDS, add_load_arguments, connect_all, run_and_report, verdict, warm_up
from bench.phases import Paced, Settle
from bench.stack import WS_PATH
from protocol.codec import FRAME_CODECS
from protocol.models import ConversationType

if TYPE_CHECKING:
    import argparse

    from bench.driver_process import DriverProcess
    from bench.stack import Stack

MORE: Final = 1.10
SLACK_MS: Final = 2.0
"""What the clock of a turn of some seconds is good for: at 10 ms 10 % are nothing."""
OUTBOX_KIB: Final = 1024
OTHERS_KIB: Final = 20 * 1024
"""What a gateway grows by under load without any slow reader."""
NOISE_BYTES: Final = 40_000
"""So much that the sockets' buffers on both sides, some megabytes, are full within a few seconds."""
CATCH_UPS: Final = "gateway_catch_ups_total"
"""Live frames that were not written to somebody who is behind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `slow-readers`."""
    parser.add_argument("--connections", type=int, default=1000, help="in all")
    parser.add_argument("--slow", type=int, default=50, help="of them, at most 75")
    parser.add_argument("--noise", type=int, default=15, help="great messages a second into the group of the slow ones")
    parser.add_argument("--rate", type=float, default=500.0, help="messages per second of the pairs")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a turn; below 30, where the slow are cut off")
    parser.add_argument("--turns", type=int, default=3, help="of each kind")
    add_load_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when nobody noticed the slow readers, 1 otherwise."""
    return run_and_report("slow-readers", args, lambda stack, driver: measure(args, stack, driver))


def measure(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> dict[str, Any]:
    """The figures, `verdict` among them."""
    pairs = (args.connections - args.slow) // 2
    talkers = max(1, round(args.noise / args.rate * pairs))
    community = create_community(stack.rest_url, stack.admin_token, ConversationType.ONE_TO_ONE, [2] * pairs)
    crowd = create_community(stack.rest_url, stack.admin_token, ConversationType.GROUP, [talkers + args.slow])
    problems = connect_all(args, stack, driver, community, senders=1, receipts=False)
    problems = problems or warm_up(driver, 4)
    problems = problems or _connect_crowd(args, stack, driver, crowd, talkers)
    if problems:
        return {"verdict": problems}
    first = 2 * pairs + talkers
    slow = list(range(first, first + args.slow))
    turns: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    grown: dict[bool, int] = {False: 0, True: 0}
    dropped = 0
    gateways = stack.pids.get("gateway", [])
    for number in range(args.turns):
        for stalled in (False, True) if number % 2 == 0 else (True, False):
            before = [figures.forget_peak(pid) for pid in gateways]
            dropped_before = _dropped(stack)
            answer = _turn(args, driver, pairs + talkers, pairs, slow if stalled else [])
            dropped += (_dropped(stack) - dropped_before) if stalled else 0
            if not answer["finished"]:
                return {"verdict": verdict(driver, answer)}
            turns[stalled].append({"ack": answer["ack_ms"]["p99"], "delivered": answer["delivered_ms"]["p99"]})
            peaks = [figures.peak_kib(pid) - was for pid, was in zip(gateways, before, strict=True)]
            grown[stalled] = max([grown[stalled], *peaks])
    found = _judge(args, driver, turns, grown) | {"dropped_for_the_slow": dropped}
    return found if dropped else found | {"verdict": ["nobody was slow: the sockets took it all"]}


def _connect_crowd(
    args: argparse.Namespace, stack: Stack, driver: DriverProcess, crowd: Community, talkers: int
) -> list[str]:
    """The group of the slow readers and of those who talk to them."""
    members = [
        Member(0, account.user_id, account.device_id, account.token, "", sends=place < talkers, is_noise=True)
        for place, account in enumerate(crowd.members[0])
    ]
    subprotocol = next(name for name in FRAME_CODECS if name.endswith(args.codec))
    command = Connect(
        urls=list(stack.ws_urls),
        subprotocol=subprotocol,
        conversations=crowd.conversations,
        members=members,
        content_bytes=NOISE_BYTES,
        receipts=False,
    )
    connected = driver.command(command, command.timeout_seconds)["connected"]
    return [] if connected == len(members) else [f"refused: {connected} of {len(members)} of the group connected"]


def _dropped(stack: Stack) -> int:
    """`CATCH_UPS` of all gateways together."""
    total = 0.0
    for url in stack.ws_urls:
        page = url.replace("ws://", "http://").removesuffix(WS_PATH) + "/metrics"
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        total += sum(float(line.split(" ")[1]) for line in lines if line.startswith(CATCH_UPS + " "))
    return int(total)


def _turn(args: argparse.Namespace, driver: DriverProcess, senders: int, pairs: int, slow: list[int]) -> dict[str, Any]:
    """Latencies of the pairs while `slow` take nothing; then everybody gets what they have not."""
    rate = args.rate * senders / pairs
    if slow:
        driver.command(Stall(slow, stalled=True), PHASE_SECONDS)
    answer = driver.command(Paced(int(rate * args.seconds), rate, args.seconds + 1.0), PHASE_SECONDS)
    if slow:
        driver.command(Stall(slow, stalled=False), PHASE_SECONDS)
    settled = driver.command(Settle(PHASE_SECONDS), PHASE_SECONDS)
    return answer | {name: settled[name] for name in ("finished", "acks_left", "deliveries_left", "receipts_left")}


def _judge(
    args: argparse.Namespace,
    driver: DriverProcess,
    turns: dict[bool, list[dict[str, float]]],
    grown: dict[bool, int],
) -> dict[str, Any]:
    contract = verdict(driver, {"finished": True})
    violations = [] if isinstance(contract, str) else contract
    p99 = {kind: {what: median(turn[what] for turn in found) for what in found[0]} for kind, found in turns.items()}
    for what, calm in p99[False].items():
        if p99[True][what] > calm * MORE + SLACK_MS:
            violations = [*violations, f"noticed: p99 {what} {calm} ms, with slow readers {p99[True][what]} ms"]
    bound = args.slow * OUTBOX_KIB + OTHERS_KIB
    if grown[True] > bound:
        violations = [*violations, f"memory: the gateway grew by {grown[True]} KiB, more than {bound}"]
    return {
        "verdict": violations or "ok",
        "p99_ms": {"reading": p99[False], "slow": p99[True]},
        "turns": {"reading": turns[False], "slow": turns[True]},
        "gateway_grown_kib": {"reading": grown[False], "slow": grown[True]},
    }
