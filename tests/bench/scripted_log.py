"""Server frames for the tests of the simulated client and of the ledger: a log with true digests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET

from protocol import codec, frames
from protocol.models import SYSTEM_SENDER, EventKind, MessageStatus, MessageType, StoredMessage, SystemEvent
from protocol.watermarks import NO_DIGEST, chain_digest, content_hash

CONVERSATION = "conv_1"
WHEN = datetime(2026, 11, 22, 18, tzinfo=UTC)


def stored(sequence: int, sender: str, content: str, *, message_id: str | None = None) -> StoredMessage:
    """A committed text message, or a system message where the sender is `system`."""
    is_system = sender == SYSTEM_SENDER
    return StoredMessage(
        message_id=message_id or f"msg_{sequence}",
        conversation_id=CONVERSATION,
        sequence_number=sequence,
        sender_id=sender,
        receiver_id=CONVERSATION,
        message_type=MessageType.SYSTEM if is_system else MessageType.TEXT,
        content=content,
        timestamp=WHEN,
        status=MessageStatus.SENT,
        created_at=WHEN,
    )


def system(sequence: int, event: str, *targets: str, actor: str | None = None, **fields: Any) -> StoredMessage:
    """An entry that changes the group; by the first of those it is about, where nobody else is named."""
    said = SystemEvent(event=EventKind(event), actor=actor or targets[0], targets=list(targets), **fields)
    return stored(sequence, SYSTEM_SENDER, codec.encode_value(said).decode())


def changed(
    sequence: int, event: EventKind, actor: str, target: str, *, shown_target: bool = True, **fields: Any
) -> StoredMessage:
    """An entry that changes the message `target`. A `hidden` one names neither actor nor target, but to its actor."""
    named = [] if event is EventKind.HIDDEN else [target]
    who = "" if event is EventKind.HIDDEN else actor
    content = codec.encode_value(SystemEvent(event=event, actor=who, targets=named, **fields)).decode()
    message = stored(sequence, SYSTEM_SENDER, content)
    return msgspec.structs.replace(message, target_message_id=target) if shown_target else message


def edited(message: StoredMessage, content: str) -> StoredMessage:
    """The message as it is shown after an edit."""
    return msgspec.structs.replace(message, content=content, edited_at=WHEN, content_hash=original(message))


def erased(message: StoredMessage) -> StoredMessage:
    """The message as it is shown once it is deleted."""
    return msgspec.structs.replace(message, content="", deleted_at=WHEN, content_hash=original(message))


def original(message: StoredMessage) -> str:
    if isinstance(message.content_hash, str):
        return message.content_hash
    return content_hash(message.content).hex()


def payload(*messages: StoredMessage, origin: str = "live", through: int | None = None) -> frames.MessagesPayload:
    """The payload that carries these messages and accounts for first..last (or ..`through`)."""
    last = messages[-1].sequence_number if through is None else through
    return frames.MessagesPayload(
        conversation_id=CONVERSATION,
        messages=list(messages),
        origin=origin,
        from_sequence=messages[0].sequence_number,
        to_sequence=last,
    )


def pushed(*messages: StoredMessage, origin: str = "live") -> frames.Messages:
    return frames.Messages(payload=payload(*messages, origin=origin))


def accounted(first: int, last: int) -> frames.Messages:
    """The answer to a `retransmit` of a range of which this member may see nothing."""
    return frames.Messages(
        payload=frames.MessagesPayload(
            conversation_id=CONVERSATION, messages=[], origin="retransmit", from_sequence=first, to_sequence=last
        )
    )


def ack(key: str, sequence: int, *, message_id: str | None = None, duplicate: bool = False) -> frames.MessageAck:
    return frames.MessageAck(
        client_message_id="",
        payload=frames.MessageAckPayload(
            message_id=message_id or f"msg_{sequence}",
            sequence_number=sequence,
            status=MessageStatus.SENT,
            timestamp=0,
            conversation_id=CONVERSATION,
            idempotency_key=key,
            duplicate=duplicate or UNSET,
        ),
    )


def digest_of(*messages: StoredMessage) -> bytes:
    digest = NO_DIGEST
    for message in messages:
        assert isinstance(message.message_id, str)
        digest = chain_digest(
            digest, message.message_id, message.sender_id, message.sequence_number, content_hash(message.content)
        )
    return digest


def sync_complete(sequence: int, digest: bytes) -> frames.SyncComplete:
    return frames.SyncComplete(
        payload=frames.SyncCompletePayload(
            heads={CONVERSATION: frames.Head(sequence_number=sequence, digest=digest.hex())},
            unread_count=0,
            server_time=0,
        )
    )


AUTH_SUCCESS = frames.AuthSuccess(payload=frames.AuthSuccessPayload(session_id="sess_1", server_time=0, unread_count=0))
