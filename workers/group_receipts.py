"""Receipts of a group: which authors a tick's moves concern, and what each of them is told. Pure; called by
`receipts.py`.

An author hears of the newest of their messages that somebody else has just stored or read: how many of the others who
can see it have it, and how far all of them have come. Who hides what they read counts as having stored it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from protocol import codec, frames

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.conversations import Owned


class Step(NamedTuple):
    """A member's mark moved over the messages in (after, through]."""

    user_id: str
    after: int
    through: int


def steps(owned: Owned, user_ids: Iterable[str]) -> list[Step]:
    """What of these members' marks the authors have not been told, at most two steps each."""
    found = []
    for user_id in user_ids:
        member = owned.members.get(user_id)
        if member is None:
            continue
        nothing = member.join_seq - 1
        told = owned.announced.get(user_id, (nothing, nothing))
        for before, now in zip(told, member.told_marks(), strict=True):
            if now > before:
                found.append(Step(user_id, max(before, nothing), now))
    return found


def concerned(owned: Owned, moved: list[Step], messages: Iterable[tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Author → the newest of their messages that one of the others has moved over, and who of them moved last.
    `messages`: (sequence, sender), newest first."""
    found: dict[str, tuple[int, str]] = {}
    for sequence, author in messages:
        if author in found or author not in owned.members:
            continue
        movers = [step.user_id for step in moved if step.user_id != author and step.after < sequence <= step.through]
        if movers:
            found[author] = sequence, movers[-1]
            if len(found) == len(owned.members):
                break
    return found


def frame(owned: Owned, author: str, sequence: int, mover: str, now_ms: int) -> bytes:
    """The author's `receipt_update`."""
    others = [(member.join_seq, *member.told_marks()) for member in owned.members.values() if member.user_id != author]
    # Who came later does not see the message.
    marks = [(delivered, read) for joined, delivered, read in others if joined <= sequence]
    payload = frames.ReceiptUpdatePayload(
        conversation_id=owned.conversation_id,
        user_id=mover,
        delivered_through=min((delivered for _, delivered, _ in others), default=0) or msgspec.UNSET,
        read_through=min((read for _, _, read in others), default=0) or msgspec.UNSET,
        delivered_count=sum(max(delivered, read) >= sequence for delivered, read in marks),
        read_count=sum(read >= sequence for _, read in marks),
        participant_count=len(marks),
        sequence_number=sequence,
        timestamp=now_ms,
    )
    return codec.JSON.encode(frames.ReceiptUpdate(payload=payload))
