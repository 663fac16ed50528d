"""How far the workers are behind, shard by shard, and whether that leaves room for another message.

Called by `broker.py` for every message and with every look at the streams' lengths. Nothing here awaits.
"""

from __future__ import annotations


class Workload:
    """Entries that no worker has settled: as of the last look at Redis, and what this gateway appended since.

    Other gateways' entries are seen with the next look, so that all of them together may pass a bound by what they
    append within a quarter of a second.
    """

    def __init__(self, shards: int, high_water: int, bound: int) -> None:
        self.backlog = [0] * shards
        self.entries = 0
        """The same over all shards."""
        self._appended = [0] * shards
        self._high_water = high_water
        self._bound = bound

    @property
    def greatest(self) -> int:
        """The backlog of the shard that has most."""
        return max(self.backlog)

    def is_full(self, shard: int) -> bool:
        """Would a message here wait too long, or its shard take all the room?"""
        return self.backlog[shard] >= self._high_water or self.entries >= self._bound

    def add(self, shard: int) -> None:
        """One more entry was sent to Redis."""
        self._appended[shard] += 1
        self.backlog[shard] += 1
        self.entries += 1

    def look(self, shard: int) -> tuple[int, int]:
        """The context of a question for the stream's length: what is sent behind it is not in its answer."""
        return shard, self._appended[shard]

    def seen(self, context: tuple[int, int], length: int) -> None:
        """The answer to that question."""
        shard, appended = context
        now = length + self._appended[shard] - appended
        self.entries += now - self.backlog[shard]
        self.backlog[shard] = now
