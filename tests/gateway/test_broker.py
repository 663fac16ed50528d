"""The broker on a real Valkey: what it writes, what it hands to its receiver, and what it says when Redis fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hiredis
import msgspec
import pytest
import trio

from gateway.broker import BrokerRefused, RedisBroker
from gateway.receipts import ReceiptCollector
from gateway.registry import Attachment
from gateway.wire import Address, Wire
from protocol import codec, keys, records
from protocol.errors import ErrorCode
from protocol.models import MessageType
from tests.gateway.fakes import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.gateway.proxy import Proxy

CONNECTION = Attachment("usr_a", "d1", 1, 1000)
SHARD = keys.shard_of("conv_1", 64)


class Recorder:
    """Implements `broker.Receiver`."""

    load = 3
    outcomes = 0

    def __init__(self) -> None:
        self.items: list[records.DownItem] = []
        self.failures: list[tuple[int, str, ErrorCode]] = []
        self.lost_queries: list[tuple[records.Query, ErrorCode]] = []
        self.recoveries: list[bool] = []
        self.tickets: list[tuple[int, records.MigrationTicket | ErrorCode | None]] = []
        self.users: set[str] = set()
        self.watched: set[str] = set()
        self.heard: list[tuple[str, records.UserSignal | records.PresenceChange]] = []
        self.gaps = 0

    def signalled(self, user_id: str, signal: records.UserSignal) -> None:
        self.heard.append((user_id, signal))

    def presence_changed(self, user_id: str, change: records.PresenceChange) -> None:
        self.heard.append((user_id, change))

    def heard_again(self) -> None:
        self.gaps += 1

    def route(self, items: Sequence[records.DownItem]) -> None:
        self.items.extend(items)

    def publish_failed(self, connection: int, idempotency_key: str, code: ErrorCode) -> None:
        self.failures.append((connection, idempotency_key, code))

    def query_failed(self, query: records.Query, code: ErrorCode) -> None:
        self.lost_queries.append((query, code))

    def recovered(self, forgotten: bool) -> None:
        self.recoveries.append(forgotten)

    def redeemed(self, connection: int, found: records.MigrationTicket | ErrorCode | None) -> None:
        self.tickets.append((connection, found))


def make_broker(address: Address, instance_id: str = "gw_1", **options: Any) -> RedisBroker:
    defaults: dict[str, Any] = {
        "shards": 64,
        "endpoint": "ws://here",
        "max_outstanding": 10_000,
        "max_receipts": 1000,
        "high_water": 20_000,
        "max_backlog": 40_000,
        "deadline_seconds": 2.0,
        "wall_ms": lambda: 5000,
    }
    return RedisBroker(address, instance_id, **(defaults | options))


def send(key: str = "k1", connection: int = 1) -> records.SendMessage:
    return records.SendMessage(
        "gw_1", connection, "usr_a", "d1", "conv_1", "c1", key, "", "hello", MessageType.TEXT, None, None, 1
    )


@pytest.fixture
def receiver() -> Recorder:
    return Recorder()


@pytest.fixture
async def redis(address: Address, nursery: trio.Nursery) -> Wire:
    wire = Wire(address, "test", max_outstanding=1000, deadline_seconds=5)
    nursery.start_soon(wire.run)
    await wire.wait_connected()
    return wire


@pytest.fixture
async def broker(address: Address, receiver: Recorder, nursery: trio.Nursery) -> RedisBroker:
    running = make_broker(address)
    with trio.fail_after(5):
        await nursery.start(running.run, receiver)
    await running.down.wait_connected()
    return running


@pytest.fixture
async def behind_proxy(proxy: Proxy, receiver: Recorder, nursery: trio.Nursery) -> RedisBroker:
    running = make_broker(proxy.address)
    with trio.fail_after(5):
        await nursery.start(running.run, receiver)
    return running


async def entries(redis: Wire, key: str) -> list[Any]:
    return [entry[1][1] for entry in await redis.call("XRANGE", key, "-", "+")]


@pytest.mark.trio
async def test_messages_land_in_their_shard_in_order(broker: RedisBroker, redis: Wire) -> None:
    for number in range(100):
        assert broker.publish(send(f"k{number}")) is None
    await eventually(lambda: broker.commands.outstanding == 0)
    stored = [codec.decode_ingest(raw) for raw in await entries(redis, keys.ingest(SHARD))]
    assert stored == [send(f"k{number}") for number in range(100)]


@pytest.mark.trio
async def test_a_flushed_redis_is_noticed_before_the_next_renewal(
    broker: RedisBroker, receiver: Recorder, redis: Wire
) -> None:
    """What is committed until then is published to a stream that is not there: every ack of it is lost."""
    await redis.call("FLUSHALL")
    with trio.fail_after(1.0):
        while not receiver.recoveries:  # noqa: ASYNC110 -- it tells nobody else
            await trio.sleep(0.01)
    assert receiver.recoveries == [True]
    assert await redis.call("EXISTS", keys.down("gw_1"), keys.instance("gw_1")) == 2


@pytest.mark.trio
async def test_a_query_goes_to_the_capped_stream(broker: RedisBroker, redis: Wire) -> None:
    query = records.HeadsQuery("gw_1", ["usr_a"])
    assert broker.ask(query) is None
    await eventually(lambda: broker.commands.outstanding == 0)
    assert [codec.decode_query(raw) for raw in await entries(redis, keys.QUERY)] == [query]


@pytest.mark.trio
async def test_receipts_are_collected_per_shard_and_unknown_ids_are_counted(broker: RedisBroker, redis: Wire) -> None:
    here, elsewhere = keys.new_message_id(1, 1, 5), keys.new_message_id(1, 2, 6)
    delivered = records.DeliveredMark("usr_a", "d1", here)
    broker.acknowledge(delivered)
    broker.acknowledge(records.DeliveredMark("usr_a", "d1", "msg_what"))
    broker.acknowledge(records.ReadMark("usr_b", "d1", [here, elsewhere, "nonsense"]))
    await eventually(lambda: broker.receipts.waiting == 0 and broker.commands.outstanding == 0)
    assert [codec.decode_ingest(raw) for raw in await entries(redis, keys.ingest(5))] == [
        records.Receipts([delivered], [records.ReadMark("usr_b", "d1", [here])])
    ]
    assert [codec.decode_ingest(raw) for raw in await entries(redis, keys.ingest(6))] == [
        records.Receipts([], [records.ReadMark("usr_b", "d1", [elsewhere])])
    ]
    assert broker.receipts.unknown_ids == 2


@pytest.mark.trio
async def test_receipts_wait_for_a_redis_that_is_away(behind_proxy: RedisBroker, proxy: Proxy, redis: Wire) -> None:
    proxy.silent = True
    mark = records.DeliveredMark("usr_a", "d1", keys.new_message_id(1, 1, 5))
    behind_proxy.acknowledge(mark)
    await trio.sleep(0.1)
    proxy.refusing = True
    proxy.cut()
    await redis.call("DEL", keys.ingest(5))
    await trio.sleep(0.1)
    assert behind_proxy.receipts.waiting == 1
    proxy.silent = proxy.refusing = False
    await eventually(lambda: behind_proxy.receipts.waiting == 0, 5)
    await eventually(lambda: behind_proxy.commands.outstanding == 0)
    assert [codec.decode_ingest(raw) for raw in await entries(redis, keys.ingest(5))] == [records.Receipts([mark], [])]


def test_receipts_past_the_bound_are_dropped_and_counted() -> None:
    collector = ReceiptCollector(64, 3)
    for number in range(5):
        collector.add(records.DeliveredMark("usr_a", "d1", keys.new_message_id(1, number, 1)))
    assert (collector.waiting, collector.dropped) == (3, 2)
    ((shard, receipts),) = collector.take()
    assert (shard, len(receipts.delivered), collector.waiting) == (1, 3, 0)
    collector.add(receipts.delivered[0])
    collector.put_back(shard, receipts)
    assert (collector.waiting, collector.dropped) == (1, 5)


@pytest.mark.trio
async def test_a_full_redis_is_overloaded_and_takes_messages_again_later(
    broker: RedisBroker, redis: Wire, receiver: Recorder
) -> None:
    await redis.call("CONFIG", "SET", "maxmemory", 1)
    try:
        assert broker.publish(send("k1", 7)) is None
        await eventually(lambda: bool(receiver.failures))
    finally:
        await redis.call("CONFIG", "SET", "maxmemory", 0)
    assert receiver.failures == [(7, "k1", ErrorCode.OVERLOADED)]
    broker.publish(send("k2"))
    await eventually(lambda: broker.commands.outstanding == 0)
    assert len(receiver.failures) == 1


@pytest.mark.trio
async def test_a_lost_connection_fails_messages_and_queries_in_order(
    behind_proxy: RedisBroker, proxy: Proxy, receiver: Recorder
) -> None:
    proxy.silent = True
    query = records.HeadsQuery("gw_1", ["usr_a"])
    for number in range(3):
        behind_proxy.publish(send(f"k{number}"))
    behind_proxy.ask(query)
    await trio.sleep(0.05)
    proxy.refusing = True
    proxy.cut()
    await eventually(lambda: bool(receiver.lost_queries))
    assert receiver.failures == [(1, f"k{number}", ErrorCode.STORAGE_UNAVAILABLE) for number in range(3)]
    assert receiver.lost_queries == [(query, ErrorCode.STORAGE_UNAVAILABLE)]
    assert behind_proxy.publish(send()) is ErrorCode.STORAGE_UNAVAILABLE
    assert behind_proxy.ask(query) is ErrorCode.STORAGE_UNAVAILABLE


@pytest.mark.trio
async def test_too_many_outstanding_messages_are_overloaded(
    proxy: Proxy, receiver: Recorder, nursery: trio.Nursery
) -> None:
    broker = make_broker(proxy.address, max_outstanding=5)
    await nursery.start(broker.run, receiver)
    await eventually(lambda: broker.commands.outstanding == 0)
    proxy.delay_seconds = 0.3
    codes = [broker.publish(send(f"k{number}")) for number in range(6)]
    assert codes == [None] * 5 + [ErrorCode.OVERLOADED]


@pytest.mark.trio
async def test_a_shard_past_its_high_water_mark_takes_no_message_and_the_others_do(
    address: Address, redis: Wire, receiver: Recorder, nursery: trio.Nursery
) -> None:
    broker = make_broker(address, high_water=3)
    await nursery.start(broker.run, receiver)
    assert [broker.publish(send(f"k{number}")) for number in range(3)] == [None] * 3
    assert broker.workload.backlog[SHARD] == 3
    await eventually(lambda: broker.commands.outstanding == 0)
    assert broker.publish(send("k4")) is ErrorCode.OVERLOADED
    elsewhere = msgspec.structs.replace(send("k5"), conversation_id="conv_2")
    assert broker.publish(elsewhere) is None
    await redis.call("XTRIM", keys.ingest(SHARD), "MAXLEN", 0)
    await eventually(lambda: broker.publish(send("k6")) is None)


@pytest.mark.trio
async def test_a_backlog_past_its_bound_refuses_every_shard_before_the_next_look_at_redis(
    address: Address, redis: Wire, receiver: Recorder, nursery: trio.Nursery
) -> None:
    """What this gateway appends counts at once: a burst between two looks does not go past the bound."""
    broker = make_broker(address, max_backlog=4)
    await nursery.start(broker.run, receiver)
    elsewhere = [msgspec.structs.replace(send(f"k{n}"), conversation_id=f"conv_{n}") for n in range(5)]
    codes = [broker.publish(record) for record in elsewhere]
    assert codes == [None] * 4 + [ErrorCode.OVERLOADED]
    await eventually(lambda: broker.commands.outstanding == 0)
    assert broker.workload.entries == sum(broker.workload.backlog) == 4
    assert broker.publish(elsewhere[4]) is ErrorCode.OVERLOADED
    for shard in range(64):
        await redis.call("XTRIM", keys.ingest(shard), "MAXLEN", 0)
    await eventually(lambda: broker.publish(elsewhere[4]) is None)


@pytest.mark.trio
async def test_down_items_arrive_in_order_and_the_stream_is_trimmed(
    broker: RedisBroker, redis: Wire, receiver: Recorder
) -> None:
    sent = [records.Reply(number, b"{}") for number in range(300)]
    for number in range(0, 300, 2):
        await redis.call("XADD", keys.down("gw_1"), "*", "r", codec.encode_down(sent[number : number + 2]))
    await eventually(lambda: len(receiver.items) == 300)
    assert receiver.items == sent
    await trio.sleep(0.6)
    await redis.call("XADD", keys.down("gw_1"), "*", "r", codec.encode_down([records.Reply(1, b"{}")]))
    await eventually(lambda: len(receiver.items) == 301)
    await trio.sleep(0.1)
    assert await redis.call("XLEN", keys.down("gw_1")) == 0


@pytest.mark.trio
async def test_a_down_entry_that_cannot_be_read_is_counted_and_passed(
    broker: RedisBroker, redis: Wire, receiver: Recorder
) -> None:
    key = keys.down("gw_1")
    await redis.call("XADD", key, "*", "r", b"\xc1")
    await redis.call("XADD", key, "*", "r", codec.encode_down([records.Reply(1, b"{}")]))
    await eventually(lambda: bool(receiver.items))
    assert broker.undecodable == 1


@pytest.mark.trio
async def test_down_items_written_while_the_reader_was_away_are_delivered(
    behind_proxy: RedisBroker, proxy: Proxy, redis: Wire, receiver: Recorder
) -> None:
    await behind_proxy.down.wait_connected()
    proxy.refusing = True
    proxy.cut()
    await redis.call("XADD", keys.down("gw_1"), "*", "r", codec.encode_down([records.Reply(1, b"{}")]))
    proxy.refusing = False
    await eventually(lambda: len(receiver.items) == 1, 5)
    await eventually(lambda: receiver.recoveries == [False])


@pytest.mark.trio
async def test_attach_and_detach_keep_registry_and_presence(broker: RedisBroker, redis: Wire) -> None:
    broker.attach(CONNECTION)
    broker.attach(Attachment("usr_a", "d2", 2, 1000))
    await eventually(lambda: broker.commands.outstanding == 0)
    assert await redis.call("HLEN", keys.connection("usr_a")) == 2
    broker.detach(CONNECTION)
    await eventually(lambda: broker.commands.outstanding == 0)
    assert codec.decode_presence(await redis.call("GET", keys.presence("usr_a"))).status == "online"
    broker.detach(Attachment("usr_a", "d2", 2, 1000))
    await eventually(lambda: broker.commands.outstanding == 0)
    assert await redis.call("EXISTS", keys.connection("usr_a")) == 0
    presence = codec.decode_presence(await redis.call("GET", keys.presence("usr_a")))
    assert (presence.status, presence.last_seen) == ("offline", 5000)
    assert await redis.call("ZSCORE", keys.SEEN, "usr_a") == 5000


@pytest.mark.trio
async def test_an_instances_users_are_those_with_a_connection_there(broker: RedisBroker, redis: Wire) -> None:
    elsewhere = make_broker(broker.commands.address, "gw_2")
    tablet = Attachment("usr_a", "d2", 2, 1000)

    async def users() -> list[set[str]]:
        await eventually(lambda: broker.commands.outstanding == 0)
        found = [await redis.call("SMEMBERS", keys.users(name)) for name in ("gw_1", "gw_2")]
        return [{user_id.decode() for user_id in names} for names in found]

    broker.attach(CONNECTION)
    broker.attach(tablet)
    assert await users() == [{"usr_a"}, set()]
    await redis.call(*attach_elsewhere(elsewhere, "d1"))
    broker.detach(CONNECTION)
    assert await users() == [{"usr_a"}, {"usr_a"}]
    broker.detach(tablet)
    assert await users() == [set(), {"usr_a"}]
    broker.refresh([tablet])
    assert await users() == [{"usr_a"}, {"usr_a"}]


def attach_elsewhere(other: RedisBroker, device_id: str) -> list[Any]:
    """The command by which another gateway registers this device."""
    reader = hiredis.Reader()
    reader.feed(other._registry.attach(Attachment("usr_a", device_id, 9, 2000)))
    words: list[Any] = reader.gets()
    return words


@pytest.mark.trio
async def test_who_was_taken_for_gone_is_announced_again(broker: RedisBroker, redis: Wire, receiver: Recorder) -> None:
    receiver.watched.add("usr_a")
    broker.watch("usr_a")
    broker.ask(records.PresenceQuery("gw_1", 1, "usr_b", ["usr_a"]))

    async def asked() -> bool:
        return bool(await entries(redis, keys.QUERY))

    await eventually(asked)
    for _ in range(2):
        broker.refresh([CONNECTION])
        await eventually(lambda: broker.commands.outstanding == 0)
    await eventually(lambda: bool(receiver.heard))
    broker.detach(CONNECTION)
    await eventually(lambda: len(receiver.heard) == 2)
    online, offline = (change.status for _, change in receiver.heard if isinstance(change, records.PresenceChange))
    assert (online, offline) == ("online", "offline")


@pytest.mark.trio
async def test_a_late_detach_leaves_the_newer_connection_alone(broker: RedisBroker, redis: Wire) -> None:
    broker.attach(CONNECTION)
    broker.attach(Attachment("usr_a", "d1", 9, 2000))
    broker.detach(CONNECTION)
    await eventually(lambda: broker.commands.outstanding == 0)
    stored = codec.decode_registry(await redis.call("HGET", keys.connection("usr_a"), "d1"))
    assert stored.connection_id == "9"
    assert codec.decode_presence(await redis.call("GET", keys.presence("usr_a"))).status == "online"


def test_detaches_are_kept_up_to_a_bound_while_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each device however often it came and went; past the bound their hour's lifetime ends them."""
    monkeypatch.setattr("gateway.broker.PENDING_DETACHES", 3)
    broker = make_broker(Address("127.0.0.1", 1, "", "", 0), "gw_1")
    for number in range(10):
        broker.detach(Attachment("usr_a", "d1", number, 1000))
        broker.detach(Attachment(f"usr_{number}", "d1", 100 + number, 1000))
    assert len(broker._detaches) == 3


@pytest.mark.trio
async def test_a_detach_that_met_no_redis_is_made_up_for(behind_proxy: RedisBroker, proxy: Proxy, redis: Wire) -> None:
    behind_proxy.attach(CONNECTION)
    await eventually(lambda: behind_proxy.commands.outstanding == 0)
    proxy.refusing = True
    proxy.cut()
    await trio.sleep(0.05)
    behind_proxy.detach(CONNECTION)
    assert await redis.call("EXISTS", keys.connection("usr_a")) == 1
    proxy.refusing = False

    async def detached() -> bool:
        return bool(await redis.call("EXISTS", keys.connection("usr_a")) == 0)

    await eventually(detached, 5)


@pytest.mark.trio
async def test_refresh_renews_lifetimes_and_writes_again_what_was_forgotten(broker: RedisBroker, redis: Wire) -> None:
    mine, lost = CONNECTION, Attachment("usr_a", "d2", 2, 1000)
    broker.attach(mine)
    await eventually(lambda: broker.commands.outstanding == 0)
    await redis.call("EXPIRE", keys.connection("usr_a"), 5)
    await redis.call("DEL", keys.presence("usr_a"))
    broker.refresh([mine, lost])
    await eventually(lambda: broker.commands.outstanding == 0)
    assert await redis.call("TTL", keys.connection("usr_a")) > 3500
    assert await redis.call("HEXISTS", keys.connection("usr_a"), "d2") == 1
    assert await redis.call("TTL", keys.presence("usr_a")) > 290


@pytest.mark.trio
async def test_refresh_never_takes_a_device_back_from_a_newer_connection(
    broker: RedisBroker, redis: Wire, address: Address, nursery: trio.Nursery
) -> None:
    other = make_broker(address, "gw_2")
    await nursery.start(other.run, Recorder())
    broker.attach(CONNECTION)
    await eventually(lambda: broker.commands.outstanding == 0)
    other.attach(Attachment("usr_a", "d1", 4, 2000))
    await eventually(lambda: other.commands.outstanding == 0)
    broker.refresh([CONNECTION])
    await eventually(lambda: broker.commands.outstanding == 0)
    stored = codec.decode_registry(await redis.call("HGET", keys.connection("usr_a"), "d1"))
    assert (stored.instance_id, stored.connection_id) == ("gw_2", "4")


@pytest.mark.trio
async def test_the_instance_that_held_the_device_is_told(
    broker: RedisBroker, receiver: Recorder, address: Address, nursery: trio.Nursery
) -> None:
    other = make_broker(address, "gw_2")
    await nursery.start(other.run, Recorder())
    broker.attach(CONNECTION)
    await eventually(lambda: broker.commands.outstanding == 0)
    other.attach(Attachment("usr_a", "d1", 4, 2000))
    await eventually(lambda: receiver.items == [records.Replaced(1)])


@pytest.mark.trio
@pytest.mark.slow
async def test_a_redis_that_forgot_gets_lease_stream_and_shard_count_again(
    broker: RedisBroker, redis: Wire, receiver: Recorder
) -> None:
    await redis.call("FLUSHALL")
    await eventually(lambda: receiver.recoveries == [True], 7)
    assert await redis.call("EXISTS", keys.instance("gw_1"), keys.down("gw_1"), keys.INSTANCES, keys.SHARDS) == 4
    await redis.call("XADD", keys.down("gw_1"), "NOMKSTREAM", "*", "r", codec.encode_down([records.Reply(1, b"{}")]))
    await eventually(lambda: records.Reply(1, b"{}") in receiver.items)
    assert broker.missing() == []


@pytest.mark.trio
@pytest.mark.slow
async def test_what_was_routed_is_not_routed_again_when_the_lease_was_forgotten(
    broker: RedisBroker, redis: Wire, receiver: Recorder
) -> None:
    """A Redis restored from disk has the stream and not the lease: authors were told old receipts a second time."""
    for number in range(3):
        await redis.call("XADD", keys.down("gw_1"), "*", "r", codec.encode_down([records.Reply(number, b"{}")]))
    await eventually(lambda: len(receiver.items) == 3)
    await redis.call("DEL", keys.instance("gw_1"))
    await eventually(lambda: receiver.recoveries == [True], 7)
    await redis.call("XADD", keys.down("gw_1"), "*", "r", codec.encode_down([records.Reply(3, b"{}")]))
    await eventually(lambda: len(receiver.items) >= 4)
    assert receiver.items == [records.Reply(number, b"{}") for number in range(4)]


@pytest.mark.trio
@pytest.mark.slow
async def test_a_redis_whose_clock_is_behind_is_still_read(
    broker: RedisBroker, redis: Wire, receiver: Recorder
) -> None:
    future = b"99999999999999-0"
    await redis.call("XADD", keys.down("gw_1"), future, "r", codec.encode_down([records.Reply(1, b"{}")]))
    await eventually(lambda: len(receiver.items) == 1)
    await redis.call("FLUSHALL")
    await eventually(lambda: receiver.recoveries == [True], 7)
    await redis.call("XADD", keys.down("gw_1"), "*", "r", codec.encode_down([records.Reply(2, b"{}")]))
    await eventually(lambda: records.Reply(2, b"{}") in receiver.items)


@pytest.mark.trio
async def test_another_shard_count_is_refused(address: Address, redis: Wire) -> None:
    await redis.call("SET", keys.SHARDS, 32)
    broker = make_broker(address)
    with trio.fail_after(5), pytest.RaisesGroup(BrokerRefused, flatten_subgroups=True):
        await broker.run(Recorder())


@pytest.mark.trio
async def test_leaving_removes_lease_and_stream(broker: RedisBroker, redis: Wire) -> None:
    await broker.leave()
    assert await redis.call("EXISTS", keys.instance("gw_1"), keys.down("gw_1")) == 0
    assert await redis.call("SCARD", keys.INSTANCES) == 0


@pytest.mark.trio
async def test_a_lease_that_is_due_while_the_instance_leaves_does_not_bring_it_back(
    broker: RedisBroker, redis: Wire
) -> None:
    broker.announce_draining()
    await broker.leave()
    broker.announce_draining()
    await trio.sleep(0.1)
    assert await redis.call("EXISTS", keys.instance("gw_1"), keys.down("gw_1")) == 0
    assert await redis.call("SISMEMBER", keys.INSTANCES, "gw_1") == 0


# --- migration -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_neighbours_are_the_other_gateways_that_live_and_do_not_drain(
    broker: RedisBroker, redis: Wire
) -> None:
    good = records.InstanceInfo("gateway", "ws://there", 7, False)
    leases = {
        "gw_good": codec.encode_value(good),
        "gw_draining": codec.encode_value(msgspec.structs.replace(good, draining=True)),
        "rest_1": codec.encode_value(msgspec.structs.replace(good, kind="rest")),
        "gw_garbled": b"{}",
    }
    for instance_id, lease in leases.items():
        await redis.call("SET", keys.instance(instance_id), lease)
    await redis.call("SADD", keys.INSTANCES, "gw_dead", *leases)
    assert await broker.neighbours() == {"gw_good": good}


@pytest.mark.trio
async def test_a_ticket_is_kept_for_a_minute_and_taken_once(
    broker: RedisBroker, receiver: Recorder, redis: Wire
) -> None:
    ticket = records.MigrationTicket("usr_a", "d1", 99, 1)
    kept: list[bool] = []
    broker.keep_ticket("mig_1", ticket, kept.append)
    await eventually(lambda: kept == [True])
    assert 58 <= await redis.call("TTL", keys.migration("mig_1")) <= 60
    assert [broker.redeem(number, "mig_1") for number in (1, 2)] == [None, None]
    await eventually(lambda: receiver.tickets == [(1, ticket), (2, None)])


@pytest.mark.trio
async def test_tickets_of_a_redis_that_is_away_are_neither_kept_nor_judged(
    behind_proxy: RedisBroker, proxy: Proxy, receiver: Recorder
) -> None:
    kept: list[bool] = []
    proxy.silent = True
    behind_proxy.keep_ticket("mig_1", records.MigrationTicket("usr_a", "d1", 99, 1), kept.append)
    assert behind_proxy.redeem(1, "mig_1") is None
    proxy.refusing = True
    proxy.cut()
    await eventually(lambda: (kept, receiver.tickets) == ([False], [(1, ErrorCode.STORAGE_UNAVAILABLE)]))
    behind_proxy.keep_ticket("mig_1", records.MigrationTicket("usr_a", "d1", 99, 1), kept.append)
    assert kept == [False, False]
    assert behind_proxy.redeem(1, "mig_1") is ErrorCode.STORAGE_UNAVAILABLE
