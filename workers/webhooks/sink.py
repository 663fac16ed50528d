"""Writes down which webhook is to get which event: what the events role hands over is queued before it is confirmed.

The list of webhooks is read for each batch, so one that is registered now gets the next event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET

from protocol import codec, events, keys, webhooks
from protocol.webhooks import Delivery, DeliveryStatus, EventType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from protocol.webhooks import Webhook
    from workers.store import Store


class WebhookSink:
    """A `Sink` of the events role. `news` is told which webhooks have something to send."""

    def __init__(self, store: Store, now: Callable[[], datetime], news: Callable[[Iterable[str]], None]) -> None:
        self._store = store
        self._now = now
        self._news = news

    async def take(self, batch: Sequence[events.Event]) -> None:
        """See `events.Sink`."""
        enabled = await self._store.webhooks.enabled()
        if not enabled:
            return
        agents: dict[str, str] = {}
        if any(webhook.agent_ids for webhook in enabled):
            agents = await self._store.events.agents_of({conversation_of(event) for event in batch})
        now = self._now()
        deliveries = [
            delivery_of(webhook, event, now)
            for event in batch
            for webhook in enabled
            if _is_since(event, webhook) and webhook.wants(event, agents.get(conversation_of(event), ""))
        ]
        if deliveries:
            await self._store.deliveries.queue(deliveries, place_at(now))
            self._news({delivery.webhook_id for delivery in deliveries})


def conversation_of(event: events.Event) -> str:
    """Whose order it belongs to; "" for what is about no conversation."""
    return "" if isinstance(event.data, events.WebhookDisabledEvent) else event.data.conversation_id


def _is_since(event: events.Event, webhook: Webhook) -> bool:
    """Of a message that was said when this webhook was there? What the outbox holds may be older than anybody who
    listens: a worker that has just started takes what it commits for events until it was asked."""
    if isinstance(event.data, events.WebhookDisabledEvent):
        return True
    return keys.made_at_ms(event.id) >= int(webhook.created_at.timestamp() * 1000)


def delivery_of(webhook: Webhook, event: events.Event, now: datetime) -> Delivery:
    """An event that waits for its turn."""
    is_notice = isinstance(event.data, events.WebhookDisabledEvent)
    return Delivery(
        delivery_id=webhooks.delivery_id(webhook.webhook_id, event.id),
        webhook_id=webhook.webhook_id,
        event_id=event.id,
        event_type=EventType(event.type),
        conversation_id=conversation_of(event),
        status=DeliveryStatus.PENDING,
        queued_at=now,
        event=codec.encode_value(event) if is_notice else UNSET,
    )


def place_at(now: datetime) -> int:
    """Of the first delivery of a batch: epoch microseconds, so later batches stand behind it."""
    return int(now.timestamp() * 1_000_000)
