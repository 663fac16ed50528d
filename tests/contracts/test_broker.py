"""The contract of the workers' broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from protocol import codec, keys, records
from protocol.models import ConnectionRegistry
from workers.broker import BrokerUnavailable, GroupMissing, Settlement

if TYPE_CHECKING:
    from tests.contracts.worlds import Servers, Twins
    from workers.broker import Broker

RECORD = records.LookAtAccount("", "", "conv", "usr")


def test_entries_are_read_once_stay_pending_and_are_settled(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        await broker.create_ingest_groups([0, 1])
        await broker.create_ingest_groups([0, 1])
        for _ in range(3):
            await broker.append_ingest(0, RECORD)
        entries = await broker.read_ingest([0, 1], 10, 50)
        assert [(entry.shard, entry.payload) for entry in entries] == [(0, codec.encode_record(RECORD))] * 3
        assert await broker.read_ingest([0, 1], 10, 50) == []
        assert await broker.read_pending(0, b"0", 10) == entries
        await broker.publish_and_settle({}, [Settlement(0, [entries[0].entry_id], entries[1].entry_id)], {})
        assert await broker.read_pending(0, b"0", 10) == entries[1:]
        assert await broker.read_pending(0, entries[1].entry_id, 10) == entries[2:]

    on.broker(scenario)


def test_what_is_pending_survives_the_trim_whoever_read_it(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        await broker.create_ingest_groups([0])
        for _ in range(250):  # more than a node of the stream holds: it is trimmed by whole nodes
            await broker.append_ingest(0, RECORD)
        first = (await broker.read_ingest([0], 1, 50))[0]
        ids = [entry.entry_id for entry in await broker.read_ingest([0], 300, 50)]
        await broker.publish_and_settle({}, [Settlement(0, ids, ids[-1])], {})
        assert await broker.read_pending(0, b"0", 10) == [first]
        await broker.publish_and_settle({}, [Settlement(0, [first.entry_id], ids[-1])], {})
        assert await broker.read_pending(0, b"0", 10) == []

    on.broker(scenario)


def test_a_blocked_read_gets_what_comes(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        await broker.create_ingest_groups([0])
        found = []

        async def read() -> None:
            found.extend(await broker.read_ingest([0], 10, 2000))

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep(0.05)
            await broker.append_ingest(0, RECORD)
        assert len(found) == 1

    on.broker(scenario)


def test_a_group_that_is_gone_is_said_to_be_missing_also_to_who_waits(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        with pytest.raises(GroupMissing):
            await broker.read_ingest([0], 10, 50)
        await broker.create_ingest_groups([0])
        raised = []

        async def read() -> None:
            try:
                await broker.read_ingest([0], 10, 2000)
            except GroupMissing as error:
                raised.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep(0.05)
            await broker.command("DEL", keys.ingest(0))
        assert len(raised) == 1

    on.broker(scenario)


def test_a_stream_nobody_made_takes_nothing_and_one_that_is_there_does(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        await broker.publish_down("gw", [records.Replaced(1)])
        assert await broker.read_down("gw", b"0", 20) == []
        await broker.create_down("gw")
        await broker.publish_down("gw", [records.Replaced(2)])
        read = await broker.read_down("gw", b"0", 20)
        assert [codec.decode_down(payload) for _, payload in read] == [[], [records.Replaced(2)]]
        await broker.trim_down("gw", read[1][0])
        assert await broker.read_down("gw", b"0", 20) == read[1:]

    on.broker(scenario)


def test_a_lease_is_one_owners_until_it_ends_or_is_given_up(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        assert await broker.hold_leases("a", [0, 1]) == [0, 1]
        assert await broker.hold_leases("b", [0, 1, 2]) == [2]
        assert await broker.free_leases([0, 3]) == [3]
        await broker.release_leases("b", [0])
        assert await broker.free_leases([0]) == []
        await broker.release_leases("a", [0])
        assert await broker.hold_leases("b", [0]) == [0]
        await broker.command("EXPIRE", keys.lease(1), 1)
        await anyio.sleep(1.1)
        assert await broker.free_leases([1]) == [1]

    on.broker(scenario)


def test_a_query_goes_to_one_of_those_who_ask(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        assert await broker.read_queries("w", 10, 20) == []
        await broker.append_query(records.HeadsQuery("gw", ["usr"]))
        assert len(await broker.read_queries("w", 10, 20)) == 1
        assert await broker.read_queries("v", 10, 20) == []

    on.broker(scenario)


def test_changes_of_the_registry_are_told_and_so_is_that_all_of_it_went(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        value = codec.encode_value(ConnectionRegistry(instance_id="gw", connection_id="1", timestamp=1))
        async with broker.registry_changes() as changes:
            await broker.command("HSET", keys.connection("usr_a"), "d1", value)
            with anyio.fail_after(5):
                assert await anext(changes) == ["usr_a"]
            assert await broker.locate(["usr_a", "usr_b"]) == {"usr_a": ("gw",), "usr_b": ()}
            await broker.command("FLUSHALL")
            with anyio.fail_after(5):
                while await anext(changes) is not None:
                    pass
            await changes.aclose()  # type: ignore[attr-defined]  # the generator behind it

    on.broker(scenario)


def test_a_listener_that_has_gone_meanwhile_is_an_outage_that_passes(servers: Servers) -> None:
    """A Redis that was restarted between two commands ended every worker. Simulator, seed 430."""

    async def scenario(broker: Broker) -> None:
        with pytest.raises(BrokerUnavailable):
            await broker.command("CLIENT", "TRACKING", "ON", "REDIRECT", 999_999, "BCAST", "PREFIX", "x")

    servers.broker(scenario)


def test_an_allowance_is_spent_and_a_session_filled_by_who_claimed_it(on: Twins | Servers) -> None:
    async def scenario(broker: Broker) -> None:
        assert [await broker.spend("x", "y", 2, 60) for _ in range(2)] == [0.0, 0.0]
        assert 0 < await broker.spend("x", "y", 2, 60) <= 60
        assert await broker.look_session("usr", "claim a") is None
        assert await broker.look_session("usr", "claim b") == b"claim a"
        await broker.fill_session("usr", "claim b", b"{}")
        assert await broker.look_session("usr", "claim b") == b"claim a"
        await broker.fill_session("usr", "claim a", b"{}")
        assert await broker.look_session("usr", "claim b") == b"{}"

    on.broker(scenario)
