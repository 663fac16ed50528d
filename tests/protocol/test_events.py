"""The two CloudEvents: required attributes, ids that make a repeat recognisable."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from protocol.events import (
    AgentResponseEvent,
    CloudEvent,
    MessageReceivedEvent,
    agent_response,
    message_received,
)
from protocol.models import MessageType

NOW = datetime(2026, 11, 22, 18, 0, tzinfo=UTC)
RECEIVED = MessageReceivedEvent(
    message_id="msg_1",
    idempotency_key="k",
    conversation_id="conv_1",
    sender_id="usr_a",
    receiver_id="usr_b",
    sequence_number=7,
    message_type=MessageType.TEXT,
    content="x",
    timestamp=NOW,
)
ANSWERED = AgentResponseEvent(
    idempotency_key="k2", conversation_id="conv_1", user_id="usr_a", agent_id="usr_agent", response="y", timestamp=NOW
)


def test_a_received_message_as_a_cloud_event() -> None:
    assert msgspec.json.decode(msgspec.json.encode(message_received(RECEIVED))) == {
        "specversion": "1.0",
        "id": "msg_1",
        "source": "/conversations/conv_1",
        "type": "trireme.message.received.v1",
        "subject": "msg_1",
        "time": "2026-11-22T18:00:00Z",
        "datacontenttype": "application/json",
        "data": {
            "message_id": "msg_1",
            "idempotency_key": "k",
            "conversation_id": "conv_1",
            "sender_id": "usr_a",
            "receiver_id": "usr_b",
            "sequence_number": 7,
            "message_type": "text",
            "content": "x",
            "timestamp": "2026-11-22T18:00:00Z",
        },
    }


def test_an_agents_answer_as_a_cloud_event() -> None:
    event = agent_response(ANSWERED)
    assert (event.id, event.type, event.source) == ("k2", "trireme.agent.response.v1", "/agents/usr_agent")
    assert msgspec.json.decode(msgspec.json.encode(event), type=CloudEvent[AgentResponseEvent]) == event


def test_the_same_message_makes_the_same_event() -> None:
    assert message_received(RECEIVED) == message_received(RECEIVED)
