"""Dead letters: records that cannot succeed now for their own reason. Built here, written by the store, called by the
ingest role.
"""

from __future__ import annotations

from datetime import timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from protocol.models import (
    DeadLetterQueueEntry,
    DLQErrorType,
    DLQStatus,
    MessageStatus,
    StoredMessage,
    to_document,
)
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from protocol import records

DEAD_LETTER_DAYS = 7
MAX_RETRIES = 5


def unplaced(record: records.SendMessage, message_id: str, now_ms: int) -> StoredMessage:
    """A message that got no place in its log: sequence 0."""
    return StoredMessage(
        message_id=message_id,
        idempotency_key=record.idempotency_key,
        conversation_id=record.conversation_id,
        sequence_number=0,
        sender_id=record.sender_id,
        receiver_id=record.receiver_id,
        message_type=record.message_type,
        content=record.content,
        timestamp=from_ms(record.timestamp),
        status=MessageStatus.SENT,
        created_at=from_ms(now_ms),
    )


def dead_letter_id(*parts: str) -> str:
    """One dead letter per (conversation, sender, key), or per (stream, entry id) of what could not be read."""
    return "dlq_" + blake2b("\0".join(parts).encode(), digest_size=14).hexdigest()


def dead_letter(
    reason: str,
    error_type: DLQErrorType,
    now_ms: int,
    message: StoredMessage | None = None,
    raw: bytes | None = None,
) -> dict[str, Any]:
    """A `dead_letter_queue` document without its id."""
    now = from_ms(now_ms)
    return to_document(
        DeadLetterQueueEntry(
            message=msgspec.UNSET if message is None else message,
            raw=msgspec.UNSET if raw is None else raw,
            error=reason[:1000],
            error_type=error_type,
            retry_count=0,
            max_retries=MAX_RETRIES,
            next_retry_at=None,
            created_at=now,
            last_retry_at=None,
            status=DLQStatus.PENDING,
            expires_at=now + timedelta(days=DEAD_LETTER_DAYS),
        )
    )
