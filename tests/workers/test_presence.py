"""Presence and typing behind the gateways: who may watch, what dead gateways leave, who hears who is typing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import codec, keys, records
from protocol.models import ConnectionRegistry, ConversationType, Presence, UserStatus
from tests.workers.lanes import SHARDS, eventually, run_lane, settled, shown
from tests.workers.seeding import Log
from workers import presence
from workers.broker import BURIED_AT_ONCE

if TYPE_CHECKING:
    from tests.workers.lanes import Yard
    from workers.broker import Broker
    from workers.store import Store

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
ONLINE, OFFLINE = UserStatus.ONLINE, UserStatus.OFFLINE


async def people(store: Store, *user_ids: str, **fields: Any) -> None:
    await store.db["users"].insert_many([{"_id": user_id, "name": user_id, **fields} for user_id in user_ids])


async def come(broker: Broker, user_id: str, device_id: str, instance_id: str) -> None:
    entry = ConnectionRegistry(instance_id=instance_id, connection_id="1", timestamp=1)
    await broker.client.hset(keys.connection(user_id), device_id, codec.encode_value(entry))
    await broker.client.set(keys.presence(user_id), codec.encode_value(Presence(status=ONLINE, last_seen=1)), ex=300)
    await broker.client.sadd(keys.users(instance_id), user_id)


def ask(*user_ids: str) -> records.PresenceQuery:
    return records.PresenceQuery("gw", 7, "ann", list(user_ids))


# --- who may watch ---------------------------------------------------------------------------------------------------


async def test_one_may_watch_whom_one_shares_a_conversation_with(store: Store, broker: Broker) -> None:
    await people(store, "ann", "bob", "cat", "dan", "eve")
    await people(store, "old", last_seen=NOW)
    group = await Log(store, "c1", ["ann", "bob", "old", "eve"]).create()
    await Log(store, "c2", ["dan", "cat"]).create()
    direct = keys.direct_conversation_id("ann", "fay")
    await people(store, "fay")
    await Log(store, direct, ["ann", "fay"]).create(ConversationType.ONE_TO_ONE)
    await group.append("ann", "bob")
    await group.leave("eve", 2)
    await come(broker, "bob", "d1", "gw")
    answer = await presence.look(store, broker, ask("bob", "cat", "dan", "eve", "fay", "old", "nobody", "ann", "bob"))
    assert answer.connection == 7
    assert sorted(answer.people, key=lambda watched: watched.user_id) == [
        records.Watched("bob", ONLINE, 1),
        records.Watched("fay", OFFLINE, 0),
        records.Watched("old", OFFLINE, NOW_MS),
    ]
    assert sorted(answer.refused) == ["ann", "cat", "dan", "eve", "nobody"]


async def test_who_has_left_may_not_watch_those_who_stayed(store: Store, broker: Broker) -> None:
    await people(store, "ann", "bob")
    group = await Log(store, "c1", ["ann", "bob"]).create()
    await group.append("ann")
    await group.leave("ann", 1)
    assert await presence.look(store, broker, ask("bob")) == records.PresenceAnswer(7, [], ["bob"])


async def test_blocks_either_way_privacy_and_deletion_hide(store: Store, broker: Broker) -> None:
    await people(store, "blocker", "blocked", "open")
    await people(store, "hidden", privacy={"last_seen": "nobody", "read_receipts": True})
    await people(store, "shy", privacy={"last_seen": "contacts", "read_receipts": True})
    await people(store, "gone", deleted_at=NOW)
    names = ["blocker", "blocked", "hidden", "shy", "gone", "open"]
    await Log(store, "c1", ["ann", *names]).create()
    await store.blocks.block("blocker", "ann", NOW)
    await store.blocks.block("ann", "blocked", NOW)
    answer = await presence.look(store, broker, ask(*names))
    assert sorted(watched.user_id for watched in answer.people) == ["open", "shy"]


# --- dead gateways ---------------------------------------------------------------------------------------------------


async def test_the_users_of_a_dead_gateway_are_offline_unless_they_are_elsewhere(broker: Broker) -> None:
    await broker.renew_instance("gw_alive", records.InstanceInfo("gateway", "", 0, draining=False))
    for name in ("gw_alive", "gw_dead"):
        await broker.create_down(name)
    await broker.client.sadd(keys.INSTANCES, "gw_dead")
    alone = [f"usr_{number}" for number in range(BURIED_AT_ONCE + 50)]
    for user_id in alone:
        await come(broker, user_id, "d1", "gw_dead")
    await come(broker, "both", "d1", "gw_dead")
    await come(broker, "both", "d2", "gw_alive")
    async with broker.client.pubsub() as channel:
        await channel.subscribe(keys.presence("usr_0"), keys.presence("both"))
        for _ in range(2):
            await channel.get_message(timeout=5)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(presence.bury_dead, broker)
        message = await channel.get_message(timeout=5)
        assert message is not None
        change = codec.decode_presence_change(message["data"])
        assert await channel.get_message(timeout=0.2) is None, "once, and only of whom nobody has any more"
    assert (change.status, change.settled) == (OFFLINE, True)
    shown = await broker.presences([*alone, "both"])
    assert {shown[user_id].status for user_id in alone} == {OFFLINE}
    assert shown["both"].status is ONLINE
    assert await broker.client.hkeys(keys.connection("both")) == [b"d2"]
    assert await broker.client.exists(keys.users("gw_dead"), keys.down("gw_dead"), keys.connection("usr_0")) == 0
    assert await broker.client.exists(keys.users("gw_alive"), keys.down("gw_alive")) == 2
    assert await broker.dead_instances() == []
    assert set(await broker.live_instances()) == {"gw_alive"}


async def test_a_gateway_that_woke_up_in_time_is_left_alone(broker: Broker) -> None:
    await come(broker, "ann", "d1", "gw_1")
    await broker.renew_instance("gw_1", records.InstanceInfo("gateway", "", 0, draining=False))
    assert await broker.bury("gw_1", 5) == -1
    assert (await broker.presences(["ann"]))["ann"].status is ONLINE


async def test_accounts_remember_when_somebody_was_seen(store: Store, broker: Broker) -> None:
    await people(store, "ann", status="online")
    await people(store, "bob", status="offline", last_seen=NOW)
    await people(store, "gone", deleted_at=NOW)
    for user_id, status, last_seen in (("ann", OFFLINE, NOW_MS), ("bob", ONLINE, 5), ("gone", OFFLINE, NOW_MS)):
        shown = codec.encode_value(Presence(status=status, last_seen=last_seen))
        await broker.client.set(keys.presence(user_id), shown, ex=300)
        await broker.client.zadd(keys.SEEN, {user_id: last_seen})

    async def written() -> bool:
        document = await store.db["users"].find_one({"_id": "bob"})
        return document is not None and document["status"] == "online"

    async with anyio.create_task_group() as group:
        group.start_soon(presence.keep, store, broker)
        await eventually(written)
        group.cancel_scope.cancel()
    found = {document["_id"]: document async for document in store.db["users"].find()}
    assert (found["ann"]["status"], found["ann"]["last_seen"]) == ("offline", NOW)
    assert found["bob"]["last_seen"] == NOW, "time only moves forward"
    assert "status" not in found["gone"]


# --- typing ----------------------------------------------------------------------------------------------------------


async def typing(yard: Yard, conversation_id: str, user_id: str, *states: bool) -> None:
    for started in states:
        await yard.put(records.Typing(user_id, conversation_id, started), conversation_id)


async def typing_notices(yard: Yard, count: int) -> list[tuple[list[str], str, str]]:
    found = [(item, shown(item.frame)) for item in await yard.next_down(records.Notice, count)]
    return [(item.users, payload.user_id, payload.state.value) for item, payload in found]


async def test_the_other_members_who_are_online_hear_who_is_typing(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", "dan", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
        await typing(yard, group, "ann", True)
        assert await typing_notices(yard, 1) == [(["bob", "cat"], "ann", "start")]
        await typing(yard, group, "ann", False)
        assert await typing_notices(yard, 1) == [(["bob", "cat"], "ann", "stop")]
        await eventually(lambda: settled(yard))
    assert len(await yard.log(group)) == 1, "the log holds the group's creation and no typing"


async def test_of_one_tick_the_last_signal_counts(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard) as lane:
        conversation_id = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        record = records.Typing("ann", conversation_id, True)
        now_ms = presence._now_ms()
        for started in (True, False, True, False):
            lane._typists.receive(records.Typing("ann", conversation_id, started), b"%d-0" % now_ms, now_ms)
        lane._typists.receive(record, b"%d-0" % (now_ms - 7000), now_ms)
        lane._to_tell.set()
        assert await typing_notices(yard, 1) == [(["bob"], "ann", "stop")]


async def test_strangers_and_those_who_may_not_speak_are_not_heard(yard: Yard) -> None:
    await yard.connect("ann", "bob", "eve")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "eve", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
        assert await yard.decided(group, "ann", records.Silence("bob", 2**45), "hush") is None
        direct = await yard.create("ann", "eve")
        await yard.next_down(records.CommandOutcome, 1)
        await yard.block("eve", "ann")
        await eventually(lambda: settled(yard))
        for conversation_id, user_id in ((group, "bob"), (group, "mallory"), ("conv_unknown", "ann"), (direct, "ann")):
            await typing(yard, conversation_id, user_id, True)
        await typing(yard, group, "eve", True)
        heard = await typing_notices(yard, 1)
        await eventually(lambda: settled(yard))
        rest = [item for item in yard.down if isinstance(item, records.Notice)]
    assert heard == [(["ann", "bob"], "eve", "start")]
    assert rest == []


async def test_typing_neither_wakes_nor_delays_the_writer(yard: Yard) -> None:
    await yard.connect("ann", "bob")
    async with run_lane(yard) as lane:
        conversation_id = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        await typing(yard, conversation_id, "ann", True)
        await typing_notices(yard, 1)
        assert not lane._queue
        shard = keys.shard_of(conversation_id, SHARDS)
        await eventually(lambda: settled(yard))
        assert lane._logs[shard].outstanding == {}
