"""The seed's two events as CloudEvents 1.0 (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md), and
how they lie in an HTTP request (http-protocol-binding.md beside it).

Written by the workers onto the `events` stream, read by agents, webhooks and apps.
"""

from __future__ import annotations

from datetime import datetime
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec

from protocol.models import MessageType


class MessageReceivedEvent(msgspec.Struct, kw_only=True, frozen=True):
    """Data of `trireme.message.received.v1`."""

    message_id: str
    idempotency_key: str
    conversation_id: str
    sender_id: str
    receiver_id: str
    sequence_number: int
    message_type: MessageType
    content: str
    timestamp: datetime


class AgentResponseEvent(msgspec.Struct, kw_only=True, frozen=True):
    """Data of `trireme.agent.response.v1`."""

    idempotency_key: str
    conversation_id: str
    user_id: str
    agent_id: str
    response: str
    timestamp: datetime


class WebhookDisabledEvent(msgspec.Struct, kw_only=True, frozen=True):
    """Data of `trireme.webhook.disabled.v1`: a webhook gets nothing any more. `reason`: see `webhooks.Reason`."""

    webhook_id: str
    app: str
    url: str
    reason: str
    failing_since: datetime | None
    timestamp: datetime


class WebhookTestEvent(msgspec.Struct, kw_only=True, frozen=True):
    """Data of `trireme.webhook.test.v1`: somebody wants to see whether the webhook takes it. Never on the stream."""

    webhook_id: str
    timestamp: datetime


Data = TypeVar("Data", MessageReceivedEvent, AgentResponseEvent, WebhookDisabledEvent, WebhookTestEvent)


class CloudEvent(msgspec.Struct, Generic[Data], kw_only=True, frozen=True):
    """The structured-mode envelope: required attributes first, then the ones we always set."""

    id: str
    source: str
    type: str
    specversion: str = "1.0"
    time: datetime
    subject: str
    datacontenttype: str = "application/json"
    data: Data


Event = CloudEvent[MessageReceivedEvent] | CloudEvent[AgentResponseEvent] | CloudEvent[WebhookDisabledEvent]

Sendable = Event | CloudEvent[WebhookTestEvent]
"""What a webhook may be sent."""


class Outgoing(NamedTuple):
    """An event and the message that it is about, whose outbox entry is to be confirmed."""

    message_id: str
    event: Event


MESSAGE_RECEIVED = "trireme.message.received.v1"
AGENT_RESPONSE = "trireme.agent.response.v1"
WEBHOOK_DISABLED = "trireme.webhook.disabled.v1"
WEBHOOK_TEST = "trireme.webhook.test.v1"

STRUCTURED_TYPE = "application/cloudevents+json"
BINARY_TYPE = "application/json"


def message_received(data: MessageReceivedEvent) -> CloudEvent[MessageReceivedEvent]:
    """The event of one committed message; its id is the message id, so a repeat is recognised."""
    return CloudEvent(
        id=data.message_id,
        source=f"/conversations/{data.conversation_id}",
        type=MESSAGE_RECEIVED,
        time=data.timestamp,
        subject=data.message_id,
        data=data,
    )


def agent_response(message_id: str, data: AgentResponseEvent) -> CloudEvent[AgentResponseEvent]:
    """The event of one agent answer; its id is the message id: an agent may use a key in several conversations."""
    return CloudEvent(
        id=message_id,
        source=f"/agents/{data.agent_id}",
        type=AGENT_RESPONSE,
        time=data.timestamp,
        subject=data.conversation_id,
        data=data,
    )


def webhook_disabled(data: WebhookDisabledEvent) -> CloudEvent[WebhookDisabledEvent]:
    """The notice of one webhook that was disabled; its id says which time, so a repeat is recognised."""
    return CloudEvent(
        id=f"{data.webhook_id}.{int(data.timestamp.timestamp() * 1000)}",
        source=f"/webhooks/{data.webhook_id}",
        type=WEBHOOK_DISABLED,
        time=data.timestamp,
        subject=data.webhook_id,
        data=data,
    )


def webhook_test(event_id: str, data: WebhookTestEvent) -> CloudEvent[WebhookTestEvent]:
    """The event of one test."""
    return CloudEvent(
        id=event_id,
        source=f"/webhooks/{data.webhook_id}",
        type=WEBHOOK_TEST,
        time=data.timestamp,
        subject=data.webhook_id,
        data=data,
    )


def binary_headers(event: Sendable) -> dict[str, str]:
    """Binary mode: the attributes as headers; the body is the data alone, as `BINARY_TYPE`."""
    time = event.time.isoformat().replace("+00:00", "Z")
    attributes = {
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "specversion": event.specversion,
        "time": time,
        "subject": event.subject,
    }
    return {f"ce-{name}": quote(value, safe=_UNQUOTED) for name, value in attributes.items()}


_UNQUOTED = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
"""The binding, section 3.1.3.2: all but these and what is not printable ASCII goes as it is."""


def event_of(message: MessageReceivedEvent, agent_id: str, user_id: str) -> Event:
    """What a committed message of a conversation is to those who listen: an agent's answer, or a message received.

    `agent_id` is the conversation's agent, "" for none; `user_id` whose conversation with the agent it is.
    """
    if not agent_id or message.sender_id != agent_id:
        return message_received(message)
    return agent_response(
        message.message_id,
        AgentResponseEvent(
            idempotency_key=message.idempotency_key,
            conversation_id=message.conversation_id,
            user_id=user_id,
            agent_id=agent_id,
            response=message.content,
            timestamp=message.timestamp,
        ),
    )
