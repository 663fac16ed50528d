"""`python -m bench fuzz`: bytes of strangers against every reader of the gateway, broken sessions against real ones.

Readers are fuzzed by atheris, which follows what the code does, where it is installed (`uv run --with atheris==3.0.0`),
else by changing good input at random. Sessions are good ones with flipped bytes, sent in pieces to a gateway on each
transport; no process may end, and no bug may have ended a connection.
"""

from __future__ import annotations

import importlib.util
import random
import secrets
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import trio

from bench import figures, fuzz_sessions
from bench.fuzz_targets import SEEDS, TARGETS
from bench.services import ServicesError
from bench.stack import StackError, run_stack

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

TRANSPORTS: Final = ("epoll", "trio-websocket")
LONGEST_BYTES: Final = 8192


class Found(Exception):
    """These bytes made a reader raise what it must not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fuzz`."""
    parser.add_argument("--minutes", type=float, default=10.0, help="over all readers")
    parser.add_argument("--sessions", type=int, default=10_000, help="broken sessions, half of them per transport")
    parser.add_argument("--seed", type=int, help="of everything random; another one each time")
    parser.add_argument("--readers", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when nothing was found."""
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
    by_atheris = importlib.util.find_spec("atheris") is not None
    found: dict[str, object] = {"seed": seed, "readers by": "atheris" if by_atheris else "random changes"}
    violations: list[str] = []
    for name in args.readers:
        seconds = args.minutes * 60 / len(args.readers)
        try:
            found[name] = _run_atheris(name, seed, seconds) if by_atheris else change_at_random(name, seed, seconds)
        except Found as bug:
            violations.append(str(bug))
    try:
        if args.sessions:
            with run_stack(gateways=2, transport=TRANSPORTS) as stack:
                outcome = trio.run(fuzz_sessions.storm, stack, args.sessions, seed)
            found["sessions"] = outcome.counts
            violations += outcome.violations
    except (StackError, ServicesError) as error:
        print(f"bench fuzz: {error}", file=sys.stderr)
        return 1
    found |= {"verdict": figures.verdict(violations), "commit": figures.commit()}
    figures.print_table("bench fuzz", found)
    if args.json:
        figures.write_json(args.json, found)
    return 1 if violations else 0


def change_at_random(name: str, seed: int, seconds: float = float("inf"), tries: int = sys.maxsize) -> str:
    """Good input with changes, until the time or the tries are over. Raises Found."""
    generator = random.Random(f"{seed} {name}")
    ends = time.monotonic() + seconds
    count = 0
    for data in _changed(generator, SEEDS[name]):
        try:
            TARGETS[name](data)
        except Exception as error:
            raise Found(f"{name} {error!r} for {data!r}") from error
        count += 1
        if count == tries or (count % 100 == 0 and time.monotonic() >= ends):
            break
    return f"{count} inputs"


def _changed(generator: random.Random, seeds: list[bytes]) -> Iterator[bytes]:
    while True:
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(1, 6)):
            change(data, generator, seeds)
        yield bytes(data[:LONGEST_BYTES])


def change(data: bytearray, generator: random.Random, seeds: list[bytes]) -> None:
    """One change in place: flip, cut, double, fill in, or continue with a piece of another input."""
    at = generator.randrange(len(data) + 1)
    to = min(len(data), at + generator.randrange(1, 40))
    kind = generator.randrange(5)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del data[at:to]
    elif kind == 2:
        data[at:at] = data[at:to] * generator.randrange(1, 4)
    elif kind == 3:
        data[at:to] = generator.randbytes(to - at)
    else:
        other = generator.choice(seeds)
        data[at:] = other[generator.randrange(len(other) + 1) :]


def _run_atheris(name: str, seed: int, seconds: float) -> str:
    """In a process of its own: libFuzzer ends the one it runs in. Raises Found."""
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.fuzz_atheris",
            name,
            f"-max_total_time={max(1, round(seconds))}",
            f"-seed={seed}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise Found(f"{name}:\n{ended.stdout[-3000:]}")
    return next((line for line in reversed(ended.stdout.splitlines()) if line.startswith("Done ")), "done")
