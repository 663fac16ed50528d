"""Bounds of the workers that no other test meets: at the bound, and one past it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import codec, keys, records
from protocol.models import Role
from workers import broker as brokers
from workers import conversations, delivery, instances, plan, query, typists
from workers.conversations import Member
from workers.instances import Instance, TooManyWaiting
from workers.receipts import Place, RecentPlaces
from workers.store.conversations import new_membership

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio


def test_own_sends_are_remembered_up_to_a_bound() -> None:
    member = Member(new_membership("conv_1", "ann", Role.MEMBER, 1, 0))
    for sequence in range(2, conversations.OWN_SENDS + 4):
        member.own.append(sequence)
    assert len(member.own) == conversations.OWN_SENDS
    assert member.own[0] == 4


def test_places_are_remembered_for_two_generations() -> None:
    places = RecentPlaces(3)
    for number in range(7):
        places.put(f"msg_{number}", Place("conv_1", number, number, True))
    known = [number for number in range(7) if places.get(f"msg_{number}") is not None]
    assert known == [3, 4, 5, 6], "the first three went with their generation"


def test_keys_are_remembered_for_two_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RECENT_KEYS", 3)
    planner: Any = plan.Planner.__new__(plan.Planner)
    planner._recent_keys, planner._older_keys = {}, {}
    for number in range(7):
        step = plan.Plan()
        step.known[("conv_1", "ann", f"k{number}")] = plan.Known(f"msg_{number}", number, 0, 0)
        planner.remember([], step)
    assert len(planner._recent_keys) + len(planner._older_keys) == 4


def test_typing_signals_of_one_tick_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typists, "WAITING_LIMIT", 3)
    nobody: Any = None
    waiting = typists.Typists(nobody, nobody, 4)
    for number in range(4):
        waiting.receive(records.Typing(f"usr_{number}", "conv_1", True), b"1000-0", 1000)
    assert len(waiting._latest) == 3


async def test_whereabouts_are_remembered_up_to_a_bound(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "REGISTRY_LIMIT", 3)
    registry = delivery.Registry(broker)
    async with anyio.create_task_group() as group:
        group.start_soon(registry.run)
        with anyio.fail_after(5):
            while not registry._following:  # noqa: ASYNC110 - it listens in another task
                await anyio.sleep(0.01)
        for number in range(4):
            await registry.locate([f"usr_{number}"])
        assert registry.known == 4
        await registry.locate(["usr_5"])
        assert registry.known == 1
        group.cancel_scope.cancel()


async def test_reads_under_way_are_bounded(
    settings: Settings, store: Store, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, most = 0, 0

    async def slow(*_: object) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await anyio.sleep(0.1)
        under_way -= 1

    monkeypatch.setattr(query, "_answer_query", slow)
    for number in range(7):
        await broker.append_query(records.HeadsQuery("gw_1", [f"usr_{number}"]))
    role = query.QueryRole(store, broker, 3)
    answers_in, _answers_out = anyio.create_memory_object_stream[Any](100)
    stopping = anyio.Event()
    async with anyio.create_task_group() as group, answers_in, _answers_out:
        group.start_soon(role.serve, "worker-1", answers_in, stopping)
        with anyio.fail_after(5):
            while most < 3:  # noqa: ASYNC110 - it happens in other tasks
                await anyio.sleep(0.02)
        await anyio.sleep(0.2)
        stopping.set()
    assert most == 3


async def test_answers_wait_in_a_bounded_stream() -> None:
    answers_in, answers_out = anyio.create_memory_object_stream[Any](query.ANSWERS)
    async with answers_in, answers_out:
        for number in range(query.ANSWERS):
            answers_in.send_nowait(number)
        with pytest.raises(anyio.WouldBlock):
            answers_in.send_nowait("one more waits")


async def test_requests_that_wait_for_an_owner_are_bounded(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "WAITING_LIMIT", 2)
    instance = Instance(broker, "rest_1", records.InstanceInfo("rest", "", 0, draining=False))
    await broker.create_down("rest_1")

    async def wait(number: int) -> None:
        record = records.RemoveParticipant("rest_1", f"r{number}", f"c{number}", "conv_1", "ann", "bob")
        await instance.command(0, record, 1.0)

    async with anyio.create_task_group() as group:
        group.start_soon(wait, 1)
        group.start_soon(wait, 2)
        await anyio.sleep(0.2)
        with pytest.raises(TooManyWaiting):
            await wait(3)


async def test_an_inbox_keeps_its_newest(broker: Broker) -> None:
    """Eight thousand at once were more than a script's stack holds, and the error ended the worker."""
    ids = [f"msg_{number}" for number in range(keys.INBOX_LIMIT + 1)]
    await broker.push_inbox({"usr_a": ids, "usr_b": ids[:3]})
    assert await broker.client.llen(keys.inbox("usr_a")) == keys.INBOX_LIMIT
    assert await broker.read_inbox("usr_a", 1) == ["msg_1"]
    assert await broker.read_inbox("usr_b", 9) == ids[:3]


async def test_the_stream_of_queries_keeps_its_newest(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "QUERY_LIMIT", 100)
    for number in range(300):
        await broker.append_query(records.HeadsQuery("gw_1", [f"usr_{number}"]))
    # Trimmed by whole nodes of the stream, which hold a hundred entries (`stream-node-max-entries`).
    assert 100 <= await broker.client.xlen(keys.QUERY) <= 200


async def test_the_stream_of_a_gateway_that_does_not_read_keeps_its_newest(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "DOWN_LIMIT", 100)
    await broker.create_down("gw_1")
    for number in range(300):
        await broker.publish_down("gw_1", [records.Replaced(number)])
    assert 100 <= await broker.client.xlen(keys.down("gw_1")) <= 200
    read: list[list[records.DownItem]] = []
    last = b"0"
    while entries := await broker.read_down("gw_1", last, 10):
        read += [codec.decode_down(payload) for _, payload in entries]
        last = entries[-1][0]
    assert read[-1] == [records.Replaced(299)]
