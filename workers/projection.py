"""What system messages change outside the log: members, the conversation, the messages they name.

Collected while a batch is planned or a tail is folded, written by `store/conversations.py` after the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from protocol.models import JOINING, LEAVING, EventKind, Membership, SystemEvent
from workers.store.changes import Effect
from workers.store.conversations import MemberChange, Projected
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from datetime import datetime

    from workers.conversations import Owned
    from workers.store.conversations import TailMessage


class Folded(NamedTuple):
    """The stays that one system message began and ended."""

    joined: list[Membership]
    left: list[str]


class Projection:
    """Changes of one conversation that the store does not show yet: per user the last stay, in order the effects."""

    __slots__ = ("_effects", "_kinds", "_members", "_stays", "_touched")

    def __init__(self) -> None:
        self._kinds: set[EventKind] = set()
        self._stays: dict[str, Membership] = {}
        self._members: dict[str, dict[str, Any]] = {}
        self._touched: dict[str, int] = {}
        self._effects: list[Effect] = []

    def add(self, event: SystemEvent, folded: Folded, sequence: int, at: datetime) -> None:
        """One more system message, created `at`, which `Owned.fold_event` has folded."""
        self._kinds.add(event.event)
        for membership in folded.joined:
            self._stays[membership.user_id] = membership
            self._members[membership.user_id] = {}
            self._touched[membership.user_id] = sequence
        for user_id in folded.left:
            self._set(user_id, sequence, "leave_seq", sequence)
            self._set(user_id, sequence, "left_at", at)
        if isinstance(event.roles, dict):
            for user_id, role in event.roles.items():
                self._set(user_id, sequence, "role", role.value)
        if event.event is EventKind.SILENCED and isinstance(event.until, int):
            for user_id in event.targets:
                self._set(user_id, sequence, "silenced_until", from_ms(event.until) if event.until else None)

    def add_effect(self, effect: Effect) -> None:
        """What one more entry does to the message it names."""
        self._effects.append(effect)

    def _set(self, user_id: str, sequence: int, name: str, value: object) -> None:
        self._members.setdefault(user_id, {})[name] = value
        self._touched[user_id] = sequence

    def through(self, owned: Owned) -> Projected:
        """All of it, for the store, as `owned` stands now."""
        fields: dict[str, Any] = {}
        kinds = self._kinds
        if kinds & (JOINING | LEAVING):
            fields["participants"] = list(owned.roster)
        if kinds & {EventKind.CREATED, EventKind.RENAMED}:
            fields["title"] = owned.conversation.title or None
        if EventKind.DISAPPEARING in kinds:
            fields["disappearing_seconds"] = owned.disappearing_seconds or None
        if kinds & {EventKind.BANNED, EventKind.UNBANNED}:
            fields["banned"] = sorted(owned.banned) or None
        members = [
            MemberChange(user_id, sequence, self._stays.get(user_id), self._members[user_id])
            for user_id, sequence in self._touched.items()
        ]
        return Projected(owned.conversation_id, owned.membership_seq, fields, members, self._effects)


def effect_of(
    event: SystemEvent, sequence: int, at: datetime, target_id: str, hidden_for: str, original: str
) -> Effect | None:
    """What the entry at `sequence` does to a message; None where it is about none."""
    if not target_id:
        return None
    return Effect(
        event.event,
        target_id,
        sequence,
        at,
        hidden_for or event.actor,
        "" if event.content is msgspec.UNSET else event.content,
        "" if event.emoji is msgspec.UNSET else event.emoji,
        original,
    )


def effect_of_tail(event: SystemEvent, message: TailMessage) -> Effect | None:
    """The same from a stored entry, for the owner that loads it."""
    return effect_of(
        event,
        message.sequence_number,
        message.created_at,
        message.target_id,
        message.hidden_for,
        message.target_hash,
    )
