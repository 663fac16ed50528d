"""What a lane has in hand of one shard. Used by `consumer.py` alone."""

from __future__ import annotations

from workers.broker import Settlement


class ShardLog:
    """What a lane has read of one shard: entries without an outcome, and those to acknowledge with the next publish."""

    __slots__ = ("done", "outstanding")

    def __init__(self) -> None:
        self.outstanding: dict[bytes, None] = {}
        self.done: list[bytes] = []

    def holds(self, entry_id: bytes) -> bool:
        """Has this entry not been acknowledged yet?"""
        return entry_id in self.outstanding or entry_id in self.done

    def settle(self, shard: int) -> Settlement:
        """Acknowledge what is done; everything below the first entry without an outcome may be trimmed."""
        done, self.done = self.done, []
        return Settlement(shard, done, next(iter(self.outstanding), done[-1]))
