"""The same scenario on a real server and on its twin."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import anyio
import pymongo
import redis
import trio

from bench.simulation.mongo import SET, TwinMongo
from bench.simulation.network import Clock, Network, make_deterministic
from bench.simulation.redis_client import TwinRedis
from bench.simulation.replica_set import ReplicaSet
from bench.simulation.valkey import SERVER, Valkey
from bench.simulation.wire import TwinWire
from gateway.wire import Address, Wire
from workers.broker import Broker, open_broker
from workers.store import Store, open_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def in_world(main: Callable[[], Awaitable[None]]) -> None:
    """Run in a world of its own: virtual time, a Valkey and a replica set without faults."""
    clock = Clock()
    network = Network(clock, random.Random(1))
    network.slow = 0.0
    make_deterministic(random.Random(2))

    async def run() -> None:
        SERVER.set(Valkey(network))
        SET.set(ReplicaSet(network))
        network.join()
        try:
            await main()
        finally:
            network.leave()
        assert network.crashes == []

    trio.run(run, clock=clock)


def twin_broker() -> Broker:
    """A broker on the Valkey of this world."""
    client: Any = TwinRedis()
    return Broker(client)


def twin_store() -> Store:
    """A store on the replica set of this world."""
    client: Any = TwinMongo()
    return Store(client, "twin", 90)


class Twins:
    """Runs scenarios on twins."""

    def broker(self, scenario: Callable[[Broker], Awaitable[None]]) -> None:
        in_world(lambda: scenario(twin_broker()))

    def wire(self, scenario: Callable[[Wire], Awaitable[None]], **options: Any) -> None:
        in_world(lambda: _with_wire(TwinWire(Address.parse("redis://twin"), "test", **_OPTIONS, **options), scenario))

    def store(self, scenario: Callable[[Store], Awaitable[None]]) -> None:
        in_world(lambda: scenario(twin_store()))


class Servers:
    """Runs scenarios on real servers."""

    def __init__(self, redis_url: str, mongodb_url: str) -> None:
        self._redis_url = redis_url
        self._mongodb_url = mongodb_url

    def broker(self, scenario: Callable[[Broker], Awaitable[None]]) -> None:
        async def run() -> None:
            async with open_broker(self._redis_url) as broker:
                await scenario(broker)

        anyio.run(run)

    def wire(self, scenario: Callable[[Wire], Awaitable[None]], **options: Any) -> None:
        trio.run(_with_wire, Wire(Address.parse(self._redis_url), "test", **_OPTIONS, **options), scenario)

    def store(self, scenario: Callable[[Store], Awaitable[None]]) -> None:
        async def run() -> None:
            async with open_store(self._mongodb_url) as store:
                await scenario(store)

        anyio.run(run)

    def flush(self) -> None:
        """Somebody empties Redis."""
        with redis.Redis.from_url(self._redis_url) as client:
            client.flushall()

    def documents(self, collection: str) -> list[dict[str, Any]]:
        """All there is in a collection."""
        with pymongo.MongoClient[dict[str, Any]](self._mongodb_url, tz_aware=True) as client:
            return list(client.get_default_database()[collection].find({}))


_OPTIONS: dict[str, Any] = {"max_outstanding": 100, "deadline_seconds": 2.0}


async def _with_wire(wire: Wire, scenario: Callable[[Wire], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.run)
        with trio.fail_after(5):
            await wire.wait_connected()
        await scenario(wire)
        nursery.cancel_scope.cancel()
