"""The AsyncAPI document against the frames: what it says is what the codecs take and send, and nothing is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from protocol import codec, frames, specification
from protocol.backlog import State
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode, RemoteProtocolError
from protocol.session import TRANSITIONS

DOCUMENT = specification.asyncapi()
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]
AUTH = {"user_id": "u", "auth_token": "t", "device_id": "d", "platform": "p", "app_version": "1"}
SEND = {"conversation_id": "c", "content": "x", "type": "text", "timestamp": 1}
CHANGE = {"idempotency_key": "k", "conversation_id": "c", "message_id": "m"}


def kind_of(name: str) -> type[frames.Frame]:
    found: type[frames.Frame] = getattr(frames, name)
    return found


def is_valid(frame: dict[str, Any], name: str) -> bool:
    """What JSON Schema says, with the document around the frame's schema."""
    schema = {**MESSAGES[name]["payload"], "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft7Validator(schema).is_valid(frame)


def test_every_frame_is_a_message_of_its_direction() -> None:
    for operation, kinds in (
        ("receive", specification.CLIENT_FRAMES),
        ("send", specification.SERVER_FRAMES),
    ):
        listed = [reference["$ref"] for reference in DOCUMENT["operations"][operation]["messages"]]
        assert listed == [f"#/channels/connection/messages/{kind.__name__}" for kind in kinds]
        assert DOCUMENT["operations"][operation]["action"] == operation
    assert MESSAGES.keys() == {kind.__name__ for kind in (*specification.CLIENT_FRAMES, *specification.SERVER_FRAMES)}
    assert {message["name"] for message in MESSAGES.values()} >= frames.CLIENT_TAGS
    assert [name for name, message in MESSAGES.items() if message["name"] == "typing"] == ["Typing", "TypingNotice"]


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)))
    assert len(references) > 50
    for reference in references:
        found: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert found


def test_every_frame_has_words() -> None:
    assert [name for name, message in MESSAGES.items() if not message.get("description")] == []


def test_the_channel_names_both_subprotocols() -> None:
    channel = DOCUMENT["channels"]["connection"]
    assert channel["address"] == "/v1/ws"
    assert channel["x-subprotocols"].keys() == codec.FRAME_CODECS.keys()
    offered = channel["bindings"]["ws"]["headers"]["properties"]["Sec-WebSocket-Protocol"]["enum"]
    assert set(offered) == codec.FRAME_CODECS.keys()


def test_every_code_is_in_the_document_with_its_advice() -> None:
    assert DOCUMENT["x-error-codes"] == {
        code.value: {"retryable": code.retryable, "httpStatus": code.http_status} for code in ErrorCode
    }
    assert DOCUMENT["x-auth-error-codes"] == list(AuthErrorCode)
    assert DOCUMENT["x-close-codes"]["1012"] == {"reason": "restart", "reconnect": "jittered"}
    assert len(DOCUMENT["x-close-codes"]) == len(CloseCode)


def test_every_client_frame_says_how_it_may_be_refused() -> None:
    assert frames.REFUSALS.keys() == set(specification.CLIENT_FRAMES)
    for kind in specification.CLIENT_FRAMES:
        assert MESSAGES[kind.__name__]["x-errors"] == [code for code in ErrorCode if code in frames.REFUSALS[kind]]
        assert ErrorCode.VALIDATION_FAILED in frames.REFUSALS[kind]


def test_only_what_looks_something_up_or_writes_can_meet_a_service_that_is_away() -> None:
    """The frames that leave the gateway and are answered."""
    away = {kind for kind, codes in frames.REFUSALS.items() if ErrorCode.STORAGE_UNAVAILABLE in codes}
    assert away == {
        frames.Message,
        frames.MessageEdit,
        frames.MessageDelete,
        frames.MessageReaction,
        frames.Retransmit,
        frames.History,
    }
    assert away < TRANSITIONS[State.LIVE].keys()


REFUSING = {
    "workers/changes.py": (frames.MessageEdit, frames.MessageDelete, frames.MessageReaction),
    "workers/plan.py": (frames.Message,),
    "workers/query.py": (frames.Retransmit, frames.History),
    "gateway/broker.py": (frames.Message,),
    "protocol/limits.py": (frames.Message, frames.MessageEdit),
}
"""Where else clients' frames are refused, and whose."""
CODE = re.compile(r"\bErrorCode\.([A-Z_]+)")


@pytest.mark.parametrize("path", REFUSING)
def test_what_is_refused_elsewhere_is_in_the_table(path: str) -> None:
    named = {ErrorCode[name] for name in CODE.findall((Path(specification.__file__).parents[1] / path).read_text())}
    assert named
    for code in named:
        assert any(code in frames.REFUSALS[kind] for kind in REFUSING[path]), code


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("Auth", {"type": "auth", "payload": {**AUTH, "resume": {"c": 4}}}),
    ("Message", {"type": "message", "idempotency_key": "k", "payload": SEND}),
    ("Message", {"type": "message", "client_message_id": None, "idempotency_key": "k" * 128, "payload": SEND}),
    ("DeliveryAck", {"type": "delivery_ack", "message_id": "m", "timestamp": 0}),
    ("ReadReceipt", {"type": "read_receipt", "message_ids": ["m"] * 500, "timestamp": 1}),
    ("Retransmit", {"type": "retransmit", "conversation_id": "c", "from_sequence": 1, "to_sequence": 2**53}),
    ("Sync", {"type": "sync", "payload": {}}),
    ("History", {"type": "history", "payload": {"conversation_id": "c", "before_sequence": 1, "limit": 100}}),
    ("MessageEdit", {"type": "message_edit", "payload": {**CHANGE, "content": ""}}),
    ("MessageReaction", {"type": "reaction", "payload": {**CHANGE, "emoji": "🚣", "op": "add"}}),
    ("Typing", {"type": "typing", "payload": {"conversation_id": "c", "state": "stop"}}),
    ("PresenceSubscribe", {"type": "presence_subscribe", "payload": {"user_ids": []}}),
    ("Goodbye", {"type": "goodbye", "unknown": [1]}),
]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("Auth", {"type": "auth", "payload": {**AUTH, "device_id": "a b"}}),
    ("Auth", {"type": "auth", "payload": {**AUTH, "device_id": "d\n"}}),
    ("Auth", {"type": "auth", "payload": {**AUTH, "resume": {"": 4}}}),
    ("Auth", {"type": "auth", "payload": {**AUTH, "resume": {"c": -1}}}),
    ("Message", {"type": "message", "payload": SEND}),
    ("Message", {"type": "message", "idempotency_key": "k" * 129, "payload": SEND}),
    ("Message", {"type": "message", "idempotency_key": "k", "payload": {**SEND, "type": "party"}}),
    ("DeliveryAck", {"type": "delivery_ack", "message_id": "", "timestamp": 0}),
    ("ReadReceipt", {"type": "read_receipt", "message_ids": ["m"] * 501, "timestamp": 1}),
    ("Retransmit", {"type": "retransmit", "conversation_id": "c", "from_sequence": 0, "to_sequence": 1}),
    ("Retransmit", {"type": "retransmit", "conversation_id": "c", "from_sequence": 1, "to_sequence": 2**53 + 1}),
    ("History", {"type": "history", "payload": {"conversation_id": "c", "before_sequence": 1, "limit": 101}}),
    ("MessageReaction", {"type": "reaction", "payload": {**CHANGE, "emoji": "\x00", "op": "add"}}),
    ("Typing", {"type": "typing", "payload": {"conversation_id": "c", "state": "maybe"}}),
]


@pytest.mark.parametrize(("name", "frame"), GOOD)
def test_what_the_document_takes_the_codecs_take(name: str, frame: dict[str, Any]) -> None:
    assert is_valid(frame, name)
    assert type(codec.JSON.decode(msgspec.json.encode(frame))) is kind_of(name)
    assert type(codec.MSGPACK.decode(msgspec.msgpack.encode(frame))) is kind_of(name)


@pytest.mark.parametrize(("name", "frame"), BAD)
def test_what_the_document_refuses_the_codecs_refuse(name: str, frame: dict[str, Any]) -> None:
    assert not is_valid(frame, name)
    with pytest.raises(RemoteProtocolError) as refused:
        codec.JSON.decode(msgspec.json.encode(frame))
    assert refused.value.code in frames.REFUSALS[kind_of(name)]


def test_times_are_dates_and_patterns_are_those_of_every_language() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["StoredMessage"]["properties"]["created_at"] == {"type": "string", "format": "date-time"}
    assert schemas["Conversation"]["properties"]["last_message_at"] == {"type": "string", "format": "date-time"}
    assert "\\\\A" not in json.dumps(DOCUMENT)
    assert "\\\\Z" not in json.dumps(DOCUMENT)
    assert schemas["AuthPayload"]["properties"]["device_id"]["pattern"] == "^[A-Za-z0-9._:-]+$"
