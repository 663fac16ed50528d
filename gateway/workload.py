"""How far the workers are behind, shard by shard, and whether that leaves room for another message.

Called by `broker.py` for every message and with every look at the streams' lengths. Nothing here awaits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

Look = tuple[int, int, int]
"""(shard, entries appended here, outcomes heard here) when a stream was asked for its length."""


class Workload:
    """Entries that no worker has settled: as of the last look at Redis, and what came and went here since.

    Other gateways' entries are seen with the next look, so that all of them together may pass a bound by what they
    append within a quarter of a second.
    """

    def __init__(self, shards: int, high_water: int, bound: int, outcomes: Callable[[], int]) -> None:
        """`outcomes`: how many messages of this gateway have had theirs; it only grows."""
        self.backlog = [0] * shards
        """Of each shard: the last look and what was appended since, since nobody knows which shard an outcome is of."""
        self._all = 0
        self._outcomes = outcomes
        self._outcomes_then = 0
        self._appended = [0] * shards
        self._high_water = high_water
        self._bound = bound

    @property
    def entries(self) -> int:
        """Of all shards."""
        return max(0, self._all - self._outcomes() + self._outcomes_then)

    @property
    def greatest(self) -> int:
        """The backlog of the shard that has most."""
        return max(self.backlog)

    def is_full(self, shard: int) -> bool:
        """Would a message here wait too long, or its shard take all the room?"""
        if self.backlog[shard] >= self._high_water:
            return True
        return self._all >= self._bound and self.entries >= self._bound

    def add(self, shard: int) -> None:
        """One more entry was sent to Redis."""
        self._appended[shard] += 1
        self.backlog[shard] += 1
        self._all += 1

    def look(self, shard: int) -> Look:
        """The context of a question for the stream's length: what is sent behind it is not in its answer."""
        return shard, self._appended[shard], self._outcomes()

    def seen(self, look: Look, length: int) -> None:
        """The answer to that question."""
        shard, appended, self._outcomes_then = look
        now = length + self._appended[shard] - appended
        self._all += now - self.backlog[shard]
        self.backlog[shard] = now
