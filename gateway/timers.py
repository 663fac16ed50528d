"""Every deadline of the gateway that belongs to no single await: one task, a wheel of one-second buckets, and the
periodic roles.

Called by `server.py`, which runs it, and by the hub, which arms its connections. It knows neither sessions nor sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import structlog
import trio

_log = structlog.get_logger(__name__)

HORIZON_SECONDS: Final = 60
"""A deadline further away is looked at again after this long, so a bucket never lives longer."""
_STEP_SECONDS: Final = 1.0
_TURN: Final = 128
"""Deadlines handled before other tasks run: half a millisecond."""


class Timed(Protocol):
    """Something with a deadline. `due` is the wheel's own: the second it stands in, 0 for none."""

    due: int

    def expired(self, now: float) -> None:
        """The deadline may have passed. Arms itself again if it wants to. Never raises."""


class TimerWheel:
    """Deadlines to the second, at most one per object; those of one second expire in the order in which they were set.
    Arming costs a dict operation; no method awaits."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[Timed, None]] = {}
        self._handled = 0

    def arm(self, timed: Timed, at: float, now: float) -> None:
        """Call `timed.expired` within the second after `at` (seconds, the clock of `now`), instead of any earlier
        wish."""
        second = max(int(min(at, now + HORIZON_SECONDS)) + 1, self._handled + 1)
        if timed.due == second:
            return
        self.disarm(timed)
        timed.due = second
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = {}
        bucket[timed] = None

    def disarm(self, timed: Timed) -> None:
        """Forget it."""
        bucket = self._buckets.get(timed.due)
        if bucket is not None:
            bucket.pop(timed, None)
        timed.due = 0

    def expire(self, now: float) -> list[Timed]:
        """Take out everything that is due."""
        second = int(now)
        if self._handled == 0 or len(self._buckets) < second - self._handled:
            seconds = sorted(key for key in self._buckets if key <= second)
        else:
            seconds = [key for key in range(self._handled + 1, second + 1) if key in self._buckets]
        self._handled = max(second, self._handled)
        expired: list[Timed] = []
        for key in seconds:
            expired.extend(self._buckets.pop(key))
        for timed in expired:
            timed.due = 0
        return expired


class Job(msgspec.Struct, frozen=True):
    """A periodic role: `run(now)` once per step of the timer. Never awaits."""

    name: str
    run: Callable[[float], None]


class TimerRole:
    """The one task."""

    def __init__(self, wheel: TimerWheel, jobs: Sequence[Job]) -> None:
        self.late_seconds = 0.0
        """How late the last step began: what the event loop lags behind."""
        self.failed_jobs = 0
        self._wheel = wheel
        self._jobs = jobs

    async def run(self) -> None:
        """Step once a second, until cancelled."""
        planned = trio.current_time()
        while True:
            planned += _STEP_SECONDS
            await trio.sleep_until(planned)
            now = trio.current_time()
            self.late_seconds = now - planned
            planned = max(planned, now - _STEP_SECONDS)
            for count, timed in enumerate(self._wheel.expire(now), 1):
                timed.expired(now)
                if count % _TURN == 0:
                    await trio.lowlevel.checkpoint()
            for job in self._jobs:
                await trio.lowlevel.checkpoint()
                self._run_job(job, trio.current_time())

    def _run_job(self, job: Job, now: float) -> None:
        try:
            job.run(now)
        except Exception:  # noqa: BLE001 -- boundary "record": a failed sweep must not stop every other deadline
            self.failed_jobs += 1
            _log.exception("job_failed", job=job.name)
