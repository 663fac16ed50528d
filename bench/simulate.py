"""`bench simulate`: universes of the deterministic simulator, each from its seed, in as many processes as asked for.

A seed that ends with a violation is named with the one line that repeats it. Hashes are fixed for the run: the order of
a set of strings would differ from process to process otherwise, and so would everything behind it.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from bench.simulation import mutants
from bench.simulation.universe import Verdict, quiet_logs, run_universe

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

CHUNK: Final = 10
"""Seeds a process takes at a time."""
SHOWN: Final = 5
"""Violations shown of one seed."""
_HASHES: Final = "PYTHONHASHSEED"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=200, metavar="N", help="how many universes (200)")
    parser.add_argument("--seed", type=int, metavar="K", help="this one only, or with --seeds the first one")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="side by side")
    parser.add_argument("--trace", action="store_true", help="print everything that happens in the universe of --seed")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="with this bug put into the product")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many failing seeds (10)")


def main(args: argparse.Namespace) -> int:
    if os.environ.get(_HASHES) != "0":
        os.environ[_HASHES] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]])
    if args.seed is not None and not _was_given(args):
        return _run_one(args.seed, args.mutant, trace=args.trace)
    return _run_many(args.seed or 0, args.seeds, args.processes, args.mutant, args.failures)


def _was_given(args: argparse.Namespace) -> bool:
    return any(word.startswith("--seeds") for word in sys.argv) and args.seeds > 0


def _run_one(seed: int, mutant: str | None, *, trace: bool) -> int:
    (verdict,) = simulate([seed], mutant, trace=trace)
    for line in verdict.trace if trace else ():
        print(line)
    _report(verdict, mutant)
    print(f"seed {seed}: {verdict.seconds:.1f} s, {verdict.sent} sends, {len(verdict.violations)} violations")
    return 1 if verdict.violations else 0


def simulate(seeds: list[int], mutant: str | None = None, *, trace: bool = False) -> list[Verdict]:
    """These universes, one after the other, in this process."""
    quiet_logs()
    with nullcontext() if mutant is None else mutants.MUTANTS[mutant]():
        return [run_universe(seed, trace=trace) for seed in seeds]


def verdicts(first: int, count: int, processes: int, mutant: str | None = None) -> Iterator[Verdict]:
    """Universes from `first` on, as they come."""
    chunks = [list(range(start, min(start + CHUNK, first + count))) for start in range(first, first + count, CHUNK)]
    if processes == 1:
        for chunk in chunks:
            yield from simulate(chunk, mutant)
        return
    with ProcessPoolExecutor(processes, max_tasks_per_child=None) as pool:
        tasks = [pool.submit(simulate, chunk, mutant) for chunk in chunks]
        try:
            for task in as_completed(tasks):
                yield from task.result()
        finally:
            for task in tasks:
                task.cancel()


def _run_many(first: int, count: int, processes: int, mutant: str | None, most_failures: int) -> int:
    began = time.perf_counter()
    done = sent = failures = 0
    virtual = 0.0
    for verdict in verdicts(first, count, processes, mutant):
        done += 1
        sent += verdict.sent
        virtual += verdict.seconds
        if verdict.violations:
            failures += 1
            _report(verdict, mutant)
            if failures >= most_failures:
                break
    seconds = time.perf_counter() - began
    print(
        f"{done} seeds, {failures} with violations; {sent} sends, {virtual / 3600:.1f} hours of the systems' time; "
        f"{done / seconds:.1f} seeds/s in {processes} processes"
    )
    return 1 if failures else 0


def _report(verdict: Verdict, mutant: str | None) -> None:
    if not verdict.violations:
        return
    with_mutant = "" if mutant is None else f" --mutant {mutant}"
    print(f"uv run python -m bench simulate --seed {verdict.seed}{with_mutant}")
    for violation in verdict.violations[:SHOWN]:
        print(f"    {violation}")
    if len(verdict.violations) > SHOWN:
        print(f"    and {len(verdict.violations) - SHOWN} more")
