"""Pending entries as a shard's next owner finds them in Redis: how often each was delivered, and which are on trial.

Called by `takeover.py`. Raises what `Broker` raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from protocol import keys
from workers.entries import StreamEntry, unusual_entry

if TYPE_CHECKING:
    from workers.broker import Broker


PROOF: Final = 3
"""What a death at once weighs: it proves that the entry kills. One later in a trial weighs 1."""


class Delivered(NamedTuple):
    """A pending entry and how often it was handed to an owner; each time but the last without an acknowledgement."""

    entry_id: bytes
    times: int


class Suspects:
    """Looks at pending entries, and what is written down of those on trial."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def pending(self, shard: int, after: bytes, count: int, idle_ms: int = 0) -> list[Delivered]:
        """The first entries of a shard behind an id (b"0" for all) that were read, `idle_ms` ago at least, and not
        acknowledged. Looking at them counts as no delivery."""
        span = ("IDLE", idle_ms, b"-" if after == b"0" else b"(" + after, "+")
        reply = await self._broker.command("XPENDING", keys.ingest(shard), keys.INGEST_GROUP, *span, count)
        return [Delivered(row[0], int(row[3])) for row in reply]

    async def read(self, shard: int, entry_id: bytes) -> StreamEntry:
        """One entry, without it being delivered to anybody."""
        reply = await self._broker.command("XRANGE", keys.ingest(shard), entry_id, entry_id)
        return unusual_entry(shard, entry_id, reply[0][1] if reply else None)

    async def begin_trial(self, shard: int, entry_id: bytes) -> None:
        """An entry whose readers died is tried alone; `end_trial` says that this time nobody did."""
        await self._broker.command("HINCRBY", keys.trials(shard), entry_id, PROOF)
        await self._broker.command("EXPIRE", keys.trials(shard), keys.TRIALS_TTL_SECONDS)

    async def doubt_trial(self, shard: int, entry_id: bytes) -> None:
        """The trial goes on for so long that a death by now may have another cause."""
        await self._broker.command("HINCRBY", keys.trials(shard), entry_id, 1 - PROOF)

    async def weight(self, shard: int, entry_id: bytes) -> int:
        """Of the deaths of those who tried this entry alone; buried from `PROOF` on."""
        return int(await self._broker.command("HGET", keys.trials(shard), entry_id) or 0)

    async def end_trial(self, shard: int, entry_id: bytes) -> None:
        """The trial ended without harm, or the entry is gone."""
        await self._broker.command("HDEL", keys.trials(shard), entry_id)
