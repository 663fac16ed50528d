"""The seed's entities as they are stored in MongoDB and shown on the wire.

Field names, renames and omissions follow the seed's serde rules: `_id` for document ids, lowercase enums, `None`
fields left out except `User.phone`, `User.email`, `next_retry_at` and `last_retry_at`, which are written as null.
Dates are `datetime` in UTC: BSON dates in MongoDB, RFC 3339 in JSON.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

Id = Annotated[str, Meta(min_length=1, max_length=64)]
"""An id as a client may name it. Ids the server makes: see `protocol.keys`."""
IdempotencyKeyText = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[A-Za-z0-9._:-]+\Z")]
EpochMs = Annotated[int, Meta(ge=0, le=253_402_300_799_999)]
"""Milliseconds since 1970; the upper end is the last one of the year 9999, the last that a `datetime` holds."""
MediaUrl = Annotated[str, Meta(pattern=r"\A/v1/media/med_[0-9a-f]{27}\Z")]
"""A medium of this system, by its path in the HTTP API (`protocol.media`): no message names a host."""
Sequence = Annotated[int, Meta(ge=1, le=2**53)]
GROUP_LIMIT = 100
"""Most participants of a group conversation (seed, "Group Chat Support")."""
SYSTEM_SENDER = "system"
AGENT_PREFIX: Final = "agt_"
"""The id of an agent's account begins so, and nobody else's does: who is an agent can be told from its id."""


class UserStatus(StrEnum):
    ONLINE = "online"
    OFFLINE = "offline"


class ConversationType(StrEnum):
    ONE_TO_ONE = "1:1"
    GROUP = "group"


class MessageType(StrEnum):
    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
    DOCUMENT = "document"
    LOCATION = "location"
    SYSTEM = "system"


class MessageStatus(StrEnum):
    SENT = "sent"
    DELIVERED = "delivered"
    READ = "read"


class DLQErrorType(StrEnum):
    BROKER_PUBLISH_FAILED = "broker_publish_failed"
    STORAGE_FAILED = "storage_failed"
    VALIDATION_FAILED = "validation_failed"
    TIMEOUT = "timeout"
    SERVICE_UNAVAILABLE = "service_unavailable"
    NETWORK_ERROR = "network_error"
    UNKNOWN = "unknown"


class DLQStatus(StrEnum):
    PENDING = "pending"
    RETRYING = "retrying"
    FAILED = "failed"
    RESOLVED = "resolved"


class Role(StrEnum):
    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"


class LastSeen(StrEnum):
    """Who sees whether and when a person was online. `contacts` are those one shares a conversation with."""

    EVERYONE = "everyone"
    CONTACTS = "contacts"
    NOBODY = "nobody"


class AgentKind(StrEnum):
    """How an agent is reached: a POST to its URL, a Python class of the role `agents`, or its own WebSocket."""

    WEBHOOK = "webhook"
    PYTHON = "python"
    WEBSOCKET = "websocket"


class AgentStatus(StrEnum):
    ENABLED = "enabled"
    DISABLED = "disabled"


class EventKind(StrEnum):
    """What a system message says. The first group changes a conversation's state, the second a message of it; the third
    says that an agent has not answered one."""

    CREATED = "created"
    ADDED = "added"
    REMOVED = "removed"
    LEFT = "left"
    BANNED = "banned"
    UNBANNED = "unbanned"
    ROLES = "roles"
    RENAMED = "renamed"
    SILENCED = "silenced"
    DISAPPEARING = "disappearing"

    EDITED = "edited"
    DELETED = "deleted"
    HIDDEN = "hidden"
    REACTED = "reacted"
    UNREACTED = "unreacted"

    AGENT_TIMEOUT = "agent_timeout"
    AGENT_FAILED = "agent_failed"


JOINING: Final = frozenset((EventKind.CREATED, EventKind.ADDED))
LEAVING: Final = frozenset((EventKind.REMOVED, EventKind.LEFT, EventKind.BANNED))
"""A ban of somebody who is in the group ends their stay."""
MESSAGE_EVENTS: Final = frozenset(
    (EventKind.EDITED, EventKind.DELETED, EventKind.HIDDEN, EventKind.REACTED, EventKind.UNREACTED)
)

AGENT_EVENTS: Final = frozenset((EventKind.AGENT_TIMEOUT, EventKind.AGENT_FAILED))


class User(msgspec.Struct, kw_only=True, frozen=True):
    """A person or agent account. `phone` and `email` are unique where they are strings."""

    user_id: str | UnsetType = msgspec.field(name="_id", default=UNSET)
    phone: str | None
    email: str | None
    name: str
    avatar_url: str | UnsetType = UNSET
    created_at: datetime
    last_seen: datetime | UnsetType = UNSET
    status: UserStatus


class Privacy(msgspec.Struct, kw_only=True, frozen=True):
    """What an account shows of itself. Without `read_receipts` nobody is told what it has read."""

    last_seen: LastSeen = LastSeen.EVERYONE
    read_receipts: bool = True


class Conversation(msgspec.Struct, kw_only=True, frozen=True):
    """A 1:1 or group conversation. `participants` holds the ids of those who are in it now.

    `disappearing_seconds`: how long the content of a message sent from now on is kept; left out: for ever. `agent_id`:
    the agent it is with, "" for none; `user_id`: who began it. `plaintext`: its members have said that nothing here is
    encrypted, so the server may look at what is said to find the agent for it.
    """

    conversation_id: str | UnsetType = msgspec.field(name="_id", default=UNSET)
    user_id: str
    agent_id: str
    conversation_type: ConversationType = msgspec.field(name="type")
    participants: list[str]
    last_sequence_number: int
    last_message_at: datetime | UnsetType = UNSET
    created_at: datetime
    title: str | UnsetType = UNSET
    disappearing_seconds: int | UnsetType = UNSET
    plaintext: bool | UnsetType = UNSET


class Agent(msgspec.Struct, kw_only=True, frozen=True):
    """A software agent; its account is the user of the same id. `capabilities`: what it is good for, as intents say it.

    `url`: of a webhook. `handler`: the name of a Python class that the role `agents` runs. `concurrency`: calls under
    way at once; `timeout_seconds`: from the first try of a call to the notice that nothing came of it.
    """

    agent_id: str = msgspec.field(name="_id")
    name: str
    description: str
    kind: AgentKind
    status: AgentStatus
    capabilities: list[str]
    is_default: bool
    url: str | UnsetType = UNSET
    handler: str | UnsetType = UNSET
    concurrency: int
    timeout_seconds: float
    created_at: datetime
    updated_at: datetime


class Membership(msgspec.Struct, kw_only=True, frozen=True):
    """One user's stay in one conversation; `_id` is `{conversation_id}:{user_id}`.

    `delivered_seq` and `read_seq` are watermarks and only grow. `read_countable` is the number of countable messages
    up to the read mark, so unread = countable at the head - `read_countable`. `devices` maps a device to the
    last sequence it acknowledged. Visible to the member: `join_seq` ≤ sequence ≤ `leave_seq`.

    `silenced_until`: an admin's word, the member cannot send before. `shown_read_seq`: the read mark as others may know
    it, where it is not the real one, because the member has hidden what it reads; it only grows too. `muted_until`,
    `archived` and `pinned_at` are the member's own order of things; nobody else sees them.
    """

    membership_id: str = msgspec.field(name="_id")
    conversation_id: str
    user_id: str
    role: Role
    join_seq: int
    leave_seq: int | UnsetType = UNSET
    delivered_seq: int
    read_seq: int
    read_countable: int
    devices: dict[str, int]
    silenced_until: datetime | UnsetType = UNSET
    shown_read_seq: int | UnsetType = UNSET
    muted_until: datetime | UnsetType = UNSET
    archived: bool | UnsetType = UNSET
    pinned_at: datetime | UnsetType = UNSET


class MessagePayload(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """What a client sends. `timestamp`: the client's clock in epoch ms, stored, never ordering."""

    conversation_id: Id
    receiver_id: Annotated[str, Meta(max_length=64)] = ""
    content: str
    message_type: MessageType = msgspec.field(name="type")
    media_url: MediaUrl | None = None
    reply_to_message_id: Id | None = None
    timestamp: EpochMs
    forwarded: bool = False


class Reaction(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    user_id: str
    emoji: str


class StoredMessage(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """A committed message as a viewer sees it: one entry of its conversation's log.

    `idempotency_key` is set for the sender only. `status` is as the viewer sees it (see `protocol.watermarks`).

    `content` is what to show now. Where that is not what was committed here (edited, deleted, disappeared, hidden),
    `content_hash` is the hexadecimal BLAKE2b-128 of the original, so that the digest chain can still be folded.
    `deleted_at`: the content is gone, for everybody or for this viewer. `target_message_id`: the message that a
    system message of `MESSAGE_EVENTS` is about; of a `hidden` one only its actor sees it.
    """

    message_id: str | UnsetType = msgspec.field(name="_id", default=UNSET)
    idempotency_key: str | UnsetType = UNSET
    conversation_id: str
    sequence_number: int
    sender_id: str
    receiver_id: str
    message_type: MessageType = msgspec.field(name="type")
    content: str
    media_url: str | UnsetType = UNSET
    reply_to_message_id: str | UnsetType = UNSET
    timestamp: datetime
    status: MessageStatus
    created_at: datetime
    forwarded: bool | UnsetType = UNSET
    target_message_id: str | UnsetType = UNSET
    expires_at: datetime | UnsetType = UNSET
    edited_at: datetime | UnsetType = UNSET
    deleted_at: datetime | UnsetType = UNSET
    content_hash: str | UnsetType = UNSET
    reactions: list[Reaction] | UnsetType = UNSET


class MessageDocument(StoredMessage, kw_only=True, frozen=True, gc=False):
    """A `messages` document: the stored message and what only the server reads.

    `digest` is the 16-byte hash chain up to and including this entry, `countable` the number of entries up to here
    that count as unread for somebody (all but system messages).
    """

    digest: bytes
    countable: int
    hidden_for: str | UnsetType = UNSET
    """Of a `hidden` entry: its actor."""
    hidden_by: list[str] | UnsetType = UNSET
    """Who has deleted this message for themselves."""
    edited_seq: int | UnsetType = UNSET
    """The entry that its content comes from, where it was edited."""
    changed_seq: int | UnsetType = UNSET
    """The last entry whose effect this message shows; none before it is applied again."""
    erase_at: datetime | UnsetType = UNSET
    """When the content is to be erased; gone once it is."""
    event_due: datetime | UnsetType = UNSET
    """Since when its event has been waiting for somebody to confirm that it arrived; gone once somebody has."""
    request_hash: bytes | UnsetType = UNSET
    """Of an entry that a command became: hash of what was asked for."""


class IdempotencyKey(msgspec.Struct, kw_only=True, frozen=True):
    """`idempotency_keys` document. `_id` scopes the client's key: `{conversation_id}:{sender_id}:{key}`."""

    idempotency_key: str = msgspec.field(name="_id")
    message_id: str
    created_at: datetime


class SequenceNumber(msgspec.Struct, kw_only=True, frozen=True):
    """`sequence_numbers` document: how far a conversation's flushed state reaches. The log itself is the truth."""

    conversation_id: str = msgspec.field(name="_id")
    last_sequence_number: int
    updated_at: datetime


class DeadLetterQueueEntry(msgspec.Struct, kw_only=True, frozen=True):
    """A record that cannot succeed now for its own reason. `raw`: its bytes, as they lay in shard `shard`.

    `_id` is the hash of what makes two records the same one (conversation, sender and key of a message), or of stream
    and entry where the bytes could not be read. `message`, `conversation_id`, `sender_id` and `idempotency_key` are of
    those that could be. `next_retry_at`: when it is tried next without anybody's doing (null: it waits for a person);
    while retrying, when it is tried again should nothing be heard of this try.

    `refused_at`: since then its sender may have been told for good that it failed; it is never replayed.
    """

    id: str | UnsetType = msgspec.field(name="_id", default=UNSET)
    message: StoredMessage | UnsetType = UNSET
    raw: bytes | UnsetType = UNSET
    shard: int | UnsetType = UNSET
    conversation_id: str | UnsetType = UNSET
    sender_id: str | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET
    error: str
    error_type: DLQErrorType
    retry_count: int
    max_retries: int
    next_retry_at: datetime | None
    created_at: datetime
    last_retry_at: datetime | None
    status: DLQStatus
    resolved_at: datetime | UnsetType = UNSET
    resolved_reason: str | UnsetType = UNSET
    refused_at: datetime | UnsetType = UNSET
    expires_at: datetime


class ConnectionRegistry(msgspec.Struct, kw_only=True, frozen=True):
    """Value of one field (device) of `connection:{user_id}`."""

    instance_id: str
    connection_id: str
    timestamp: int


class Presence(msgspec.Struct, kw_only=True, frozen=True):
    """Value of `presence:{user_id}`; `last_seen` in epoch ms."""

    status: UserStatus
    last_seen: int


class SystemEvent(msgspec.Struct, kw_only=True, frozen=True):
    """JSON content of a system message: one step of a conversation's state, or a change of one of its messages.

    `targets`: user ids, or the id of the one message that an event of `MESSAGE_EVENTS` or `AGENT_EVENTS` is about (none
    for `hidden`, which shows the others only a `commitment`). `until`: epoch ms, 0 for no longer silenced.
    `seconds`: 0 for no longer disappearing. `content`: what an edited message says now, opaque as the message was.
    """

    event: EventKind
    actor: str
    targets: list[str]
    version: int = 1
    roles: dict[str, Role] | UnsetType = UNSET
    title: str | UnsetType = UNSET
    until: int | UnsetType = UNSET
    seconds: int | UnsetType = UNSET
    content: str | UnsetType = UNSET
    emoji: str | UnsetType = UNSET
    commitment: str | UnsetType = UNSET


def to_document(model: msgspec.Struct) -> dict[str, Any]:
    """The BSON-ready mapping of a model: dates and bytes stay what they are."""
    document: dict[str, Any] = msgspec.to_builtins(model, builtin_types=(datetime, bytes))
    return document
