"""Every WebSocket frame, a section per direction. `session.py` says when each may come; `codec.py` makes the bytes.

The seed's frames are exactly as its tagged enum serialises them (`type` = snake_case tag); the frames added to it carry
their fields in `payload`. Unknown fields are ignored, optional fields are left out when empty. Times are epoch ms.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, get_args

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
    UserStatus,
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
    """The first frame, within 10 s; again before the token ends. Answered by `auth_success` or `auth_error`."""

    payload: AuthPayload


class Message(Frame, tag="message", kw_only=True, frozen=True, gc=False):
    """Answered by a `message_ack` once committed; the same key again is answered by the same ack."""

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
    """These messages, and what is before them in their conversations, have been read."""

    message_ids: Annotated[list[Id], Meta(max_length=500)]
    timestamp: EpochMs


class Heartbeat(Frame, tag="heartbeat", kw_only=True, frozen=True, gc=False):
    """Any frame proves life; after 60 s of silence a connection is closed."""

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
    """Catch up again: what is missed as `messages`, then `sync_complete`."""

    payload: SyncPayload


class HistoryPayload(msgspec.Struct, kw_only=True, frozen=True):
    conversation_id: Id
    before_sequence: Sequence
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


class History(Frame, tag="history", kw_only=True, frozen=True, gc=False):
    """Messages before a sequence; answered by `messages`."""

    payload: HistoryPayload


Emoji = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
"""What a reaction shows; as opaque to the server as content."""


class TypingState(StrEnum):
    START = "start"
    STOP = "stop"


class DeleteScope(StrEnum):
    ME = "me"
    ALL = "all"


class ReactionOp(StrEnum):
    ADD = "add"
    REMOVE = "remove"


class MessageChange(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """Which message is changed. Answered by a `message_ack` of the log entry that the change becomes."""

    client_message_id: Label | None = None
    idempotency_key: IdempotencyKeyText
    conversation_id: Id
    message_id: Id


class EditPayload(MessageChange, kw_only=True, frozen=True, gc=False):
    content: str


class MessageEdit(Frame, tag="message_edit", kw_only=True, frozen=True, gc=False):
    """The author says something else."""

    payload: EditPayload


class DeletePayload(MessageChange, kw_only=True, frozen=True, gc=False):
    scope: DeleteScope


class MessageDelete(Frame, tag="message_delete", kw_only=True, frozen=True, gc=False):
    """The author, or an admin of the group, deletes it for all; anybody for themselves."""

    payload: DeletePayload


class ReactionPayload(MessageChange, kw_only=True, frozen=True, gc=False):
    emoji: Emoji
    op: ReactionOp


class MessageReaction(Frame, tag="reaction", kw_only=True, frozen=True, gc=False):
    """One person's emoji on a message."""

    payload: ReactionPayload


class TypingPayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    conversation_id: Id
    state: TypingState


class Typing(Frame, tag="typing", kw_only=True, frozen=True, gc=False):
    """Never stored; one `start` per 3 s is passed on, and ends by itself after 6 s."""

    payload: TypingPayload


class PeoplePayload(msgspec.Struct, kw_only=True, frozen=True):
    user_ids: Annotated[list[Id], Meta(max_length=500)]


class PresenceSubscribe(Frame, tag="presence_subscribe", kw_only=True, frozen=True, gc=False):
    """Watch these people too; those one may not watch are left out without a word. At most 500 per connection."""

    payload: PeoplePayload


class PresenceUnsubscribe(Frame, tag="presence_unsubscribe", kw_only=True, frozen=True, gc=False):
    """Watch these people no more."""

    payload: PeoplePayload


class Goodbye(Frame, tag="goodbye", kw_only=True, frozen=True, gc=False):
    """A clean close; the device is offline at once."""

    payload: dict[str, Any] | UnsetType = UNSET


ClientFrame = (
    Auth
    | Message
    | DeliveryAck
    | ReadReceipt
    | Heartbeat
    | Retransmit
    | Sync
    | History
    | MessageEdit
    | MessageDelete
    | MessageReaction
    | Typing
    | PresenceSubscribe
    | PresenceUnsubscribe
    | Goodbye
)


# --- server to client ------------------------------------------------------------------------------------------------


class AuthSuccessPayload(msgspec.Struct, kw_only=True, frozen=True):
    session_id: str
    server_time: int
    unread_count: int
    heartbeat_interval_ms: int | UnsetType = UNSET
    max_frame_bytes: int | UnsetType = UNSET
    resumed: bool | UnsetType = UNSET


class AuthSuccess(Frame, tag="auth_success", kw_only=True, frozen=True, gc=False):
    """The session is open; what was missed follows as `messages`, then `sync_complete`."""

    payload: AuthSuccessPayload


class AuthError(Frame, tag="auth_error", kw_only=True, frozen=True, gc=False):
    """Not let in, or no longer; the connection is closed."""

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
    """A `message` or change of one is committed, and this is its place."""

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
    """Log entries of one conversation in order: the only frame that delivers."""

    payload: MessagesPayload


class HeartbeatAck(Frame, tag="heartbeat_ack", kw_only=True, frozen=True, gc=False):
    """Answers a `heartbeat`."""

    server_time: int


class MigrationPayload(msgspec.Struct, kw_only=True, frozen=True):
    new_endpoint: str
    session_token: str


class Migration(Frame, tag="migration", kw_only=True, frozen=True, gc=False):
    """This gateway ends: connect there with this token, good once and for 60 s, then leave here."""

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
    """Something was refused: the frame named by its key, by `in_reply_to`, or the last one.

    A retryable refusal of a key that is no `rate_limited`: after `retry_after_ms` the same key again, and in one
    conversation in the order of first sending. What comes behind such a key is refused likewise until that key has come
    again, or for 5 s.
    """

    payload: ErrorPayload


class ReceiptUpdatePayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """1:1: `user_id` has stored or read everything through the given sequences.

    Group: all members have; `user_id` moved last. The counts say how many of the `participant_count` others have stored
    and read the author's newest message, `sequence_number`.
    """

    conversation_id: str
    user_id: str
    delivered_through: int | UnsetType = UNSET
    read_through: int | UnsetType = UNSET
    delivered_count: int | UnsetType = UNSET
    read_count: int | UnsetType = UNSET
    participant_count: int | UnsetType = UNSET
    sequence_number: int | UnsetType = UNSET
    timestamp: int


class ReceiptUpdate(Frame, tag="receipt_update", kw_only=True, frozen=True, gc=False):
    """How far the others are with what one wrote."""

    payload: ReceiptUpdatePayload


class SyncCompletePayload(msgspec.Struct, kw_only=True, frozen=True):
    heads: dict[str, Head]
    unread_count: int
    server_time: int


class SyncComplete(Frame, tag="sync_complete", kw_only=True, frozen=True, gc=False):
    """Everything up to these heads has been sent."""

    payload: SyncCompletePayload


class ConversationEvent(StrEnum):
    """What a `conversation_update` is about. The last three are the member's own settings."""

    CREATED = "created"
    UPDATED = "updated"
    REMOVED = "removed"
    READ = "read"
    MUTED = "muted"
    PINNED = "pinned"
    ARCHIVED = "archived"


class ConversationUpdatePayload(msgspec.Struct, kw_only=True, frozen=True):
    """`version`: the log's position that caused it, or epoch ms for the member's own settings, of which `muted_until`
    (epoch ms), `pinned` and `archived` say how they stand now."""

    conversation: Conversation | UnsetType = UNSET
    conversation_id: str
    unread_count: int | UnsetType = UNSET
    event: ConversationEvent
    version: int
    muted_until: int | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    archived: bool | UnsetType = UNSET


class ConversationUpdate(Frame, tag="conversation_update", kw_only=True, frozen=True, gc=False):
    """A conversation, or one's own view of it, has changed."""

    payload: ConversationUpdatePayload


class TypingNoticePayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    conversation_id: str
    user_id: str
    state: TypingState


class TypingNotice(Frame, tag="typing", kw_only=True, frozen=True, gc=False):
    """Ends by itself 6 s after the last `start`."""

    payload: TypingNoticePayload


class AgentProgressPayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """`stage`: `working`, or what the agent calls it. `message_id`: what it is working on."""

    conversation_id: str
    agent_id: str
    stage: str
    text: str | UnsetType = UNSET
    message_id: str | UnsetType = UNSET


class AgentProgress(Frame, tag="agent_progress", kw_only=True, frozen=True, gc=False):
    """An agent is at work and has not answered yet. Never stored."""

    payload: AgentProgressPayload


class PresencePayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """`last_seen`: epoch ms, left out where it is not known or not shown."""

    user_id: str
    status: UserStatus
    last_seen: int | UnsetType = UNSET


class PresenceNotice(Frame, tag="presence", kw_only=True, frozen=True, gc=False):
    """A person one watches is online or has gone."""

    payload: PresencePayload


class KeysLowPayload(msgspec.Struct, kw_only=True, frozen=True):
    device_id: str
    remaining: int


class KeysLow(Frame, tag="keys_low", kw_only=True, frozen=True, gc=False):
    """This device's one-time prekeys run out: upload more."""

    payload: KeysLowPayload


class IdentityChangedPayload(msgspec.Struct, kw_only=True, frozen=True):
    """`version`: of the user's device list, which grows with every device that is added, changed or removed."""

    user_id: str
    device_id: str
    version: int


class IdentityChanged(Frame, tag="identity_changed", kw_only=True, frozen=True, gc=False):
    """A person one talks to has a device with a new identity key, or has lost one: fetch their keys again."""

    payload: IdentityChangedPayload


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
    | TypingNotice
    | AgentProgress
    | PresenceNotice
    | KeysLow
    | IdentityChanged
)

CLIENT_TAGS = frozenset(kind.__struct_config__.tag for kind in get_args(ClientFrame))

_ANY: Final = frozenset((ErrorCode.VALIDATION_FAILED,))
"""What the codec says of any frame with a field out of bounds."""
_LOGGED: Final = _ANY | {
    ErrorCode.CONVERSATION_NOT_FOUND,
    ErrorCode.IDEMPOTENCY_CONFLICT,
    ErrorCode.RATE_LIMITED,
    ErrorCode.STORAGE_UNAVAILABLE,
    ErrorCode.OVERLOADED,
    ErrorCode.QUEUED_FOR_RETRY,
}
"""What becomes an entry of a log."""
_SPOKEN: Final = _LOGGED | {ErrorCode.MUTED, ErrorCode.BLOCKED}
_LOOKED_UP: Final = _ANY | {
    ErrorCode.CONVERSATION_NOT_FOUND,
    ErrorCode.RATE_LIMITED,
    ErrorCode.STORAGE_UNAVAILABLE,
}

REFUSALS: Final[dict[type[Frame], frozenset[ErrorCode]]] = {
    Auth: _ANY | {ErrorCode.FORBIDDEN},
    Message: _SPOKEN | {ErrorCode.FORBIDDEN, ErrorCode.TOO_LARGE},
    DeliveryAck: _ANY,
    ReadReceipt: _ANY,
    Heartbeat: _ANY,
    Retransmit: _LOOKED_UP,
    Sync: _ANY | {ErrorCode.RATE_LIMITED},
    History: _LOOKED_UP,
    MessageEdit: _SPOKEN | {ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN, ErrorCode.TOO_LATE, ErrorCode.TOO_LARGE},
    MessageDelete: _LOGGED | {ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN},
    MessageReaction: _SPOKEN | {ErrorCode.NOT_FOUND},
    Typing: _ANY,
    PresenceSubscribe: _ANY | {ErrorCode.RATE_LIMITED, ErrorCode.OVERLOADED},
    PresenceUnsubscribe: _ANY,
    Goodbye: _ANY,
}
"""Client frame → codes of the `error` it may be answered with, whoever refuses it: codec, session, gateway or worker.

Besides these a token that is no good is answered by `auth_error`, and what is no frame by bad_frame or unknown_type.
"""


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
