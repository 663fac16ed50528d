"""The load driver's frames: what it sends is cut from templates, what it receives is decoded as far as it is checked.

Called by `driver`. Both codecs go the same way: a frame is encoded once with a placeholder of the final length, and the
placeholder is replaced by joining the pieces around it, which is one call in C per message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from bench.tally import MARK_DIGITS
from protocol import frames
from protocol.keys import MESSAGE_ID_LENGTH
from protocol.models import MessagePayload, MessageType

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.codec import FrameCodec

_MARK: Final = "#" * MARK_DIGITS
_MESSAGE_ID: Final = "#" * MESSAGE_ID_LENGTH


def message_template(
    codec: FrameCodec, conversation_id: str, receiver_id: str, content_bytes: int, run: str, now_ms: int
) -> Callable[[bytes], bytes]:
    """Mark (`MARK_DIGITS` digits) → a `message` frame of `content_bytes` content that carries it three times."""
    frame = frames.Message(
        client_message_id=_MARK,
        idempotency_key=f"{run}-{_MARK}",
        payload=MessagePayload(
            conversation_id=conversation_id,
            receiver_id=receiver_id,
            content=_MARK.ljust(content_bytes, "x"),
            message_type=MessageType.TEXT,
            timestamp=now_ms,
        ),
    )
    return _joiner(codec.encode(frame), _MARK)


def delivery_ack_template(codec: FrameCodec, now_ms: int) -> Callable[[bytes], bytes]:
    """Message id → a `delivery_ack` frame."""
    return _joiner(codec.encode(frames.DeliveryAck(message_id=_MESSAGE_ID, timestamp=now_ms)), _MESSAGE_ID)


def _joiner(encoded: bytes, placeholder: str) -> Callable[[bytes], bytes]:
    pieces = encoded.split(placeholder.encode())

    def fill(value: bytes) -> bytes:
        return value.join(pieces)

    return fill


# --- server to client, cut down to what is checked -------------------------------------------------------------------


class _Lean(msgspec.Struct, tag_field="type", gc=False):
    """A server frame; fields that are not named here are skipped by the decoder."""


class AckPayload(msgspec.Struct, gc=False):
    message_id: str
    sequence_number: int


class Ack(_Lean, tag="message_ack", gc=False):
    client_message_id: str
    payload: AckPayload


class Row(msgspec.Struct, gc=False):
    message_id: str = msgspec.field(name="_id")
    sequence_number: int
    content: str
    sender_id: str


class MessagesPayload(msgspec.Struct, gc=False):
    messages: list[Row]
    origin: str = "live"
    from_sequence: int = 0
    to_sequence: int = 0


class Messages(_Lean, tag="messages", gc=False):
    payload: MessagesPayload


class ReceiptPayload(msgspec.Struct, gc=False):
    delivered_through: int = 0
    read_through: int = 0


class Receipt(_Lean, tag="receipt_update", gc=False):
    payload: ReceiptPayload


class HeartbeatAck(_Lean, tag="heartbeat_ack", gc=False):
    pass


class SyncComplete(_Lean, tag="sync_complete", gc=False):
    pass


class AuthSuccess(_Lean, tag="auth_success", gc=False):
    pass


class AuthError(_Lean, tag="auth_error", gc=False):
    error: str


class ConversationUpdate(_Lean, tag="conversation_update", gc=False):
    pass


class Typing(_Lean, tag="typing", gc=False):
    pass


class Presence(_Lean, tag="presence", gc=False):
    pass


class AgentProgress(_Lean, tag="agent_progress", gc=False):
    pass


class ErrorPayload(msgspec.Struct, gc=False):
    code: str
    message: str
    retryable: bool = False
    client_message_id: str | UnsetType = UNSET
    retry_after_ms: int = 0


class Error(_Lean, tag="error", gc=False):
    payload: ErrorPayload


LeanFrame = (
    Ack
    | Messages
    | Receipt
    | HeartbeatAck
    | SyncComplete
    | AuthSuccess
    | AuthError
    | ConversationUpdate
    | Typing
    | Presence
    | AgentProgress
    | Error
)


def lean_decoder(codec: FrameCodec) -> Callable[[bytes | memoryview], LeanFrame]:
    """Payload of one data frame → the frame. Raises msgspec.DecodeError on what it does not know."""
    decoder: Any = msgspec.msgpack.Decoder if codec.binary else msgspec.json.Decoder
    decode: Callable[[bytes | memoryview], LeanFrame] = decoder(LeanFrame).decode
    return decode
