"""A message before and after it takes its place in the log: the draft, the message as the others see it, the document.

Called by `plan.py`. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import UNSET

from protocol.models import MessageStatus, MessageType, StoredMessage
from protocol.watermarks import content_hash
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from protocol.records import SendMessage
    from workers.conversations import Owned


class Draft(NamedTuple):
    """A message that may be written, without its place. `key`: of its sender, or the id of a command.

    `expires_ms`: 0 for never. `keeps_hash`: its content may go one day, so the hash of it is stored from the start.
    """

    sender_id: str
    receiver_id: str
    message_type: MessageType
    content: str
    hashed: bytes
    key: str
    timestamp_ms: int
    media_url: str | None = None
    reply_to: str | None = None
    forwarded: bool = False
    expires_ms: int = 0
    keeps_hash: bool = False
    target_id: str = ""
    hidden_for: str = ""
    hidden_by: frozenset[str] = frozenset()
    request_hash: bytes = b""
    """Of a command: what was asked for, where the entry says what came of it."""
    has_event: bool = False
    """Somebody listens: the document is its event's outbox entry too (`store.events`)."""


def of_message(record: SendMessage, owned: Owned, now_ms: int, *, has_event: bool) -> Draft:
    """What a client has sent, once it is allowed."""
    seconds = owned.disappearing_seconds
    return Draft(
        record.sender_id,
        record.receiver_id or owned.default_receiver(record.sender_id),
        record.message_type,
        record.content,
        content_hash(record.content),
        record.idempotency_key,
        record.timestamp,
        record.media_url,
        record.reply_to_message_id,
        record.forwarded,
        max(now_ms, owned.created_ms) + seconds * 1000 if seconds else 0,
        seconds > 0,
        has_event=has_event,
    )


def place(draft: Draft, message_id: str, owned: Owned) -> StoredMessage:
    """The message at the conversation's head, as the others see it."""
    return StoredMessage(
        message_id=message_id,
        conversation_id=owned.conversation_id,
        sequence_number=owned.last,
        sender_id=draft.sender_id,
        receiver_id=draft.receiver_id,
        message_type=draft.message_type,
        content=draft.content,
        media_url=UNSET if draft.media_url is None else draft.media_url,
        reply_to_message_id=UNSET if draft.reply_to is None else draft.reply_to,
        timestamp=from_ms(draft.timestamp_ms),
        status=MessageStatus.SENT,
        created_at=from_ms(owned.created_ms),
        forwarded=True if draft.forwarded else UNSET,
        target_message_id=draft.target_id or UNSET,
        expires_at=from_ms(draft.expires_ms) if draft.expires_ms else UNSET,
        content_hash=draft.hashed.hex() if draft.keeps_hash else UNSET,
    )


def document(message: StoredMessage, draft: Draft, owned: Owned) -> dict[str, Any]:
    """The `messages` document of a message that has just taken its place (see `models.MessageDocument`)."""
    stored: dict[str, Any] = {
        "_id": message.message_id,
        "idempotency_key": draft.key,
        "conversation_id": message.conversation_id,
        "sequence_number": message.sequence_number,
        "sender_id": draft.sender_id,
        "receiver_id": draft.receiver_id,
        "type": draft.message_type.value,
        "content": draft.content,
        "timestamp": message.timestamp,
        "status": "sent",
        "created_at": message.created_at,
        "digest": owned.digest,
        "countable": owned.countable,
    }
    if draft.media_url is not None:
        stored["media_url"] = draft.media_url
    if draft.reply_to is not None:
        stored["reply_to_message_id"] = draft.reply_to
    if draft.forwarded:
        stored["forwarded"] = True
    if draft.expires_ms:
        stored["expires_at"] = stored["erase_at"] = message.expires_at
    if draft.keeps_hash:
        stored["content_hash"] = message.content_hash
    if draft.request_hash:
        stored["request_hash"] = draft.request_hash
    if draft.has_event:
        stored["event_due"] = message.created_at
    if draft.target_id:
        stored["target_message_id"] = draft.target_id
    if draft.hidden_for:
        stored["hidden_for"] = draft.hidden_for
    if draft.hidden_by:
        stored["hidden_by"] = sorted(draft.hidden_by)
    return stored
