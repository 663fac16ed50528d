"""Role: agents answer. Composition: which partitions are ours, what the stream and the sweep bring, who is asked.

`workers/events.py` → `tasks` (sink, stream) → `runner` (lanes, bounds) → `routing` (whom) → `calls` (the agent) →
`replies` (the log). Any number of processes share the partitions by leases; when one dies another has its tasks within
the lease (5 s) and one look.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol import keys, records
from protocol.models import AgentKind
from workers.agents.calls import Caller, PythonCaller
from workers.agents.classes import class_names, make
from workers.agents.intents import Intents, open_classifier
from workers.agents.registry import Registry
from workers.agents.replies import Replies, now_ms
from workers.agents.routing import Router
from workers.agents.runner import Runner
from workers.agents.tasks import TaskQueue
from workers.agents.webhook import WebhookCaller
from workers.broker import Broker, BrokerUnavailable
from workers.egress import open_egress
from workers.instances import Instance
from workers.lease import Estate, Leases
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store import Store
    from workers.store.agent_tasks import Waiting

KIND: Final = "agents"
SWEEP_SECONDS: Final = 2.0
SWEEP_PAGE: Final = 1000
_BLOCK_MS: Final = 500
"""So long a partition that has just come waits for its first read; its tasks are swept at once."""
_PAUSE_SECONDS: Final = 0.5
_COUNT_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)


class _Partitions:
    """Those that this process holds now, and whether more have come since they were last swept."""

    def __init__(self) -> None:
        self.held: frozenset[int] = frozenset()
        self.gained = anyio.Event()

    def change(self, held: frozenset[int]) -> None:
        is_more = bool(held - self.held)
        self.held = held
        if is_more:
            self.gained.set()


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Answer until `stopping`; then finish the calls under way, as far as the drain allows, and give up the partitions.

    Raises SettingError for a class that cannot be imported.
    """
    agents = {name: make(path) for name, path in class_names(settings).items()}
    classifier = open_classifier(settings.intent_classifier)
    instance_id = keys.new_id(KIND, now_ms(), secrets.randbits(64))
    instance = Instance(broker, instance_id, records.InstanceInfo(KIND, "", 0, draining=False))
    queue = TaskQueue(broker)
    partitions = _Partitions()
    leases = Leases(
        broker, instance_id, keys.AGENT_PARTITIONS, partitions.change, Estate(KIND, keys.agent_lease, queue.prepare)
    )
    router = Router(store, Registry(store, broker), Intents(broker, classifier))
    replies = Replies(store, broker, instance, settings.shards)
    async with open_egress(settings.egress_allow) as egress, anyio.create_task_group() as group:
        callers: dict[AgentKind, Caller] = {
            AgentKind.PYTHON: PythonCaller(agents),
            AgentKind.WEBHOOK: WebhookCaller(store, egress),
        }
        await group.start(instance.run, name="agents instance")
        group.start_soon(leases.run, name="agents leases")
        async with anyio.create_task_group() as calls:
            runner = Runner(settings, store, router, callers, replies, calls)
            runner.holds = lambda partition: partition in partitions.held
            group.start_soon(runner.keep_books, name="agents books")
            group.start_soon(_count_processes, broker, runner, name="agents share")
            async with anyio.create_task_group() as intake:
                intake.start_soon(_follow, queue, instance_id, partitions, runner, name="agents reader")
                intake.start_soon(_sweep, store, partitions, runner, name="agents sweep")
                await stopping.wait()
                intake.cancel_scope.cancel()
            runner.holds = lambda _: False
            calls.cancel_scope.deadline = anyio.current_time() + settings.drain_seconds / 2
        await runner.flush()
        await leases.release()
        group.cancel_scope.cancel()


async def _follow(queue: TaskQueue, consumer: str, partitions: _Partitions, runner: Runner) -> None:
    while True:
        held = sorted(partitions.held)
        if not held or not runner.has_room:
            runner.room_left = anyio.Event()
            with anyio.move_on_after(_PAUSE_SECONDS):
                await (runner.room_left if held else partitions.gained).wait()
            continue
        try:
            runner.take(await queue.read(consumer, held, _BLOCK_MS))
        except BrokerUnavailable as error:
            log.warning("agent_tasks_unread", error=str(error)[:200])
            await anyio.sleep(_PAUSE_SECONDS)


async def _sweep(store: Store, partitions: _Partitions, runner: Runner) -> None:
    """What the stream lost, what another process left behind, what found no room."""
    while True:
        partitions.gained = anyio.Event()
        try:
            await sweep(store, partitions.held, runner)
        except StoreUnavailable as error:
            log.warning("agent_sweep_waits", error=str(error)[:200])
        with anyio.move_on_after(SWEEP_SECONDS):
            await partitions.gained.wait()


async def sweep(store: Store, held: frozenset[int], runner: Runner) -> None:
    """Take the tasks of these partitions that nobody has in hand. Raises StoreUnavailable."""
    after: Waiting | None = None
    before = datetime.now(UTC)
    while held and runner.has_room:
        page = await store.agent_tasks.waiting(held, after, before, SWEEP_PAGE)
        wanted = [task.message_id for task in page if runner.wants(task.message_id, task.conversation_id)]
        if wanted:
            runner.take(await store.agent_tasks.get(wanted))
        if len(page) < SWEEP_PAGE:
            return
        after = page[-1]


async def _count_processes(broker: Broker, runner: Runner) -> None:
    """An agent's bound is for all processes together, so each has its share of it, and at least one call."""
    while True:
        try:
            live = await broker.live_instances()
            runner.share = max(1, sum(info.kind == KIND for info in live.values()))
        except BrokerUnavailable as error:
            log.warning("agent_processes_unknown", error=str(error)[:200])
        await anyio.sleep(_COUNT_SECONDS)
