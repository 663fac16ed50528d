"""What the load saw of the system, half a second at a time: made by the crowd, read by recovery and the report."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from bench.figures import nearest_rank

STEP_SECONDS: Final = 0.5


class Sample(msgspec.Struct, frozen=True):
    """One step. `at` is its end on the monotonic clock, which all processes of a machine share."""

    at: float
    acked: int
    """Messages whose first ack came in it; latencies are theirs, from when they were to be sent."""
    p50_ms: float
    p99_ms: float
    outstanding: int
    oldest_seconds: float
    """Age of the oldest message without an outcome at the end of the step."""
    online: int


class Sampler:
    """Collects: `said` when a message is due, `settled` when its fate is known, `step` at each end of a step."""

    def __init__(self) -> None:
        self.steps: list[Sample] = []
        """Since they were last taken."""
        self.total_acked = 0
        self.slowest_seconds = 0.0
        self._born: dict[tuple[str, str], float] = {}
        """(user, key) → when it was said; the oldest first."""
        self._latencies: list[float] = []

    @property
    def outstanding(self) -> int:
        return len(self._born)

    def said(self, user_id: str, key: str) -> None:
        self._born[(user_id, key)] = time.monotonic()

    def acked(self, user_id: str, key: str, at: float) -> None:
        born = self._born.pop((user_id, key), None)
        if born is not None:
            self._latencies.append(at - born)
            self.total_acked += 1

    def refused(self, user_id: str, key: str) -> None:
        """For good."""
        self._born.pop((user_id, key), None)

    def step(self, online: int) -> None:
        """A step is over."""
        now = time.monotonic()
        latencies, self._latencies = sorted(self._latencies), []
        p50 = p99 = 0.0
        if latencies:
            p50, p99 = nearest_rank(latencies, 0.5), nearest_rank(latencies, 0.99)
            self.slowest_seconds = max(self.slowest_seconds, latencies[-1])
        oldest = now - next(iter(self._born.values()), now)
        self.steps.append(
            Sample(now, len(latencies), round(p50 * 1000, 2), round(p99 * 1000, 2), len(self._born), oldest, online)
        )

    def take(self) -> list[Sample]:
        """The steps since the last time."""
        taken, self.steps = self.steps, []
        return taken
