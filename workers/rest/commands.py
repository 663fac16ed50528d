"""What REST asks of a conversation's owner: records built here, decided there, answered on this instance's down stream.

Every command carries the idempotency key of its log entry. With an `Idempotency-Key` header that key, and a new group's
id, are derived from (actor, header), so a request repeated after a time-out finds the group it made. Messages and their
changes carry the header itself: a key means the same on both doors.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec
import structlog

from protocol import keys, records
from protocol.errors import ErrorCode
from protocol.frames import MessageAckPayload
from protocol.models import SYSTEM_SENDER, Conversation, ConversationType, MessagePayload
from workers.rest.errors import RestError

if TYPE_CHECKING:
    from workers.rest.desk import Desk

log = structlog.get_logger(__name__)

_decode_conversation = msgspec.json.Decoder(Conversation).decode
_decode_ack = msgspec.json.Decoder(MessageAckPayload).decode
Asked = records.GroupCommand | records.SendMessage | records.ChangeMessage
Step = records.SetRole | records.Rename | records.Silence | records.Ban | records.Unban | records.SetDisappearing


def command_id(desk: Desk, actor: str, purpose: str, idempotency_key: str | None) -> str:
    """Key of a command's log entry: fresh, or the same for the same (actor, purpose, header)."""
    if idempotency_key is None:
        return desk.new_id("cmd")
    return "cmd_" + blake2b(f"{actor}\0{purpose}\0{idempotency_key}".encode(), digest_size=14).hexdigest()


def group_key(desk: Desk, actor: str, idempotency_key: str) -> tuple[str, str]:
    """(conversation, key of its first entry) of the group that this header makes."""
    key = command_id(desk, actor, "create", idempotency_key)
    return "conv_" + key.removeprefix("cmd_"), key


def add_key(desk: Desk, actor: str, conversation_id: str, idempotency_key: str | None) -> str:
    """Key of the entry that this header's addition becomes."""
    return command_id(desk, actor, f"add {conversation_id}", idempotency_key)


async def has_entry(desk: Desk, conversation_id: str, key: str) -> bool:
    """Has a command with this key had its effect? Then nothing that has changed since may refuse its repeat. Raises
    StoreUnavailable."""
    return bool(await desk.store.messages.find_keys([(conversation_id, SYSTEM_SENDER, key)]))


async def create(
    desk: Desk,
    actor: str,
    conversation_type: ConversationType,
    participants: list[str],
    agent_id: str,
    title: str,
    plaintext: bool,
    idempotency_key: str | None,
) -> Conversation:
    """Create a conversation, or find the one that this request made before. Raises RestError."""
    if conversation_type is ConversationType.ONE_TO_ONE:
        conversation_id = keys.direct_conversation_id(*participants)
        key = "create"
    elif idempotency_key is None:
        conversation_id = desk.new_id("conv")
        key = "create"
    else:
        conversation_id, key = group_key(desk, actor, idempotency_key)
    record = records.CreateConversation(
        desk.instance.instance_id,
        desk.new_id("req"),
        key,
        conversation_id,
        conversation_type,
        actor,
        participants,
        agent_id,
        title,
        plaintext,
    )
    return await _change_conversation(desk, record)


async def add(
    desk: Desk, actor: str, conversation_id: str, user_ids: list[str], idempotency_key: str | None
) -> Conversation:
    """Add participants; the conversation as it is then. Raises RestError."""
    record = records.AddParticipants(
        desk.instance.instance_id,
        desk.new_id("req"),
        add_key(desk, actor, conversation_id, idempotency_key),
        conversation_id,
        actor,
        user_ids,
    )
    return await _change_conversation(desk, record)


async def remove(
    desk: Desk, actor: str, conversation_id: str, user_id: str, idempotency_key: str | None
) -> Conversation:
    """Remove a participant (oneself: leave); the conversation as it is then. Raises RestError."""
    record = records.RemoveParticipant(
        desk.instance.instance_id,
        desk.new_id("req"),
        command_id(desk, actor, f"remove {conversation_id}", idempotency_key),
        conversation_id,
        actor,
        user_id,
    )
    return await _change_conversation(desk, record)


async def change(desk: Desk, actor: str, conversation_id: str, step: Step, idempotency_key: str | None) -> Conversation:
    """Any other step of a conversation's state; the conversation as it is then. Raises RestError."""
    # The kind and its object make the purpose, so that one request may take several steps under one header.
    purpose = f"{step.__struct_config__.tag} {conversation_id} {getattr(step, 'user_id', '')}"
    record = records.ChangeConversation(
        desk.instance.instance_id,
        desk.new_id("req"),
        command_id(desk, actor, purpose, idempotency_key),
        conversation_id,
        actor,
        step,
    )
    return await _change_conversation(desk, record)


async def send(desk: Desk, sender_id: str, payload: MessagePayload, idempotency_key: str) -> MessageAckPayload:
    """A message, as the WebSocket would publish it; its ack. Raises RestError."""
    record = records.SendMessage(
        desk.instance.instance_id,
        0,
        sender_id,
        "",
        payload.conversation_id,
        "",
        idempotency_key,
        payload.receiver_id,
        payload.content,
        payload.message_type,
        payload.media_url,
        payload.reply_to_message_id,
        payload.timestamp,
        payload.forwarded,
        desk.new_id("req"),
    )
    return _decode_ack(await _decided(desk, record))


async def change_message(
    desk: Desk,
    sender_id: str,
    conversation_id: str,
    message_id: str,
    change: records.Edit | records.Delete | records.React,
    idempotency_key: str | None,
) -> MessageAckPayload:
    """A change of a message; the ack of the entry it became. Raises RestError."""
    record = records.ChangeMessage(
        desk.instance.instance_id,
        0,
        desk.new_id("req"),
        sender_id,
        "",
        conversation_id,
        "",
        idempotency_key or desk.new_id("cmd"),
        message_id,
        change,
    )
    return _decode_ack(await _decided(desk, record))


async def _change_conversation(desk: Desk, record: records.GroupCommand) -> Conversation:
    conversation = _decode_conversation(await _decided(desk, record))
    leaves = isinstance(record, records.RemoveParticipant) and record.user_id == record.actor
    if record.actor not in conversation.participants and not leaves:
        # A repeat of what was done while they were in it: how it stands now is not theirs to know.
        if isinstance(record, records.CreateConversation):
            raise RestError(ErrorCode.CONFLICT, "this key has made a group that you are no longer in")
        raise RestError(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
    return conversation


async def _decided(desk: Desk, record: Asked) -> bytes:
    log.debug("> command", trace=records.trace_of(record), request=record.request)
    shard = keys.shard_of(record.conversation_id, desk.settings.shards)
    outcome = await desk.instance.command(shard, record, desk.settings.command_timeout_seconds)
    if outcome is None:
        raise RestError(ErrorCode.STORAGE_UNAVAILABLE, "not decided in time; repeat with the same Idempotency-Key")
    if outcome.code is not None:
        raise RestError(outcome.code, outcome.message)
    return outcome.body
