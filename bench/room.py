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
from bench.http_api import HttpApi, Refusal
from bench.ledger import Ledger
from bench.pastimes import Pastimes, Shares
from bench.phone import FrameCache, Phone, Settled
from bench.transcript import Kind, Line, Transcript
from protocol.errors import ErrorCode
from protocol.models import GROUP_LIMIT, Role

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
    refused_muted: int = 0
    refused_banned: int = 0


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
    shares: Shares | None
    """None: people only talk, come and go."""


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
        self.shared = resources
        self._random = random.Random(f"{resources.seed}:{transcript.name}")
        self.phone_of: dict[int, Phone] = {}
        self._running: set[int] = set()
        self.tokens: dict[int, str] = {}
        self.users: dict[int, str] = {}
        self.members: dict[int, int] = {}
        """Person → line of the last word, in the order in which they joined."""
        self.joined_at: dict[int, int] = {}
        """Person → number of the line at which the present stay began."""
        self.roles: dict[int, Role] = {}
        """Of those who are not plain members."""
        self.silenced: set[int] = set()
        self.banned: set[int] = set()
        self.title = ""
        self._waiting: deque[int] = deque()
        self.message_ids: dict[int, str] = {}
        self._unsettled: dict[int, trio.Event] = {}
        self._window = trio.Semaphore(OUTSTANDING)
        self._away: dict[int, list[tuple[int, bool]]] = self._plan_spells()
        self.pastimes = Pastimes(self, resources.shares) if resources.shares is not None else None

    @property
    def phones(self) -> list[Phone]:
        return list(self.phone_of.values())

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
            api = self.shared.api
            user_id = await api.create_user(self.transcript.people[person])
            token = await api.create_token(user_id, DEVICE)
        self.users[person] = user_id
        self.tokens[person] = token
        self.phone_of[person] = Phone(
            self.shared.ws_urls,
            user_id,
            DEVICE,
            token,
            self.shared.ledger.record,
            habits=HABITS,
            cache=self.shared.cache,
            seed=self.shared.seed,
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
        speed = self.shared.speed
        for index, line in enumerate(self.transcript.lines):
            if speed is not None:
                due = started_at + line.minutes * 60 / speed
                await trio.sleep_until(due)
                self.shared.lateness.add(trio.current_time() - due)
            for person, comes_back in self._away.get(index, ()):
                self._switch(nursery, person, comes_back)
            if self.pastimes is not None:
                await self.pastimes.before(nursery, index)
            await self._play_line(nursery, index, line)
            if self.pastimes is not None and line.kind is Kind.SAY:
                await self.pastimes.after(index, line)
            self.lines_played += 1

    async def _play_line(self, nursery: trio.Nursery, index: int, line: Line) -> None:
        if not self.conversation_id:
            await self._found(nursery, line.person, index)
        if line.kind is Kind.LEAVE:
            await self.leave(nursery, line.person, index)
        elif line.kind is Kind.JOIN:
            await self.join(nursery, line.person, index, must=False)
        else:
            await self.join(nursery, line.person, index, must=True)
            await self._say(line)
            self.members[line.person] = index

    async def _found(self, nursery: trio.Nursery, person: int, index: int) -> None:
        self._start_phone(nursery, person)
        token = self.tokens[person]
        self.conversation_id = await self.shared.api.create_conversation("group", [self.users[person]], token)
        self._note_joined(person, index)
        self.roles[person] = Role.OWNER

    def _note_joined(self, person: int, index: int) -> None:
        self.members[person] = index
        self.joined_at[person] = self.transcript.lines[index].number
        self.counts.joined += 1

    def _start_phone(self, nursery: trio.Nursery, person: int) -> None:
        if person not in self._running:
            self._running.add(person)
            nursery.start_soon(self.phone_of[person].run, name=f"phone {self.transcript.people[person]}")

    def _switch(self, nursery: trio.Nursery, person: int, comes_back: bool) -> None:
        phone = self.phone_of[person]
        if comes_back:
            phone.go_online()
        elif phone.wanted and person in self._running:
            self.counts.away_spells += 1
            nursery.start_soon(phone.go_offline)

    async def join(self, nursery: trio.Nursery, person: int, index: int, *, must: bool) -> None:
        """Bring a person into the group. Who meets the cap waits for a place; who has something to say gets one now."""
        if person in self.members:
            return
        self._start_phone(nursery, person)
        if person in self.banned:
            await self._end_ban(person)
        if await self._add(person, index):
            return
        if not must:
            if person not in self._waiting:
                self._waiting.append(person)
            return
        silent = min(self.members, key=self.members.__getitem__)
        await self._remove(silent)
        if not await self._add(person, index):
            raise RoomError(f"{self.transcript.name}: refused although somebody had just left")
        self.counts.rotated_in += 1
        if person in self._waiting:
            self._waiting.remove(person)

    async def _add(self, person: int, index: int) -> bool:
        """True: in. False: the group is full, and the server said so with exactly this code."""
        refusal = await self._call_add(person)
        if refusal is None:
            self._note_joined(person, index)
            if len(self.members) > GROUP_LIMIT:
                self.violations.append(f"cap: {self.transcript.name} took participant {len(self.members)}")
            return True
        if refusal.code is ErrorCode.GROUP_FULL and len(self.members) >= GROUP_LIMIT:
            self.counts.refused_by_cap += 1
            return False
        raise RoomError(
            f"{self.transcript.name}: participant {len(self.members) + 1} was refused with "
            f"{refusal.status} {refusal.code.value}: {refusal.message}"
        )

    async def _call_add(self, person: int) -> Refusal | None:
        return await self.shared.api.add_participants(
            self.conversation_id, [self.users[person]], self.tokens[self.owner]
        )

    async def _end_ban(self, person: int) -> None:
        """Who is banned is not let in, before the owner says otherwise."""
        refusal = await self._call_add(person)
        if refusal is None or refusal.code is not ErrorCode.BANNED:
            said = "taken in" if refusal is None else refusal.code.value
            self.violations.append(f"ban: {self.transcript.name}: person {person} is banned and was {said}")
        self.counts.refused_banned += 1
        await self.unban(self.owner, person)

    @property
    def owner(self) -> int:
        return next(person for person, role in self.roles.items() if role is Role.OWNER)

    async def leave(self, nursery: trio.Nursery, person: int, index: int) -> None:
        if person in self._waiting:
            self._waiting.remove(person)
        if person not in self.members or len(self.members) == 1:
            return
        await self._remove(person)
        if self._waiting:
            await self.join(nursery, self._waiting.popleft(), index, must=False)
            self.counts.rotated_in += 1

    async def _remove(self, person: int) -> None:
        await self.last_words(person)
        refusal = await self.shared.api.remove_participant(
            self.conversation_id, self.users[person], self.tokens[person]
        )
        self.check("leave", refusal)
        self._forget(person)
        self.counts.left += 1

    async def last_words(self, person: int) -> None:
        """Until the fate of all that this person has said is known: it must not arrive after what comes next."""
        phone = self.phone_of[person]
        if phone.client.pending:
            phone.go_online()
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await phone.wait_until(lambda: not phone.client.pending)

    def _forget(self, person: int) -> None:
        """Out. The server hands the group of its last owner to the admin, else the member, who came first."""
        del self.members[person]
        self.silenced.discard(person)
        if self.pastimes is not None:
            self.pastimes.arranged.pop(person, None)  # who comes back is a new member
        if self.roles.pop(person, None) is Role.OWNER:
            heir = min(self.members, key=lambda other: self.roles.get(other) is not Role.ADMIN)
            self.roles[heir] = Role.OWNER

    def check(self, what: str, refusal: Refusal | None) -> None:
        """The server has to allow this. Raises RoomError where it does not."""
        if refusal is not None:
            raise RoomError(f"{self.transcript.name}: {what}: {refusal.code.value} {refusal.message}")

    async def ban(self, manager: int, person: int) -> None:
        """Out, until the ban ends. Raises RoomError, ApiError, as all of these do."""
        await self.last_words(person)
        api = self.shared.api
        self.check("ban", await api.ban(self.conversation_id, self.users[person], self.tokens[manager]))
        self._forget(person)
        self.banned.add(person)

    async def unban(self, manager: int, person: int) -> None:
        api = self.shared.api
        self.check("unban", await api.unban(self.conversation_id, self.users[person], self.tokens[manager]))
        self.banned.discard(person)

    async def silence(self, manager: int, person: int, until: str | None) -> None:
        """Until then nothing this person says is taken; None: it is again."""
        await self.last_words(person)
        api = self.shared.api
        refusal = await api.silence(self.conversation_id, self.users[person], until, self.tokens[manager])
        self.check("silence", refusal)
        (self.silenced.discard if until is None else self.silenced.add)(person)

    async def set_role(self, person: int, role: Role) -> None:
        api = self.shared.api
        user_id = self.users[person]
        self.check("role", await api.set_role(self.conversation_id, user_id, role, self.tokens[self.owner]))
        self.roles.pop(person, None)
        if role is not Role.MEMBER:
            self.roles[person] = role

    async def rename(self, manager: int, title: str) -> None:
        self.check("rename", await self.shared.api.rename(self.conversation_id, title, self.tokens[manager]))
        self.title = title

    async def _say(self, line: Line) -> None:
        phone = self.phone_of[line.person]
        phone.go_online()  # who types has the app open
        parent = await self._parent(line)
        await self.take_place()
        self._unsettled[line.number] = trio.Event()
        was_online = phone.online
        started_at = trio.current_time()
        key = await phone.send_nowait(self.conversation_id, line.text, reply_to_message_id=parent)
        muted = line.person in self.silenced
        phone.when_settled(key, partial(self._settled, line, started_at if was_online else None, muted))
        self.counts.messages += 1

    def _settled(self, line: Line, started_at: float | None, muted: bool, answer: Settled) -> None:
        self.give_place()
        if answer.code != (ErrorCode.MUTED.value if muted else ""):
            fate = answer.code or "taken, although its author is silenced"
            self.violations.append(f"refused: line {line.number} of {self.transcript.name}: {fate}")
        if answer.code:
            self.counts.refused_muted += muted
        else:
            self.message_ids[line.number] = answer.message_id
            if started_at is not None:
                self.shared.ack_latency.add(trio.current_time() - started_at)
        self._unsettled.pop(line.number).set()

    async def take_place(self) -> None:
        """A place in the window; where it is full, those who hold it from offline come online."""
        if self._window.value == 0:
            self._wake(lambda phone: bool(phone.client.pending))
        await self._window.acquire()

    def give_place(self) -> None:
        self._window.release()

    def _wake(self, holds_up: Callable[[Phone], bool]) -> None:
        for person in self._running:
            if holds_up(self.phone_of[person]):
                self.phone_of[person].go_online()

    async def _parent(self, line: Line) -> str | None:
        """The message id of what this line answers, waiting for its ack if need be; None where it cannot be linked.

        It may answer somebody's coming or going, which is no message here, or what was said before the one who answers
        was in the group, which the server rightly refuses to link.
        """
        if line.answers is None:
            return None
        message_id = await self.message_id(line.answers)
        if message_id is None or line.answers < self.joined_at[line.person]:
            self.counts.answers_unlinked += 1
            return None
        self.counts.answers += 1
        return message_id

    async def message_id(self, number: int) -> str | None:
        """Id of what was said in this line, once its fate is known; None where it was nothing, or refused."""
        waiting = self._unsettled.get(number)
        if waiting is not None:
            self._wake(lambda phone: bool(phone.client.pending))
            with trio.move_on_after(PARENT_SECONDS):
                await waiting.wait()
        return self.message_ids.get(number)

    # --- after -------------------------------------------------------------------------------------------------------

    async def catch_up(self) -> None:
        """Everybody online; until all sends are settled, all members hold the whole log and have proven its digest."""
        running = [self.phone_of[person] for person in sorted(self._running)]
        for phone in running:
            phone.go_online()
        with trio.move_on_after(CATCH_UP_SECONDS):
            async with trio.open_nursery() as nursery:
                for phone in running:
                    nursery.start_soon(self._finish_sends, phone)
            async with trio.open_nursery() as nursery:
                for person in self.members:
                    nursery.start_soon(self._finish_log, self.phone_of[person])

    async def _finish_sends(self, phone: Phone) -> None:
        await phone.wait_online()
        await phone.wait_until(lambda: not phone.client.pending)

    async def _finish_log(self, phone: Phone) -> None:
        def is_complete() -> bool:
            log = phone.client.logs.get(self.conversation_id)
            return log is not None and (log.cursor or 0) >= self.shared.ledger.head(self.conversation_id)

        await phone.wait_until(is_complete)
        await phone.sync()
        await phone.wait_online()
        phone.client.report(self.conversation_id, trio.current_time())
