"""The door of the yard: `python -m bench COMMAND`. The table below is the list of commands.

Each command is a module with `add_arguments(parser)` and `main(args) -> exit status`, imported only when it is asked
for: the load drivers and the locust run must not pay for, or meet, each other's imports.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Final

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "services": ("bench.services_command", "local Valkey, mongod and S3 store, until stopped"),
    "replay": ("bench.replay", "replay real chat logs as groups and check every message"),
    "e2ee": ("bench.e2ee", "end-to-end encryption: Olm and Megolm on a real system, and nothing readable left behind"),
    "direct": ("bench.load", "load: durable 1:1 messages with delivery receipts"),
    "group": ("bench.group_load", "load: fan-out in full groups"),
    "overload": ("bench.overload", "load: three times what the workers take; the rest is refused at once"),
    "hot": ("bench.hot", "load: one conversation in which 50 people write 20 messages a second each"),
    "slow-readers": ("bench.slow_readers", "load: 50 of 1,000 clients read nothing; the others must not notice"),
    "agents": ("bench.agents", "load: 1,000 people talk to the echo agent, whose process is killed again and again"),
    "persist": ("bench.persist", "documents per second through the ingest worker against bare insert_many"),
    "gateway": (
        "bench.gateway_cost",
        "CPU per message and memory per connection of both transports and three echo servers",
    ),
    "simulate": (
        "bench.simulate",
        "the real code on a virtual clock, over twins of the servers, with faults from a seed",
    ),
    "drain": ("bench.drain", "stop and start every gateway in turn under load: nobody loses anything"),
    "chaos": ("bench.chaos.campaign", "faults on real processes under load, and a verdict on every message"),
    "locust": ("bench.locust_run", "a short headless locust run with its HTML report"),
    "conformance": ("bench.conformance", "schemathesis against the HTTP API: does it keep what its document says"),
    "autobahn": ("bench.autobahn", "the Autobahn cases against both transports, judged by four gates"),
    "bounds": ("bench.bounds", "write docs/bounds.md: every bound with its reason, gauge and test"),
    "fuzz": ("bench.fuzz", "bytes of strangers against every reader, broken sessions against real gateways"),
    "reference": ("bench.reference", "write docs/reference.md: every frame, route and code, from the code"),
}
"""Command → (module, help)."""


def parse(argv: list[str]) -> tuple[str, argparse.Namespace]:
    """The command's module name and its arguments. Only that module is imported."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Services, load, replay and verdicts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    return COMMANDS[args.command][0], args


def main() -> int:
    module, args = parse(sys.argv[1:])
    status: int = importlib.import_module(module).main(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
