"""Apps that listen by HTTP: a webhook, what it wants to hear, and what became of each event that it was sent.

Stored by the workers, shown by the HTTP API. Rules without a clock: who wants which event, how a request is signed, and
when the next try is due.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol import events
from protocol.models import Id

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT: Final = 100
"""Webhooks of one installation: each is asked about every event, and has connections of its own."""
SECRET_PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32
"""Standard Webhooks 1.0 asks for 24 to 64."""
OVERLAP: Final = timedelta(hours=24)
"""So long after a rotation requests are signed with the secret before, too."""

Url = Annotated[str, Meta(min_length=1, max_length=2048)]
App = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z")]
"""Whose webhook it is, in the administrator's own words."""
Ids = Annotated[list[Id], Meta(max_length=100)]


class EventType(StrEnum):
    """What a webhook may ask for."""

    MESSAGE_RECEIVED = events.MESSAGE_RECEIVED
    AGENT_RESPONSE = events.AGENT_RESPONSE
    WEBHOOK_DISABLED = events.WEBHOOK_DISABLED


DEFAULT_TYPES: Final = (EventType.MESSAGE_RECEIVED, EventType.AGENT_RESPONSE)
"""What a webhook hears that names none: every message."""
Types = Annotated[list[EventType], Meta(max_length=len(EventType))]


class Mode(StrEnum):
    """How an event lies in its request (CloudEvents HTTP binding): whole in the body, or attributes in headers."""

    STRUCTURED = "structured"
    BINARY = "binary"


class WebhookStatus(StrEnum):
    ENABLED = "enabled"
    DISABLED = "disabled"


class Reason(StrEnum):
    """Why a webhook is disabled: by the administrator; it failed for too long; it answered 410; too much waits."""

    BY_HAND = "by_hand"
    FAILED = "failed"
    GONE = "gone"
    BACKLOG = "backlog"


class Span(msgspec.Struct, kw_only=True, frozen=True):
    """Messages of `since` and later, and before `until`, that are being sent again. `after`: those up to this id are
    in the queue."""

    since: datetime
    until: datetime
    after: str = ""


class Webhook(msgspec.Struct, kw_only=True, frozen=True):
    """One webhook. Empty lists let everything through; `agent_ids`: what is said by these agents, to them, and in
    their conversations.

    `failures`: deliveries in a row that came to nothing, the first of them at `failing_since`. `old_secret_until`: when
    the secret before the last rotation stops signing. `replay`: what is being sent again.
    """

    webhook_id: str = msgspec.field(name="_id")
    app: str
    url: str
    mode: Mode
    types: list[EventType]
    conversation_ids: list[str]
    agent_ids: list[str]
    status: WebhookStatus
    status_reason: Reason | None = None
    disabled_at: datetime | None = None
    failures: int = 0
    failing_since: datetime | None = None
    old_secret_until: datetime | None = None
    replay: Span | None = None
    created_at: datetime
    updated_at: datetime

    def wants(self, event: events.Event, agent_id: str) -> bool:
        """Is this event for it? `agent_id`: the agent of the event's conversation, "" for none."""
        if event.type not in (self.types or DEFAULT_TYPES):
            return False
        if isinstance(event.data, events.WebhookDisabledEvent):
            return event.data.webhook_id != self.webhook_id
        if self.conversation_ids and event.data.conversation_id not in self.conversation_ids:
            return False
        return not self.agent_ids or not {agent_id, *_people(event.data)}.isdisjoint(self.agent_ids)


def _people(data: events.MessageReceivedEvent | events.AgentResponseEvent) -> tuple[str, ...]:
    """Who speaks to whom: an agent may be one of a pair."""
    if isinstance(data, events.AgentResponseEvent):
        return (data.agent_id,)
    return (data.sender_id, data.receiver_id)


class DeliveryStatus(StrEnum):
    """pending: waits for its turn. failed: a dead letter, tried again later where `next_try_at` is set."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Delivery(msgspec.Struct, kw_only=True, frozen=True):
    """One event for one webhook, without what it says: that is read from its message when it is sent.

    `last_status`: of the last answer, null where there was none. `tries` counts requests since it was queued.
    """

    delivery_id: str = msgspec.field(name="_id")
    webhook_id: str
    event_id: str
    event_type: EventType
    conversation_id: str
    status: DeliveryStatus
    tries: int = 0
    last_status: int | None = None
    last_error: str | None = None
    last_try_at: datetime | None = None
    next_try_at: datetime | None = None
    delivered_at: datetime | None = None
    queued_at: datetime
    event: bytes | UnsetType = UNSET
    """An event that is no message's, encoded. Never shown."""


def delivery_id(webhook_id: str, event_id: str) -> str:
    """One per webhook and event, however often that event comes by."""
    return f"{webhook_id}:{event_id}"


# --- signatures (Standard Webhooks 1.0, symmetric) -------------------------------------------------------------------


def secret_of(key: bytes) -> str:
    """A key as its owner is shown it."""
    return SECRET_PREFIX + base64.b64encode(key).decode()


def key_of(secret: str) -> bytes:
    """The key of a secret. Raises ValueError."""
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)


def signature(keys: Sequence[bytes], message_id: str, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 over `id.timestamp.body`, Base64, with its version: one for each key, separated by spaces."""
    signed = b".".join((message_id.encode(), timestamp.encode(), body))
    return " ".join("v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys)


def signed_headers(keys: Sequence[bytes], message_id: str, seconds: int, body: bytes) -> dict[str, str]:
    """The three headers of a request that is made at `seconds` (epoch)."""
    timestamp = str(seconds)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": signature(keys, message_id, timestamp, body),
    }


# --- tries (reliability.md section 11, "HTTP to agents and webhooks") ------------------------------------------------

TRIES: Final = 3
FIRST_RETRY_SECONDS: Final = 0.2
LONGEST_RETRY_SECONDS: Final = 10.0
JITTER: Final = 0.2
FAILURES_TO_OPEN: Final = 3
OPEN_SECONDS: Final = 60.0
TRANSIENT: Final = frozenset((429, 500, 502, 503, 504))
"""Answers that another try may mend."""
FIRST_SLOW_SECONDS: Final = 60.0
LONGEST_SLOW_SECONDS: Final = 6 * 3600.0
SLOW_RETRIES_FOR: Final = timedelta(days=5)
"""A dead letter is tried again 1, 2, 4 … minutes, later 6 hours apart, for five days."""


def quick_retry_seconds(tries: int) -> float:
    """Between two of the first tries, after so many; before jitter."""
    return float(min(FIRST_RETRY_SECONDS * 2 ** (tries - 1), LONGEST_RETRY_SECONDS))


def slow_retry_at(delivery: Delivery, tries: int, now: datetime) -> datetime | None:
    """When a dead letter that was tried so often is tried again; None: no more."""
    seconds = min(FIRST_SLOW_SECONDS * 2.0 ** min(max(tries - TRIES, 0), 16), LONGEST_SLOW_SECONDS)
    at = now + timedelta(seconds=seconds)
    return at if at <= delivery.queued_at + SLOW_RETRIES_FOR else None
