"""Who was in a conversation from where to where, in which role: the fold of its system messages, made independently of
the workers' own (`workers/conversations.py`), so that neither can hide the other's mistake. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.models import JOINING, LEAVING, EventKind, Role, SystemEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.audit.snapshot import Member


class Stay:
    """What one user may see: first..last; `last` None: still in. `first` 0: it began before the log does now."""

    __slots__ = ("first", "last")

    def __init__(self, first: int, last: int | None = None) -> None:
        self.first = first
        self.last = last

    def holds(self, sequence: int) -> bool:
        return self.first <= sequence and (self.last is None or sequence <= self.last)

    def __repr__(self) -> str:
        return f"{self.first}..{'' if self.last is None else self.last}"


class Roster:
    """A conversation after the entries taken so far. What only removed entries said is None."""

    def __init__(self, *, complete: bool) -> None:
        self.complete = complete
        """The log is here from its first entry on."""
        self.stays: dict[str, list[Stay]] = {}
        self.roles: dict[str, Role] = {}
        self.silenced: dict[str, int] = {}
        """User → epoch ms until when; 0: no longer."""
        self.title: str | None = "" if complete else None
        self.seconds: int | None = 0 if complete else None
        self.banned: set[str] = set()
        self.largest = 0
        """Most who were in it at once."""
        self._live = 0

    def adopt(self, members: Iterable[Member], floor: int) -> None:
        """Those whose stay began before the first entry that is still there; in a 1:1 conversation both."""
        for member in members:
            if member.join_seq < floor:
                ended = member.leave_seq if member.leave_seq is not None and member.leave_seq < floor else None
                self.stays[member.user_id] = [Stay(member.join_seq, ended)]
                self._live += ended is None
        self.largest = self._live

    def is_in(self, user_id: str) -> bool:
        """Is this user in it now?"""
        stays = self.stays.get(user_id)
        return stays is not None and stays[-1].last is None

    def may_see(self, user_id: str, sequence: int) -> bool:
        return any(stay.holds(sequence) for stay in self.stays.get(user_id, ()))

    def take(self, event: SystemEvent, sequence: int) -> None:
        """One more system message."""
        kind = event.event
        if kind in JOINING:
            for user_id in event.targets:
                self._join(user_id, sequence)
            if kind is EventKind.CREATED:
                self.roles[event.actor] = Role.OWNER
        elif kind in LEAVING:
            for user_id in event.targets:
                self._leave(user_id, sequence, is_ban=kind is EventKind.BANNED)
        if isinstance(event.roles, dict):
            self.roles.update(event.roles)
        if isinstance(event.title, str):
            self.title = event.title
        if kind is EventKind.SILENCED:
            until = event.until if isinstance(event.until, int) else 0
            self.silenced.update((user_id, until) for user_id in event.targets if self.is_in(user_id))
        elif kind is EventKind.BANNED:
            self.banned.update(event.targets)
        elif kind is EventKind.UNBANNED:
            self.banned.difference_update(event.targets)
        elif kind is EventKind.DISAPPEARING:
            self.seconds = event.seconds if isinstance(event.seconds, int) else 0

    def _join(self, user_id: str, sequence: int) -> None:
        if not self.is_in(user_id):
            self._live += 1
            self.largest = max(self.largest, self._live)
        self.stays.setdefault(user_id, []).append(Stay(sequence))
        self.roles[user_id] = Role.MEMBER
        self.silenced.pop(user_id, None)

    def _leave(self, user_id: str, sequence: int, *, is_ban: bool) -> None:
        if self.is_in(user_id):
            self.stays[user_id][-1].last = sequence
            self._live -= 1
        elif not self.complete and not is_ban:
            self.stays.setdefault(user_id, []).append(Stay(0, sequence))
