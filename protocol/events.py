"""The seed's two events as CloudEvents 1.0 (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md).

Written by the workers onto the `events` stream, read by agents and webhooks.
"""

from __future__ import annotations

from datetime import datetime
from typing import Generic, TypeVar

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


Data = TypeVar("Data", MessageReceivedEvent, AgentResponseEvent)


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


MESSAGE_RECEIVED = "trireme.message.received.v1"
AGENT_RESPONSE = "trireme.agent.response.v1"


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


def agent_response(data: AgentResponseEvent) -> CloudEvent[AgentResponseEvent]:
    """The event of one agent answer; its id is the answer's idempotency key."""
    return CloudEvent(
        id=data.idempotency_key,
        source=f"/agents/{data.agent_id}",
        type=AGENT_RESPONSE,
        time=data.timestamp,
        subject=data.conversation_id,
        data=data,
    )
