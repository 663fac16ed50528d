"""The seed's entities: renames, omissions, lowercase enums, dates, as documents and as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
import pytest

from protocol.models import (
    Conversation,
    ConversationType,
    DeadLetterQueueEntry,
    DLQErrorType,
    DLQStatus,
    EpochMs,
    IdempotencyKey,
    Membership,
    MessageDocument,
    MessageStatus,
    MessageType,
    Role,
    SequenceNumber,
    StoredMessage,
    User,
    UserStatus,
    to_document,
)

if TYPE_CHECKING:
    from enum import StrEnum

NOW = datetime(2026, 11, 22, 18, 0, 0, 123000, tzinfo=UTC)
STORED = {
    "_id": "msg_1",
    "idempotency_key": "k",
    "conversation_id": "conv_1",
    "sequence_number": 1,
    "sender_id": "usr_a",
    "receiver_id": "usr_b",
    "type": "text",
    "content": "x",
    "timestamp": NOW,
    "status": "sent",
    "created_at": NOW,
}


def test_a_user_without_phone_and_email_stores_nulls_and_nothing_else_empty() -> None:
    user = User(user_id="usr_1", phone=None, email=None, name="Ann", created_at=NOW, status=UserStatus.OFFLINE)
    assert to_document(user) == {
        "_id": "usr_1",
        "phone": None,
        "email": None,
        "name": "Ann",
        "created_at": NOW,
        "status": "offline",
    }


def test_a_conversation_renames_id_and_type() -> None:
    conversation = Conversation(
        conversation_id="conv_1",
        user_id="usr_a",
        agent_id="",
        conversation_type=ConversationType.ONE_TO_ONE,
        participants=["usr_a", "usr_b"],
        last_sequence_number=0,
        created_at=NOW,
    )
    assert to_document(conversation) == {
        "_id": "conv_1",
        "user_id": "usr_a",
        "agent_id": "",
        "type": "1:1",
        "participants": ["usr_a", "usr_b"],
        "last_sequence_number": 0,
        "created_at": NOW,
    }
    assert msgspec.convert(to_document(conversation), Conversation) == conversation


def test_a_message_document_keeps_dates_and_bytes() -> None:
    document = {**STORED, "digest": bytes(16), "countable": 1}
    message = msgspec.convert(document, MessageDocument)
    assert message.message_type is MessageType.TEXT
    assert to_document(message) == document


def test_what_a_viewer_sees_has_no_server_fields() -> None:
    optional = {"media_url", "reply_to_message_id", "forwarded", "target_message_id", "reactions"}
    changed = {"expires_at", "edited_at", "deleted_at", "content_hash"}
    assert set(StoredMessage.__struct_encode_fields__) == {*STORED, *optional, *changed}


def test_dates_are_rfc_3339_in_json() -> None:
    shown = msgspec.json.decode(msgspec.json.encode(msgspec.convert(STORED, StoredMessage)))
    assert datetime.fromisoformat(shown["timestamp"]) == NOW
    assert shown["timestamp"].endswith("Z")


def test_a_dead_letter_writes_its_two_dates_as_null() -> None:
    entry = DeadLetterQueueEntry(
        id="dlq_1",
        raw=b"\x00",
        error="undecodable",
        error_type=DLQErrorType.VALIDATION_FAILED,
        retry_count=0,
        max_retries=5,
        next_retry_at=None,
        created_at=NOW,
        last_retry_at=None,
        status=DLQStatus.PENDING,
        expires_at=NOW,
    )
    assert to_document(entry) == {
        "_id": "dlq_1",
        "raw": b"\x00",
        "error": "undecodable",
        "error_type": "validation_failed",
        "retry_count": 0,
        "max_retries": 5,
        "next_retry_at": None,
        "created_at": NOW,
        "last_retry_at": None,
        "status": "pending",
        "expires_at": NOW,
    }


def test_ids_of_the_small_documents() -> None:
    assert to_document(IdempotencyKey(idempotency_key="c:u:k", message_id="m", created_at=NOW))["_id"] == "c:u:k"
    assert to_document(SequenceNumber(conversation_id="c", last_sequence_number=3, updated_at=NOW))["_id"] == "c"
    membership = Membership(
        membership_id="c:u",
        conversation_id="c",
        user_id="u",
        role=Role.MEMBER,
        join_seq=1,
        delivered_seq=0,
        read_seq=0,
        read_countable=0,
        devices={},
    )
    document = to_document(membership)
    assert document["_id"] == "c:u"
    assert "leave_seq" not in document


@pytest.mark.parametrize(
    "enum", [UserStatus, ConversationType, MessageType, MessageStatus, DLQErrorType, DLQStatus, Role]
)
def test_enums_are_lowercase(enum: type[StrEnum]) -> None:
    for member in enum:
        assert member.value == ("1:1" if member is ConversationType.ONE_TO_ONE else member.name.lower())


def test_the_seeds_enum_values_are_all_there() -> None:
    assert {kind.value for kind in MessageType} == {
        "text",
        "image",
        "video",
        "audio",
        "document",
        "location",
        "system",
    }
    assert [status.value for status in MessageStatus] == ["sent", "delivered", "read"]
    assert len(DLQErrorType) == 7
    assert len(DLQStatus) == 4


def test_w74_the_last_timestamp_a_client_may_name_is_a_date() -> None:
    last = 253_402_300_799_999
    assert msgspec.convert(last, EpochMs) == last
    assert datetime.fromtimestamp(last / 1000, UTC).year == 9999
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(last + 1, EpochMs)
