"""The seed's two events as CloudEvents 1.0 (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md).

Written by the workers onto the `events` stream, read by agents and webhooks.
"""

from __future__ import annotations

from datetime import datetime
from typing import Generic, NamedTuple, TypeVar

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


Event = CloudEvent[MessageReceivedEvent] | CloudEvent[AgentResponseEvent]


class Outgoing(NamedTuple):
    """An event and the message that it is about, whose outbox entry is to be confirmed."""

    message_id: str
    event: Event


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
