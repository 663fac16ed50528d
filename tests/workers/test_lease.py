"""Shard leases: spread, taken over, given back."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from protocol import keys
from workers.broker import Broker, BrokerUnavailable, open_broker
from workers.consumer import BLOCK_MS
from workers.lease import ROUND_SECONDS, SAFETY_SECONDS, Leases, preferred_owner, worker_info

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.anyio
SHARDS = 16


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    async with open_broker(redis_url) as opened:
        yield opened


class Worker:
    """One lease holder; `held` is what it was last told."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.broker = broker
        self.name = name
        self.held: frozenset[int] = frozenset()
        self.leases = Leases(broker, name, SHARDS, self._changed)

    def _changed(self, held: frozenset[int]) -> None:
        self.held = held

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Worker]:
        await self.broker.renew_instance(self.name, worker_info("", 0, draining=False))
        async with anyio.create_task_group() as group:
            group.start_soon(self.leases.run)
            yield self
            group.cancel_scope.cancel()


async def until(check: Callable[[], object], seconds: float) -> float:
    started = anyio.current_time()
    with anyio.fail_after(seconds):
        while not check():  # noqa: ASYNC110 - Redis tells nobody
            await anyio.sleep(0.05)
    return anyio.current_time() - started


def test_a_leaving_worker_moves_only_its_own_shards() -> None:
    before = {shard: preferred_owner(shard, ("a", "b", "c")) for shard in range(256)}
    after = {shard: preferred_owner(shard, ("a", "c")) for shard in range(256)}
    assert {before[shard] for shard in before} == {"a", "b", "c"}
    assert all(after[shard] == before[shard] for shard in before if before[shard] != "b")
    assert preferred_owner(1, ()) is None


async def test_one_worker_takes_everything_and_two_share_it(broker: Broker) -> None:
    one, two = Worker(broker, "worker-1"), Worker(broker, "worker-2")
    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
        async with two.running():
            await until(lambda: two.held and len(one.held) + len(two.held) == SHARDS, 8)
            assert not one.held & two.held
            owners = {shard: await broker.client.get(keys.lease(shard)) for shard in range(SHARDS)}
    assert {shard for shard, owner in owners.items() if owner == b"worker-1"} == one.held
    assert {shard for shard, owner in owners.items() if owner == b"worker-2"} == two.held


async def test_shards_of_a_killed_worker_are_taken_over_when_its_leases_end(broker: Broker) -> None:
    dead, alive = Worker(broker, "worker-1"), Worker(broker, "worker-2")
    async with dead.running():
        await until(lambda: len(dead.held) == SHARDS, 3)
    # Killed: nothing is released, and its liveness lease goes on for 15 s.
    killed_at = anyio.current_time()
    async with alive.running():
        await until(lambda: len(alive.held) == SHARDS, 8)
        assert anyio.current_time() - killed_at <= 6.5
        await anyio.sleep(1.5)
        assert len(alive.held) == SHARDS


async def test_a_clean_stop_gives_the_shards_back_at_once(broker: Broker) -> None:
    one = Worker(broker, "worker-1")
    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
    await one.leases.release()
    assert await broker.hold_leases("worker-2", list(range(SHARDS))) == list(range(SHARDS))


async def test_a_shard_that_is_given_up_stays_leased_until_the_last_read_of_it_is_over(broker: Broker) -> None:
    """That read took a message from the next owner, who committed a later one of the same connection first."""
    one, two = Worker(broker, "worker-1"), Worker(broker, "worker-2")
    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
        async with two.running():
            await until(lambda: len(one.held) < SHARDS, 8)
            given_up_at = anyio.current_time()
            assert not two.held
            await until(lambda: two.held, 5)
            assert anyio.current_time() - given_up_at > BLOCK_MS / 1000


async def test_i7_a_shard_of_an_emptied_redis_rests_until_its_owner_from_before_knows(broker: Broker) -> None:
    """The group was there again before that owner read on: it read in turn with the next one."""
    before, after = Worker(broker, "worker-1"), Worker(broker, "worker-2")
    async with before.running():
        await until(lambda: len(before.held) == SHARDS, 5)
        await broker.client.flushdb()
        assert await broker.hold_leases("worker-2", list(range(SHARDS))) == list(range(SHARDS))
        async with after.running():
            await until(lambda: after.held, 5)
            assert not after.held & before.held


async def test_leases_are_not_current_once_the_clock_says_so(broker: Broker) -> None:
    one = Worker(broker, "worker-1")
    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
        assert one.leases.is_current
    one.leases._until[3] = anyio.current_time() + 0.5
    assert not one.leases.is_current


async def test_a_lease_that_ended_while_the_process_stood_still_is_a_new_one(broker: Broker) -> None:
    """Another may have owned the shard meanwhile: what memory holds of it is old, even if the lease is free."""
    changes: list[frozenset[int]] = []
    leases = Leases(broker, "worker-a", 1, changes.append)
    async with anyio.create_task_group() as group:
        group.start_soon(leases.run)
        await until(lambda: changes, 3)
        group.cancel_scope.cancel()
    await broker.client.delete(keys.lease(0))
    leases._until[0] = anyio.current_time() - 1.0
    async with anyio.create_task_group() as group:
        group.start_soon(leases.run)
        await until(lambda: len(changes) == 3, 3)
        group.cancel_scope.cancel()
    assert changes == [{0}, set(), {0}]


async def test_a_stolen_lease_is_noticed(broker: Broker) -> None:
    one = Worker(broker, "worker-1")
    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
        await broker.client.set(keys.lease(3), "zombie", px=60_000)
        await until(lambda: 3 not in one.held, 4)
        assert len(one.held) == SHARDS - 1


async def test_an_owner_stops_before_its_lease_ends_when_redis_is_gone(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Worker(broker, "worker-1")

    async def away(*_: object) -> list[int]:
        raise BrokerUnavailable("gone")

    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
        monkeypatch.setattr(broker, "hold_leases", away)
        seconds = await until(lambda: not one.held, 8)
    assert seconds < keys.LEASE_TTL_MS / 1000


class Slow:
    """A broker to whose Redis one look takes long."""

    def __init__(self, broker: Broker) -> None:
        self.seconds = 0.0
        self._broker = broker

    def __getattr__(self, name: str) -> object:
        return getattr(self._broker, name)

    async def live_instances(self) -> object:
        seconds, self.seconds = self.seconds, 0.0
        await anyio.sleep(seconds)
        return await self._broker.live_instances()


async def test_what_is_renewed_in_the_last_moment_is_worked_on_again(broker: Broker) -> None:
    """Somebody else's shards are handed over when the others are too near their end to be worked on: with their renewal
    the lane has to hear of them again, or nobody reads them (simulator, seed 2347 of 3cb64a9)."""
    slow = Slow(broker)
    one, two = Worker(slow, "worker-1"), Worker(broker, "worker-2")  # type: ignore[arg-type]  # it passes everything on
    async with one.running():
        await until(lambda: len(one.held) == SHARDS, 3)
        slow.seconds = keys.LEASE_TTL_MS / 1000 - SAFETY_SECONDS - ROUND_SECONDS + 0.2
        async with two.running():
            await until(lambda: not one.held, 6)
            await until(lambda: one.held, 3)
            await until(lambda: len(one.held) + len(two.held) == SHARDS, 3)
