"""`python -m bench locust`: a short headless locust run against an own stack, with its HTML report.

Locust runs in a process of its own (`locustfile`), since it patches the standard library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.load import open_stack

if TYPE_CHECKING:
    import argparse

REPORT: Final = Path("reports/locust.html")
LOCUSTFILE: Final = Path(__file__).with_name("locustfile.py")
LONGEST_SECONDS: Final = 540.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `locust`."""
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--spawn-rate", type=float, default=10.0, help="users started per second")
    parser.add_argument("--run-time", default="20s", help="as locust writes it: 20s, 2m")
    parser.add_argument("--attach", action="store_true", help="use the running stack")
    parser.add_argument("--report", type=Path, default=REPORT)


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when no request failed, locust's own otherwise."""
    args.report.parent.mkdir(parents=True, exist_ok=True)
    with open_stack(args.attach) as stack:
        host = stack.ws_urls[0].removesuffix("/v1/ws").replace("ws", "http", 1)
        environment = {
            **os.environ,
            "TRIREME_REST_URL": stack.rest_url,
            "TRIREME_ADMIN_TOKEN": stack.admin_token,
        }
        arguments = (
            *(sys.executable, "-m", "locust", "--headless", "--only-summary", "--locustfile", str(LOCUSTFILE)),
            *("--host", host, "--users", str(args.users), "--spawn-rate", str(args.spawn_rate)),
            *("--run-time", args.run_time, "--html", str(args.report), "--exit-code-on-error", "1"),
        )
        try:
            status = subprocess.run(arguments, env=environment, timeout=LONGEST_SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"bench locust: not done after {LONGEST_SECONDS:.0f} s", file=sys.stderr)
            return 1
    print(f"report: {args.report}")
    return status
