"""`python -m bench group`: fan-out in full groups, every delivery checked.

The same stack, driver and checks as `direct`; what differs is one encoded frame for a hundred sockets, so the figure is
deliveries per second of gateway CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.accounts import create_community
from bench.load import add_load_arguments, connect_all, run_and_report, saturate
from protocol.models import GROUP_LIMIT, ConversationType

if TYPE_CHECKING:
    import argparse

    from bench.driver_process import DriverProcess
    from bench.stack import Stack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `group`."""
    parser.add_argument("--members", type=int, default=GROUP_LIMIT)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--messages", type=int, default=3000, help="in all groups together")
    parser.add_argument("--senders", type=int, default=10, help="members of each group who send")
    parser.add_argument("--window", type=int, default=4, help="unacknowledged messages per sender (at most 32)")
    add_load_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when no message broke the contract, 1 otherwise."""
    return run_and_report("group", args, lambda stack, driver: _group(args, stack, driver))


def _group(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> dict[str, Any]:
    sizes = [args.members] * args.groups
    community = create_community(stack.rest_url, stack.admin_token, ConversationType.GROUP, sizes)
    problems = connect_all(args, stack, driver, community, args.senders)
    if problems:
        return {"verdict": problems}
    found, rate = saturate(args, stack, driver)
    deliveries = args.messages * (args.members - 1)
    found["deliveries_per_second"] = round(rate * (args.members - 1), 1)
    gateway_seconds = found["cpu_seconds"].get("gateway")
    if gateway_seconds:
        found["deliveries_per_gateway_cpu_second"] = round(deliveries / gateway_seconds)
        found["frames_per_gateway_cpu_second"] = round(found["message_frames"] / gateway_seconds)
    return found
