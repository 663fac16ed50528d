"""Universes of the simulator end without a violation, and the same seed is the same universe."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Final

import pytest

SEEDS: Final = int(os.environ.get("SIMULATED_SEEDS", "2000"))
"""Of a test run; more on demand (`bench simulate --seeds`)."""
REGRESSIONS: Final = (3, 10, 35, 49, 72, 79, 103, 107, 112, 120, 156, 191)
"""Seeds that once ended with a violation, as the product or the simulator was then."""


def simulate(*arguments: str, hashes: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONHASHSEED": hashes}
    # Its time is virtual: it takes what tests of real time leave.
    command = ["nice", "-n", "19", sys.executable, "-m", "bench", "simulate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


@pytest.mark.slow
def test_the_same_seed_is_the_same_universe_to_the_byte() -> None:
    """Also for who starts it with other hashes: the command sets them itself."""
    runs = [simulate("--seed", "11", "--trace", hashes=hashes) for hashes in ("0", "1")]
    first, second = (hashlib.sha256(run.stdout.encode()).hexdigest() for run in runs)
    assert runs[0].returncode == 0, runs[0].stdout[-2000:] + runs[0].stderr[-2000:]
    assert len(runs[0].stdout.splitlines()) > 300
    assert first == second


@pytest.mark.slow
def test_a_seed_is_the_same_universe_alone_and_behind_others_in_one_process() -> None:
    """A failing seed once did not fail when it was run alone: ids of requests came from where objects lay in memory,
    and so did the order in which deadlines of one second expired. So where they lie is shaken up too."""
    script = (
        "import hashlib, random, sys; from bench.simulate import simulate; "
        "kept = [[None] * random.randrange(1, 20) for _ in range(60_000 if len(sys.argv) > 2 else 0)]; "
        "random.shuffle(kept); del kept[::2]; "
        "last = simulate([int(seed) for seed in sys.argv[1:]], trace=True)[-1]; "
        "print(len(last.trace), hashlib.sha256('\\n'.join(last.trace).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    before = [str(seed) for seed in range(1000, 1020)]
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, *others, "23"],
            capture_output=True, text=True, timeout=300, env=environment, check=True,
        ).stdout
        for others in ([], before)
    ]  # fmt: skip
    assert int(runs[0].split()[0]) > 300
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_no_universe_ends_with_a_violation() -> None:
    run = simulate("--seeds", str(SEEDS), "--processes", "2")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_went_wrong_once_does_not_again(seed: int) -> None:
    run = simulate("--seed", str(seed))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_a_failing_seed_is_named_with_the_line_that_repeats_it() -> None:
    run = simulate("--seeds", "3", "--processes", "1", "--mutant", "ack_on_xadd", "--failures", "1")
    assert run.returncode == 1
    line = "uv run python -m bench simulate --seed 0 --mutant ack_on_xadd"
    assert line in run.stdout, run.stdout + run.stderr
    assert "seeds/s" in run.stdout
