"""What presence and typing cost a durable message: the same load with and without, turn by turn in one run.

Called by `direct` with `--social`. In both kinds of turns the connections send heartbeats; in the social ones everybody
watches the other of the conversation, and types before sending as often as a gateway passes it on.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, Final

from bench import figures
from bench.driver import Ambient
from bench.phases import Closed, Paced

if TYPE_CHECKING:
    import argparse

    from bench.driver_process import DriverProcess
    from bench.stack import Stack

TURN_SECONDS: Final = 180.0
SETTLING_MESSAGES: Final = 2000
"""Sent before a turn is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `direct` about what clients do beside messages."""
    parser.add_argument("--heartbeat-seconds", type=float, default=0.0, help="between heartbeats of a connection")
    parser.add_argument("--social", action="store_true", help="compare with presence subscriptions and typing")
    parser.add_argument("--turns", type=int, default=3, help="of each kind, with --social")


def compare(args: argparse.Namespace, stack: Stack, driver: DriverProcess) -> dict[str, Any]:
    """CPU per message of each turn, their medians, and how much more the social ones take."""
    plain: list[dict[str, float]] = []
    social: list[dict[str, float]] = []
    heard: dict[str, float] = {}
    for number in range(args.turns):
        for is_social in (False, True) if number % 2 == 0 else (True, False):
            driver.command(Ambient(args.heartbeat_seconds, is_social), TURN_SECONDS)
            found, counted = _turn(args, stack, driver, Ambient(args.heartbeat_seconds, is_social))
            if "verdict" in found:
                return found
            (social if is_social else plain).append(found["cpu"])
            if is_social:
                heard = {name: round(count / found["seconds"], 1) for name, count in counted.items()}
    return {
        "plain": plain,
        "social": social,
        "social_more_percent": {role: more_percent(plain, social, role) for role in plain[0] if role != "rest"},
        "social_per_second": heard,
    }


def _turn(
    args: argparse.Namespace, stack: Stack, driver: DriverProcess, same: Ambient
) -> tuple[dict[str, Any], dict[str, int]]:
    """The figures of one turn, and what came beside its messages."""
    driver.command(Closed(SETTLING_MESSAGES, args.window, TURN_SECONDS), TURN_SECONDS)
    driver.command(same, TURN_SECONDS)
    command: Closed | Paced = (
        Paced(args.messages, args.rate, TURN_SECONDS) if args.rate else Closed(args.messages, args.window, TURN_SECONDS)
    )
    clock = figures.RoleClock({**stack.pids, "driver": [driver.pid]})
    answer = driver.command(command, TURN_SECONDS)
    used = clock.used_seconds()
    counted = driver.command(same, TURN_SECONDS)
    if not answer["finished"]:
        return {"verdict": ["lost: a turn did not finish"]}, counted
    return {"cpu": figures.cpu_us_per_message(used, args.messages), "seconds": answer["seconds"]}, counted


def more_percent(plain: list[dict[str, float]], social: list[dict[str, float]], role: str) -> float:
    """How much greater the median of the social turns is; 0 for a role that did nothing before."""
    before = median(turn[role] for turn in plain)
    return round((median(turn[role] for turn in social) / before - 1) * 100, 1) if before else 0.0
