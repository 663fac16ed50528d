"""What a session asks of its shell. `session.py` makes them, the gateway's hub carries them out, in order."""

from __future__ import annotations

from typing import Final, assert_never

import msgspec

from protocol import frames, records
from protocol.errors import CloseCode, ErrorCode


class Send(msgspec.Struct, frozen=True, gc=False):
    """Encode this frame in the connection's codec and write it."""

    frame: frames.ServerFrame

    @staticmethod
    def error(
        code: ErrorCode,
        message: str,
        *,
        client_message_id: str | None = None,
        idempotency_key: str | None = None,
        conversation_id: str | None = None,
        retry_after_ms: int | None = None,
        in_reply_to: str | None = None,
    ) -> Send:
        """An `error` frame with the table's `retryable` and only the fields that are known."""
        return Send(
            frames.error_frame(
                code,
                message,
                client_message_id=client_message_id,
                idempotency_key=idempotency_key,
                conversation_id=conversation_id,
                retry_after_ms=retry_after_ms,
                in_reply_to=in_reply_to,
            )
        )


class SendEncoded(msgspec.Struct, frozen=True, gc=False):
    """Write a worker's JSON frame (transcoded for a MessagePack connection)."""

    frame: bytes


class Ping(msgspec.Struct, frozen=True, gc=False):
    """Send a WebSocket ping."""


class Verify(msgspec.Struct, frozen=True, gc=False):
    """Check this token, then call `admit` or `refuse`."""

    payload: frames.AuthPayload


class Attach(msgspec.Struct, frozen=True, gc=False):
    """Register this connection for its user and device, before the `Ask` that follows is published."""

    user_id: str
    device_id: str


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Append this message, or change of one, to its shard; on failure call `publish_failed`."""

    record: records.SendMessage | records.ChangeMessage


class Signal(msgspec.Struct, frozen=True, gc=False):
    """Append this to its shard; if that fails, nobody misses it."""

    record: records.Typing


class Watch(msgspec.Struct, frozen=True, gc=False):
    """Expect a `PresenceAnswer` about these people, and tell this connection of their presence from then on."""

    user_ids: list[str]


class Unwatch(msgspec.Struct, frozen=True, gc=False):
    """Tell this connection no more of these people."""

    user_ids: list[str]


class Acknowledge(msgspec.Struct, frozen=True, gc=False):
    """Hand this receipt to the shard of its messages; may be collected for a few milliseconds."""

    mark: records.DeliveredMark | records.ReadMark


class Ask(msgspec.Struct, frozen=True, gc=False):
    """Publish this query."""

    query: records.Query


class Close(msgspec.Struct, frozen=True, gc=False):
    """Close the WebSocket; nothing follows."""

    code: CloseCode


Command = Send | SendEncoded | Ping | Verify | Attach | Publish | Signal | Watch | Unwatch | Acknowledge | Ask | Close

PING: Final = Ping()


def message_change(
    frame: frames.MessageEdit | frames.MessageDelete | frames.MessageReaction,
) -> records.Edit | records.Delete | records.React:
    """What a frame changes, as the record of its `Publish` says it."""
    match frame:
        case frames.MessageEdit(payload=payload):
            return records.Edit(payload.content)
        case frames.MessageDelete(payload=payload):
            return records.Delete(payload.scope is frames.DeleteScope.ALL)
        case frames.MessageReaction(payload=payload):
            return records.React(payload.emoji, payload.op is frames.ReactionOp.ADD)
        case _:
            assert_never(frame)
