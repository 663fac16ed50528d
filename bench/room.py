"""One chat log replayed as one group: its people on their phones, their coming and going, the cap, the offline spells.

Called by the replay, one room per log; all rooms run side by side and write into the same ledger.
"""

from __future__ import annotations

import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from bench.client import Habits
from bench.figures import Latencies
from bench.http_api import HttpApi
from bench.ledger import Ledger
from bench.phone import FrameCache, Phone, Settled
from bench.transcript import Kind, Line, Transcript
from protocol.errors import ErrorCode
from protocol.models import GROUP_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE: Final = "phone-1"
AT_ONCE: Final = 16
"""Accounts made at a time."""
HABITS: Final = Habits(confirm_seconds=1.0)
"""A busy group is confirmed once a second: a thousand phones share one core with the servers they test."""
OUTSTANDING: Final = 64
"""Sends of one room without an ack, at most; they only pile up where the log runs faster than the server."""
PARENT_SECONDS: Final = 20.0
"""An answer waits for the id of what it answers for so long."""
LAST_WORDS_SECONDS: Final = 20.0
CATCH_UP_SECONDS: Final = 60.0
AWAY_SHARE: Final = 0.25
"""A quarter of the users go offline and come back."""
AWAY_SPELLS: Final = (1, 3)
AWAY_LINES: Final = (20, 300)


class RoomCounts(msgspec.Struct):
    """What happened in one room."""

    messages: int = 0
    answers: int = 0
    answers_unlinked: int = 0
    joined: int = 0
    left: int = 0
    refused_by_cap: int = 0
    rotated_in: int = 0
    away_spells: int = 0
    refused_messages: int = 0


class Resources(msgspec.Struct, frozen=True):
    """What all rooms share. `started_at`: the moment of each log's first line; `speed` None: as fast as it goes."""

    api: HttpApi
    ws_urls: tuple[str, ...]
    ledger: Ledger
    cache: FrameCache
    ack_latency: Latencies
    lateness: Latencies
    seed: int
    speed: float | None


class RoomError(Exception):
    """The server refused what it has to allow, or allowed what it has to refuse."""


class Room:
    """`prepare` makes the accounts, `play` the log, `catch_up` waits until everybody has everything."""

    def __init__(self, transcript: Transcript, resources: Resources) -> None:
        self.transcript = transcript
        self.counts = RoomCounts()
        self.conversation_id = ""
        self.lines_played = 0
        self.violations: list[str] = []
        self._shared = resources
        self._random = random.Random(f"{resources.seed}:{transcript.name}")
        self._phones: dict[int, Phone] = {}
        self._running: set[int] = set()
        self._tokens: dict[int, str] = {}
        self._users: dict[int, str] = {}
        self._members: dict[int, int] = {}
        """Person → line of the last word, in the order in which they joined; the first one owns the group."""
        self._joined_at: dict[int, int] = {}
        """Person → number of the line at which the present stay began."""
        self._waiting: deque[int] = deque()
        self._message_ids: dict[int, str] = {}
        self._unsettled: dict[int, trio.Event] = {}
        self._window = trio.Semaphore(OUTSTANDING)
        self._away: dict[int, list[tuple[int, bool]]] = self._plan_spells()

    @property
    def phones(self) -> list[Phone]:
        return list(self._phones.values())

    # --- before ------------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make a user and a token for everybody who does something in this log. Raises ApiError."""
        active = sorted({line.person for line in self.transcript.lines})
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for person in active:
                nursery.start_soon(self._open_account, person, limiter)

    async def _open_account(self, person: int, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            api = self._shared.api
            user_id = await api.create_user(self.transcript.people[person])
            token = await api.create_token(user_id, DEVICE)
        self._users[person] = user_id
        self._tokens[person] = token
        self._phones[person] = Phone(
            self._shared.ws_urls,
            user_id,
            DEVICE,
            token,
            self._shared.ledger.record,
            habits=HABITS,
            cache=self._shared.cache,
            seed=self._shared.seed,
        )

    def _plan_spells(self) -> dict[int, list[tuple[int, bool]]]:
        """Index of a line → who (person, comes back?) switches the phone there; the same for the same seed."""
        plan: dict[int, list[tuple[int, bool]]] = {}
        lines = len(self.transcript.lines)
        first_seen: dict[int, int] = {}
        for index, line in enumerate(self.transcript.lines):
            first_seen.setdefault(line.person, index)
        people = sorted(first_seen)
        for person in self._random.sample(people, round(len(people) * AWAY_SHARE)):
            at = first_seen[person] + 1
            for _ in range(self._random.randint(*AWAY_SPELLS)):
                goes = at + self._random.randint(1, max(1, lines // 4))
                comes = goes + self._random.randint(*AWAY_LINES)
                if goes >= lines:
                    break
                plan.setdefault(goes, []).append((person, False))
                plan.setdefault(comes, []).append((person, True))
                at = comes
        return plan

    # --- the log -----------------------------------------------------------------------------------------------------

    async def play(self, nursery: trio.Nursery, started_at: float) -> None:
        """Play the log, each line at its time. The phones run in `nursery`. Raises RoomError, ApiError."""
        speed = self._shared.speed
        for index, line in enumerate(self.transcript.lines):
            if speed is not None:
                due = started_at + line.minutes * 60 / speed
                await trio.sleep_until(due)
                self._shared.lateness.add(trio.current_time() - due)
            for person, comes_back in self._away.get(index, ()):
                self._switch(nursery, person, comes_back)
            await self._play_line(nursery, index, line)
            self.lines_played += 1

    async def _play_line(self, nursery: trio.Nursery, index: int, line: Line) -> None:
        if not self.conversation_id:
            await self._found(nursery, line.person, index)
        if line.kind is Kind.LEAVE:
            await self._leave(nursery, line.person, index)
        elif line.kind is Kind.JOIN:
            await self._join(nursery, line.person, index, must=False)
        else:
            await self._join(nursery, line.person, index, must=True)
            await self._say(line)
            self._members[line.person] = index

    async def _found(self, nursery: trio.Nursery, person: int, index: int) -> None:
        self._start_phone(nursery, person)
        token = self._tokens[person]
        self.conversation_id = await self._shared.api.create_conversation("group", [self._users[person]], token)
        self._note_joined(person, index)

    def _note_joined(self, person: int, index: int) -> None:
        self._members[person] = index
        self._joined_at[person] = self.transcript.lines[index].number
        self.counts.joined += 1

    def _start_phone(self, nursery: trio.Nursery, person: int) -> None:
        if person not in self._running:
            self._running.add(person)
            nursery.start_soon(self._phones[person].run, name=f"phone {self.transcript.people[person]}")

    def _switch(self, nursery: trio.Nursery, person: int, comes_back: bool) -> None:
        phone = self._phones[person]
        if comes_back:
            phone.go_online()
        elif phone.wanted and person in self._running:
            self.counts.away_spells += 1
            nursery.start_soon(phone.go_offline)

    async def _join(self, nursery: trio.Nursery, person: int, index: int, *, must: bool) -> None:
        """Bring a person into the group. Who meets the cap waits for a place; who has something to say gets one now."""
        if person in self._members:
            return
        self._start_phone(nursery, person)
        if await self._add(person, index):
            return
        if not must:
            if person not in self._waiting:
                self._waiting.append(person)
            return
        silent = min(self._members, key=self._members.__getitem__)
        await self._remove(silent)
        if not await self._add(person, index):
            raise RoomError(f"{self.transcript.name}: refused although somebody had just left")
        self.counts.rotated_in += 1
        if person in self._waiting:
            self._waiting.remove(person)

    async def _add(self, person: int, index: int) -> bool:
        """True: in. False: the group is full, and the server said so with exactly this code."""
        owner = next(iter(self._members))
        refusal = await self._shared.api.add_participants(
            self.conversation_id, [self._users[person]], self._tokens[owner]
        )
        if refusal is None:
            self._note_joined(person, index)
            if len(self._members) > GROUP_LIMIT:
                self.violations.append(f"cap: {self.transcript.name} took participant {len(self._members)}")
            return True
        if refusal.code is ErrorCode.GROUP_FULL and len(self._members) >= GROUP_LIMIT:
            self.counts.refused_by_cap += 1
            return False
        raise RoomError(
            f"{self.transcript.name}: participant {len(self._members) + 1} was refused with "
            f"{refusal.status} {refusal.code.value}: {refusal.message}"
        )

    async def _leave(self, nursery: trio.Nursery, person: int, index: int) -> None:
        if person in self._waiting:
            self._waiting.remove(person)
        if person not in self._members or len(self._members) == 1:
            return
        await self._remove(person)
        if self._waiting:
            await self._join(nursery, self._waiting.popleft(), index, must=False)
            self.counts.rotated_in += 1

    async def _remove(self, person: int) -> None:
        phone = self._phones[person]
        if phone.client.pending:  # what was said before leaving must not arrive after it
            phone.go_online()
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await phone.wait_until(lambda: not phone.client.pending)
        refusal = await self._shared.api.remove_participant(
            self.conversation_id, self._users[person], self._tokens[person]
        )
        if refusal is not None:
            raise RoomError(f"{self.transcript.name}: could not leave: {refusal.code.value} {refusal.message}")
        # The server hands the group of a leaving owner to whoever joined first: the next in this order.
        del self._members[person]
        self.counts.left += 1

    async def _say(self, line: Line) -> None:
        phone = self._phones[line.person]
        phone.go_online()  # who types has the app open
        parent = await self._parent(line)
        await self._take_place()
        self._unsettled[line.number] = trio.Event()
        was_online = phone.online
        started_at = trio.current_time()
        key = await phone.send_nowait(self.conversation_id, line.text, reply_to_message_id=parent)
        phone.when_settled(key, partial(self._settled, line, started_at if was_online else None))
        self.counts.messages += 1

    def _settled(self, line: Line, started_at: float | None, answer: Settled) -> None:
        self._window.release()
        if answer.code:
            self.counts.refused_messages += 1
            self.violations.append(f"refused: line {line.number} of {self.transcript.name}: {answer.code}")
        else:
            self._message_ids[line.number] = answer.message_id
            if started_at is not None:
                self._shared.ack_latency.add(trio.current_time() - started_at)
        self._unsettled.pop(line.number).set()

    async def _take_place(self) -> None:
        """A place in the window; where it is full, those who hold it from offline come online."""
        if self._window.value == 0:
            self._wake(lambda phone: bool(phone.client.pending))
        await self._window.acquire()

    def _wake(self, holds_up: Callable[[Phone], bool]) -> None:
        for person in self._running:
            if holds_up(self._phones[person]):
                self._phones[person].go_online()

    async def _parent(self, line: Line) -> str | None:
        """The message id of what this line answers, waiting for its ack if need be; None where it cannot be linked.

        It may answer somebody's coming or going, which is no message here, or what was said before the one who answers
        was in the group, which the server rightly refuses to link.
        """
        if line.answers is None:
            return None
        waiting = self._unsettled.get(line.answers)
        if waiting is not None:
            self._wake(lambda phone: bool(phone.client.pending))
            with trio.move_on_after(PARENT_SECONDS):
                await waiting.wait()
        message_id = self._message_ids.get(line.answers)
        if message_id is None or line.answers < self._joined_at[line.person]:
            self.counts.answers_unlinked += 1
            return None
        self.counts.answers += 1
        return message_id

    # --- after -------------------------------------------------------------------------------------------------------

    async def catch_up(self) -> None:
        """Everybody online; until all sends are settled, all members hold the whole log and have proven its digest."""
        running = [self._phones[person] for person in sorted(self._running)]
        for phone in running:
            phone.go_online()
        with trio.move_on_after(CATCH_UP_SECONDS):
            async with trio.open_nursery() as nursery:
                for phone in running:
                    nursery.start_soon(self._finish_sends, phone)
            async with trio.open_nursery() as nursery:
                for person in self._members:
                    nursery.start_soon(self._finish_log, self._phones[person])

    async def _finish_sends(self, phone: Phone) -> None:
        await phone.wait_online()
        await phone.wait_until(lambda: not phone.client.pending)

    async def _finish_log(self, phone: Phone) -> None:
        def is_complete() -> bool:
            log = phone.client.logs.get(self.conversation_id)
            return log is not None and (log.cursor or 0) >= self._shared.ledger.head(self.conversation_id)

        await phone.wait_until(is_complete)
        await phone.sync()
        await phone.wait_online()
