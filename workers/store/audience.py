"""Who may see which part of a log, and how far each of them is: a message as one viewer sees it.

Called by `logs.py`; pure.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import msgspec

from protocol import watermarks
from protocol.models import MessageStatus, StoredMessage
from workers.store.changes import original_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

Document = dict[str, Any]


class Audience:
    """The members a conversation has and had, seen from one of them."""

    def __init__(self, viewer: Document, members: Sequence[Document], now: datetime) -> None:
        self._now = now
        self._user_id: str = viewer["user_id"]
        self.first: int = viewer["join_seq"]
        """The first sequence the viewer may see."""
        self._leave_seq: int | None = viewer.get("leave_seq")
        self._members = members
        # Between two of these sequences the audience of a message does not change.
        self._bounds = sorted({member["join_seq"] for member in members} | {_end(member) + 1 for member in members})
        self._least: dict[tuple[int, str], list[tuple[int, int]]] = {}

    @classmethod
    def of(cls, user_id: str, members: Sequence[Document], now: datetime) -> Audience | None:
        """None where the user is not and never was among the members. `now`: what has disappeared by then is not
        shown."""
        for member in members:
            if member["user_id"] == user_id:
                return cls(member, members, now)
        return None

    def last(self, head: int) -> int:
        """The last sequence the viewer may see of a log that ends at `head`."""
        return watermarks.visible_range(self.first, self._leave_seq, head)[1]

    def show(self, document: Document) -> StoredMessage:
        """The stored message for this viewer: computed status, the idempotency key for its sender only, no content that
        has disappeared, that the viewer has deleted or that was written after they left, the target of a private
        deletion for its actor only."""
        shown = dict(document)
        sender_id = shown["sender_id"]
        shown["status"] = self._status(shown["sequence_number"], sender_id)
        if sender_id != self._user_id:
            shown.pop("idempotency_key", None)
        if shown.get("hidden_for", self._user_id) != self._user_id:
            shown.pop("target_message_id", None)
        if self._user_id in shown.get("hidden_by", ()):
            _veil(shown, shown["created_at"])
        elif "expires_at" in shown and shown["expires_at"] <= self._now:
            _veil(shown, shown["expires_at"])
        if self._leave_seq is not None and shown.get("changed_seq", 0) > self._leave_seq:
            # Who has left sees nothing of later: neither what was written into a message nor who reacts to it.
            shown.pop("reactions", None)
            if shown.get("edited_seq", 0) > self._leave_seq:
                _veil(shown, shown["edited_at"])
        if "deleted_at" in shown or not shown.get("reactions", True):
            shown.pop("reactions", None)
        # The model ignores what only the server reads (digest, countable, who has hidden it from themselves).
        return msgspec.convert(shown, StoredMessage)

    def _status(self, sequence: int, sender_id: str) -> MessageStatus:
        segment = bisect_right(self._bounds, sequence)
        marks = self._least.get((segment, sender_id))
        if marks is None:
            marks = self._least[segment, sender_id] = _least_marks(
                member
                for member in self._members
                if member["user_id"] != sender_id and member["join_seq"] <= sequence <= _end(member)
            )
        return watermarks.message_status(sequence, marks)


def _veil(shown: Document, at: datetime) -> None:
    """Leave its place and the hash of what it said first."""
    shown["content_hash"] = original_hash(shown)
    shown["content"] = ""
    shown.setdefault("deleted_at", at)
    for name in ("media_url", "reactions"):
        shown.pop(name, None)


def _end(member: Document) -> int:
    return int(member.get("leave_seq", 2**53))


def shown_marks(member: Document) -> tuple[int, int]:
    """(delivered, read) as others may know them: what somebody has read and hides they have got, no more."""
    read: int = member["read_seq"]
    shown: int = member.get("shown_read_seq", read)
    return max(member["delivered_seq"], read), shown


def _least_marks(members: Iterable[Document]) -> list[tuple[int, int]]:
    """The marks that decide for all of them: the least delivered and the least read; none for nobody."""
    marks = [shown_marks(member) for member in members]
    if not marks:
        return []
    return [(min(delivered for delivered, _ in marks), min(read for _, read in marks))]
