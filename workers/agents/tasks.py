"""From events to tasks: what of all that was said is for an agent, written down, and put where its runner looks.

`TaskSink` is a sink of the role `events`; `TaskQueue` is the stream between it and the agents role. The task in MongoDB
is the truth: what the stream loses, the runner finds there.
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from protocol import codec, keys
from protocol.events import Event, MessageReceivedEvent
from protocol.models import AGENT_PREFIX, MessageType
from workers import metrics
from workers.broker import Broker, BrokerUnavailable, GroupMissing
from workers.store.agent_tasks import Home, Task

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from workers.store import Store

HOMES_LIMIT: Final = 20_000
"""Conversations whose agent is remembered (about 200 bytes each); past it those not heard of longest are forgotten."""
STREAM_LIMIT: Final = 10_000
"""Entries a partition's stream keeps for a runner that is busy or dead; the tasks themselves are in MongoDB."""
_READ_COUNT: Final = 50
_NO_HOME: Final = Home("", "", plaintext=False)

log = structlog.get_logger(__name__)
_decode_tasks = msgspec.json.Decoder(list[Task]).decode


def partition_of(conversation_id: str) -> int:
    """Where a conversation's tasks go, so that one process at a time has all of them."""
    return keys.shard_of(conversation_id, keys.AGENT_PARTITIONS)


class TaskSink:
    """See `workers.events.Sink`."""

    def __init__(self, store: Store, queue: TaskQueue) -> None:
        self._store = store
        self._queue = queue
        self._homes: OrderedDict[str, Home] = OrderedDict()

    async def take(self, batch: Sequence[Event]) -> None:
        """See `workers.events.Sink.take`."""
        asked = [event.data for event in batch if isinstance(event.data, MessageReceivedEvent) and _may_ask(event.data)]
        if not asked:
            return
        await self._learn({message.conversation_id for message in asked})
        tasks = [task for message in asked if (task := self._task(message)) is not None]
        if not tasks:
            return
        fresh = await self._store.agent_tasks.add(tasks, datetime.now(UTC))
        metrics.AGENT_TASKS.labels("asked").inc(len(fresh))
        await self._queue.put(fresh)

    async def _learn(self, conversation_ids: set[str]) -> None:
        unknown = [name for name in conversation_ids if name not in self._homes]
        if unknown:
            self._homes.update(await self._store.agent_tasks.homes(unknown))
        for name in conversation_ids & self._homes.keys():
            self._homes.move_to_end(name)

    def _task(self, message: MessageReceivedEvent) -> Task | None:
        """The task that a message is, None where it is for no agent."""
        home = self._homes.get(message.conversation_id, _NO_HOME)
        while len(self._homes) > HOMES_LIMIT:
            self._homes.popitem(last=False)
        if not home.agent_id and not message.receiver_id.startswith(AGENT_PREFIX):
            return None
        return Task(
            partition=partition_of(message.conversation_id),
            agent_id=home.agent_id,
            user_id=home.user_id,
            plaintext=home.plaintext,
            event=message,
        )


def _may_ask(message: MessageReceivedEvent) -> bool:
    """Agents do not answer agents, so two of them cannot keep each other talking; nor what the system says."""
    return message.message_type is not MessageType.SYSTEM and not message.sender_id.startswith(AGENT_PREFIX)


class TaskQueue:
    """The streams `agents:tasks:{partition}`: how a runner hears of a task within a moment."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def put(self, tasks: Iterable[Task]) -> None:
        """Tell their runners. What cannot be told is found by them later."""
        parts: dict[int, list[Task]] = {}
        for task in tasks:
            parts.setdefault(task.partition, []).append(task)
        limit = ("MAXLEN", "~", STREAM_LIMIT)
        for partition, part in parts.items():
            stream, value = keys.agent_tasks(partition), codec.encode_value(part)
            try:
                await self._broker.command("XADD", stream, *limit, "*", keys.FIELD, value)
            except BrokerUnavailable as error:
                log.warning("agent_tasks_not_told", tasks=len(part), error=str(error)[:200])

    async def prepare(self, partitions: Iterable[int]) -> bool:
        """Groups that begin at the end: what lies there already is in MongoDB. False: nobody waits for anybody (see
        `lease.Estate`). Raises BrokerUnavailable."""
        for partition in partitions:
            try:
                await self._broker.create_group(keys.agent_tasks(partition), keys.AGENT_GROUP, "$")
            except GroupMissing:
                log.warning("agent_group_not_made", partition=partition)
        return False

    async def read(self, consumer: str, partitions: Sequence[int], block_ms: int) -> list[Task]:
        """Tasks of these partitions that nobody has read. Raises BrokerUnavailable."""
        streams = [keys.agent_tasks(partition) for partition in partitions]
        try:
            reply = await self._broker.command(
                "XREADGROUP", "GROUP", keys.AGENT_GROUP, consumer,
                "COUNT", _READ_COUNT, "BLOCK", block_ms, "NOACK", "STREAMS", *streams, *[">"] * len(streams),
            )  # fmt: skip
        except GroupMissing:
            await self.prepare(partitions)
            return []
        return [task for _, entries in reply or () for _, fields in entries for task in _tasks(fields[1])]


def _tasks(value: bytes) -> list[Task]:
    try:
        return _decode_tasks(value)
    except msgspec.DecodeError as error:
        # Put there by another release: the task is in MongoDB too, and is read from there.
        log.warning("agent_task_unreadable", error=str(error)[:200])
        return []
