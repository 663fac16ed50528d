"""Who of this gateway's clients watches whom, and what they have been told.

The hub calls it with what clients ask, workers answer and channels bring, and once a second with `step`. A person is
watched once however many watch; all of them are told the same frame, encoded once. A change is told when it has held
for `DEBOUNCE_SECONDS`. A client that does not read is told of each person when it reads again, once and as they are
then. A connection that watches nobody costs nothing. Nothing here awaits.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, Protocol

from msgspec import UNSET

from gateway.transport import Outgoing
from protocol import frames, records
from protocol.codec import JSON
from protocol.errors import ErrorCode
from protocol.models import UserStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.connection import Connection

DEBOUNCE_SECONDS: Final = 3.0
ASK_AGAIN_SECONDS: Final = 15.0
"""A question without an answer is asked again, each further time after twice as long, so that workers who are behind
are not asked the more for it: with 5 s a thousand subscriptions at once on a busy machine were asked twice."""
ASK_AGAIN_AT_MOST_SECONDS: Final = 120.0
RIGHTS_SECONDS: Final = 300
"""Every watcher's rights are looked at again so often."""
ASKS_PER_SECOND: Final = 200
"""After a gap all watchers ask again, no faster than this: a quarter of one worker's time."""
PEOPLE_LIMIT: Final = 200_000
"""People watched by all clients of a gateway together, about 100 MB with their watchers."""

State = tuple[UserStatus, int]
"""(status, last_seen)."""


class Channels(Protocol):
    """What the broker does for presence."""

    def watch(self, user_id: str) -> None:
        """This person's first watcher came, or the last one went."""

    def ask(self, query: records.Query) -> ErrorCode | None:
        """Hand a query to any worker."""


class _Watcher:
    __slots__ = ("again_at", "asked_at", "connection", "outstanding", "patience", "people", "untold", "waits")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.people: dict[str, bool] = {}
        """Person → has an answer said that this client may watch?"""
        self.outstanding: set[str] = set()
        """Asked for and not answered."""
        self.asked_at = 0.0
        """When the oldest question without an answer was asked."""
        self.again_at = 0.0
        """When to ask again."""
        self.waits = False
        """This watcher stands in the heap: once, however often it asks."""
        self.patience = ASK_AGAIN_SECONDS
        self.untold: dict[str, Outgoing | None] = {}
        """Of whom the client is to hear when its outbox has drained: a last word, or None: how they are then."""


class _Person:
    __slots__ = ("changed_at", "current", "known_at", "outgoing", "told", "waits", "watchers")

    def __init__(self) -> None:
        self.watchers: dict[int, _Watcher] = {}
        self.current: State | None = None
        self.told: State | None = None
        """What the watchers take for true."""
        self.outgoing: Outgoing | None = None
        """`told` as a frame."""
        self.changed_at = 0.0
        self.known_at = 0.0
        """When `current` was last known to be true: a channel said it, or the question of an answer was asked."""
        self.waits = False
        """A change of this person stands in the heap."""


class Presence:
    """All watchers of this process."""

    def __init__(self, instance_id: str, channels: Channels, people_per_connection: int) -> None:
        self.people: dict[str, _Person] = {}
        self.told = 0
        """`presence` frames sent."""
        self._instance_id = instance_id
        self._channels = channels
        self._per_connection = people_per_connection
        self._watchers: dict[int, _Watcher] = {}
        self._due: list[tuple[float, str]] = []
        self._ask_again: list[tuple[float, int]] = []
        """(when, connection): questions to repeat."""
        self._round: list[int] = []
        self._step = 1
        self._seconds_left = RIGHTS_SECONDS

    @property
    def questions(self) -> int:
        """Watchers who may ask again."""
        return len(self._ask_again)

    # --- what clients ask --------------------------------------------------------------------------------------------

    def watch(self, connection: Connection, user_ids: Iterable[str]) -> None:
        """Expect answers about these people; a client that watches too many is told so."""
        number = connection.session.connection
        watcher = self._watchers.get(number) or _Watcher(connection)
        wanted = dict.fromkeys(user_ids, False)
        if len(watcher.people.keys() | wanted.keys() | watcher.untold.keys()) > self._per_connection:
            limit = self._per_connection
            self._refuse(connection, ErrorCode.VALIDATION_FAILED, f"a connection watches at most {limit} people")
        elif len(self.people) + len(wanted) > PEOPLE_LIMIT:
            self._refuse(connection, ErrorCode.OVERLOADED, "too many people are watched here")
        elif wanted:
            self._watchers[number] = watcher
            watcher.people |= wanted
            for user_id in wanted:
                person = self.people.get(user_id)
                if person is None:
                    person = self.people[user_id] = _Person()
                    self._channels.watch(user_id)
                person.watchers[number] = watcher

    @staticmethod
    def _refuse(connection: Connection, code: ErrorCode, reason: str) -> None:
        retry_after_ms = 1000 if code.retryable else None
        frame = frames.error_frame(code, reason, retry_after_ms=retry_after_ms, in_reply_to="presence_subscribe")
        connection.send(Outgoing(JSON.encode(frame)))

    def ask(self, query: records.PresenceQuery, now: float) -> None:
        """The question that goes with a `watch`; nothing of one that was refused."""
        watcher = self._watchers.get(query.connection)
        if watcher is not None:
            self._ask(watcher, [name for name in query.user_ids if watcher.people.get(name) is False], now)

    def unwatch(self, connection: Connection, user_ids: Iterable[str]) -> None:
        """Tell this client no more of these people."""
        watcher = self._watchers.get(connection.session.connection)
        if watcher is not None:
            for user_id in user_ids:
                watcher.untold.pop(user_id, None)
                self._drop(watcher, user_id)
            self._forget_idle(watcher)

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        watcher = self._watchers.get(connection.session.connection)
        if watcher is not None:
            watcher.untold.clear()
            for user_id in list(watcher.people):
                self._drop(watcher, user_id)
            self._forget_idle(watcher)

    def _drop(self, watcher: _Watcher, user_id: str) -> None:
        if watcher.people.pop(user_id, None) is None:
            return
        watcher.outstanding.discard(user_id)
        person = self.people[user_id]
        del person.watchers[watcher.connection.session.connection]
        if not person.watchers:
            del self.people[user_id]
            self._channels.watch(user_id)

    def _forget_idle(self, watcher: _Watcher) -> None:
        number = watcher.connection.session.connection
        if not watcher.people and not watcher.untold:
            self._watchers.pop(number, None)

    # --- what workers answer -----------------------------------------------------------------------------------------

    def _ask(self, watcher: _Watcher, user_ids: list[str], now: float) -> None:
        if not user_ids:
            return
        session = watcher.connection.session
        if not watcher.outstanding:
            watcher.asked_at = now
            watcher.patience = ASK_AGAIN_SECONDS
        watcher.outstanding.update(user_ids)
        watcher.again_at = now + watcher.patience
        self._queue(watcher)
        self._channels.ask(records.PresenceQuery(self._instance_id, session.connection, session.user_id, user_ids))

    def _queue(self, watcher: _Watcher) -> None:
        if not watcher.waits:
            watcher.waits = True
            heappush(self._ask_again, (watcher.again_at, watcher.connection.session.connection))

    def answered(self, answer: records.PresenceAnswer, now: float) -> None:
        """Tell this client how they are, and let go whom it may not watch."""
        watcher = self._watchers.get(answer.connection)
        if watcher is None:
            return
        for watched in answer.people:
            user_id = watched.user_id
            if user_id in watcher.people:
                watcher.outstanding.discard(user_id)
                person = self.people[user_id]
                self._correct(user_id, person, (watched.status, watched.last_seen), watcher.asked_at, now)
                if not watcher.people[user_id]:
                    watcher.people[user_id] = True
                    self._send(watcher, user_id)
        for user_id in answer.refused:
            self._end(watcher, user_id)
        self._forget_idle(watcher)

    def _correct(self, user_id: str, person: _Person, state: State, asked_at: float, now: float) -> None:
        """What is known since the question was asked is newer than its answer, also where it was no news."""
        if person.current is None or person.known_at <= asked_at:
            if person.current is None or _differ(state, person.current):
                person.current = state
                person.changed_at = now
            person.known_at = asked_at
        if person.told is None:
            person.told = person.current
        elif _differ(person.current, person.told):
            self._await_calm(user_id, person)

    def _end(self, watcher: _Watcher, user_id: str) -> None:
        """This client may watch this person no longer: offline is the last it hears."""
        if watcher.people.get(user_id) or user_id in watcher.untold:
            self._send(watcher, user_id, Outgoing(_encode(user_id, (UserStatus.OFFLINE, 0))))
        self._drop(watcher, user_id)

    # --- what channels bring -----------------------------------------------------------------------------------------

    def changed(self, user_id: str, change: records.PresenceChange, now: float) -> None:
        """Somebody came or went, or does not want to be watched any more."""
        person = self.people.get(user_id)
        if person is None:
            return
        if change.hidden_from:
            for watcher in list(person.watchers.values()):
                if change.hidden_from in ("*", watcher.connection.session.user_id):
                    self._end(watcher, user_id)
                    self._forget_idle(watcher)
            return
        state = (change.status, change.last_seen)
        if person.current is None or _differ(state, person.current):
            person.changed_at = now
        person.current = state
        person.known_at = now
        if person.told is not None and _differ(state, person.told):
            if change.settled:
                self._tell(user_id, person)
            else:
                self._await_calm(user_id, person)

    def _await_calm(self, user_id: str, person: _Person) -> None:
        if not person.waits:
            person.waits = True
            heappush(self._due, (person.changed_at + DEBOUNCE_SECONDS, user_id))

    def _tell(self, user_id: str, person: _Person) -> None:
        person.told, person.outgoing = person.current, None
        for watcher in list(person.watchers.values()):
            if watcher.people.get(user_id):
                self._send(watcher, user_id)

    @staticmethod
    def _outgoing(user_id: str, person: _Person) -> Outgoing:
        if person.outgoing is None:
            person.outgoing = Outgoing(_encode(user_id, person.told or (UserStatus.OFFLINE, 0)))
        return person.outgoing

    def _send(self, watcher: _Watcher, user_id: str, last_word: Outgoing | None = None) -> None:
        """Tell this client how this person is, or that it hears no more of them; when it reads again, if it does not
        now: past the outbox's bound it would be cut off for what others do."""
        if watcher.connection.session.lagging:
            watcher.untold[user_id] = last_word
            return
        self.told += 1
        outgoing = last_word or self._outgoing(user_id, self.people[user_id])
        try:
            watcher.connection.send(outgoing)
        except Exception:  # noqa: BLE001 -- boundary "connection"
            watcher.connection.isolate()

    def drained(self, connection: Connection) -> None:
        """This client reads again: what it has not been told, as far as its outbox takes it."""
        watcher = self._watchers.get(connection.session.connection)
        if watcher is None:
            return
        while watcher.untold and not connection.session.lagging:
            user_id = next(iter(watcher.untold))
            self._send(watcher, user_id, watcher.untold.pop(user_id))
        self._forget_idle(watcher)

    # --- time --------------------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Changes may have been missed: everybody asks again, spread."""
        self._round = list(self._watchers)
        self._step = ASKS_PER_SECOND
        self._seconds_left = RIGHTS_SECONDS

    def step(self, now: float) -> None:
        """Once a second: changes that have held, questions without an answer, rights to look at again."""
        while self._due and self._due[0][0] <= now:
            _, user_id = heappop(self._due)
            person = self.people.get(user_id)
            if person is None or not person.waits:
                continue
            person.waits = False
            if person.current is None or person.told is None or not _differ(person.current, person.told):
                continue
            if now < person.changed_at + DEBOUNCE_SECONDS:
                self._await_calm(user_id, person)
            else:
                self._tell(user_id, person)
        while self._ask_again and self._ask_again[0][0] <= now:
            watcher = self._watchers.get(heappop(self._ask_again)[1])
            if watcher is None:
                continue
            watcher.waits = False
            if watcher.again_at > now:
                self._queue(watcher)  # it has asked anew since
            elif watcher.outstanding:
                watcher.patience = min(watcher.patience * 2, ASK_AGAIN_AT_MOST_SECONDS)
                self._ask(watcher, list(watcher.outstanding), now)
        self._look_at_rights(now)

    def _look_at_rights(self, now: float) -> None:
        if self._seconds_left == 0:
            self._round = list(self._watchers)
            self._step = -(-len(self._round) // RIGHTS_SECONDS)
            self._seconds_left = RIGHTS_SECONDS
        self._seconds_left -= 1
        for _ in range(min(self._step, len(self._round))):
            watcher = self._watchers.get(self._round.pop())
            if watcher is not None:
                self._ask(watcher, list(watcher.people), now)


def _differ(one: State, other: State) -> bool:
    """Is it another thing to show? Of who is online, when they were last seen is no news."""
    return one != other and (one[0] is not other[0] or one[0] is UserStatus.OFFLINE)


def _encode(user_id: str, state: State) -> bytes:
    status, last_seen = state
    payload = frames.PresencePayload(user_id=user_id, status=status, last_seen=last_seen or UNSET)
    return JSON.encode(frames.PresenceNotice(payload=payload))
