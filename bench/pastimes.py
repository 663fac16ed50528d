"""What people in a replayed room do besides talking: edit, delete, react, manage the group, arrange it, take a break.

Called by `room.Room` around each line of the log. Who does what to which message is drawn from the seed alone.
"""

from __future__ import annotations

import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from protocol.errors import ErrorCode
from protocol.frames import DeleteScope, ReactionOp
from protocol.models import Role

if TYPE_CHECKING:
    import trio

    from bench.http_api import Refusal
    from bench.phone import Phone, Settled
    from bench.room import Room
    from bench.transcript import Line

RECENT_LINES: Final = 40
"""People react to, edit and delete what was said lately."""
EMOJIS: Final = ("\N{THUMBS UP SIGN}", "\N{HEAVY BLACK HEART}", "\N{FACE WITH TEARS OF JOY}", ":ubuntu:", "+1")
TAKEN_BACK: Final = 0.15
"""Of the reactions that somebody still can take back."""
SPELL_LINES: Final = (20, 120)
"""For so many lines somebody stays silenced, banned or away."""
ADMINS: Final = 3
SILENCED_UNTIL: Final = "2100-01-01T00:00:00Z"


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """How often each thing happens per message that is said."""

    edits: float = 0.02
    deletions: float = 0.01
    reactions: float = 0.08
    admin: float = 0.006
    settings: float = 0.004
    churn: float = 0.004


class PastimeCounts(msgspec.Struct):
    """What happened in one room. `too_late`: changes refused because their message had been deleted meanwhile."""

    edited: int = 0
    deleted: int = 0
    hidden: int = 0
    reacted: int = 0
    unreacted: int = 0
    too_late: int = 0
    renamed: int = 0
    roles: int = 0
    silenced: int = 0
    banned: int = 0
    unbanned: int = 0
    arranged: int = 0
    churned: int = 0


class Pastimes:
    """The pastimes of one room."""

    def __init__(self, room: Room, shares: Shares) -> None:
        self.counts = PastimeCounts()
        self.arranged: dict[int, dict[str, object]] = {}
        """Person → the own settings that the server has confirmed last."""
        self._room = room
        self._random = random.Random(f"{room.shared.seed}:{room.transcript.name}:pastimes")
        self._recent: deque[Line] = deque(maxlen=RECENT_LINES)
        self._deleted: set[int] = set()
        self._hidden: set[tuple[int, int]] = set()
        self._reactions: dict[tuple[int, int], set[str]] = {}
        """(person, line) → what the person has reacted with."""
        self._later: dict[int, list[tuple[str, int]]] = {}
        """Index of a line → what ends there: (silence, ban, absence) of whom."""
        self._deeds = (
            (shares.edits, self._edit),
            (shares.deletions, self._delete),
            (shares.reactions, self._react),
            (shares.admin, self._manage),
            (shares.settings, self._arrange),
            (shares.churn, self._churn),
        )
        self._away: list[int] = []

    async def before(self, nursery: trio.Nursery, index: int) -> None:
        """End what was to end at this line, and let those go who want a break. Raises RoomError, ApiError."""
        room = self._room
        for person in self._away:
            if person in room.members and len(room.members) > 1:
                await room.leave(nursery, person, index)
                self.counts.churned += 1
        self._away.clear()
        for what, person in self._later.pop(index, ()):
            if what == "silence" and person in room.silenced and person != room.owner:
                await room.last_words(person)
                await room.silence(room.owner, person, None)
                self.counts.silenced += 1
            elif what == "ban" and person in room.banned:
                await room.unban(room.owner, person)
                self.counts.unbanned += 1
            elif what == "absence":
                await room.join(nursery, person, index, must=False)

    async def after(self, index: int, line: Line) -> None:
        """Whatever the draw says happens behind this line. Raises RoomError, ApiError."""
        self._recent.append(line)
        for share, deed in self._deeds:
            if self._random.random() < share:
                await deed(index)

    @property
    def hiders(self) -> list[int]:
        """Those still there who have deleted a message for themselves."""
        return sorted({person for person, _ in self._hidden if person in self._room.members})

    # --- changes of messages -----------------------------------------------------------------------------------------

    async def _edit(self, index: int) -> None:
        line = self._draw_own()
        message_id = await self._room.message_id(line.number) if line is not None else None
        if line is None or message_id is None:
            return
        phone = self._room.phone_of[line.person]
        await self._start(line.person)
        key = await phone.edit_nowait(self._room.conversation_id, message_id, f"{line.text} (edited at {index})")
        self._follow(phone, key, "edited", line)

    async def _delete(self, index: int) -> None:
        for_all = self._random.random() < 0.5
        if for_all:
            line = self._draw_own()
            person = line.person if line is not None else -1
        else:
            line, person = self._draw_visible()
        message_id = await self._room.message_id(line.number) if line is not None else None
        if line is None or message_id is None or (person, line.number) in self._hidden:
            return
        await self._start(person)
        if for_all:
            self._deleted.add(line.number)
        else:
            self._hidden.add((person, line.number))
        scope = DeleteScope.ALL if for_all else DeleteScope.ME
        phone = self._room.phone_of[person]
        key = await phone.delete_nowait(self._room.conversation_id, message_id, scope)
        self._follow(phone, key, "deleted" if for_all else "hidden", line)

    async def _react(self, index: int) -> None:
        line, person, emoji = self._draw_reaction()
        if line is None or person in self._room.silenced or (person, line.number) in self._hidden:
            return
        message_id = await self._room.message_id(line.number)
        if message_id is None:
            return
        given = self._reactions.setdefault((person, line.number), set())
        if given:  # one who has reacted takes it back: two changes of one state never overtake each other
            await self._room.last_words(person)
        adds = emoji not in given
        (given.add if adds else given.discard)(emoji)
        await self._start(person)
        op = ReactionOp.ADD if adds else ReactionOp.REMOVE
        phone = self._room.phone_of[person]
        key = await phone.react_nowait(self._room.conversation_id, message_id, emoji, op)
        self._follow(phone, key, "reacted" if adds else "unreacted", line)

    def _draw_reaction(self) -> tuple[Line | None, int, str]:
        """What somebody reacts to and how; or a reaction of theirs, to be taken back."""
        line, person = self._draw_visible()
        emoji = self._random.choice(EMOJIS)
        if self._random.random() < TAKEN_BACK:
            room = self._room
            given = [
                (recent, who, one)
                for recent in self._recent
                if recent.number not in self._deleted
                for who in room.members
                if room.joined_at[who] <= recent.number
                for one in sorted(self._reactions.get((who, recent.number), ()))
            ]
            if given:
                return self._random.choice(given)
        return line, person, emoji

    def _draw_own(self) -> Line | None:
        """A recent line whose author is still there, may speak, and has not lost it."""
        room = self._room
        lines = [
            line
            for line in self._recent
            if line.number not in self._deleted
            and line.person in room.members
            and line.person not in room.silenced
            and room.joined_at[line.person] <= line.number
            and (line.person, line.number) not in self._hidden
        ]
        return self._random.choice(lines) if lines else None

    def _draw_visible(self) -> tuple[Line | None, int]:
        """A recent line and somebody who can see it."""
        lines = [line for line in self._recent if line.number not in self._deleted]
        if not lines:
            return None, -1
        line = self._random.choice(lines)
        room = self._room
        people = [person for person in room.members if room.joined_at[person] <= line.number]
        return (line, self._random.choice(people)) if people else (None, -1)

    async def _start(self, person: int) -> None:
        self._room.phone_of[person].go_online()  # who does something has the app open
        await self._room.take_place()

    def _follow(self, phone: Phone, key: str, what: str, line: Line) -> None:
        phone.when_settled(key, partial(self._settled, what, line))

    def _settled(self, what: str, line: Line, answer: Settled) -> None:
        self._room.give_place()
        if not answer.code:
            setattr(self.counts, what, getattr(self.counts, what) + 1)
        elif answer.code == ErrorCode.NOT_FOUND.value and line.number in self._deleted:
            self.counts.too_late += 1
        else:
            self._room.violations.append(
                f"refused: {what} of line {line.number} of {self._room.transcript.name}: {answer.code}"
            )

    # --- the group ---------------------------------------------------------------------------------------------------

    async def _manage(self, index: int) -> None:
        """A rename, a silence, a ban, a promotion or a demotion, by somebody who may."""
        room = self._room
        managers = [person for person in room.members if person in room.roles]
        manager = self._random.choice(managers)
        plain = [person for person in room.members if person not in room.roles]
        deed = self._random.choice(("rename", "silence", "role", "role", "ban"))
        if deed == "rename":
            await room.rename(manager, f"{room.transcript.name} since line {index}")
            self.counts.renamed += 1
        elif deed == "role":
            await self._change_role(plain)
        elif plain and deed == "silence":
            person = self._random.choice(plain)
            if person not in room.silenced:
                await room.silence(manager, person, SILENCED_UNTIL)
                self.counts.silenced += 1
                self._plan("silence", person, index)
        elif plain:
            person = self._random.choice(plain)
            await room.ban(manager, person)
            self.counts.banned += 1
            self._plan("ban", person, index)

    async def _change_role(self, plain: list[int]) -> None:
        admins = [person for person, role in self._room.roles.items() if role is Role.ADMIN]
        if len(admins) >= ADMINS:
            await self._room.set_role(self._random.choice(admins), Role.MEMBER)
        elif plain:
            await self._room.set_role(self._random.choice(plain), Role.ADMIN)
        else:
            return
        self.counts.roles += 1

    def _plan(self, what: str, person: int, index: int) -> None:
        self._later.setdefault(index + self._random.randint(*SPELL_LINES), []).append((what, person))

    # --- one's own ---------------------------------------------------------------------------------------------------

    async def _arrange(self, index: int) -> None:
        room = self._room
        person = self._random.choice(list(room.members))
        flag = self._random.random() < 0.7
        name = self._random.choice(("archived", "pinned", "muted_until"))
        value: object = flag
        if name == "muted_until":
            value = SILENCED_UNTIL if flag else None
        refusal: Refusal | None = await room.shared.api.arrange(
            room.conversation_id, {name: value}, room.tokens[person]
        )
        room.check("arrange", refusal)
        self.arranged.setdefault(person, {})[name] = value
        self.counts.arranged += 1

    async def _churn(self, index: int) -> None:
        person = self._random.choice(list(self._room.members))
        self._away.append(person)
        self._plan("absence", person, index)
