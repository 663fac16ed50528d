"""From committed messages to down records: who is where, runs of messages encoded once, inboxes for those who are
nowhere.

Called by the ingest role in process, after the commit. Nothing here is needed for correctness: a record that never
arrives is repaired from the log by the gateway's sweep.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import anyio
import msgspec
import structlog

from protocol import codec, frames, records
from protocol.models import AGENT_PREFIX
from workers import metrics
from workers.broker import Broker, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from protocol.models import StoredMessage

RUN_MESSAGES = 50
RUN_BYTES = 64 * 1024
"""Content of one live frame, at most: half a page, so that a phone shows the first of a burst soon."""
REGISTRY_LIMIT = 200_000
"""Users whose whereabouts are remembered (about 200 bytes each); past it all are forgotten and asked again."""
_LIVE_SECONDS = 2.0

log = structlog.get_logger()
Down = dict[str, list[records.DownItem]]


class Committed(NamedTuple):
    """One committed message on its way out. `roster`: who may see it. `instance`/`connection`: where it came from (""
    / 0: a server). `hidden_for`: whose private deletion this is; the others do not see what it is about.
    """

    message: StoredMessage
    roster: tuple[str, ...]
    instance: str
    connection: int
    hidden_for: str = ""


class Registry:
    """User → instances that hold its connections, one per device; cached until Redis says the key changed."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._where: dict[str, tuple[str, ...]] = {}
        self._live: frozenset[str] = frozenset()
        self._following = False
        self._changes = 0
        """Invalidations seen: what was read before one of them is not cached after it."""

    @property
    def known(self) -> int:
        """Users whose whereabouts are remembered."""
        return len(self._where)

    async def run(self) -> None:
        """Follow the invalidations until cancelled; while they are not followed nothing is cached."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow_instances, name="registry instances")
            while True:
                try:
                    async with self._broker.registry_changes() as changes:
                        self._where.clear()
                        self._changes += 1  # a lookup that began before anybody was told of changes is not kept
                        self._following = True
                        async for users in changes:
                            self._changes += 1
                            if users is None:
                                self._where.clear()
                            else:
                                for user_id in users:
                                    self._where.pop(user_id, None)
                except BrokerUnavailable as error:
                    log.warning("registry_unfollowed", error=str(error))
                self._following = False
                self._where.clear()
                await anyio.sleep(0.5)

    async def _follow_instances(self) -> None:
        while True:
            try:
                await self._see_live()
            except BrokerUnavailable as error:
                log.warning("instances_unknown", error=str(error))
            await anyio.sleep(_LIVE_SECONDS)

    async def _see_live(self) -> None:
        live = frozenset(await self._broker.live_instances())
        if live != self._live:
            self._live = live
            self._where.clear()

    async def locate(self, user_ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Where these users are now; an empty tuple is offline. Raises BrokerUnavailable."""
        wanted = list(user_ids)
        if self._following and all(user_id in self._where for user_id in wanted):
            return self._where
        known = self._where if self._following else {}
        # A snapshot: invalidations come while this waits, and what they make stale must not be kept either.
        where = {user_id: known[user_id] for user_id in wanted if user_id in known}
        changes = self._changes
        found = await self._broker.locate([user_id for user_id in wanted if user_id not in where])
        if any(instance not in self._live for instances in found.values() for instance in instances):
            await self._see_live()
        fresh = {
            user_id: tuple(instance for instance in instances if instance in self._live)
            for user_id, instances in found.items()
        }
        if self._following and changes == self._changes:
            if len(self._where) > REGISTRY_LIMIT:
                self._where.clear()
            self._where.update(fresh)
        where.update(fresh)
        return where


class _Run:
    """Consecutive messages of one conversation that go out as one frame."""

    __slots__ = ("connection", "content_bytes", "instance", "messages", "roster")

    def __init__(self, first: Committed) -> None:
        self.roster = first.roster
        self.instance = first.instance
        self.connection = first.connection
        self.messages = [first.message]
        self.content_bytes = len(first.message.content)

    def takes(self, item: Committed) -> bool:
        """May this one join? Only where the same people see it, directly behind, within the bounds of a frame."""
        return (
            item.roster is self.roster
            and len(self.messages) < RUN_MESSAGES
            and self.content_bytes + len(item.message.content) <= RUN_BYTES
            and item.message.sequence_number == self.messages[-1].sequence_number + 1
        )

    def add(self, item: Committed) -> None:
        self.messages.append(item.message)
        self.content_bytes += len(item.message.content)
        if item.connection != self.connection or item.instance != self.instance:
            # Nobody sent all of it, so everybody gets a copy.
            self.connection = 0


class Courier:
    """Turns commits, receipts and outcomes into one record per instance."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def deliver(self, committed: Sequence[Committed], down: Down) -> dict[str, list[StoredMessage]]:
        """Add the deliveries of these commits to `down`, in log order; returns the messages of offline
        users, but for agents, who have their tasks. Raises
        BrokerUnavailable.
        """
        runs = _runs(committed)
        wanted: set[str] = set()
        for run in runs:
            wanted.update(run.roster)
        where = await self._registry.locate(wanted)
        offline: dict[str, list[StoredMessage]] = defaultdict(list)
        for run in runs:
            frame = encode_live(run.messages)
            first = run.messages[0]
            users_at: dict[str, list[str]] = defaultdict(list)
            for user_id in run.roster:
                instances = where[user_id]
                if not instances and not user_id.startswith(AGENT_PREFIX):
                    offline[user_id] += [m for m in run.messages if m.sender_id != user_id]
                for instance in set(instances) if len(instances) > 1 else instances:
                    users_at[instance].append(user_id)
            for instance, users in users_at.items():
                skip = run.connection if instance == run.instance else 0
                down[instance].append(
                    records.Delivery(
                        first.conversation_id,
                        first.sequence_number,
                        run.messages[-1].sequence_number,
                        users,
                        skip,
                        frame,
                    )
                )
            metrics.DELIVERIES.inc(len(run.roster))
        return offline

    async def notify(self, notices: Sequence[tuple[Sequence[str], bytes]], down: Down) -> None:
        """Add frames outside any log, each for its users, to `down`. Raises BrokerUnavailable."""
        where = await self._registry.locate({user_id for users, _ in notices for user_id in users})
        for users, frame in notices:
            users_at: dict[str, list[str]] = defaultdict(list)
            for user_id in users:
                for instance in set(where[user_id]):
                    users_at[instance].append(user_id)
            for instance, here in users_at.items():
                down[instance].append(records.Notice(here, frame))

    async def devices(self, user_id: str) -> int:
        """How many of a user's devices are connected. Raises BrokerUnavailable."""
        return len((await self._registry.locate((user_id,)))[user_id])


def _runs(committed: Sequence[Committed]) -> list[_Run]:
    runs: list[_Run] = []
    open_runs: dict[str, _Run] = {}
    for item in committed:
        conversation_id = item.message.conversation_id
        if item.hidden_for:
            open_runs.pop(conversation_id, None)
            runs += _private_runs(item)
            continue
        run = open_runs.get(conversation_id)
        if run is not None and run.takes(item):
            run.add(item)
        else:
            run = open_runs[conversation_id] = _Run(item)
            runs.append(run)
    return runs


def _private_runs(item: Committed) -> list[_Run]:
    """The entry of a private deletion: with its target for its actor, without for the others."""
    veiled = msgspec.structs.replace(item.message, target_message_id=msgspec.UNSET)
    others = tuple(user_id for user_id in item.roster if user_id != item.hidden_for)
    return [_Run(item._replace(roster=(item.hidden_for,))), _Run(item._replace(message=veiled, roster=others))]


def encode_live(messages: list[StoredMessage]) -> bytes:
    """The one `messages` frame of a run, encoded once for all who get it."""
    first = messages[0]
    return codec.JSON.encode(
        frames.Messages(
            payload=frames.MessagesPayload(
                conversation_id=first.conversation_id,
                messages=messages,
                origin="live",
                from_sequence=first.sequence_number,
                to_sequence=messages[-1].sequence_number,
            )
        )
    )
