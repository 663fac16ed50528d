"""Role: every committed message that somebody listens to reaches them as a CloudEvent, whatever dies meanwhile.

The ingest role appends events to the `events` stream right after the commit; this role hands them to the sinks, which
write down what they will do, and confirms them in the outbox (`store.events`). What the stream lost, or a dead process
did not confirm, is found in the outbox and handed over again, to the stream as well: consumers tell repeats by the
event's id. The webhooks' queues are one such sink (`workers/webhooks`), and what is queued is sent from here.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import structlog

from protocol import codec, events
from workers import listeners, metrics
from workers.agents.tasks import TaskQueue, TaskSink
from workers.broker import Broker, BrokerUnavailable
from workers.egress import open_egress
from workers.store.errors import StoreUnavailable
from workers.webhooks.couriers import Couriers
from workers.webhooks.sink import WebhookSink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from workers.settings import Settings
    from workers.store import Store

BATCH: Final = 200
BLOCK_MS: Final = 1000
OVERDUE_SECONDS: Final = 10.0
"""Unconfirmed for so long after its commit, an event was lost on its way."""
SWEEP_SECONDS: Final = 5.0
UNCONFIRMED: Final = 16
"""Batches that every sink has and the outbox does not know of yet; past it the reader waits. What is lost of them is
found in the outbox and taken again."""
NOTICE_SECONDS: Final = 2.0
_PAUSE_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)


class Sink(Protocol):
    """Somebody who acts on events."""

    async def take(self, batch: Sequence[events.Event]) -> None:
        """Write down what is to be done about them; an event that came before changes nothing. Raises
        StoreUnavailable."""


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Hand events over until `stopping`. *Cancellation*: safe anywhere; what is unconfirmed comes again."""
    async with open_egress(settings.egress_allow) as egress, anyio.create_task_group() as group:
        couriers = Couriers(store, egress, settings, _now)
        sinks: list[Sink] = [TaskSink(store, TaskQueue(broker)), WebhookSink(store, _now, couriers.news)]
        group.start_soon(couriers.run, name="couriers")
        group.start_soon(follow, store, broker, sinks, name="events reader")
        group.start_soon(_sweep, store, broker, sinks, name="events sweep")
        group.start_soon(_tell, store, broker, sinks, name="events notices")
        await stopping.wait()
        group.cancel_scope.cancel()


async def hand_over(store: Store, sinks: Sequence[Sink], batch: Sequence[events.Outgoing]) -> None:
    """To every sink, then confirmed. Raises StoreUnavailable: the outbox keeps what is not confirmed."""
    for sink in sinks:
        await sink.take([item.event for item in batch])
    await store.events.confirm([item.message_id for item in batch])
    metrics.EVENTS.labels("handed_over").inc(len(batch))


async def follow(store: Store, broker: Broker, sinks: Sequence[Sink]) -> None:
    """What the stream brings, to every sink; confirmed beside, so that the next events do not wait for that write.
    Until cancelled."""
    taken, written = anyio.create_memory_object_stream[list[str]](UNCONFIRMED)
    with taken, written:
        async with anyio.create_task_group() as group:
            group.start_soon(_confirm, store, written, name="events outbox")
            await _read(broker, sinks, taken)


async def _read(broker: Broker, sinks: Sequence[Sink], taken: MemoryObjectSendStream[list[str]]) -> None:
    consumer = f"events-{secrets.token_hex(6)}"
    while True:
        try:
            entries = await broker.read_events(consumer, BATCH, BLOCK_MS)
            batch = [events.Outgoing(message_id, codec.decode_event(payload)) for message_id, payload in entries]
            if batch:
                for sink in sinks:
                    await sink.take([item.event for item in batch])
                await taken.send([item.message_id for item in batch])
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("events_wait", error=str(error)[:200])
            await anyio.sleep(_PAUSE_SECONDS)


async def _confirm(store: Store, written: MemoryObjectReceiveStream[list[str]]) -> None:
    async for message_ids in written:
        try:
            await store.events.confirm(message_ids)
            metrics.EVENTS.labels("handed_over").inc(len(message_ids))
        except StoreUnavailable as error:
            log.warning("events_unconfirmed", events=len(message_ids), error=str(error)[:200])


async def _sweep(store: Store, broker: Broker, sinks: Sequence[Sink]) -> None:
    while True:
        await anyio.sleep(SWEEP_SECONDS)
        try:
            await sweep(store, broker, sinks, _now() - timedelta(seconds=OVERDUE_SECONDS))
            await listeners.trim(broker, int(_now().timestamp() * 1000))
            metrics.EVENTS_LAG.set(max((group.lag or 0 for group in await listeners.groups(broker)), default=0))
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("events_sweep_waits", error=str(error)[:200])


async def sweep(store: Store, broker: Broker, sinks: Sequence[Sink], before: datetime) -> int:
    """Hand over what has been waiting since before; how many there were. Raises BrokerUnavailable, StoreUnavailable."""
    swept = 0
    while batch := await store.events.due(before, BATCH):
        await broker.append_events(batch)
        await hand_over(store, sinks, batch)
        metrics.EVENTS.labels("found_again").inc(len(batch))
        swept += len(batch)
        if len(batch) < BATCH:
            break
    return swept


async def _tell(store: Store, broker: Broker, sinks: Sequence[Sink]) -> None:
    while True:
        await anyio.sleep(NOTICE_SECONDS)
        try:
            await tell(store, broker, sinks)
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("events_notices_wait", error=str(error)[:200])


async def tell(store: Store, broker: Broker, sinks: Sequence[Sink]) -> None:
    """Of webhooks that were disabled: to the sinks, and to the stream. Raises BrokerUnavailable, StoreUnavailable: the
    notices stay due."""
    for notice in await store.webhooks.notices():
        webhook = notice.webhook
        data = events.WebhookDisabledEvent(
            webhook_id=webhook.webhook_id,
            app=webhook.app,
            url=webhook.url,
            reason="" if webhook.status_reason is None else webhook.status_reason.value,
            failing_since=webhook.failing_since,
            timestamp=notice.due,
        )
        event = events.webhook_disabled(data)
        for sink in sinks:
            await sink.take([event])
        await broker.append_events([events.Outgoing("", event)])
        await store.webhooks.told(notice)
        metrics.EVENTS.labels("handed_over").inc()


def _now() -> datetime:
    """The one place where this role reads the clock."""
    return datetime.now(UTC)
