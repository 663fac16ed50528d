"""When all was well again: the definition of reliability.md section 6 over the samples of the load. Pure.

From the end of the fault (or from the kill) to: p99 of acks below 200 ms for 5 s, and no outstanding message older than
5 s. On a machine whose undisturbed p99 is not far below 200 ms the limit is a multiple of that; the report says which.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Final

from bench.chaos.samples import STEP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.chaos.samples import Sample

LIMIT_MS: Final = 200.0
CALM_FACTOR: Final = 2.5
CALM_SECONDS: Final = 5.0
OLDEST_SECONDS: Final = 5.0
CALM_STEPS: Final = round(CALM_SECONDS / STEP_SECONDS)


def limit_ms(before: Sequence[Sample]) -> float:
    """What p99 has to stay below, by the last five seconds before the fault."""
    calm = [sample.p99_ms for sample in before[-CALM_STEPS:] if sample.acked]
    return max(LIMIT_MS, CALM_FACTOR * median(calm)) if calm else LIMIT_MS


def is_well(sample: Sample, limit: float) -> bool:
    """Is this step one of a healthy system?"""
    return sample.acked > 0 and sample.p99_ms < limit and sample.oldest_seconds < OLDEST_SECONDS


def recovery_seconds(samples: Sequence[Sample], since: float, over: float, limit: float) -> float | None:
    """From `since` to the end of the last step that was not well; None while 5 s of calm after `over` are not seen.

    The calm has to come behind the end of the script: a process that stands still is not missed at once.
    """
    bad_until = since
    calm = 0
    for sample in samples:
        if sample.at < since:
            continue
        if not is_well(sample, limit):
            bad_until = sample.at
            calm = 0
        elif sample.at - STEP_SECONDS >= over - STEP_SECONDS / 2:
            calm += 1
            if calm >= CALM_STEPS:
                return bad_until - since
    return None


def broken_silence(samples: Sequence[Sample], since: float, until: float) -> int:
    """Messages acked in steps that lie wholly within a time in which none may be."""
    return sum(sample.acked for sample in samples if sample.at - STEP_SECONDS >= since and sample.at <= until)
