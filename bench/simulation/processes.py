"""The processes of a world: gateways, workers and a REST instance, each the real composition on the twins.

`seams` puts the twins, the virtual clock and seeded entropy where the product reaches for sockets, time and chance; it
lasts for one run.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import anyio
import trio

import gateway.broker
import gateway.server
import gateway.settings
import gateway.subscriptions
import workers.broker
from bench.simulation.lines import TwinTransport
from bench.simulation.mongo import TwinMongo
from bench.simulation.network import Process
from bench.simulation.redis_client import TwinRedis
from bench.simulation.waiting import cheap_waiting
from bench.simulation.wire import TwinWire
from gateway.admission import PublicKeys
from protocol import dev_keys, keys, records
from workers import ingest, query
from workers.breaker import probe
from workers.instances import Instance
from workers.settings import load_settings
from workers.store import Store
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from bench.simulation.network import Network

SHARDS: Final = 2
_ENVIRONMENT: Final = {
    "TRIREME_ENV": "dev",
    "TRIREME_SHARDS": str(SHARDS),
    "TRIREME_REDIS_URL": "redis://twin",
    "TRIREME_MONGODB_URL": "mongodb://twin",
    "TRIREME_LANES": "1",
    "TRIREME_DRAIN_SECONDS": "2",
}
_GATEWAY: Final = gateway.settings.load_settings(_ENVIRONMENT)
_WORKER: Final = load_settings(_ENVIRONMENT, ["ingest", "query"])
_KEYS: Final = PublicKeys(dev_keys.PUBLIC_JWK)


@contextmanager
def seams(network: Network, rng: random.Random) -> Iterator[None]:
    """Until it ends, gateways and workers started here live in this network."""
    before = random.getstate()
    random.seed(rng.getrandbits(64))
    with (
        cheap_waiting(network),
        patch.object(time, "time_ns", lambda: network.wall_ms() * 1_000_000),
        patch.object(os, "urandom", rng.randbytes),
        patch.object(secrets, "token_hex", lambda count=16: rng.randbytes(count).hex()),
        patch.object(secrets, "randbits", rng.getrandbits),
        patch.object(gateway.broker, "Wire", TwinWire),
        patch.object(gateway.subscriptions, "Wire", TwinWire),
        patch.object(gateway.server, "open_transport", lambda _kind, host, limits, *_: TwinTransport(host, limits)),
        patch.object(gateway.server, "PublicKeys", lambda _text: _KEYS),
    ):
        try:
            yield
        finally:
            random.setstate(before)


class House:
    """All processes that were ever started in this world."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        self.network = network
        self.gateways: list[Process] = []
        self.workers: list[Process] = []
        self.rest: Process | None = None
        self.taken: list[str] = []
        """Keys of what was appended once and the stream has taken."""
        self.instance: Instance | None = None
        self._nursery = nursery
        self._doors: dict[Process, gateway.server.Gateway] = {}
        self._count = 0
        self._outside = _broker()
        """Of no process."""

    def _start(self, kind: str, main: Callable[[Process], Coroutine[Any, Any, None]]) -> Process:
        self._count += 1
        process = Process(f"{kind}-{self._count}", self.network)
        self.network.note("start", process.name)
        self._nursery.start_soon(process.run, lambda: main(process), name=process.name)
        return process

    # --- gateways ----------------------------------------------------------------------------------------------------

    def start_gateway(self) -> Process:
        """One more gateway."""
        process = self._start("gateway", self._run_gateway)
        self.gateways.append(process)
        return process

    async def _run_gateway(self, process: Process) -> None:
        door = gateway.server.Gateway(_GATEWAY)
        self._doors[process] = door
        process.stopping = trio.Event()
        listener: Any = SimpleNamespace(shutdown=lambda _how: None)
        await door.run(process.stopping, listener)

    def doors(self) -> list[TwinTransport]:
        """Where a phone may dial: every gateway that takes connections, a paused one too."""
        found = []
        for process in self.gateways:
            door = self._doors.get(process)
            transport = None if door is None or not process.alive else door.transport
            if isinstance(transport, TwinTransport) and transport.accepting:
                found.append(transport)
        return found

    def isolated_errors(self) -> int:
        """Bugs that ended one connection."""
        return sum(
            door.hub.counts.isolated_errors + door.transport.isolated_errors + door.timers.failed_jobs
            for door in self._doors.values()
        )

    # --- workers -----------------------------------------------------------------------------------------------------

    def start_worker(self) -> Process:
        """One more worker, roles ingest and query."""
        process = self._start("worker", self._run_worker)
        self.workers.append(process)
        return process

    async def _run_worker(self, process: Process) -> None:
        store, broker = _store(), _broker()
        process.stopping = anyio.Event()
        async with anyio.create_task_group() as probes:
            probes.start_soon(probe, store.breaker, store.ping, StoreUnavailable)
            probes.start_soon(probe, broker.breaker, broker.ping, workers.broker.BrokerUnavailable)
            async with anyio.create_task_group() as group:
                group.start_soon(ingest.run, _WORKER, store, broker, process.stopping)
                group.start_soon(query.run, _WORKER, store, broker, process.stopping)
            probes.cancel_scope.cancel()

    # --- REST --------------------------------------------------------------------------------------------------------

    def start_rest(self) -> Process:
        """The REST role's instance, whose commands somebody else builds."""
        self.rest = self._start("rest", self._run_rest)
        return self.rest

    async def _run_rest(self, _process: Process) -> None:
        info = records.InstanceInfo("rest", "", 0, False)
        self.instance = Instance(_broker(), "rest_1", info)
        await self.instance.run()

    async def command(self, record: records.GroupCommand) -> records.CommandOutcome | None:
        """One request to REST; None where it is not decided in time."""
        if self.instance is None:
            return None
        try:
            return await self.instance.command(keys.shard_of(record.conversation_id, SHARDS), record, 5.0)
        except workers.broker.BrokerUnavailable:
            return None

    async def append(self, record: records.SendMessage) -> None:
        """Append to the log once, from outside of all processes; what the stream takes is in `taken`."""
        with suppress(workers.broker.BrokerUnavailable):
            await self._outside.append_ingest(keys.shard_of(record.conversation_id, SHARDS), record)
            self.taken.append(record.idempotency_key)


def _store() -> Store:
    client: Any = TwinMongo()
    return Store(client, "twin", 90)


def _broker() -> workers.broker.Broker:
    client: Any = TwinRedis()
    return workers.broker.Broker(client)
