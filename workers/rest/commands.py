"""Conversation commands: built here, decided by the shard's owner, answered on this instance's down stream.

Every command carries the idempotency key of its log entry. With an `Idempotency-Key` header that key, and a new group's
id, are derived from (actor, header), so a request repeated after a time-out finds the group it made.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from protocol import keys, records
from protocol.errors import ErrorCode
from protocol.models import Conversation, ConversationType
from workers.rest.errors import RestError

if TYPE_CHECKING:
    from workers.rest.desk import Desk

_decode_conversation = msgspec.json.Decoder(Conversation).decode


def command_id(desk: Desk, actor: str, purpose: str, idempotency_key: str | None) -> str:
    """Key of a command's log entry: fresh, or the same for the same (actor, purpose, header)."""
    if idempotency_key is None:
        return desk.new_id("cmd")
    return "cmd_" + blake2b(f"{actor}\0{purpose}\0{idempotency_key}".encode(), digest_size=14).hexdigest()


async def create(
    desk: Desk,
    actor: str,
    conversation_type: ConversationType,
    participants: list[str],
    agent_id: str,
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
        key = command_id(desk, actor, "create", idempotency_key)
        conversation_id = "conv_" + key.removeprefix("cmd_")
    record = records.CreateConversation(
        desk.instance.instance_id,
        desk.new_id("req"),
        key,
        conversation_id,
        conversation_type,
        actor,
        participants,
        agent_id,
    )
    return await _send(desk, record)


async def add(
    desk: Desk, actor: str, conversation_id: str, user_ids: list[str], idempotency_key: str | None
) -> Conversation:
    """Add participants; the conversation as it is then. Raises RestError."""
    record = records.AddParticipants(
        desk.instance.instance_id,
        desk.new_id("req"),
        command_id(desk, actor, f"add {conversation_id}", idempotency_key),
        conversation_id,
        actor,
        user_ids,
    )
    return await _send(desk, record)


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
    return await _send(desk, record)


async def _send(desk: Desk, record: records.GroupCommand) -> Conversation:
    shard = keys.shard_of(record.conversation_id, desk.settings.shards)
    outcome = await desk.instance.command(shard, record, desk.settings.command_timeout_seconds)
    if outcome is None:
        raise RestError(ErrorCode.STORAGE_UNAVAILABLE, "not decided in time; repeat with the same Idempotency-Key")
    if outcome.code is not None:
        raise RestError(outcome.code, outcome.message)
    return _decode_conversation(outcome.body)
