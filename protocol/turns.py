"""Whose turn it is to be said again: what keeps a sender's order in a conversation after a message was not taken.

Used by `session.py`; pure state, empty while all goes well. A message that was refused comes again later, and what its
sender says meanwhile in the same conversation would stand before it. So it is refused too, until everything in front of
it has been said again, or has its outcome, or nobody has said it for `Limits.repeat_seconds`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protocol.errors import ErrorCode
    from protocol.limits import Limits


class Refused(NamedTuple):
    """Not its turn: what the sender is told, the same as of the message in front."""

    code: ErrorCode
    retry_after_ms: int


class _Line:
    """One conversation's keys in the order of their first sending."""

    __slots__ = ("keys", "refused", "until")

    def __init__(self, keys: Iterable[str], refused: Refused, until: float) -> None:
        self.keys = dict.fromkeys(keys, False)
        """Key → does it wait to be said again? False: it is on its way."""
        self.refused = refused
        self.until = until


class Turns:
    """The conversations of one connection in which something waits to be said again."""

    __slots__ = ("_limits", "_lines")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lines: dict[str, _Line] = {}

    def __len__(self) -> int:
        """Keys remembered."""
        return sum(len(line.keys) for line in self._lines.values())

    def fail(self, conversation_id: str, key: str, on_the_way: Iterable[str], refused: Refused, now: float) -> None:
        """This key was not taken. `on_the_way`: the keys of the conversation without an outcome, this one among them,
        in the order in which they were sent."""
        until = now + self._limits.repeat_seconds
        line = self._lines.get(conversation_id)
        if line is None:
            line = self._lines[conversation_id] = _Line(on_the_way, refused, until)
        line.refused, line.until = refused, until
        if key in line.keys or len(self) < self._limits.repeats:
            line.keys[key] = True

    def check(self, conversation_id: str, key: str, now: float) -> Refused | None:
        """May this key go on its way now? Else it waits behind those in front of it."""
        line = self._lines.get(conversation_id)
        if line is None:
            return None
        if now >= line.until:  # whoever was to be said again is not: given up by its sender
            del self._lines[conversation_id]
            return None
        if line.keys.get(key) is False:
            return None
        if key == next(waiting for waiting, waits in line.keys.items() if waits):
            line.keys[key] = False
            line.until = now + self._limits.repeat_seconds
            self._drop_unless_waiting(conversation_id)
            return None
        if key in line.keys or len(self) < self._limits.repeats:
            line.keys[key] = True
        return line.refused

    def settle(self, key: str) -> None:
        """This key has its outcome, however often it was said: nobody waits for it any more."""
        for conversation_id in [name for name, line in self._lines.items() if key in line.keys]:
            del self._lines[conversation_id].keys[key]
            self._drop_unless_waiting(conversation_id)

    def forget(self, now: float) -> None:
        """Drop the lines whose time is over."""
        self._lines = {name: line for name, line in self._lines.items() if now < line.until}

    def _drop_unless_waiting(self, conversation_id: str) -> None:
        if not any(self._lines[conversation_id].keys.values()):
            del self._lines[conversation_id]
