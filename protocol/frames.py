"""Every WebSocket frame, a section per direction. `session.py` says when each may come; `codec.py` makes the bytes.

The seed's frames are exactly as its tagged enum serialises them (`type` = snake_case tag); the frames added to it carry
their fields in `payload`. Unknown fields are ignored, optional fields are left out when empty. Times are epoch ms.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol.errors import AuthErrorCode, ErrorCode
from protocol.models import (
    Conversation,
    EpochMs,
    Id,
    IdempotencyKeyText,
    MessagePayload,
    MessageStatus,
    Sequence,
    StoredMessage,
)

DeviceId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[A-Za-z0-9._:-]+\Z")]
Label = Annotated[str, Meta(max_length=128)]
Cursor = Annotated[int, Meta(ge=0, le=2**53)]
Cursors = Annotated[dict[Id, Cursor], Meta(max_length=500)]


class Frame(msgspec.Struct, tag_field="type", frozen=True, gc=False):
    """What crosses the WebSocket."""


# --- client to server ------------------------------------------------------------------------------------------------


class AuthPayload(msgspec.Struct, kw_only=True, frozen=True):
    """`auth_token`: a JWT, or the session token of a `migration`. `resume`: last sequence held per conversation."""

    user_id: Id
    auth_token: Annotated[str, Meta(min_length=1, max_length=4096)]
    device_id: DeviceId
    platform: Label
    app_version: Label
    resume: Cursors | UnsetType = UNSET
    protocol_version: int | UnsetType = UNSET


class Auth(Frame, tag="auth", kw_only=True, frozen=True, gc=False):
    payload: AuthPayload


class Message(Frame, tag="message", kw_only=True, frozen=True, gc=False):
    client_message_id: Label | None = None
    idempotency_key: IdempotencyKeyText
    payload: MessagePayload


class DeliveryAck(Frame, tag="delivery_ack", kw_only=True, frozen=True, gc=False):
    """Cumulative: everything up to this message in its conversation is stored on this device."""

    message_id: Id
    timestamp: EpochMs
    conversation_id: Id | UnsetType = UNSET
    sequence_number: Sequence | UnsetType = UNSET


class ReadReceipt(Frame, tag="read_receipt", kw_only=True, frozen=True, gc=False):
    message_ids: Annotated[list[Id], Meta(max_length=500)]
    timestamp: EpochMs


class Heartbeat(Frame, tag="heartbeat", kw_only=True, frozen=True, gc=False):
    timestamp: EpochMs


class Retransmit(Frame, tag="retransmit", kw_only=True, frozen=True, gc=False):
    """Asks for the inclusive range again; the answer accounts for all of it."""

    conversation_id: Id
    from_sequence: Sequence
    to_sequence: Sequence


class SyncPayload(msgspec.Struct, kw_only=True, frozen=True):
    """`cursors`: last sequence held per conversation; conversations left out are synced from the device's cursor."""

    cursors: Cursors = {}
    limit: Annotated[int, Meta(ge=1, le=100)] = 100


class Sync(Frame, tag="sync", kw_only=True, frozen=True, gc=False):
    payload: SyncPayload


class HistoryPayload(msgspec.Struct, kw_only=True, frozen=True):
    conversation_id: Id
    before_sequence: Sequence
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


class History(Frame, tag="history", kw_only=True, frozen=True, gc=False):
    payload: HistoryPayload


class Goodbye(Frame, tag="goodbye", kw_only=True, frozen=True, gc=False):
    payload: dict[str, Any] | UnsetType = UNSET


ClientFrame = Auth | Message | DeliveryAck | ReadReceipt | Heartbeat | Retransmit | Sync | History | Goodbye


# --- server to client ------------------------------------------------------------------------------------------------


class AuthSuccessPayload(msgspec.Struct, kw_only=True, frozen=True):
    session_id: str
    server_time: int
    unread_count: int
    heartbeat_interval_ms: int | UnsetType = UNSET
    max_frame_bytes: int | UnsetType = UNSET
    resumed: bool | UnsetType = UNSET


class AuthSuccess(Frame, tag="auth_success", kw_only=True, frozen=True, gc=False):
    payload: AuthSuccessPayload


class AuthError(Frame, tag="auth_error", kw_only=True, frozen=True, gc=False):
    error: AuthErrorCode
    retry_after_ms: int | UnsetType = UNSET


class MessageAckPayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """The message is committed: journalled by a majority, with its final id and sequence."""

    message_id: str
    sequence_number: int
    status: MessageStatus
    timestamp: int
    conversation_id: str | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET
    duplicate: bool | UnsetType = UNSET


class MessageAck(Frame, tag="message_ack", kw_only=True, frozen=True, gc=False):
    client_message_id: str
    payload: MessageAckPayload


class Head(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """Where a conversation's log ends; `digest` is hexadecimal (see `watermarks.chain_digest`)."""

    sequence_number: int
    digest: str


class MessagesPayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """`origin`: live, backlog or retransmit. `from_sequence`..`to_sequence`: the range this frame accounts for."""

    conversation_id: str
    messages: list[StoredMessage]
    origin: str | UnsetType = UNSET
    from_sequence: int | UnsetType = UNSET
    to_sequence: int | UnsetType = UNSET
    expired_through: int | UnsetType = UNSET
    has_more: bool | UnsetType = UNSET
    head: Head | UnsetType = UNSET


class Messages(Frame, tag="messages", kw_only=True, frozen=True, gc=False):
    payload: MessagesPayload


class HeartbeatAck(Frame, tag="heartbeat_ack", kw_only=True, frozen=True, gc=False):
    server_time: int


class MigrationPayload(msgspec.Struct, kw_only=True, frozen=True):
    new_endpoint: str
    session_token: str


class Migration(Frame, tag="migration", kw_only=True, frozen=True, gc=False):
    payload: MigrationPayload


class ErrorPayload(msgspec.Struct, kw_only=True, frozen=True):
    code: ErrorCode
    message: str
    retryable: bool
    retry_after_ms: int | UnsetType = UNSET
    client_message_id: str | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET
    conversation_id: str | UnsetType = UNSET
    in_reply_to: str | UnsetType = UNSET


class Error(Frame, tag="error", kw_only=True, frozen=True, gc=False):
    payload: ErrorPayload


class ReceiptUpdatePayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """1:1: `user_id` has stored or read everything through the given sequences.

    Group: all members have; `user_id` came last.
    """

    conversation_id: str
    user_id: str
    delivered_through: int | UnsetType = UNSET
    read_through: int | UnsetType = UNSET
    delivered_count: int | UnsetType = UNSET
    read_count: int | UnsetType = UNSET
    participant_count: int | UnsetType = UNSET
    timestamp: int


class ReceiptUpdate(Frame, tag="receipt_update", kw_only=True, frozen=True, gc=False):
    payload: ReceiptUpdatePayload


class SyncCompletePayload(msgspec.Struct, kw_only=True, frozen=True):
    heads: dict[str, Head]
    unread_count: int
    server_time: int


class SyncComplete(Frame, tag="sync_complete", kw_only=True, frozen=True, gc=False):
    payload: SyncCompletePayload


class ConversationUpdatePayload(msgspec.Struct, kw_only=True, frozen=True):
    """`event`: created, updated, removed, read."""

    conversation: Conversation | UnsetType = UNSET
    conversation_id: str
    unread_count: int | UnsetType = UNSET
    event: str
    version: int


class ConversationUpdate(Frame, tag="conversation_update", kw_only=True, frozen=True, gc=False):
    payload: ConversationUpdatePayload


ServerFrame = (
    AuthSuccess
    | AuthError
    | MessageAck
    | Messages
    | HeartbeatAck
    | Migration
    | Error
    | ReceiptUpdate
    | SyncComplete
    | ConversationUpdate
)

CLIENT_TAGS = frozenset(
    ("auth", "message", "delivery_ack", "read_receipt", "heartbeat", "retransmit", "sync", "history", "goodbye")
)


def error_frame(
    code: ErrorCode,
    message: str,
    *,
    client_message_id: str | None = None,
    idempotency_key: str | None = None,
    conversation_id: str | None = None,
    retry_after_ms: int | None = None,
    in_reply_to: str | None = None,
) -> Error:
    """An `error` frame with the table's `retryable` and only the fields that are known."""
    return Error(
        payload=ErrorPayload(
            code=code,
            message=message,
            retryable=code.retryable,
            retry_after_ms=UNSET if retry_after_ms is None else retry_after_ms,
            client_message_id=UNSET if client_message_id is None else client_message_id,
            idempotency_key=UNSET if idempotency_key is None else idempotency_key,
            conversation_id=UNSET if conversation_id is None else conversation_id,
            in_reply_to=UNSET if in_reply_to is None else in_reply_to,
        )
    )
