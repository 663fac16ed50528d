"""Role: own shards and run their lanes. Composition only; one message's way goes through `consumer.py`.

`consumer` (stream loop) → `plan` (authorise, dedupe, sequence) → `commit` (persist) → `delivery` (who, where) →
`consumer` (publish, acknowledge).
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import anyio
import structlog

from workers import janitor, metrics, presence
from workers.broker import Broker, BrokerUnavailable
from workers.consumer import Lane
from workers.delivery import Registry
from workers.interest import Interest
from workers.lease import Leases, worker_info

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store import Store

INSTANCE_SECONDS = 2.5
"""How often the liveness lease (10 s) is renewed."""

log = structlog.get_logger()


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Own a share of the shards until `stopping`; then finish what was read, flush, and release the leases."""
    worker_id = f"worker-{secrets.token_hex(6)}"
    registry = Registry(broker)
    interest, trial = Interest(listened=True), anyio.Lock()
    lanes = [
        Lane(
            store,
            broker,
            registry,
            settings.batch,
            settings.shards,
            settings.edit_seconds,
            interest,
            worker_id,
            trial,
            settings.conversations,
            round(settings.push_after_seconds * 1000),
        )
        for _ in range(settings.lanes)
    ]

    for number, lane in enumerate(lanes):
        _show(number, lane)
    metrics.REGISTRY_USERS.set_function(lambda: registry.known)

    def share(held: frozenset[int]) -> None:
        metrics.SHARDS_HELD.set(len(held))
        for index, lane in enumerate(lanes):
            lane.set_shards(frozenset(shard for shard in held if shard % len(lanes) == index))

    leases = Leases(broker, worker_id, settings.shards, share)
    for lane in lanes:
        lane.may_read = lambda: leases.is_current
    async with anyio.create_task_group() as upkeep:
        upkeep.start_soon(registry.run, name="registry")
        upkeep.start_soon(presence.keep, store, broker, name="presence")
        upkeep.start_soon(_stay_listed, broker, worker_id, name="instance lease")
        upkeep.start_soon(leases.run, name="shard leases")
        upkeep.start_soon(interest.run, store, broker, name="interest")
        upkeep.start_soon(janitor.run, store, name="janitor")
        async with anyio.create_task_group() as group:
            for index, lane in enumerate(lanes):
                group.start_soon(lane.run, stopping, name=f"lane {index}")
        upkeep.cancel_scope.cancel()
    await leases.release()
    try:
        await broker.remove_instance(worker_id)
    except BrokerUnavailable as error:
        log.warning("instance_not_removed", error=str(error))


def _show(number: int, lane: Lane) -> None:
    """Let whoever asks for metrics see what a lane holds."""
    metrics.LANE_QUEUED.labels(str(number)).set_function(lambda: lane.queued)
    metrics.LANE_MARKS.labels(str(number)).set_function(lambda: lane.marks_waiting)
    metrics.LANE_KEYS.labels(str(number)).set_function(lambda: lane.keys_waiting)
    metrics.LANE_CONVERSATIONS.labels(str(number)).set_function(lambda: lane.conversations_held)


async def _stay_listed(broker: Broker, worker_id: str) -> None:
    while True:
        try:
            await broker.renew_instance(worker_id, worker_info("", 0, draining=False))
        except BrokerUnavailable as error:
            log.warning("instance_not_renewed", error=str(error))
        await anyio.sleep(INSTANCE_SECONDS)
