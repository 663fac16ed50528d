"""The load of a chaos run, a process of its own: `python -m bench.chaos.crowd`, one JSON command per line, one answer.

Phones in pairs and groups talk at a given rate whatever happens to the system, and keep what they could not say; people
come and go in the groups and rename them through the HTTP API, so the logs hold entries that no phone sent. The ledger
judges every event. One crowd per chapter: what it has kept in memory ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread
import msgspec

from bench import journal
from bench.accounts import Account
from bench.chaos.handset import Handset
from bench.chaos.samples import STEP_SECONDS, Sampler
from bench.history import WritingLedger
from bench.http_api import ApiError, HttpApi
from bench.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

PACE_SECONDS: Final = 0.01
TICK_SECONDS: Final = 0.1
MOST_UNSAID: Final = 24
"""Messages one phone keeps without an ack; past it people wait too, so that an outage costs bounded memory."""
GROUP_STEP_SECONDS: Final = 0.5
CONTENT_BYTES: Final = 120
SHOWN_VIOLATIONS: Final = 40


class Talk(msgspec.Struct, frozen=True):
    """One conversation. A group's last member comes and goes and does not speak, its first one is the owner."""

    conversation_id: str
    members: list[Account]
    is_group: bool


class Enter(msgspec.Struct, frozen=True, tag="enter", tag_field="do"):
    """Everybody connects, each to its own choice of `urls[i]` of its place. Answers when all are in."""

    talks: list[Talk]
    urls: list[list[str]]
    """Sets of gateways' addresses; phones take the sets in turn."""
    rest_url: str
    admin_token: str
    seed: int
    group_share: float
    """Part of the messages that go to groups."""
    history: str = ""
    """File for what the phones see, for the auditor."""
    timeout_seconds: float = 60.0


class Pace(msgspec.Struct, frozen=True, tag="pace", tag_field="do"):
    """Messages per second from now on; 0: silence."""

    rate: float
    leaves: bool = False
    """Members of groups leave too, not only come. A removal whose push is lost is told to nobody again, so no fault may
    be near."""


class Look(msgspec.Struct, frozen=True, tag="look", tag_field="do"):
    """The samples since the last look."""


class Settle(msgspec.Struct, frozen=True, tag="settle", tag_field="do"):
    """Wait until everybody has everything and has proven its digest, then judge."""

    timeout_seconds: float


class Quit(msgspec.Struct, frozen=True, tag="quit", tag_field="do"):
    """Hang up and end."""


Command = Enter | Pace | Look | Settle | Quit


class Crowd:
    """All phones of this process."""

    def __init__(self, tasks: anyio.abc.TaskGroup, call_later: Callable[..., Any]) -> None:
        self._tasks = tasks
        self._call_later = call_later
        self._ledger: Ledger | WritingLedger = Ledger()
        self._sampler = Sampler()
        self._handsets: dict[str, Handset] = {}
        self._talks: list[Talk] = []
        self._speakers: Iterator[tuple[Handset, str, str]] = iter(())
        self._pace = Pace(0.0)
        self._held_back = 0
        self._api: HttpApi | None = None
        self._random = random.Random()
        self._out: dict[str, bool] = {}
        """Group → is its last member out, as far as one knows?"""
        self._steps = 0

    def record(self, event: journal.Event) -> None:
        """See `journal.Journal`."""
        self._ledger.record(event)
        if isinstance(event, journal.Acked):
            self._sampler.acked(event.user_id, event.idempotency_key, event.at)
        elif isinstance(event, journal.Refused) and not event.retryable and event.idempotency_key is not None:
            self._sampler.refused(event.user_id, event.idempotency_key)

    # --- the beginning -----------------------------------------------------------------------------------------------

    async def enter(self, command: Enter) -> dict[str, Any]:
        self._random = random.Random(command.seed)
        if command.history:
            self._ledger = WritingLedger(Path(command.history))
        self._talks = command.talks
        for talk in command.talks:
            if not talk.is_group:
                self._ledger.declare_direct(talk.conversation_id, (talk.members[0].user_id, talk.members[1].user_id))
        urls = itertools.cycle(command.urls)
        for account in (account for talk in command.talks for account in talk.members):
            handset = Handset(
                next(urls),
                account.user_id,
                account.device_id,
                account.token,
                self.record,
                self._spawn,
                self._call_later,
                command.seed,
            )
            self._handsets[account.user_id] = handset
            self._tasks.start_soon(handset.run)
        self._speakers = self._choose(command.group_share)
        self._api = HttpApi(command.rest_url, command.admin_token)
        self._tasks.start_soon(self._serve_api)
        for work in (self._speak, self._tick, self._sample, self._change_groups):
            self._tasks.start_soon(work)
        with anyio.move_on_after(command.timeout_seconds):
            await self._wait_in()
        return {"online": self._online(), "phones": len(self._handsets)}

    async def _wait_in(self) -> None:
        """Until everybody is connected and has its backlog."""
        while not all(handset.online and handset.client.synced for handset in self._handsets.values()):  # noqa: ASYNC110
            await anyio.sleep(0.05)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.start_soon(_await, work)

    def _choose(self, group_share: float) -> Iterator[tuple[Handset, str, str]]:
        """Who speaks next: the people of pairs and of groups, each in turn, mixed by the share."""
        pairs = [
            (self._handsets[talk.members[place].user_id], talk.conversation_id, talk.members[1 - place].user_id)
            for talk in self._talks
            if not talk.is_group
            for place in (0, 1)
        ]
        groups = [
            (self._handsets[account.user_id], talk.conversation_id, "")
            for talk in self._talks
            if talk.is_group
            for account in talk.members[:-1]
        ]
        self._random.shuffle(pairs)
        self._random.shuffle(groups)
        turns = itertools.cycle(pairs), itertools.cycle(groups)
        while True:
            yield next(turns[bool(groups) and self._random.random() < group_share])

    def _online(self) -> int:
        return sum(handset.online for handset in self._handsets.values())

    # --- what goes on ------------------------------------------------------------------------------------------------

    async def _speak(self) -> None:
        """By the clock. Who has too much unsaid waits."""
        number, owed, before = 0, 0.0, time.monotonic()
        while True:
            await anyio.sleep(PACE_SECONDS)
            now = time.monotonic()
            owed = min(owed + self._pace.rate * (now - before), self._pace.rate * 0.25)  # not a burst after a stall
            before = now
            while owed >= 1.0:
                owed -= 1.0
                handset, conversation_id, receiver_id = next(self._speakers)
                if len(handset.client.pending) >= MOST_UNSAID:
                    self._held_back += 1
                    continue
                number += 1
                key = handset.say(
                    conversation_id, f"{handset.client.user_id}/{number}".ljust(CONTENT_BYTES), receiver_id
                )
                self._sampler.said(handset.client.user_id, key)

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for handset in self._handsets.values():
                handset.tick(now)

    async def _sample(self) -> None:
        due = time.monotonic() + STEP_SECONDS
        while True:
            await anyio.sleep(max(0.0, due - time.monotonic()))
            due += STEP_SECONDS
            self._sampler.step(self._online())

    async def _serve_api(self) -> None:
        assert self._api is not None
        async with self._api:
            await anyio.sleep_forever()

    async def _change_groups(self) -> None:
        """Entries of the log that no phone has sent: a new title, or the last member goes or comes back."""
        groups = [talk for talk in self._talks if talk.is_group]
        while groups:
            await anyio.sleep(GROUP_STEP_SECONDS)
            if not self._pace.rate:
                continue
            with contextlib.suppress(ApiError):  # the log says what has come of it
                await self._change(self._random.choice(groups))
                self._steps += 1

    async def _change(self, talk: Talk) -> None:
        assert self._api is not None
        owner, last = talk.members[0], talk.members[-1]
        if self._out.get(talk.conversation_id, False) and self._random.random() < 0.2:
            if await self._api.add_participants(talk.conversation_id, [last.user_id], owner.token) is None:
                self._out[talk.conversation_id] = False
        elif not self._pace.leaves or self._out.get(talk.conversation_id, False):
            await self._api.rename(talk.conversation_id, f"title {self._random.random()}", owner.token)
        else:
            self._out[talk.conversation_id] = True  # whether an answer comes or not: adding again does no harm
            await self._api.remove_participant(talk.conversation_id, last.user_id, owner.token)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def settle(self, command: Settle) -> dict[str, Any]:
        """Everybody comes to rest. The verdict, and what was still open where that did not happen."""
        deadline = time.monotonic() + command.timeout_seconds
        self._pace = Pace(0.0)
        open_ends = await self._wait_settled(deadline)
        for handset in self._handsets.values():
            handset.sync()
        with anyio.move_on_after(deadline - time.monotonic()):
            await self._wait_in()
        if isinstance(self._ledger, WritingLedger):
            self._ledger.end(time.monotonic())
        violations = [str(violation) for violation in self._ledger.verdict()]
        violations += [text for handset in self._handsets.values() for text in handset.refused]
        return {
            "open_ends": open_ends,
            "violations": violations[:SHOWN_VIOLATIONS],
            "violation_count": len(violations),
            "counts": dict(self._ledger.counts),
            "slowest_ack_seconds": round(self._sampler.slowest_seconds, 3),
            "held_back": self._held_back,
            "group_steps": self._steps,
            "digests_proven": sum(len(handset.client.proven) for handset in self._handsets.values()),
            "stored": sum(self._ledger.head(talk.conversation_id) for talk in self._talks),
        }

    async def _wait_settled(self, deadline: float) -> list[str]:
        quiet_since = time.monotonic()
        while time.monotonic() < deadline:
            open_ends = self._open_ends()
            if open_ends:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > STEP_SECONDS:
                return []
            await anyio.sleep(0.1)
        return self._open_ends()[:SHOWN_VIOLATIONS]

    def _open_ends(self) -> list[str]:
        """What not everybody has yet. A member who is out has nothing to wait for."""
        found: list[str] = []
        for talk in self._talks:
            head = self._ledger.head(talk.conversation_id)
            for account in talk.members:
                handset = self._handsets[account.user_id]
                log = handset.client.logs.get(talk.conversation_id)
                cursor = 0 if log is None else log.cursor or 0
                if handset.client.pending or not handset.online or not handset.client.synced:
                    found.append(
                        f"{account.user_id}: {len(handset.client.pending)} unsaid, {handset.client.state.value}"
                    )
                elif cursor < head and (not talk.is_group or self._is_in(talk, account)):
                    found.append(f"{account.user_id} has {cursor} of {head} of {talk.conversation_id}")
        return found

    def _is_in(self, talk: Talk, account: Account) -> bool:
        return account.user_id in self._ledger.group(talk.conversation_id).participants

    def look(self) -> dict[str, Any]:
        return {
            "samples": self._sampler.take(),
            "acked": self._sampler.total_acked,
            "refused": [text for handset in self._handsets.values() for text in handset.refused],
        }

    def set_pace(self, command: Pace) -> dict[str, Any]:
        self._pace = command
        return {}


async def _await(work: Coroutine[Any, Any, None]) -> None:
    await work


_decode = msgspec.json.Decoder(Command).decode


async def main() -> None:
    """Serve commands until `quit` or the end of the input."""
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(tasks, asyncio.get_running_loop().call_later)
        while True:
            line = await anyio.to_thread.run_sync(sys.stdin.buffer.readline)
            command = _decode(line) if line.strip() else Quit()
            match command:
                case Enter():
                    answer = await crowd.enter(command)
                case Pace():
                    answer = crowd.set_pace(command)
                case Look():
                    answer = crowd.look()
                case Settle():
                    answer = await crowd.settle(command)
                case Quit():
                    break
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    # Not on uvloop: a line that is cut in its handshake closes its socket under libuv, which aborts the process (libuv
    # issue 5130).
    anyio.run(main)
