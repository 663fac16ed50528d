"""What the system messages and receipts have left outside of the log: memberships, marks, the conversation. Pure.

Called by `logs.py` at the end of a log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.models import GROUP_LIMIT, MessageStatus
from protocol.watermarks import message_status, unread

if TYPE_CHECKING:
    from workers.audit.logs import LogAudit
    from workers.audit.snapshot import ConversationState, Member

_RANK = {MessageStatus.SENT: 0, MessageStatus.DELIVERED: 1, MessageStatus.READ: 2}


def check_members(log: LogAudit, written_through: int | None) -> None:
    """Every membership is the last stay that the log gives its user, with marks that can be."""
    for user_id, member in log.members.items():
        _check_marks(log, member)
        _check_unread(log, member)
        if not log.roster.stays.get(user_id) and log.roster.complete and written_through is None:
            log.add(
                "projection", "a membership that no entry of the log begins", user=user_id, join_seq=member.join_seq
            )
    if written_through is not None:
        return
    for user_id, stays in log.roster.stays.items():
        _check_stay(log, user_id, stays[-1].first, stays[-1].last)
    if log.roster.largest > GROUP_LIMIT:
        log.add("projection", f"more than {GROUP_LIMIT} were in it at once", most=log.roster.largest)


def _check_stay(log: LogAudit, user_id: str, first: int, last: int | None) -> None:
    member = log.members.get(user_id)
    if member is None:
        if last is None:
            log.add("projection", "a member by the log has no membership", user=user_id, join_seq=first)
        return
    if (member.join_seq, member.leave_seq) != (first or member.join_seq, last):
        stored = f"{member.join_seq}..{member.leave_seq or ''}"
        log.add(
            "projection",
            "a membership is another stay than the log's",
            user=user_id,
            stored=stored,
            log=f"{first}..{last or ''}",
        )
        return
    if last is not None:
        return
    role = log.roster.roles.get(user_id)
    if role is not None and member.role is not role:
        log.add("projection", "a role is not the log's", user=user_id, stored=member.role.value, log=role.value)
    until = log.roster.silenced.get(user_id)
    silenced_ms = 0 if member.silenced_until is None else round(member.silenced_until.timestamp() * 1000)
    if (until is not None or log.roster.complete) and silenced_ms != (until or 0):
        log.add("projection", "a silence is not the log's", user=user_id, stored=silenced_ms, log=until or 0)


def check_state(log: LogAudit, state: ConversationState) -> None:
    """The conversation's own document."""
    roster = log.roster
    live = {user_id for user_id, member in log.members.items() if member.leave_seq is None}
    is_born = log.last > 0 or not log.is_group  # a group begins with its first entry
    if is_born and (set(state.participants) != live or len(state.participants) != len(live)):
        shown = sorted(set(state.participants) ^ live)
        log.add("projection", "participants are not those who have a live membership", differ=shown)
    if log.is_group and roster.title is not None and state.title != roster.title:
        log.add("projection", "the title is not the log's", stored=len(state.title), log=len(roster.title))
    if roster.seconds is not None and state.disappearing_seconds != roster.seconds:
        stored = state.disappearing_seconds
        log.add("projection", "`disappearing_seconds` is not the log's", stored=stored, log=roster.seconds)
    if roster.complete and set(state.banned) != roster.banned:
        log.add("projection", "who is banned is not the log's", differ=sorted(set(state.banned) ^ roster.banned))


def _check_marks(log: LogAudit, member: Member) -> None:
    """Marks lie within the log and no device is ahead of its user."""
    marks = {"delivered_seq": member.delivered_seq, "read_seq": member.read_seq, **member.devices}
    for name, mark in marks.items():
        if mark > log.last:
            log.add("I9", "a mark is behind the end of the log", user=member.user_id, mark=name, at=mark, last=log.last)
    least = member.join_seq - 1
    for name in ("delivered_seq", "read_seq"):
        if marks[name] < least:
            log.add("I9", "a mark is before the stay", user=member.user_id, mark=name, at=marks[name], joined=least + 1)
    ahead = max(member.devices.values(), default=0)
    if ahead > member.delivered_seq:
        log.add(
            "I9",
            "a device has more than is delivered",
            user=member.user_id,
            device=ahead,
            delivered=member.delivered_seq,
        )


def _check_unread(log: LogAudit, member: Member) -> None:
    """The stored count at the read mark is the log's: unread is derived from it."""
    if member.leave_seq is not None or member.read_seq > log.last:
        return
    counted = log.countable_at(member.read_seq)
    if counted is not None and counted != member.read_countable:
        head = log.countable_at(log.last) or 0
        log.add(
            "I6",
            "unread is derived from a count that is not the log's",
            user=member.user_id,
            read_seq=member.read_seq,
            unread=unread(head, member.read_countable),
            counted=unread(head, counted),
        )


def unread_of(log: LogAudit, member: Member) -> int | None:
    """Countable messages of others behind the read mark, counted in the log; None where that part of it is gone."""
    read = max(member.read_seq, member.join_seq - 1, log.own.get(member.user_id, 0))
    before, head = log.countable_at(min(read, log.last)), log.countable_at(log.last)
    return None if before is None or head is None else head - before


def check_statuses(log: LogAudit) -> None:
    """A stored status is never ahead of the marks of those who could see the message."""
    for sequence, sender_id, status in log.received:
        marks = [
            (member.delivered_seq, member.read_seq)
            for user_id, member in log.members.items()
            if user_id != sender_id and log.roster.may_see(user_id, sequence)
        ]
        if _RANK[status] > _RANK[message_status(sequence, marks)]:
            log.add("I9", "a stored status is ahead of the marks", sequence=sequence, status=status.value)
