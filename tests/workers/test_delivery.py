"""Who is told, where and how: runs, offline inboxes, the registry's changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import keys, records
from tests.workers.lanes import INSTANCE, eventually, run_lane, shown
from workers.delivery import Registry

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


async def test_offline_users_have_an_inbox_until_they_acknowledge(yard: Yard) -> None:
    await yard.connect("ann")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        await yard.send(conv, "ann", "k2")
        ids = [a["payload"]["message_id"] for a in await yard.acks(2)]

        async def boxed() -> bool:
            return await yard.broker.read_inbox("bob", 10) == ids

        await eventually(boxed)
        lifetime = await yard.broker.client.ttl(keys.inbox("bob"))
        await yard.delivered(ids[1], "bob")

        async def emptied() -> bool:
            return await yard.broker.read_inbox("bob", 10) == []

        await eventually(emptied)
    assert 30 * 86400 - 10 <= lifetime <= 30 * 86400
    assert await yard.broker.read_inbox("ann", 10) == []


async def test_a_connection_that_appears_is_delivered_to_at_once(yard: Yard) -> None:
    """The registry cache follows Redis: no time to live has to pass."""
    await yard.connect("ann")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.send(conv, "ann", "k1")
        (first,) = await yard.next_down(records.Delivery, 1)
        assert first.users == ["ann"]
        await yard.connect("bob")
        await anyio.sleep(0.1)
        await yard.send(conv, "ann", "k2")
        (second,) = await yard.next_down(records.Delivery, 1)
        assert second.users == ["ann", "bob"]
        await yard.broker.client.delete(keys.connection("bob"))
        await anyio.sleep(0.1)
        await yard.send(conv, "ann", "k3")
        (third,) = await yard.next_down(records.Delivery, 1)
        assert third.users == ["ann"]


async def test_a_burst_from_several_senders_travels_as_one_frame(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    for number in range(10):
        await yard.send(conv, ("ann", "bob")[number % 2], f"k{number}", connection=number % 2 + 1)
    async with run_lane(yard):
        await yard.acks(10)
        (delivery,) = await yard.next_down(records.Delivery, 1)
    assert (delivery.from_sequence, delivery.to_sequence, delivery.skip) == (1, 10, 0)
    assert [m.sequence_number for m in shown(delivery.frame).messages] == list(range(1, 11))


async def test_a_change_during_a_lookup_is_neither_missed_nor_kept_out(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The invalidation removed a user while others were looked up, and delivery to it ended the worker."""
    await yard.connect("ann", "bob")
    registry = Registry(yard.broker)
    locate = yard.broker.locate

    async def locate_while_bob_leaves(user_ids: Any) -> Any:
        found = await locate(user_ids)
        await yard.broker.client.delete(keys.connection("bob"))
        await anyio.sleep(0.2)
        return found

    async with anyio.create_task_group() as group:
        group.start_soon(registry.run)
        await anyio.sleep(0.2)
        await registry.locate(["bob"])
        with monkeypatch.context() as patched:
            patched.setattr(yard.broker, "locate", locate_while_bob_leaves)
            during = await registry.locate(["ann", "bob"])
        after = await registry.locate(["ann", "bob"])
        group.cancel_scope.cancel()
    assert set(during) >= {"ann", "bob"}
    assert after["bob"] == ()
    assert after["ann"] == (INSTANCE,)
