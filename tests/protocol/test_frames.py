"""The exact JSON of every frame: tags, field order where the seed fixes it, omissions, payload placement."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from protocol import codec, frames
from protocol.errors import AuthErrorCode, ErrorCode
from protocol.models import MessageStatus, MessageType, StoredMessage, UserStatus

T = 1_732_300_000_000
STORED = StoredMessage(
    message_id="msg_1",
    conversation_id="conv_1",
    sequence_number=7,
    sender_id="usr_a",
    receiver_id="usr_b",
    message_type=MessageType.TEXT,
    content="hi",
    timestamp=datetime(2026, 11, 22, 18, 0, 0, tzinfo=UTC),
    status=MessageStatus.SENT,
    created_at=datetime(2026, 11, 22, 18, 0, 0, 5000, tzinfo=UTC),
)

SERVER_SHAPES: list[tuple[frames.ServerFrame, str]] = [
    (
        frames.AuthSuccess(
            payload=frames.AuthSuccessPayload(session_id="sess_1", server_time=T, unread_count=3),
        ),
        '{"type":"auth_success","payload":{"session_id":"sess_1","server_time":1732300000000,"unread_count":3}}',
    ),
    (frames.AuthError(error=AuthErrorCode.EXPIRED_TOKEN), '{"type":"auth_error","error":"expired_token"}'),
    (
        frames.MessageAck(
            client_message_id="c1",
            payload=frames.MessageAckPayload(
                message_id="msg_1", sequence_number=7, status=MessageStatus.SENT, timestamp=T
            ),
        ),
        '{"type":"message_ack","client_message_id":"c1","payload":{"message_id":"msg_1","sequence_number":7,'
        '"status":"sent","timestamp":1732300000000}}',
    ),
    (
        frames.Messages(payload=frames.MessagesPayload(conversation_id="conv_1", messages=[STORED], origin="live")),
        '{"type":"messages","payload":{"conversation_id":"conv_1","messages":[{"_id":"msg_1","conversation_id":"conv_1",'
        '"sequence_number":7,"sender_id":"usr_a","receiver_id":"usr_b","type":"text","content":"hi",'
        '"timestamp":"2026-11-22T18:00:00Z","status":"sent","created_at":"2026-11-22T18:00:00.005000Z"}],"origin":"live"}}',
    ),
    (frames.HeartbeatAck(server_time=T), '{"type":"heartbeat_ack","server_time":1732300000000}'),
    (
        frames.Migration(payload=frames.MigrationPayload(new_endpoint="wss://b", session_token="s")),
        '{"type":"migration","payload":{"new_endpoint":"wss://b","session_token":"s"}}',
    ),
    (
        frames.error_frame(ErrorCode.RATE_LIMITED, "slower", retry_after_ms=500, client_message_id="c1"),
        '{"type":"error","payload":{"code":"rate_limited","message":"slower","retryable":true,"retry_after_ms":500,'
        '"client_message_id":"c1"}}',
    ),
    (
        frames.ReceiptUpdate(
            payload=frames.ReceiptUpdatePayload(
                conversation_id="conv_1", user_id="usr_b", delivered_through=7, timestamp=T
            )
        ),
        '{"type":"receipt_update","payload":{"conversation_id":"conv_1","user_id":"usr_b","delivered_through":7,'
        '"timestamp":1732300000000}}',
    ),
    (
        frames.SyncComplete(
            payload=frames.SyncCompletePayload(
                heads={"conv_1": frames.Head(sequence_number=7, digest="00ff")}, unread_count=0, server_time=T
            )
        ),
        '{"type":"sync_complete","payload":{"heads":{"conv_1":{"sequence_number":7,"digest":"00ff"}},"unread_count":0,'
        '"server_time":1732300000000}}',
    ),
    (
        frames.ConversationUpdate(
            payload=frames.ConversationUpdatePayload(
                conversation_id="conv_1", unread_count=0, event=frames.ConversationEvent.READ, version=1
            )
        ),
        '{"type":"conversation_update","payload":{"conversation_id":"conv_1","unread_count":0,"event":"read","version":1}}',
    ),
    (
        frames.TypingNotice(
            payload=frames.TypingNoticePayload(
                conversation_id="conv_1", user_id="usr_b", state=frames.TypingState.START
            )
        ),
        '{"type":"typing","payload":{"conversation_id":"conv_1","user_id":"usr_b","state":"start"}}',
    ),
    (
        frames.AgentProgress(
            payload=frames.AgentProgressPayload(
                conversation_id="conv_1", agent_id="agt_1", stage="reading", text="page 1", message_id="msg_1"
            )
        ),
        '{"type":"agent_progress","payload":{"conversation_id":"conv_1","agent_id":"agt_1","stage":"reading",'
        '"text":"page 1","message_id":"msg_1"}}',
    ),
    (
        frames.PresenceNotice(payload=frames.PresencePayload(user_id="usr_b", status=UserStatus.OFFLINE, last_seen=T)),
        '{"type":"presence","payload":{"user_id":"usr_b","status":"offline","last_seen":1732300000000}}',
    ),
    (
        frames.KeysLow(payload=frames.KeysLowPayload(device_id="phone", remaining=3)),
        '{"type":"keys_low","payload":{"device_id":"phone","remaining":3}}',
    ),
    (
        frames.IdentityChanged(payload=frames.IdentityChangedPayload(user_id="usr_b", device_id="phone", version=4)),
        '{"type":"identity_changed","payload":{"user_id":"usr_b","device_id":"phone","version":4}}',
    ),
]

CLIENT_SHAPES: list[tuple[str, type[frames.ClientFrame]]] = [
    (
        '{"type":"auth","payload":{"user_id":"usr_1","auth_token":"t","device_id":"phone-1","platform":"web",'
        '"app_version":"1.0"}}',
        frames.Auth,
    ),
    (
        '{"type":"message","client_message_id":"c1","idempotency_key":"k","payload":{"conversation_id":"conv_1",'
        '"receiver_id":"usr_1","content":"x","type":"text","timestamp":1732300000000}}',
        frames.Message,
    ),
    ('{"type":"delivery_ack","message_id":"msg_1","timestamp":1732300000100}', frames.DeliveryAck),
    ('{"type":"read_receipt","message_ids":["msg_1"],"timestamp":1732300000200}', frames.ReadReceipt),
    ('{"type":"heartbeat","timestamp":1732300000300}', frames.Heartbeat),
    ('{"type":"retransmit","conversation_id":"conv_1","from_sequence":2,"to_sequence":4}', frames.Retransmit),
    ('{"type":"sync","payload":{"cursors":{"conv_1":5},"limit":100}}', frames.Sync),
    ('{"type":"history","payload":{"conversation_id":"conv_1","before_sequence":9,"limit":50}}', frames.History),
    (
        '{"type":"message_edit","payload":{"client_message_id":"c1","idempotency_key":"k","conversation_id":"conv_1",'
        '"message_id":"msg_1","content":"y"}}',
        frames.MessageEdit,
    ),
    (
        '{"type":"message_delete","payload":{"client_message_id":"c1","idempotency_key":"k","conversation_id":"conv_1",'
        '"message_id":"msg_1","scope":"all"}}',
        frames.MessageDelete,
    ),
    (
        '{"type":"reaction","payload":{"client_message_id":"c1","idempotency_key":"k","conversation_id":"conv_1",'
        '"message_id":"msg_1","emoji":"+1","op":"add"}}',
        frames.MessageReaction,
    ),
    ('{"type":"typing","payload":{"conversation_id":"conv_1","state":"start"}}', frames.Typing),
    ('{"type":"presence_subscribe","payload":{"user_ids":["usr_1"]}}', frames.PresenceSubscribe),
    ('{"type":"presence_unsubscribe","payload":{"user_ids":["usr_1"]}}', frames.PresenceUnsubscribe),
    ('{"type":"goodbye"}', frames.Goodbye),
]


@pytest.mark.parametrize(("frame", "expected"), SERVER_SHAPES, ids=lambda value: type(value).__name__)
def test_a_server_frame_has_exactly_this_json(frame: frames.ServerFrame, expected: str) -> None:
    assert codec.JSON.encode(frame).decode() == expected


def test_every_server_frame_is_in_the_table_above() -> None:
    assert {type(frame) for frame, _ in SERVER_SHAPES} == set(frames.ServerFrame.__args__)


@pytest.mark.parametrize(("text", "kind"), CLIENT_SHAPES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_client_frame_of_this_json_is_understood(text: str, kind: type[frames.ClientFrame]) -> None:
    frame = codec.JSON.decode(text.encode())
    assert type(frame) is kind
    assert json.loads(codec.JSON.encode(frame)) == with_defaults(json.loads(text))


def with_defaults(expected: dict[str, Any]) -> dict[str, Any]:
    """What a client may leave out and the struct fills in with null or a default when it is encoded again."""
    if expected["type"] == "message":
        expected["payload"] |= {"media_url": None, "reply_to_message_id": None, "forwarded": False}
    return expected


def test_every_client_frame_is_in_the_table_above() -> None:
    assert {kind for _, kind in CLIENT_SHAPES} == set(frames.ClientFrame.__args__)
    assert {json.loads(text)["type"] for text, _ in CLIENT_SHAPES} == frames.CLIENT_TAGS


@pytest.mark.parametrize(("frame", "expected"), SERVER_SHAPES, ids=lambda value: type(value).__name__)
def test_nothing_empty_is_written(frame: frames.ServerFrame, expected: str) -> None:
    assert "null" not in codec.JSON.encode(frame).decode()


def test_an_error_says_what_the_table_says_about_retrying() -> None:
    for code in ErrorCode:
        assert frames.error_frame(code, "x").payload.retryable is code.retryable


def test_the_optional_fields_of_a_message_may_be_null_or_missing() -> None:
    text = (
        '{"type":"message","client_message_id":null,"idempotency_key":"k","payload":{"conversation_id":"c","content":"x",'
        '"type":"text","media_url":null,"reply_to_message_id":null,"timestamp":0}}'
    )
    frame = codec.JSON.decode(text.encode())
    assert isinstance(frame, frames.Message)
    assert frame.client_message_id is None
    assert frame.payload.receiver_id == ""


def test_frames_are_frozen() -> None:
    with pytest.raises(AttributeError):
        frames.Heartbeat(timestamp=1).timestamp = 2  # type: ignore[misc]


OTHER_TAGS = {
    frames.MessageReaction: "reaction",
    frames.TypingNotice: "typing",
    frames.PresenceNotice: "presence",
}
"""`Reaction` is the model's, and a frame of both directions has two classes."""


def test_every_frame_is_tagged_with_its_snake_case_name() -> None:
    for kind in (*frames.ClientFrame.__args__, *frames.ServerFrame.__args__):
        if kind in OTHER_TAGS:
            assert kind.__struct_config__.tag == OTHER_TAGS[kind]
            continue
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).lstrip("_")
        assert kind.__struct_config__.tag == name
        assert kind.__struct_config__.tag_field == "type"
