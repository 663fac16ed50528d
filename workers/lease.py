"""Who owns which shard: leases in Redis, spread over the live workers by rendezvous hashing.

Run by the ingest role, and by the agents role over partitions of its own. A lease organises, it never fences: two
owners for a while are allowed, and the unique indexes of `messages` keep the log right (reliability.md section 10.4).
An owner stops on its own monotonic clock before its lease ends.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import anyio
import structlog

from protocol import keys, records
from workers.broker import Broker, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

ROUND_SECONDS = 0.5
"""Between two looks at the leases: one script and two reads. A dead owner's shard is free after 5 s and adopted at the
second look that finds it so: within 6 s of its death (reliability.md, F-W1)."""
ADOPTION_SECONDS = 20.0
"""How long a shard that its preferred owner did not hold is kept, in which a dead worker's liveness lease (10 s)
ends.
"""
SAFETY_SECONDS = 1.5
"""An owner with less than this left of its lease issues no more work (reliability.md section 10.4)."""
GIVING_UP_SECONDS = 0.4
"""Between the last read of a shard that is given up and the end of its lease: longer than a read waits (`BLOCK_MS`)."""
REMADE_SECONDS = ROUND_SECONDS + 2 * GIVING_UP_SECONDS
"""How long a shard rests whose group was missing: so late its owner from before Redis was emptied may have its next
look at the leases, and a read under way behind that. To that owner the group is there again, and what two owners read
in turn is committed out of order."""
MOVES_PER_ROUND = 64
"""Shards given up per round when workers come or go; a moved shard costs its new owner one read of pending entries."""

log = structlog.get_logger()


def preferred_owner(shard: int, workers: Iterable[str]) -> str | None:
    """Rendezvous hashing: the worker with the greatest hash of (shard, worker); a leaving worker moves only its own
    shards.
    """
    return max(workers, key=lambda worker: blake2b(f"{shard}:{worker}".encode(), digest_size=8).digest(), default=None)


class Estate(NamedTuple):
    """What is shared out: among instances of which kind, by which keys, and what a part needs before it is
    worked on. `prepare`: must whoever has read there before be given time to notice?"""

    kind: str
    lease: Callable[[int], str]
    prepare: Callable[[Iterable[int]], Awaitable[bool]]


class Leases:
    """The shards this worker holds. `changed` is called after each change, with the shards held now."""

    def __init__(
        self,
        broker: Broker,
        worker_id: str,
        shards: int,
        changed: Callable[[frozenset[int]], None],
        estate: Estate | None = None,
    ) -> None:
        self._broker = broker
        self._estate = estate or Estate("worker", keys.lease, broker.create_ingest_groups)
        self._worker_id = worker_id
        self._shards = shards
        self._changed = changed
        self._until: dict[int, float] = {}
        self._adopted: dict[int, float] = {}
        self._told: frozenset[int] = frozenset()
        self._resting: list[int] = []
        """Held, and not worked on yet."""
        self._seen_free: frozenset[int] = frozenset()

    @property
    def held(self) -> frozenset[int]:
        """Shards whose lease has `SAFETY_SECONDS` or more left by this process' monotonic clock."""
        now = anyio.current_time()
        return frozenset(shard for shard, until in self._until.items() if until - now >= SAFETY_SECONDS)

    @property
    def is_current(self) -> bool:
        """Is every lease this worker goes by still its own by this process' clock? Not after it has stood still."""
        return len(self.held) == len(self._until)

    async def run(self) -> None:
        """Take, renew and give up leases until cancelled."""
        while True:
            # Before it renews: a process that stood still may find a lease free again that another had meanwhile.
            self._drop_expired()
            try:
                await self._round()
            except BrokerUnavailable as error:
                log.warning("lease_round_failed", error=str(error))
            self._drop_expired()
            await anyio.sleep(ROUND_SECONDS)

    async def _round(self) -> None:
        """One look: who lives, what should be mine, give up, take and renew."""
        live = await self._broker.live_instances()
        workers = [name for name, info in live.items() if info.kind == self._estate.kind and not info.draining]
        if self._worker_id not in workers:
            workers.append(self._worker_id)
        wanted = [shard for shard in range(self._shards) if preferred_owner(shard, workers) == self._worker_id]
        wanted += await self._adopt(frozenset(range(self._shards)) - frozenset(wanted))
        unwanted = sorted(set(self._until) - set(wanted))[:MOVES_PER_ROUND]
        if unwanted:
            for shard in unwanted:
                del self._until[shard]
            self._tell()
            # The lane finishes the batch it has in hand; whoever takes over meanwhile is fenced by the indexes. But the
            # next owner has to come behind its waiting read: what that still takes would be found too late, and later
            # messages of the same connection be committed first.
            await anyio.sleep(GIVING_UP_SECONDS)
            await self._broker.release_leases(self._worker_id, unwanted, self._estate.lease)
        asked_at = anyio.current_time()
        held = await self._broker.hold_leases(self._worker_id, wanted, self._estate.lease)
        fresh = [shard for shard in held if shard not in self._until]
        if fresh:
            self._resting = fresh
            if await self._estate.prepare(fresh):
                await anyio.sleep(REMADE_SECONDS)
            self._resting = []
        lost = [shard for shard in wanted if shard in self._until and shard not in set(held)]
        for shard in lost:
            del self._until[shard]
        for shard in held:
            self._until[shard] = asked_at + keys.LEASE_TTL_MS / 1000
        if fresh or lost:
            log.info("shards_changed", held=len(self._until), gained=len(fresh), lost=len(lost))
        # Also where nothing moved: one that was too near its end, when the last word was given, is renewed now.
        self._tell()

    def _tell(self) -> None:
        held = self.held
        if held != self._told:
            self._told = held
            self._changed(held)

    async def _adopt(self, foreign: frozenset[int]) -> list[int]:
        """Which shards of others to hold for now: those whose owner let the lease end without being seen dead yet."""
        now = anyio.current_time()
        self._adopted = {shard: until for shard, until in self._adopted.items() if shard in foreign and until > now}
        free = frozenset(await self._broker.free_leases(sorted(foreign - self._until.keys()), self._estate.lease))
        for shard in free & self._seen_free:
            self._adopted[shard] = now + ADOPTION_SECONDS
        self._seen_free = free
        return list(self._adopted)

    def _drop_expired(self) -> None:
        held = self.held
        expired = [shard for shard in self._until if shard not in held]
        for shard in expired:
            del self._until[shard]
        if expired:
            log.warning("leases_expired", shards=len(expired))
            self._tell()

    async def release(self) -> None:
        """Give up everything, for a clean stop. Never raises: the leases end by themselves."""
        shards = [*self._until, *self._resting]
        self._until.clear()
        try:
            await self._broker.release_leases(self._worker_id, shards, self._estate.lease)
        except BrokerUnavailable as error:
            log.warning("lease_release_failed", error=str(error))


def worker_info(endpoint: str, shards: int, draining: bool) -> records.InstanceInfo:
    """What a worker says of itself under `instance:{id}`."""
    return records.InstanceInfo("worker", endpoint, shards, draining)
