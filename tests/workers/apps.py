"""An app with a webhook, for the tests of the events role: a conversation, what is said there, and who is sent it."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import standardwebhooks
from cloudevents.core.bindings.http import HTTPMessage, from_http_event

from protocol import keys
from protocol.webhooks import Delivery, DeliveryStatus, Mode, Webhook, WebhookStatus, secret_of
from tests.workers.lanes import eventually
from tests.workers.seeding import Log
from workers.egress import open_egress
from workers.webhooks.couriers import Couriers
from workers.webhooks.sink import WebhookSink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.workers.receiver import Receiver, Request
    from workers.settings import Settings
    from workers.store import Store

LATER = timedelta(minutes=1)
FIRST = datetime.fromtimestamp(0, UTC)
"""Older than the ids of `seeding.Log`."""


def now() -> datetime:
    return datetime.now(UTC)


class App:
    """One webhook and its key."""

    def __init__(self, store: Store, webhook: Webhook, key: bytes) -> None:
        self.store = store
        self.webhook_id = webhook.webhook_id
        self.key = key

    async def stored(self) -> Webhook:
        webhook = await self.store.webhooks.get(self.webhook_id)
        assert webhook is not None
        return webhook

    async def deliveries(self, status: DeliveryStatus | None = None) -> list[Delivery]:
        """Oldest first."""
        page, _ = await self.store.deliveries.page(self.webhook_id, status, None, 1000)
        return sorted(page, key=lambda delivery: delivery.event_id)

    async def has(self, count: int, status: DeliveryStatus) -> bool:
        return len(await self.deliveries(status)) == count

    async def until(self, count: int, status: DeliveryStatus, seconds: float = 8.0) -> list[Delivery]:
        """Wait until there are so many with this status."""
        await eventually(lambda: self.has(count, status), seconds)
        return await self.deliveries(status)


async def open_app(store: Store, url: str, **fields: Any) -> App:
    """A webhook of this URL."""
    key = secrets.token_bytes(32)
    webhook = Webhook(
        webhook_id=keys.new_id("whk", int(now().timestamp() * 1000), secrets.randbits(64)),
        app="crm",
        url=url,
        mode=fields.pop("mode", Mode.STRUCTURED),
        types=fields.pop("types", []),
        conversation_ids=fields.pop("conversation_ids", []),
        agent_ids=fields.pop("agent_ids", []),
        status=WebhookStatus.ENABLED,
        created_at=fields.pop("created_at", FIRST),
        updated_at=now(),
        **fields,
    )
    assert await store.webhooks.create(webhook, key)
    return App(store, webhook, key)


@asynccontextmanager
async def couriers(store: Store, settings: Settings, **changes: Any) -> AsyncIterator[Couriers]:
    """What sends, at work; cut off at the end, as by kill -9 but for the leases."""
    settings = msgspec.structs.replace(settings, **changes)
    async with open_egress(settings.egress_allow) as egress, anyio.create_task_group() as group:
        running = Couriers(store, egress, settings, now)
        group.start_soon(running.run)
        yield running
        group.cancel_scope.cancel()


class Talk:
    """A conversation whose messages are queued for who wants them."""

    def __init__(self, store: Store, name: str = "conv_1") -> None:
        self.store = store
        self.log = Log(store, name, ["ann", "bob"])
        self.sink = WebhookSink(store, now, lambda _: None)
        self._said = 0

    async def open(self) -> Talk:
        await self.log.create()
        return self

    async def say(self, *contents: str) -> list[str]:
        """Append messages; their ids. They are events that were handed over."""
        before = await self.ids()
        for content in contents:
            await self.log.append("ann", content=content)
        fresh = [message_id for message_id in await self.ids() if message_id not in before]
        await self.hand_over(fresh)
        return fresh

    async def hand_over(self, message_ids: Sequence[str]) -> None:
        said = await self.store.events.of_messages(message_ids)
        await self.sink.take([said[message_id] for message_id in message_ids])

    async def ids(self) -> list[str]:
        found = self.store.db["messages"].find({"conversation_id": self.log.conversation_id})
        return [document["_id"] async for document in found.sort("sequence_number", 1)]


def verified(request: Request, key: bytes) -> Any:
    """The event in a request that the Standard Webhooks library has verified, as the CloudEvents SDK reads it."""
    standardwebhooks.Webhook(secret_of(key)).verify(request.body, request.headers)
    return from_http_event(HTTPMessage(request.headers, request.body))


def heard(receiver: Receiver, app: App) -> list[str]:
    """Ids of what came, in order, every signature verified."""
    return [verified(request, app.key).get_id() for request in receiver.requests]
