"""What the gateway goes over again and again: heads (a push that vanished is repaired, contract C8), the registry's
lifetimes, and tokens that may have been revoked while nobody could say so.

Called by the hub once a second. No sweep writes to a connection; they say what is due.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from protocol import records

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gateway.connection import Connection
    from gateway.registry import Attachment

HEADS_PERIOD_SECONDS: Final = 10
"""Two rounds, the grace and a page fit into the 30 s of contract C8."""
HEADS_CHUNK: Final = 500
"""Users per query: one indexed read of a few milliseconds in a worker."""
GRACE_SECONDS: Final = 2.0
"""A head that is ahead of its cursor is usually just on its way."""
SUSPECTS: Final = 100_000
"""Past it the oldest suspicion is dropped; the next round finds it again."""
REGISTRY_PERIOD_SECONDS: Final = 100
"""Every user's keys once in this time: a third of the presence lifetime, so that two lost refreshes do no harm."""
_HURRY_PER_SECOND: Final = 2500
"""Users registered per second after Redis forgot them: about 25 ms of work."""


_TOKENS_PER_SECOND: Final = 500
"""Sessions looked at per second after a gap: one indexed read each in a worker."""
_TOKENS_AGAIN_SECONDS: Final = 15.0
"""After a round its unanswered questions wait so long before they are repeated: workers that are behind are asked no
more than they can bear."""


class HeadSweep:
    """Asks for the heads of all users once per period, in chunks spread over it."""

    def __init__(self, users: Mapping[str, tuple[Connection, ...]], instance_id: str) -> None:
        self._users = users
        self._instance_id = instance_id
        self._second = 0
        self._round: list[str] = []
        self._hurry = False
        self._suspects: deque[tuple[float, Connection, str, int]] = deque(maxlen=SUSPECTS)

    def hurry(self) -> None:
        """Ask for everybody at the next step: pushes may have been lost in numbers."""
        self._hurry = True

    def due_queries(self, now: float) -> Iterator[records.HeadsQuery]:
        """The queries of this second."""
        if self._hurry:
            self._hurry = False
            self._second = 0
            users = list(self._users)
            for start in range(0, len(users), HEADS_CHUNK):
                yield records.HeadsQuery(self._instance_id, users[start : start + HEADS_CHUNK])
            return
        if self._second == 0:
            self._round = list(self._users)
        chunks = -(-len(self._round) // HEADS_CHUNK)
        # Rounded up, so that the only chunk of a small gateway goes with the users of this second, not of nine ago.
        first = -(-self._second * chunks // HEADS_PERIOD_SECONDS)
        last = -(-(self._second + 1) * chunks // HEADS_PERIOD_SECONDS)
        self._second = (self._second + 1) % HEADS_PERIOD_SECONDS
        for chunk in range(first, last):
            user_ids = self._round[chunk * HEADS_CHUNK : (chunk + 1) * HEADS_CHUNK]
            yield records.HeadsQuery(self._instance_id, user_ids)

    def answered(self, answer: records.HeadsAnswer, now: float) -> None:
        """Suspect every connection whose cursor is behind."""
        for head in answer.heads:
            for connection in self._users.get(head.user_id, ()):
                if head.ended and head.conversation_id not in (connection.session.cursors or ()):
                    continue  # it had no part of it
                if connection.session.head_seen(head.conversation_id, head.head):
                    self._suspects.append((now + GRACE_SECONDS, connection, head.conversation_id, head.head))

    @property
    def suspects(self) -> int:
        """Suspicions within their grace."""
        return len(self._suspects)

    def due_suspects(self, now: float) -> Iterator[tuple[Connection, str, int]]:
        """Suspicions whose grace is over: (connection, conversation, head)."""
        while self._suspects and self._suspects[0][0] <= now:
            _, connection, conversation_id, head = self._suspects.popleft()
            yield connection, conversation_id, head


class RegistrySweep:
    """Every user's registration once per period, a slice each second."""

    def __init__(self, users: Mapping[str, tuple[Connection, ...]]) -> None:
        self._users = users
        self._round: list[str] = []
        self._step = 1
        self._seconds_left = 0

    def hurry(self) -> None:
        """Redis has forgotten: begin a round at once, at full speed."""
        self._round = list(self._users)
        self._step = _HURRY_PER_SECOND
        self._seconds_left = REGISTRY_PERIOD_SECONDS

    def due(self) -> Iterator[Sequence[Attachment]]:
        """The registrations of this second, by user."""
        if self._seconds_left == 0:
            self._round = list(self._users)
            self._step = -(-len(self._round) // REGISTRY_PERIOD_SECONDS)
            self._seconds_left = REGISTRY_PERIOD_SECONDS
        self._seconds_left -= 1
        slice_ = self._round[-self._step :] if self._step else []
        del self._round[len(self._round) - len(slice_) :]
        for user_id in slice_:
            attachments = [c.attachment for c in self._users.get(user_id, ()) if c.attachment is not None]
            if attachments:
                yield attachments


class TokenSweep:
    """Are the tokens of those who are here still good? Asked after a gap, in which a revocation may have been lost,
    until it is answered: a question can be lost like anything else."""

    def __init__(self, users: Mapping[str, tuple[Connection, ...]], instance_id: str) -> None:
        self._users = users
        self._instance_id = instance_id
        self._unproven: dict[int, Connection] = {}
        """Connections whose tokens are in question, by number."""
        self._round: list[int] = []
        self._round_ends = 0.0

    def hurry(self) -> None:
        """Begin a round with everybody."""
        self._unproven = {c.session.connection: c for connections in self._users.values() for c in connections}
        self._round = list(self._unproven)

    def answered(self, connection: int) -> None:
        """Its token is good. One that is not is ended by its answer."""
        self._unproven.pop(connection, None)

    def due(self, now: float) -> Iterator[records.OpenQuery]:
        """The questions of this second."""
        if not self._round and self._unproven and now >= self._round_ends:
            self._round = list(self._unproven)
        numbers = self._round[-_TOKENS_PER_SECOND:]
        del self._round[-_TOKENS_PER_SECOND:]
        for number in numbers:
            self._round_ends = now + _TOKENS_AGAIN_SECONDS
            connection = self._unproven.get(number)
            if connection is None:
                continue
            if connection.transport is None:
                del self._unproven[number]
                continue
            session = connection.session
            yield records.OpenQuery(
                self._instance_id, number, session.user_id, session.device_id, {}, session.issued_ms, is_check=True
            )
