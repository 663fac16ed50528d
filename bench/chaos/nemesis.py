"""Who does it: a seeded choice of faults, one at a time, each watched until all is well again."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final

import msgspec

from bench.chaos import recovery
from bench.services import ServicesError
from bench.stack import StackError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.chaos.faults import Fault
    from bench.chaos.rig import Rig

GIVE_UP_SECONDS: Final = 45.0
"""A fault whose end is this long ago and still felt: the run goes on, and the report says so. The default."""
PAUSE_SECONDS: Final = (0.0, 1.5)
"""Between the end of one fault's watch and the next fault."""


class Episode(msgspec.Struct, kw_only=True):
    """One fault as it happened. Times are of the monotonic clock."""

    row: str
    name: str
    detail: str
    began: float
    ended: float
    since: float
    """Either of the two: what the bound counts from."""
    recovery_seconds: float | None
    """None: not before one gave up."""
    bound_seconds: float | None
    limit_ms: float
    acked: int
    """While it went on, until all was well."""
    chapter: int
    gave_up: float
    """When one stopped to watch."""

    @property
    def over(self) -> float:
        """When all was well again, or one gave up."""
        if self.recovery_seconds is None:
            return self.gave_up
        return max(self.ended, self.since + self.recovery_seconds)

    @property
    def is_late(self) -> bool:
        """Past its bound."""
        if self.recovery_seconds is None:
            return True
        return self.bound_seconds is not None and self.recovery_seconds > self.bound_seconds


def schedule(faults: Sequence[Fault], count: int, seed: int) -> list[Fault]:
    """So many faults in rounds: each round has every row in an order of its own, those with a star twice."""
    rng = random.Random(seed)
    planned: list[Fault] = []
    while len(planned) < count:
        turn = [*faults, *(fault for fault in faults if fault.often)]
        rng.shuffle(turn)
        planned += turn
    return planned[:count]


class Nemesis:
    """Applies faults to a rig."""

    def __init__(self, rig: Rig, seed: int, give_up_seconds: float = GIVE_UP_SECONDS) -> None:
        self.episodes: list[Episode] = []
        self._give_up_seconds = give_up_seconds
        self._rig = rig
        self._random = random.Random(seed)

    def strike(self, fault: Fault, chapter: int) -> Episode:
        """One fault from its beginning until all is well, or until one gives up. Raises DriverError."""
        rig = self._rig
        limit = recovery.limit_ms(rig.samples)
        first, acked = len(rig.samples), rig.acked
        began = time.monotonic()
        try:
            detail = fault.script(rig, self._random)
        except (ServicesError, StackError, OSError) as error:
            detail = f"the script failed: {error}"
            rig.troubles.append(f"{fault.row} {fault.name}: {error}")
        ended = time.monotonic()
        since = began if fault.counts_from == "begin" else ended
        recovered = None
        while recovered is None and time.monotonic() < ended + self._give_up_seconds:
            rig.sleep(0.5)
            recovered = recovery.recovery_seconds(rig.samples[first:], since, ended, limit)
        self._check_silence(fault, first, began, ended)
        self._mend()
        episode = Episode(
            row=fault.row,
            name=fault.name,
            detail=detail,
            began=began,
            ended=ended,
            since=since,
            recovery_seconds=None if recovered is None else round(recovered, 2),
            bound_seconds=fault.bound_seconds,
            limit_ms=round(limit),
            acked=rig.acked - acked,
            chapter=chapter,
            gave_up=time.monotonic(),
        )
        self.episodes.append(episode)
        rig.sleep(self._random.uniform(*PAUSE_SECONDS))
        return episode

    def _check_silence(self, fault: Fault, first: int, began: float, ended: float) -> None:
        if fault.silent_after_seconds is None:
            return
        since = began + fault.silent_after_seconds
        acked = recovery.broken_silence(self._rig.samples[first:], since, ended)
        if acked:
            self._rig.troubles.append(
                f"{fault.row} {fault.name}: {acked} messages were acked when none could be durable"
            )

    def _mend(self) -> None:
        try:
            self._rig.mend()
            self._rig.replica_set.wait_whole()
        except (ServicesError, StackError) as error:
            self._rig.troubles.append(f"not to be mended: {error}")


def chapters(planned: Sequence[Fault], size: int) -> Iterator[list[Fault]]:
    """The plan in parts of so many faults."""
    for start in range(0, len(planned), size):
        yield list(planned[start : start + size])
