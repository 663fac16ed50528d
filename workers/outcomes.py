"""What became of a message or a change of one, in the words of the door it came through: a frame for a connection, a
`CommandOutcome` for a REST request. Called by `plan.py` and `commit.py`. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from protocol import codec, frames, records

if TYPE_CHECKING:
    from protocol.errors import ErrorCode
    from protocol.models import MessageStatus

Asked = records.SendMessage | records.ChangeMessage


def acknowledged(
    record: Asked, message_id: str, sequence_number: int, created_ms: int, status: MessageStatus, *, duplicate: bool
) -> tuple[str, records.DownItem]:
    """It is committed, at this place."""
    payload = frames.MessageAckPayload(
        message_id=message_id,
        sequence_number=sequence_number,
        status=status,
        timestamp=created_ms,
        conversation_id=record.conversation_id,
        idempotency_key=record.idempotency_key,
        duplicate=True if duplicate else msgspec.UNSET,
    )
    if record.request:
        return record.instance, records.CommandOutcome(record.request, None, "", codec.encode_value(payload))
    frame = frames.MessageAck(client_message_id=record.client_message_id, payload=payload)
    return record.instance, records.Outcome(record.connection, record.idempotency_key, codec.JSON.encode(frame))


def refused(
    record: Asked, code: ErrorCode, reason: str, retry_after_ms: int | None = None
) -> tuple[str, records.DownItem]:
    """It will not be committed; with a retryable code: not now."""
    if record.request:
        return record.instance, records.CommandOutcome(record.request, code, reason, b"")
    frame = frames.error_frame(
        code,
        reason,
        client_message_id=record.client_message_id or None,
        idempotency_key=record.idempotency_key,
        conversation_id=record.conversation_id,
        retry_after_ms=retry_after_ms,
    )
    return record.instance, records.Outcome(record.connection, record.idempotency_key, codec.JSON.encode(frame))
