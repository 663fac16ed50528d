"""Who is told, where and how: runs, offline inboxes, the registry's changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from protocol import keys, records
from tests.workers.lanes import eventually, run_lane, shown

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
