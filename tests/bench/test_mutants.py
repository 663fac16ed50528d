"""Each bug of the list is found by the simulator, within a bounded number of seeds (reliability.md section 10.6).

The seeds are those that find it, as the product is now; where one no longer does, look for others with
`bench simulate --mutant NAME --seeds N`, and where there are none, make the faults or the workload stronger.
"""

from __future__ import annotations

from typing import Final

import pytest

from bench.simulation.mutants import MUTANTS
from tests.bench.test_simulate import simulate

FOUND_FROM: Final = {
    "ack_on_xadd": 0,
    "cache_before_message": 0,
    "inc_counter_then_insert": 0,
    "redis_incr_sequence": 0,
    "new_message_id_on_retry": 0,
    "no_unique_key": 0,
    "no_unique_sequence": 40,
    "pipelined_batches": 0,
    "ack_at_w1": 0,
    "unordered_bulk": 0,
    "publish_after_xack": 0,
    "pubsub_only": 0,
    "dedupe_by_local_read": 40,
    "take_over_by_local_read": 0,
    "xack_before_insert": 40,
}
"""Mutant → a seed from which it is found within `SEEDS`."""
SEEDS: Final = 60


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FOUND_FROM))
def test_a_mutant_is_found(name: str) -> None:
    first = str(FOUND_FROM[name])
    run = simulate("--seed", first, "--seeds", str(SEEDS), "--processes", "1", "--mutant", name, "--failures", "1")
    assert run.returncode == 1, f"{name} survives {SEEDS} seeds from {first} on: {run.stdout}{run.stderr[-2000:]}"
    assert "crash:" not in run.stdout, run.stdout


def test_every_mutant_has_its_test() -> None:
    assert set(FOUND_FROM) == set(MUTANTS)
