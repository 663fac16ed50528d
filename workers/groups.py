"""Commands about a conversation: who may do what in it, and the system message each becomes. Pure; called by `plan.py`.

Owners outrank admins, admins outrank members: who removes, silences or bans somebody must outrank them.

Commands travel the same stream as messages, so membership and messages are totally ordered and the cap of 100 is exact.
"""

from __future__ import annotations

import unicodedata
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple, assert_never

import msgspec

from protocol import codec, records
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

    from msgspec import UnsetType

    from workers.conversations import Member, Owned


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

ADMINS: Final = frozenset((Role.OWNER, Role.ADMIN))
TITLE_LIMIT: Final = 128
"""Characters."""
LONGEST_DISAPPEARING_SECONDS: Final = 31_536_000
BANNED_LIMIT: Final = 1000
"""Users one group may keep out: all of them are written with each ban."""
_RANKS: Final = {Role.MEMBER: 0, Role.ADMIN: 1, Role.OWNER: 2}
_SYSTEM_RANK: Final = 3
_LAST_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999 (`protocol.models.EpochMs`)."""


def check_create(record: records.CreateConversation) -> Refused | None:
    """The bounds of a new conversation, whoever made the record."""
    participants = set(record.participants)
    if record.conversation_type is ConversationType.ONE_TO_ONE:
        if len(participants) != 2:
            return Refused(ErrorCode.VALIDATION_FAILED, "a 1:1 conversation has two participants")
        if record.title:
            return Refused(ErrorCode.VALIDATION_FAILED, "a 1:1 conversation has no title")
    elif len(participants) > GROUP_LIMIT:
        return Refused(ErrorCode.GROUP_FULL, f"a group has at most {GROUP_LIMIT} participants")
    if record.actor not in participants:
        return Refused(ErrorCode.VALIDATION_FAILED, "the creator must be a participant")
    return _check_title(record.title)


def _check_title(title: str) -> Refused | None:
    if len(title) > TITLE_LIMIT:
        return Refused(ErrorCode.VALIDATION_FAILED, f"a title has at most {TITLE_LIMIT} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in title):
        return Refused(ErrorCode.VALIDATION_FAILED, "a title has no control characters")
    return None


_BLOCKED: Final = Refused(ErrorCode.BLOCKED, "one of you has blocked the other")


def check_speech(owned: Owned, member: Member, now_ms: int) -> Refused | None:
    """May this member say something now? Deleting is no speech."""
    if owned.blocked:
        return _BLOCKED
    if member.silenced_until > now_ms:
        return Refused(ErrorCode.MUTED, "you may not speak here now")
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
        title=record.title or msgspec.UNSET,
        plaintext=True if record.plaintext else msgspec.UNSET,
    )


def first_members(record: records.CreateConversation) -> list[Membership]:
    """Both sides of a new 1:1 conversation: they see it from its first message on."""
    return [
        new_membership(record.conversation_id, user_id, Role.MEMBER, 1, 0)
        for user_id in dict.fromkeys(record.participants)
    ]


def created_event(record: records.CreateConversation) -> SystemEvent:
    """The first entry of a group's log."""
    return SystemEvent(
        event=EventKind.CREATED,
        actor=record.actor,
        targets=list(dict.fromkeys(record.participants)),
        title=record.title or msgspec.UNSET,
    )


def request_hash(record: records.GroupCommand) -> bytes:
    """BLAKE2b-128 of what a command asks for, whoever waits for its answer: one key asks for one thing."""
    asked = codec.encode_record(msgspec.structs.replace(record, instance="", request=""))
    return blake2b(asked, digest_size=16).digest()


Command = records.AddParticipants | records.RemoveParticipant | records.ChangeConversation


def decide(record: Command, owned: Owned) -> Verdict:
    """May this happen now, and what is it called?"""
    actor = owned.members.get(record.actor)
    if actor is None and record.actor != SYSTEM_SENDER:
        return Refused(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
    rank = _SYSTEM_RANK if actor is None else _RANKS[actor.role]
    if isinstance(record, records.ChangeConversation):
        return _decide_change(record, owned, rank)
    if not owned.is_group:
        return _PAIR
    if isinstance(record, records.AddParticipants):
        return _decide_add(record, owned, rank)
    return _decide_remove(record, owned, rank)


_PAIR: Final = Refused(ErrorCode.FORBIDDEN, "a 1:1 conversation keeps its two participants")
_NOT_HERE: Final = Refused(ErrorCode.NOT_FOUND, "not a participant")


def _decide_add(record: records.AddParticipants, owned: Owned, rank: int) -> Verdict:
    if rank < _RANKS[Role.ADMIN]:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin adds participants")
    fresh = [user_id for user_id in dict.fromkeys(record.user_ids) if user_id not in owned.members]
    if not fresh:
        return NoChange()
    if not owned.banned.isdisjoint(fresh):
        return Refused(ErrorCode.BANNED, "who is banned cannot be added")
    if len(owned.members) + len(fresh) > GROUP_LIMIT:
        return Refused(ErrorCode.GROUP_FULL, f"a group has at most {GROUP_LIMIT} participants")
    return Change(SystemEvent(event=EventKind.ADDED, actor=record.actor, targets=fresh))


def _decide_remove(record: records.RemoveParticipant, owned: Owned, rank: int) -> Verdict:
    target = owned.members.get(record.user_id)
    if target is None:
        return _NOT_HERE
    leaves = record.user_id == record.actor
    if not leaves and (refused := _check_rank(rank, target)) is not None:
        return refused
    return Change(
        SystemEvent(
            event=EventKind.LEFT if leaves else EventKind.REMOVED,
            actor=record.actor,
            targets=[record.user_id],
            roles=_heir(owned, target),
        )
    )


def _check_rank(rank: int, target: Member) -> Refused | None:
    if rank < _RANKS[Role.ADMIN]:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin does that")
    if rank <= _RANKS[target.role]:
        return Refused(ErrorCode.FORBIDDEN, "only who outranks them does that")
    return None


def _heir(owned: Owned, target: Member) -> dict[str, Role] | UnsetType:
    """Somebody must be able to manage the group: the admin, else the member, who has been there longest."""
    others = [member for member in owned.members.values() if member is not target]
    if target.role is not Role.OWNER or not others or any(member.role is Role.OWNER for member in others):
        return msgspec.UNSET
    heir = min(others, key=lambda member: (member.role is not Role.ADMIN, member.join_seq))
    return {heir.user_id: Role.OWNER}


def _decide_change(record: records.ChangeConversation, owned: Owned, rank: int) -> Verdict:
    change = record.change
    if isinstance(change, records.SetDisappearing):
        return _decide_disappearing(record, change, owned, rank)
    if isinstance(change, records.AgentNotice):
        kind = EventKind.AGENT_FAILED if change.in_time else EventKind.AGENT_TIMEOUT
        return Change(SystemEvent(event=kind, actor=record.actor, targets=[change.message_id]))
    if not owned.is_group:
        return Refused(ErrorCode.FORBIDDEN, "a 1:1 conversation has nothing to manage")
    match change:
        case records.SetRole():
            return _decide_role(record, change, owned, rank)
        case records.Rename():
            return _decide_rename(record, change, owned, rank)
        case records.Silence():
            return _decide_silence(record, change, owned, rank)
        case records.Ban():
            return _decide_ban(record, change, owned, rank)
        case records.Unban():
            if rank < _RANKS[Role.ADMIN]:
                return Refused(ErrorCode.FORBIDDEN, "only an owner or admin lifts a ban")
            if change.user_id not in owned.banned:
                return NoChange()
            return Change(SystemEvent(event=EventKind.UNBANNED, actor=record.actor, targets=[change.user_id]))
        case _:
            assert_never(change)


def _decide_disappearing(
    record: records.ChangeConversation, change: records.SetDisappearing, owned: Owned, rank: int
) -> Verdict:
    if owned.is_group and rank < _RANKS[Role.ADMIN]:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin lets messages disappear")
    if owned.blocked:
        return _BLOCKED
    if not 0 <= change.seconds <= LONGEST_DISAPPEARING_SECONDS:
        return Refused(
            ErrorCode.VALIDATION_FAILED, f"messages disappear after 1 to {LONGEST_DISAPPEARING_SECONDS} s, or never (0)"
        )
    if change.seconds == owned.disappearing_seconds:
        return NoChange()
    return Change(SystemEvent(event=EventKind.DISAPPEARING, actor=record.actor, targets=[], seconds=change.seconds))


def _decide_role(record: records.ChangeConversation, change: records.SetRole, owned: Owned, rank: int) -> Verdict:
    if rank < _RANKS[Role.OWNER]:
        return Refused(ErrorCode.FORBIDDEN, "only an owner gives roles")
    target = owned.members.get(change.user_id)
    if target is None:
        return _NOT_HERE
    if target.role is change.role:
        return NoChange()
    if target.role is Role.OWNER and not any(
        member.role is Role.OWNER for member in owned.members.values() if member is not target
    ):
        return Refused(ErrorCode.CONFLICT, "a group keeps an owner")
    return Change(
        SystemEvent(
            event=EventKind.ROLES,
            actor=record.actor,
            targets=[change.user_id],
            roles={change.user_id: change.role},
        )
    )


def _decide_rename(record: records.ChangeConversation, change: records.Rename, owned: Owned, rank: int) -> Verdict:
    if rank < _RANKS[Role.ADMIN]:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin renames the group")
    if (unfit := _check_title(change.title)) is not None:
        return unfit
    if change.title == (owned.conversation.title or ""):
        return NoChange()
    return Change(SystemEvent(event=EventKind.RENAMED, actor=record.actor, targets=[], title=change.title))


def _decide_silence(record: records.ChangeConversation, change: records.Silence, owned: Owned, rank: int) -> Verdict:
    target = owned.members.get(change.user_id)
    if target is None:
        return _NOT_HERE
    if (refused := _check_rank(rank, target)) is not None:
        return refused
    if not 0 <= change.until <= _LAST_MS:
        return Refused(ErrorCode.VALIDATION_FAILED, "until is no time")
    if change.until == target.silenced_until:
        return NoChange()
    return Change(
        SystemEvent(event=EventKind.SILENCED, actor=record.actor, targets=[change.user_id], until=change.until)
    )


def _decide_ban(record: records.ChangeConversation, change: records.Ban, owned: Owned, rank: int) -> Verdict:
    if rank < _RANKS[Role.ADMIN]:
        return Refused(ErrorCode.FORBIDDEN, "only an owner or admin bans")
    target = owned.members.get(change.user_id)
    if target is None:
        if change.user_id in owned.banned:
            return NoChange()
    elif (refused := _check_rank(rank, target)) is not None:
        return refused
    if len(owned.banned) >= BANNED_LIMIT:
        return Refused(ErrorCode.CONFLICT, f"a group keeps at most {BANNED_LIMIT} users out")
    return Change(
        SystemEvent(
            event=EventKind.BANNED,
            actor=record.actor,
            targets=[change.user_id],
            roles=msgspec.UNSET if target is None else _heir(owned, target),
        )
    )
