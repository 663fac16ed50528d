"""Changes of a message: who may edit, delete and react, when, and the entry each becomes. Pure; called by `plan.py`.

An edit, a deletion for all and a reaction name their target. A deletion for oneself is private: its entry shows the
others a commitment, with which its author can prove later what it was.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final, assert_never

from protocol import records
from protocol.errors import ErrorCode
from protocol.models import EventKind, SystemEvent
from workers.groups import ADMINS, Change, NoChange, Refused, Verdict, check_speech

if TYPE_CHECKING:
    from workers.conversations import Member, Owned
    from workers.store.changes import Target

REACTIONS_EACH: Final = 10
"""Different emojis of one user on one message."""
_NOT_FOUND: Final = Refused(ErrorCode.NOT_FOUND, "no such message")


def event_of(record: records.ChangeMessage) -> SystemEvent:
    """What the entry says, if the change may happen: the record alone decides, so a repeat says the same."""
    targets = [record.message_id]
    match record.change:
        case records.Edit(content):
            return SystemEvent(event=EventKind.EDITED, actor=record.sender_id, targets=targets, content=content)
        case records.Delete(for_all):
            if for_all:
                return SystemEvent(event=EventKind.DELETED, actor=record.sender_id, targets=targets)
            return SystemEvent(event=EventKind.HIDDEN, actor="", targets=[], commitment=_commitment(record))
        case records.React(emoji, add):
            kind = EventKind.REACTED if add else EventKind.UNREACTED
            return SystemEvent(event=kind, actor=record.sender_id, targets=targets, emoji=emoji)
        case _:
            assert_never(record.change)


def _commitment(record: records.ChangeMessage) -> str:
    text = f"{record.sender_id}\0{record.idempotency_key}\0{record.message_id}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def decide(
    record: records.ChangeMessage, owned: Owned, target: Target | None, now_ms: int, edit_seconds: int
) -> Verdict:
    """May this happen now?"""
    member = owned.members.get(record.sender_id)
    if member is None:
        return Refused(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
    if target is None or not _is_there(target, owned, member, now_ms):
        return _NOT_FOUND
    change = record.change
    if isinstance(change, records.Delete):
        return _decide_delete(record, change, owned, member, target)
    if record.sender_id in target.hidden_by:
        return _NOT_FOUND
    if isinstance(change, records.Edit) and target.sender_id != record.sender_id:
        return Refused(ErrorCode.FORBIDDEN, "only its sender edits a message")
    if (silence := check_speech(owned, member, now_ms)) is not None:
        return silence
    if isinstance(change, records.Edit):
        return _decide_edit(record, target, now_ms, edit_seconds)
    return _decide_reaction(record, change, target)


def _is_there(target: Target, owned: Owned, member: Member, now_ms: int) -> bool:
    return (
        target.conversation_id == owned.conversation_id
        and target.sequence_number >= member.join_seq
        and not target.is_system
        and not target.deleted
        and not 0 < target.expires_ms <= now_ms
    )


def _decide_delete(
    record: records.ChangeMessage, change: records.Delete, owned: Owned, member: Member, target: Target
) -> Verdict:
    if not change.for_all:
        return NoChange() if record.sender_id in target.hidden_by else Change(event_of(record))
    if target.sender_id != record.sender_id and not (owned.is_group and member.role in ADMINS):
        return Refused(ErrorCode.FORBIDDEN, "only its sender, or an owner or admin, deletes a message for all")
    return Change(event_of(record))


def _decide_edit(record: records.ChangeMessage, target: Target, now_ms: int, edit_seconds: int) -> Verdict:
    if not target.has_content:
        return Refused(ErrorCode.VALIDATION_FAILED, "this message has no content to edit")
    if now_ms > target.created_ms + edit_seconds * 1000:
        return Refused(ErrorCode.TOO_LATE, f"a message can be edited for {edit_seconds} s")
    return Change(event_of(record))


def _decide_reaction(record: records.ChangeMessage, change: records.React, target: Target) -> Verdict:
    if ((record.sender_id, change.emoji) in target.reactions) is change.add:
        return NoChange()
    if change.add and sum(user_id == record.sender_id for user_id, _ in target.reactions) >= REACTIONS_EACH:
        return Refused(ErrorCode.VALIDATION_FAILED, f"at most {REACTIONS_EACH} reactions of one user on one message")
    return Change(event_of(record))


def move_on(target: Target, record: records.ChangeMessage) -> None:
    """The change is planned: later ones of the batch meet the target as it is then."""
    match record.change:
        case records.Edit(content):
            target.has_content = bool(content)
        case records.Delete(for_all):
            if for_all:
                target.deleted = True
            else:
                target.hidden_by.add(record.sender_id)
        case records.React(emoji, add):
            (target.reactions.add if add else target.reactions.discard)((record.sender_id, emoji))
        case _:
            assert_never(record.change)
