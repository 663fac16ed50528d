"""The REST role as an instance: lease, down stream, waiting requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from protocol import keys, records
from protocol.models import ConversationType
from workers.instances import Instance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.broker import Broker

pytestmark = pytest.mark.anyio

INFO = records.InstanceInfo("rest", "http://x", 0, False)


@pytest.fixture
async def instance(broker: Broker) -> AsyncIterator[Instance]:
    made = Instance(broker, "rest_1", INFO)
    async with anyio.create_task_group() as group:
        await group.start(made.run)
        yield made
        group.cancel_scope.cancel()


def command(request: str) -> records.CreateConversation:
    return records.CreateConversation("rest_1", request, "k", "c", ConversationType.GROUP, "a", ["a"], "")


async def test_an_instance_is_listed_while_it_runs_and_gone_afterwards(broker: Broker) -> None:
    made = Instance(broker, "rest_1", INFO)
    async with anyio.create_task_group() as group:
        await group.start(made.run)
        assert made.alive
        assert await broker.live_instances() == {"rest_1": INFO}
        assert await broker.client.exists(keys.down("rest_1")) == 1
        group.cancel_scope.cancel()
    assert await broker.live_instances() == {}
    assert await broker.client.exists(keys.down("rest_1")) == 0


async def test_a_command_waits_for_its_own_outcome(instance: Instance, broker: Broker) -> None:
    outcomes: dict[str, records.CommandOutcome | None] = {}

    async def send(request: str) -> None:
        outcomes[request] = await instance.command(0, command(request), 5)

    async with anyio.create_task_group() as group:
        for request in ("r1", "r2"):
            group.start_soon(send, request)
        while await broker.client.xlen(keys.ingest(0)) < 2:  # noqa: ASYNC110 - both commands are in their shard
            await anyio.sleep(0.01)
        for request in ("r2", "stranger", "r1"):
            await broker.publish_down("rest_1", [records.CommandOutcome(request, None, "", request.encode())])
    assert {request: outcome and outcome.body for request, outcome in outcomes.items()} == {"r1": b"r1", "r2": b"r2"}


async def test_no_outcome_in_time_is_none_and_forgets_the_request(instance: Instance) -> None:
    assert await instance.command(0, command("r1"), 0.05) is None
    assert instance._waiting == {}


async def test_garbage_on_the_down_stream_harms_nothing(instance: Instance, broker: Broker) -> None:
    await broker.client.xadd(keys.down("rest_1"), {keys.FIELD: b"\xc1"})

    async def answer() -> None:
        while not instance._waiting:  # noqa: ASYNC110 - until the command waits
            await anyio.sleep(0.01)
        await broker.publish_down("rest_1", [records.CommandOutcome("r1", None, "", b"{}")])

    async with anyio.create_task_group() as group:
        group.start_soon(answer)
        assert await instance.command(0, command("r1"), 5) is not None


async def test_what_was_read_is_trimmed(instance: Instance, broker: Broker) -> None:
    for _ in range(50):
        await broker.publish_down("rest_1", [])
    with anyio.fail_after(5):
        while await broker.client.xlen(keys.down("rest_1")) > 1:  # noqa: ASYNC110 - read and trimmed by its own task
            await anyio.sleep(0.02)
