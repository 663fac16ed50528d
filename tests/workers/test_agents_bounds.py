"""What the agents role keeps in memory and in its streams, at each bound and one past it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import keys
from protocol.events import MessageReceivedEvent, message_received
from protocol.models import Agent, AgentKind, AgentStatus, MessageType
from workers.agents import runner as runner_module
from workers.agents import tasks as tasks_module
from workers.agents.runner import Runner
from workers.agents.tasks import TaskQueue, TaskSink
from workers.store.agent_tasks import Task

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def task(number: int, conversation_id: str) -> Task:
    event = MessageReceivedEvent(
        message_id=keys.new_message_id(1, number, 0),
        idempotency_key=f"k{number}",
        conversation_id=conversation_id,
        sender_id="ann",
        receiver_id="agt_1",
        sequence_number=number,
        message_type=MessageType.TEXT,
        content="hello",
        timestamp=NOW,
    )
    return Task(partition=0, agent_id="agt_1", user_id="ann", plaintext=False, event=event)


def agent(agent_id: str) -> Agent:
    return Agent(
        agent_id=agent_id,
        name="a",
        description="",
        kind=AgentKind.PYTHON,
        status=AgentStatus.ENABLED,
        capabilities=[],
        is_default=False,
        concurrency=1,
        timeout_seconds=1.0,
        created_at=NOW,
        updated_at=NOW,
    )


class Waits:
    """A router that lets nobody through until it is told to, and then nowhere."""

    def __init__(self) -> None:
        self.open = anyio.Event()

    async def route(self, _: Task) -> None:
        await self.open.wait()


def runner_of(settings: Settings, store: Store, router: Any, group: anyio.abc.TaskGroup) -> Runner:
    return Runner(settings, store, router, {}, None, group)  # type: ignore[arg-type]


async def test_a_process_takes_no_more_tasks_than_its_bound(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "IN_HAND", 3)
    router = Waits()
    async with anyio.create_task_group() as group:
        runner = runner_of(settings, store, router, group)
        runner.take([task(number, f"conv_{number}") for number in range(5)])
        assert (runner.in_hand, runner.has_room) == (3, False)
        router.open.set()
        await runner.room_left.wait()
        assert runner.wants(task(4, "conv_4").message_id, "conv_4")


async def test_a_conversation_takes_no_more_room_than_its_bound(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "LANE_TASKS", 2)
    router = Waits()
    async with anyio.create_task_group() as group:
        runner = runner_of(settings, store, router, group)
        runner.take([task(number, "conv_1") for number in range(5)])
        assert runner.in_hand == 2
        assert runner.wants(task(9, "conv_2").message_id, "conv_2")
        router.open.set()


async def test_finished_tasks_are_remembered_up_to_a_bound(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "FINISHED_KEPT", 2)
    router = Waits()
    router.open.set()
    made = [task(number, "conv_1") for number in range(3)]
    async with anyio.create_task_group() as group:
        runner = runner_of(settings, store, router, group)
        runner.take(made)
    assert [runner.wants(one.message_id, "conv_1") for one in made] == [True, False, False]


async def test_processes_share_the_calls_that_an_agent_takes_at_once(settings: Settings, store: Store) -> None:
    async with anyio.create_task_group() as group:
        runner = runner_of(settings, store, Waits(), group)
        busy = msgspec.structs.replace(agent("agt_0"), concurrency=4)
        for share, calls in ((1, 4), (2, 2), (9, 1)):
            runner.share = share
            assert runner._desk(busy).room.total_tokens == calls


async def test_agents_are_remembered_up_to_a_bound(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "AGENTS_KEPT", 2)
    async with anyio.create_task_group() as group:
        runner = runner_of(settings, store, Waits(), group)
        busy = runner._desk(agent("agt_0"))
        async with busy.room:
            for number in range(1, 5):
                runner._desk(agent(f"agt_{number}"))
            assert list(runner._desks) == ["agt_0", "agt_4"], "whoever is asked now stays"


async def test_homes_of_conversations_are_remembered_up_to_a_bound(
    store: Store, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "HOMES_LIMIT", 2)
    sink = TaskSink(store, TaskQueue(broker))
    for number in range(4):
        await store.db["conversations"].insert_one({"_id": f"conv_{number}", "agent_id": "agt_1", "user_id": "ann"})
        await sink.take([message_received(task(number, f"conv_{number}").event)])
    assert list(sink._homes) == ["conv_2", "conv_3"]
    assert await store.db["agent_tasks"].count_documents({}) == 4


async def test_the_stream_of_tasks_keeps_its_newest(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "STREAM_LIMIT", 10)
    queue = TaskQueue(broker)
    for number in range(300):
        await queue.put([task(number, "conv_1")])
    assert await broker.client.xlen(keys.agent_tasks(0)) < 200
