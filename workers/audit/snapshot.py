"""What an audit looks at: stored documents and the state of the streams, at one moment, as plain values.

Made by `command.py` from the servers, conversation by conversation; `of_documents` makes one from a twin of the store.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from protocol.models import SYSTEM_SENDER, ConversationType, DLQStatus, MessageStatus, MessageType, Reaction, Role
from protocol.watermarks import content_hash
from workers.store.indexes import DAY_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Document = dict[str, Any]
RETENTION_SECONDS: Final = 90 * DAY_SECONDS


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the checks need of a `messages` document."""

    message_id: str = msgspec.field(name="_id")
    conversation_id: str
    sequence_number: int
    sender_id: str
    idempotency_key: str
    message_type: MessageType = msgspec.field(name="type")
    content: str
    status: MessageStatus
    created_at: datetime
    digest: bytes
    countable: int
    media_url: str | None = None
    content_hash: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")] | None = None
    target_message_id: str | None = None
    hidden_for: str | None = None
    hidden_by: list[str] = []
    reactions: list[Reaction] = []
    edited_seq: int | None = None
    changed_seq: int | None = None
    edited_at: datetime | None = None
    deleted_at: datetime | None = None
    expires_at: datetime | None = None

    @property
    def is_system(self) -> bool:
        return self.message_type is MessageType.SYSTEM

    @property
    def original(self) -> str:
        """Hash of what was committed here, hexadecimal."""
        return content_hash(self.content).hex() if self.content_hash is None else self.content_hash


ENTRY_FIELDS: Final = [field.encode_name for field in msgspec.structs.fields(Entry)]


class ConversationState(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks need of a `conversations` document."""

    conversation_type: ConversationType = msgspec.field(name="type")
    participants: list[str]
    last_sequence_number: int
    created_at: datetime
    title: str = ""
    disappearing_seconds: int = 0
    banned: list[str] = []
    membership_seq: int = 0


class Counter(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks need of a `sequence_numbers` document."""

    last_sequence_number: int
    countable: int
    digest: bytes


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks need of a `memberships` document."""

    user_id: str
    role: Role
    join_seq: int
    leave_seq: int | None = None
    delivered_seq: int
    read_seq: int
    read_countable: int
    devices: dict[str, int] = {}
    silenced_until: datetime | None = None
    hide_reads: bool = False


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a conversation but its log. None: there is no such document."""

    conversation_id: str
    conversation: Document | None = None
    counter: Document | None = None
    """Of `sequence_numbers`."""
    memberships: list[Document] = []


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation and its `messages` documents, ascending by sequence number."""

    head: Head
    messages: list[Document]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An `idempotency_keys` document, and the `messages` document it names (None: gone or never there)."""

    record: Document
    message: Document | None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A `dead_letter_queue` document; `message_id`: of the stored message with its key, None where there is none."""

    document: Document
    message_id: str | None


class ShardQueue(msgspec.Struct, frozen=True, kw_only=True):
    """One shard's ingest stream: entries in it, read and not acknowledged, not read yet; consumers of its group."""

    shard: int
    length: int
    pending: int
    unread: int
    consumers: int


class Amount(msgspec.Struct, frozen=True, kw_only=True):
    """Something in Redis that has a bound."""

    what: str
    value: int
    limit: int


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A user whom Redis shows online although no living instance has a connection of theirs. `seconds`: since when at
    least."""

    user_id: str
    seconds: float


class Queues(msgspec.Struct, frozen=True, kw_only=True):
    """What Redis holds. `ghosts` None: no worker lives that would bury them."""

    shards: list[ShardQueue] = []
    amounts: list[Amount] = []
    ghosts: list[Shown] | None = None


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How to judge. `settled`: nothing moves any more, so what is flushed later must be flushed by now.

    `retention_seconds`: of `messages`; what is younger cannot have been removed by it.
    """

    taken_at: datetime
    settled: bool = True
    retention_seconds: int = RETENTION_SECONDS


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All of it at once, for the pure `audit`. `indexes`: collection → its indexes; None: not looked at."""

    setting: Setting
    logs: list[Log]
    keys: list[KeyRecord] = []
    dead_letters: list[DeadLetter] = []
    indexes: dict[str, list[Document]] | None = None
    queues: Queues | None = None


def of_documents(setting: Setting, collections: Mapping[str, Iterable[Document]], queues: Queues | None) -> Snapshot:
    """A snapshot of whole collections by name, as a twin of the store holds them."""
    messages: dict[str, list[Document]] = {}
    by_id: dict[str, Document] = {}
    by_key: dict[tuple[str, str, str], str] = {}
    for document in collections.get("messages", ()):
        messages.setdefault(document["conversation_id"], []).append(document)
        by_id[document["_id"]] = document
        by_key[key_of(document)] = document["_id"]
    conversations = {document["_id"]: document for document in collections.get("conversations", ())}
    counters = {document["_id"]: document for document in collections.get("sequence_numbers", ())}
    members: dict[str, list[Document]] = {}
    for document in collections.get("memberships", ()):
        members.setdefault(document["conversation_id"], []).append(document)
    names = sorted({*messages, *conversations, *counters, *members})
    logs = [
        Log(
            head=Head(
                conversation_id=name,
                conversation=conversations.get(name),
                counter=counters.get(name),
                memberships=members.get(name, []),
            ),
            messages=sorted(messages.get(name, []), key=lambda document: document["sequence_number"]),
        )
        for name in names
    ]
    keys = [
        KeyRecord(record=record, message=by_id.get(record["message_id"]))
        for record in collections.get("idempotency_keys", ())
    ]
    dead_letters = []
    for document in collections.get("dead_letter_queue", ()):
        key = letter_key(document)
        dead_letters.append(DeadLetter(document=document, message_id=None if key is None else by_key.get(key)))
    return Snapshot(setting=setting, logs=logs, keys=keys, dead_letters=dead_letters, queues=queues)


def key_of(document: Document) -> tuple[str, str, str]:
    """(conversation, sender, key) of a message."""
    return document["conversation_id"], document["sender_id"], document["idempotency_key"]


def letter_key(document: Document) -> tuple[str, str, str] | None:
    """(conversation, sender, key) of the log entry that a dead letter would become; None where that is not known. A
    change of a message lies in the log under the server's name (`workers/plan.py`)."""
    message = document.get("message", {})
    names = [document.get(name) or message.get(name) for name in ("conversation_id", "sender_id", "idempotency_key")]
    conversation_id, sender_id, key = names
    if not (isinstance(conversation_id, str) and isinstance(sender_id, str) and isinstance(key, str)):
        return None
    if not message and sender_id != SYSTEM_SENDER:
        return conversation_id, SYSTEM_SENDER, f"{sender_id}:{key}"
    return conversation_id, sender_id, key


def author_of(entry: Entry) -> tuple[str, str] | None:
    """(user, key) that an entry was sent with, as the user named it; None for what the server says itself."""
    if entry.sender_id != SYSTEM_SENDER:
        return entry.sender_id, entry.idempotency_key
    if entry.target_message_id is None:
        return None
    user_id, _, key = entry.idempotency_key.partition(":")
    return user_id, key


OPEN_LETTERS: Final = frozenset((DLQStatus.PENDING.value, DLQStatus.RETRYING.value, DLQStatus.FAILED.value))
