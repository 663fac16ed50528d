"""`python -m bench hot`: one conversation in which everybody writes at once (reliability.md L-4).

Fifty members of one group send twenty messages a second each: one shard, one lane, every commit of the same
conversation. The verdict: nothing broke the contract, the stored sequence numbers are 1..n without a hole or a repeat,
and the p99 of the acks, from when each was due, is within its bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pymongo

from bench import figures
from bench.accounts import create_community
from bench.load import PHASE_SECONDS, add_load_arguments, connect_all, cpu_of, run_and_report, verdict, warm_up
from bench.phases import Paced
from protocol.models import ConversationType

if TYPE_CHECKING:
    import argparse

    from bench.driver_process import DriverProcess
    from bench.stack import Stack

ACK_P99_MS: Final = 300.0
WINDOW: Final = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hot`."""
    parser.add_argument("--members", type=int, default=50, help="of the group; all of them send")
    parser.add_argument("--each", type=float, default=20.0, help="messages per second of each")
    parser.add_argument("--seconds", type=float, default=30.0)
    add_load_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when the log is whole and the acks came in time, 1 otherwise."""
    return run_and_report("hot", args, lambda stack, driver: measure(args, stack, driver))


def measure(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> dict[str, Any]:
    """The figures, `verdict` among them."""
    community = create_community(stack.rest_url, stack.admin_token, ConversationType.GROUP, [args.members])
    problems = connect_all(args, stack, driver, community, senders=args.members, receipts=False)
    problems = problems or warm_up(driver, WINDOW)
    if problems:
        return {"verdict": problems}
    rate = args.members * args.each
    messages = int(rate * args.seconds)
    with cpu_of(stack, driver) as clock:
        answer = driver.command(Paced(messages, rate, args.seconds + 60), PHASE_SECONDS + args.seconds)
        used, elsewhere = clock.used_seconds(), clock.elsewhere_cores()
    violations = verdict(driver, answer)
    found = [] if isinstance(violations, str) else violations
    if stack.mongodb_url:
        found = [*found, *_holes(stack.mongodb_url, community.conversations[0])]
    p99 = answer["ack_ms"].get("p99", float("inf"))
    if p99 > ACK_P99_MS:
        found = [*found, f"late acks: p99 {p99} ms"]
    return {
        "verdict": found or "ok",
        "messages": messages,
        "messages_per_second": rate,
        "deliveries_per_second": rate * (args.members - 1),
        "message_frames": answer["message_frames"],
        "ack_ms": answer["ack_ms"],
        "delivered_ms": answer["delivered_ms"],
        "cpu_us_per_message": figures.cpu_us_per_message(used, messages),
        "elsewhere_cores": elsewhere,
    }


def _holes(mongodb_url: str, conversation_id: str) -> list[str]:
    """I2 as it is stored: the numbers are 1..n, each once."""
    with pymongo.MongoClient[dict[str, Any]](mongodb_url) as client:
        messages = client.get_default_database()["messages"]
        found = messages.find({"conversation_id": conversation_id}, {"_id": 0, "sequence_number": 1})
        numbers = sorted(document["sequence_number"] for document in found)
    whole = numbers == list(range(1, len(numbers) + 1))
    return [] if whole and numbers else [f"gap or repeat: {len(numbers)} stored, the last is {numbers[-1:]}"]
