"""Group commands: who may create, add and remove, and the system message each becomes. Pure; called by `ingest.py`
while it plans.

Commands travel the same stream as messages, so membership and messages are totally ordered and the cap of 100 is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from protocol import records
from protocol.errors import ErrorCode
from protocol.models import (
    GROUP_LIMIT,
    SYSTEM_SENDER,
    Conversation,
    ConversationType,
    EventKind,
    Membership,
    Role,
    SystemEvent,
)
from workers.store.conversations import new_membership

if TYPE_CHECKING:
    from datetime import datetime

    from workers.conversations import Owned


class Refused(NamedTuple):
    """Why a command has no effect."""

    code: ErrorCode
    message: str


class NoChange(NamedTuple):
    """The command asks for what is already so."""


class Change(NamedTuple):
    """The command becomes this system message."""

    event: SystemEvent


Verdict = Refused | NoChange | Change

_ADMINS = frozenset((Role.OWNER, Role.ADMIN))


def check_create(record: records.CreateConversation) -> Refused | None:
    """The bounds of a new conversation, whoever made the record."""
    participants = set(record.participants)
    if record.conversation_type is ConversationType.ONE_TO_ONE:
        if len(participants) != 2:
            return Refused(ErrorCode.VALIDATION_FAILED, "a 1:1 conversation has two participants")
    elif len(participants) > GROUP_LIMIT:
        return Refused(ErrorCode.GROUP_FULL, f"a group has at most {GROUP_LIMIT} participants")
    if record.actor not in participants:
        return Refused(ErrorCode.VALIDATION_FAILED, "the creator must be a participant")
    return None


def new_conversation(record: records.CreateConversation, created_at: datetime) -> Conversation:
    """The conversation a create command asks for; `user_id` is its creator, as in the seed."""
    return Conversation(
        conversation_id=record.conversation_id,
        user_id=record.actor,
        agent_id=record.agent_id,
        conversation_type=record.conversation_type,
        participants=list(dict.fromkeys(record.participants)),
        last_sequence_number=0,
        created_at=created_at,
    )


def first_members(record: records.CreateConversation) -> list[Membership]:
    """Both sides of a new 1:1 conversation: they see it from its first message on."""
    return [
        new_membership(record.conversation_id, user_id, Role.MEMBER, 1, 0)
        for user_id in dict.fromkeys(record.participants)
    ]


def created_event(record: records.CreateConversation) -> SystemEvent:
    """The first entry of a group's log."""
    return SystemEvent(event=EventKind.CREATED, actor=record.actor, targets=list(dict.fromkeys(record.participants)))


def decide(record: records.AddParticipants | records.RemoveParticipant, owned: Owned) -> Verdict:
    """May this happen now, and what is it called?"""
    if not owned.is_group:
        return Refused(ErrorCode.FORBIDDEN, "a 1:1 conversation keeps its two participants")
    actor = owned.members.get(record.actor)
    if actor is None and record.actor != SYSTEM_SENDER:
        return Refused(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
    may_manage = actor is None or actor.role in _ADMINS
    if isinstance(record, records.AddParticipants):
        return _decide_add(record, owned, may_manage)
    return _decide_remove(record, owned, may_manage)


def _decide_add(record: records.AddParticipants, owned: Owned, may_manage: bool) -> Verdict:
    if not may_manage:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin adds participants")
    fresh = [user_id for user_id in dict.fromkeys(record.user_ids) if user_id not in owned.members]
    if not fresh:
        return NoChange()
    if len(owned.members) + len(fresh) > GROUP_LIMIT:
        return Refused(ErrorCode.GROUP_FULL, f"a group has at most {GROUP_LIMIT} participants")
    return Change(SystemEvent(event=EventKind.ADDED, actor=record.actor, targets=fresh))


def _decide_remove(record: records.RemoveParticipant, owned: Owned, may_manage: bool) -> Verdict:
    target = owned.members.get(record.user_id)
    if target is None:
        return Refused(ErrorCode.NOT_FOUND, "not a participant")
    leaves = record.user_id == record.actor
    if not leaves and not may_manage:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin removes participants")
    others = [member for member in owned.members.values() if member is not target]
    roles: dict[str, Role] = {}
    if target.role is Role.OWNER and others and not any(member.role is Role.OWNER for member in others):
        # Somebody must be able to manage the group: the admin, else the member, who has been there longest.
        heir = min(others, key=lambda member: (member.role is not Role.ADMIN, member.join_seq))
        roles[heir.user_id] = Role.OWNER
    return Change(
        SystemEvent(
            event=EventKind.LEFT if leaves else EventKind.REMOVED,
            actor=record.actor,
            targets=[record.user_id],
            roles=roles or msgspec.UNSET,
        )
    )
