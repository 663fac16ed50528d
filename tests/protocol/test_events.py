"""The two CloudEvents: required attributes, ids that make a repeat recognisable."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_binary_event, from_structured_event

from protocol import codec
from protocol.events import (
    AgentResponseEvent,
    CloudEvent,
    MessageReceivedEvent,
    WebhookDisabledEvent,
    agent_response,
    binary_headers,
    event_of,
    message_received,
    webhook_disabled,
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
    event = agent_response("msg_2", ANSWERED)
    assert (event.id, event.type, event.source) == ("msg_2", "trireme.agent.response.v1", "/agents/usr_agent")
    assert msgspec.json.decode(msgspec.json.encode(event), type=CloudEvent[AgentResponseEvent]) == event


def test_the_same_message_makes_the_same_event() -> None:
    assert message_received(RECEIVED) == message_received(RECEIVED)


def test_an_agents_message_is_an_answer_and_everybody_elses_was_received() -> None:
    by_agent = msgspec.structs.replace(RECEIVED, sender_id="usr_agent")
    assert event_of(RECEIVED, "usr_agent", "usr_a").type == "trireme.message.received.v1"
    assert event_of(by_agent, "", "usr_a").type == "trireme.message.received.v1"
    answer = event_of(by_agent, "usr_agent", "usr_a")
    assert isinstance(answer.data, AgentResponseEvent)
    assert (answer.id, answer.data.response, answer.data.user_id) == ("msg_1", "x", "usr_a")


DISABLED = WebhookDisabledEvent(
    webhook_id="whk_1", app="crm", url="https://h.example/", reason="gone", failing_since=None, timestamp=NOW
)
ALL = (message_received(RECEIVED), agent_response("msg_2", ANSWERED), webhook_disabled(DISABLED))


def test_the_official_sdk_reads_them_in_structured_mode_and_so_do_we() -> None:
    for event in ALL:
        body = codec.encode_value(event)
        read = from_structured_event(HTTPMessage({"content-type": "application/cloudevents+json"}, body))
        assert (read.get_id(), read.get_type(), read.get_source()) == (event.id, event.type, event.source)
        assert (read.get_specversion(), read.get_time()) == ("1.0", NOW)
        assert read.get_data() == msgspec.to_builtins(event.data)
        assert codec.decode_event(body) == event
    for garbage in (b"", b"{}", b'{"type":"other"}', b'{"type":"trireme.message.received.v1"}'):
        with pytest.raises(msgspec.DecodeError):
            codec.decode_event(garbage)


def test_the_official_sdk_reads_them_in_binary_mode() -> None:
    for event in ALL:
        headers = {**binary_headers(event), "content-type": "application/json"}
        read = from_binary_event(HTTPMessage(headers, codec.encode_value(event.data)))
        assert (read.get_id(), read.get_type(), read.get_source()) == (event.id, event.type, event.source)
        assert (read.get_specversion(), read.get_time(), read.get_subject()) == ("1.0", NOW, event.subject)
        assert read.get_data() == msgspec.to_builtins(event.data)


@pytest.mark.parametrize("odd", ["a b", 'say "hi"', "50%", "zwölf", "€😀", "x\r\nX-Evil: 1", "\x00"])
def test_whatever_an_attribute_says_it_is_one_ascii_header_that_the_sdk_reads_back(odd: str) -> None:
    event = msgspec.structs.replace(ALL[0], subject=odd)
    headers = binary_headers(event)
    assert all(0x21 <= ord(character) <= 0x7E for value in headers.values() for character in value)
    read = from_binary_event(HTTPMessage({**headers, "content-type": "application/json"}, b"{}"))
    assert read.get_subject() == odd
