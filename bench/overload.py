"""`python -m bench overload`: what happens to three times the load that the workers take (reliability.md L-5).

Saturation is measured first, in a closed loop of the same senders. Then they send by the clock at `--times` that rate
for `--seconds`; what is refused takes its sender's next turn. The verdict: nothing broke the contract; what the workers
can take is still taken; the rest is refused at once and told when to come again; no ack is late; memory stays within
its bound; and soon after the end everything is answered and a message takes as long as before.

By default the workers, not the processors, are the bottleneck (`--batch 5`): on a machine that also carries the
generator three times the load would measure the generator. `--batch 500 --backlog 20000` is the product's own setting.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from bench import figures
from bench.accounts import create_community
from bench.load import (
    PHASE_SECONDS,
    add_load_arguments,
    connect_all,
    cpu_of,
    run_and_report,
    saturate,
    verdict,
    warm_up,
)
from bench.phases import Flood, Paced
from protocol.models import ConversationType

if TYPE_CHECKING:
    import argparse

    from bench.driver_process import DriverProcess
    from bench.stack import Stack

GOODPUT: Final = 0.9
REFUSAL_MS: Final = 50.0
ACK_MS: Final = 10_000.0
RECOVERY_SECONDS: Final = 5.0
RECOVERED_P99_MS: Final = 200.0
MEMORY_KIB: Final = 100 * 1024
"""More in any server process than before: a backlog of 20,000 entries is 10 MB, what sockets hold is the kernel's."""
LOOKS_SECONDS = 0.5
"""Two looks of a gateway at how far the workers are: until then it may still count what is settled, and a sender that
does not repeat has the rest of its conversation refused with its first message. Within what recovery may take (5 s)."""
CALM_SECONDS: Final = 3.0
CALM_SHARE: Final = 0.3
"""Of the saturated rate, in the look at whether the system has recovered."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `overload`."""
    parser.add_argument("--pairs", type=int, default=200, help="1:1 conversations; both of each send")
    parser.add_argument("--messages", type=int, default=8000, help="of the measurement of saturation")
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload")
    parser.add_argument("--times", type=float, default=3.0, help="the saturated rate")
    parser.add_argument("--batch", type=int, default=5, help="entries per commit: makes the workers the bottleneck")
    parser.add_argument("--backlog", type=int, default=2000, help="entries taken and not settled, over all shards")
    add_load_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when the overload did no harm, 1 otherwise."""
    settings = {"TRIREME_BATCH": str(args.batch), "TRIREME_INGEST_BACKLOG": str(args.backlog)}
    return run_and_report("overload", args, lambda stack, driver: measure(args, stack, driver), settings)


def measure(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> dict[str, Any]:
    """The figures, `verdict` among them."""
    senders = 2 * args.pairs
    args.window = max(1, min(8, args.backlog // (2 * senders)))
    community = create_community(stack.rest_url, stack.admin_token, ConversationType.ONE_TO_ONE, [2] * args.pairs)
    problems = connect_all(args, stack, driver, community, senders=2, receipts=False)
    problems = problems or warm_up(driver, args.window)
    if problems:
        return {"verdict": problems}
    saturated, rate = saturate(args, stack, driver)
    if saturated["verdict"] != "ok":
        return saturated
    servers = {pid: role for role, pids in stack.pids.items() if role in ("gateway", "worker") for pid in pids}
    before = {pid: figures.forget_peak(pid) for pid in servers}
    with cpu_of(stack, driver) as clock:
        command = Flood(rate=args.times * rate, seconds=args.seconds, timeout_seconds=args.seconds + 30)
        flood = driver.command(command, PHASE_SECONDS)
        used, elsewhere = clock.used_seconds(), clock.elsewhere_cores()
    grown = {f"{role}_kib": figures.peak_kib(pid) - before[pid] for pid, role in servers.items()}
    time.sleep(LOOKS_SECONDS)
    calm = Paced(int(rate * CALM_SHARE * CALM_SECONDS), rate * CALM_SHARE, PHASE_SECONDS)
    after = driver.command(calm, PHASE_SECONDS)
    acked = flood["messages"] - flood["refused"]
    # The first second fills the backlog, and what is left of it at the end is no measure of what is taken.
    steady = flood["acks_of_seconds"][1 : int(args.seconds)]
    goodput = sum(steady) / max(1, len(steady)) / rate
    found = {
        "saturated_per_second": round(rate, 1),
        "offered_per_second": round(flood["messages"] / args.seconds, 1),
        "acked": acked,
        "refused": flood["refused"],
        "goodput": round(goodput, 3),
        "acks_of_seconds": flood["acks_of_seconds"],
        "ack_ms": flood["ack_ms"],
        "refused_ms": flood["refused_ms"],
        "drained_seconds": round(flood["drained_seconds"], 2),
        "recovered_ack_ms": after["ack_ms"],
        "grown": grown,
        "cpu_seconds": {role: round(seconds, 2) for role, seconds in used.items()},
        "elsewhere_cores": elsewhere,
    }
    violations = _judge(found, flood)
    contract = verdict(driver, {"finished": flood["finished"] and after["finished"], **_owed(flood, after)})
    if isinstance(contract, list):
        violations = contract + violations
    return {"verdict": violations or "ok", **found}


def _owed(flood: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    return {name: flood[name] + after[name] for name in ("acks_left", "deliveries_left", "receipts_left")}


def _judge(found: dict[str, Any], flood: dict[str, Any]) -> list[str]:
    """What the overload did that it must not."""
    checks = [
        (found["goodput"] >= GOODPUT, f"goodput: {found['goodput']} of what is taken at saturation, not {GOODPUT}"),
        (flood["refused"] > 0, "no overload: nothing was refused"),
        (flood["refused_ms"].get("p99", 0.0) <= REFUSAL_MS, f"late refusals: p99 {flood['refused_ms'].get('p99')} ms"),
        (not flood["refused_without_wait"], f"{flood['refused_without_wait']} refusals without retry_after_ms"),
        (flood["ack_ms"].get("max", 0.0) <= ACK_MS, f"late acks: {flood['ack_ms'].get('max')} ms"),
        (flood["drained_seconds"] <= RECOVERY_SECONDS, f"drained only after {flood['drained_seconds']:.1f} s"),
        (found["recovered_ack_ms"].get("p99", 1e9) <= RECOVERED_P99_MS, f"slow after it: {found['recovered_ack_ms']}"),
        (max(found["grown"].values()) <= MEMORY_KIB, f"memory: {found['grown']}"),
    ]
    return [text for met, text in checks if not met]
