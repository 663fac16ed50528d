"""A drain sends its clients elsewhere: who is told when and where to, and that a ticket opens one door once."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio_websocket

from gateway.migration import Migration, Neighbours
from gateway.wire import Address, WireLost
from protocol import keys, records
from protocol.codec import decode_registry, encode_value
from protocol.errors import CloseCode, ErrorCode
from protocol.records import InstanceInfo, MigrationTicket
from tests.gateway.fakes import WALL_SECONDS, House, message
from tests.gateway.test_server import Running, auth_frame, close_code, receive, start

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.connection import Connection
    from tests.gateway.fakes import FakeTransport

TOKEN = keys.MIGRATION_PREFIX + "t" * 64
TICKET = MigrationTicket("usr_a", "d1", (WALL_SECONDS + 600) * 1000, 7)


def gateways(**loads: int) -> dict[str, InstanceInfo]:
    return {name: InstanceInfo("gateway", f"ws://{name}", load, False) for name, load in loads.items()}


# --- where to --------------------------------------------------------------------------------------------------------


def send_one(neighbours: Neighbours) -> str:
    neighbour = neighbours.least_loaded()
    assert neighbour is not None
    neighbour.sent += 1
    return neighbour.endpoint


def test_the_least_loaded_neighbour_is_chosen_and_what_was_sent_there_counts() -> None:
    neighbours = Neighbours()
    neighbours.look(gateways(a=3, b=1))
    assert [send_one(neighbours) for _ in range(4)] == ["ws://b", "ws://b", "ws://a", "ws://b"]


def test_a_lease_that_lags_behind_does_not_make_a_neighbour_look_empty_again() -> None:
    neighbours = Neighbours()
    neighbours.look(gateways(a=0, b=1))
    assert [send_one(neighbours) for _ in range(2)] == ["ws://a", "ws://a"]
    neighbours.look(gateways(a=0, b=1))
    assert send_one(neighbours) == "ws://b"
    neighbours.look(gateways(a=9, b=1))
    assert send_one(neighbours) == "ws://b"


def test_a_neighbour_that_has_gone_is_not_chosen() -> None:
    neighbours = Neighbours()
    neighbours.look(gateways(a=0, b=9))
    neighbours.look(gateways(b=9))
    assert send_one(neighbours) == "ws://b"
    neighbours.look({})
    assert neighbours.least_loaded() is None


# --- when ------------------------------------------------------------------------------------------------------------


class FakeTickets:
    """Implements `migration.Tickets`; notes when which ticket was stored."""

    def __init__(self, leases: Mapping[str, InstanceInfo]) -> None:
        self.leases: dict[str, InstanceInfo] = dict(leases)
        self.kept: dict[str, MigrationTicket] = {}
        self.times: list[float] = []
        self.refusing = False
        self.away = False

    async def neighbours(self) -> dict[str, InstanceInfo]:
        await trio.lowlevel.checkpoint()
        if self.away:
            raise WireLost("away")
        return self.leases

    def keep_ticket(self, session_token: str, ticket: MigrationTicket, kept: Callable[[bool], None]) -> None:
        if not self.refusing:
            self.kept[session_token] = ticket
            self.times.append(trio.current_time())
        kept(not self.refusing)


def open_many(house: House, count: int) -> list[tuple[Connection, FakeTransport]]:
    return [house.open(f"usr_{number}") for number in range(count)]


def told(transport: FakeTransport) -> list[dict[str, Any]]:
    return [frame["payload"] for frame in transport.take() if frame["type"] == "migration"]


@pytest.mark.trio
async def test_clients_are_told_evenly_over_the_window(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    clients = open_many(house, 10)
    tickets = FakeTickets(gateways(a=0))
    began = trio.current_time()
    await Migration(house.hub, tickets, house.hub.wall_ms).run(5.0)
    gaps = [after - before for before, after in zip(tickets.times, tickets.times[1:], strict=False)]
    assert len(tickets.times) == 10
    assert all(0.45 < gap < 0.55 for gap in gaps)
    assert tickets.times[-1] - began < 5.0
    frames = [told(transport) for _, transport in clients]
    assert all(len(payloads) == 1 for payloads in frames)
    assert {payloads[0]["session_token"] for payloads in frames} == set(tickets.kept)
    assert all(transport.closed is None for _, transport in clients)


@pytest.mark.trio
async def test_a_ticket_says_whose_it_is_and_when_the_original_token_ends(
    autojump_clock: trio.testing.MockClock,
) -> None:
    house = House()
    connection, transport = house.open("usr_a", "d1")
    connection.session.issued_ms = 77
    tickets = FakeTickets(gateways(a=0))
    house.hub.migrate = lambda *_: None  # type: ignore[method-assign]  # the clock of the house is not trio's
    migration = Migration(house.hub, tickets, lambda: 5_000_000)
    left_seconds = 100.0
    connection.session.expires_at = trio.current_time() + left_seconds
    await migration.run(0.2)
    (token, ticket), *others = tickets.kept.items()
    assert others == []
    assert token.startswith(keys.MIGRATION_PREFIX)
    assert len(token) >= len(keys.MIGRATION_PREFIX) + 43
    assert (ticket.user_id, ticket.device_id, ticket.issued_ms) == ("usr_a", "d1", 77)
    assert 5_000_000 + 99_000 <= ticket.expires_ms <= 5_000_000 + 100_000
    assert transport.take() == []


@pytest.mark.trio
async def test_without_a_neighbour_nobody_is_told_and_nobody_waits(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    _, transport = house.open()
    began = trio.current_time()
    await Migration(house.hub, FakeTickets({}), house.hub.wall_ms).run(20.0)
    assert trio.current_time() - began < 1.0
    assert transport.take() == []


@pytest.mark.trio
async def test_a_ticket_that_redis_did_not_take_is_made_again(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    _, transport = house.open()
    tickets = FakeTickets(gateways(a=0))
    tickets.refusing = True
    migration = Migration(house.hub, tickets, house.hub.wall_ms)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(migration.run, 5.0)
        await trio.sleep(1.0)
        assert transport.take() == []
        tickets.refusing, tickets.away = False, True
        await trio.sleep(1.5)
        assert len(told(transport)) == 1
    assert migration.told == 1


@pytest.mark.trio
async def test_nobody_is_told_twice_and_latecomers_are_told_too(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    _, first = house.open("usr_a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Migration(house.hub, FakeTickets(gateways(a=0)), house.hub.wall_ms).run, 5.0)
        await trio.sleep(1.0)
        _, second = house.open("usr_b")
    assert [len(told(transport)) for transport in (first, second)] == [1, 1]


@pytest.mark.trio
async def test_it_ends_when_everybody_has_gone(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    connection, _ = house.open()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Migration(house.hub, FakeTickets(gateways(a=0)), house.hub.wall_ms).run, 20.0)
        await trio.sleep(2.0)
        connection.lost()
    assert trio.current_time() - began < 3.0


@pytest.mark.trio
async def test_who_was_told_to_go_is_served_until_the_last_moment_of_a_long_drain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """With 30 s to drain, nobody's messages were taken from the 20th on, while their phones made up their minds."""
    house = House()
    slow, _ = house.open("usr_a")
    quick, _ = house.open("usr_b")
    for connection in (slow, quick):
        house.hub.migrate(connection, "ws://b", TOKEN)
    migration = Migration(house.hub, FakeTickets(gateways(a=0)), house.hub.wall_ms)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(migration.see_off, 7.0)
        await trio.sleep(3.0)
        quick.lost()
        house.send(slow, message("k1"))
        assert len(house.broker.take("publish")) == 1
    assert 6.9 < trio.current_time() - began < 7.2
    slow.lost()
    await migration.see_off(7.0)
    assert trio.current_time() - began < 7.3


def test_a_client_that_has_migrated_is_closed_with_restart_after_its_acks_had_a_moment() -> None:
    house = House()
    connection, transport = house.open()
    house.send(connection, message("k1"))
    house.hub.migrate(connection, "ws://b", TOKEN)
    assert told(transport) == [{"new_endpoint": "ws://b", "session_token": TOKEN}]
    number = connection.session.connection
    house.hub.route([records.Replaced(number)])
    house.hub.retire(house.now + 1.9)
    house.hub.route([records.Outcome(number, "k1", b'{"type":"message_ack"}')])
    assert [frame["type"] for frame in transport.take()] == ["message_ack"]
    assert house.hub.migrating == 1
    house.hub.retire(house.now + 2.0)
    assert transport.closed is CloseCode.RESTART
    assert transport.take() == []
    assert house.hub.migrating == 0


def test_a_device_that_connects_again_without_having_been_told_is_replaced_at_once() -> None:
    house = House()
    connection, transport = house.open()
    house.hub.route([records.Replaced(connection.session.connection)])
    assert transport.closed is CloseCode.REPLACED


# --- the other end ---------------------------------------------------------------------------------------------------


def redeem(house: House, found: MigrationTicket | ErrorCode | None, **extra: Any) -> tuple[Connection, FakeTransport]:
    """A client that shows a session token, and what Redis says about it."""
    connection, transport = house.connect()
    house.auth(connection, auth_token=TOKEN, **extra)
    assert house.broker.take("redeem") == [(connection.session.connection, TOKEN)]
    house.hub.redeemed(connection.session.connection, found)
    return connection, transport


def test_a_ticket_lets_its_device_in_with_the_end_and_the_birth_of_the_original_token() -> None:
    house = House()
    connection, transport = redeem(house, TICKET, resume={"conv_1": 5})
    (query,) = house.broker.take("ask")
    assert (query.user_id, query.device_id, query.cursors, query.issued_ms) == ("usr_a", "d1", {"conv_1": 5}, 7)
    assert len(house.broker.take("attach")) == 1
    assert connection.session.expires_at == house.now + 600
    house.hub.route([records.OpenAnswer(connection.session.connection, 0, [])])
    assert [frame["type"] for frame in transport.take()] == ["auth_success", "sync_complete"]
    assert house.hub.counts.migrated == 1


@pytest.mark.parametrize(
    ("found", "extra", "error"),
    [
        (None, {}, "invalid_token"),
        (TICKET, {"device_id": "d2"}, "invalid_token"),
        (TICKET, {"user_id": "usr_b"}, "invalid_token"),
        (MigrationTicket("usr_a", "d1", WALL_SECONDS * 1000, 0), {}, "expired_token"),
        (ErrorCode.STORAGE_UNAVAILABLE, {}, "server_busy"),
    ],
)
def test_what_a_session_token_cannot_open(
    found: MigrationTicket | ErrorCode | None, extra: dict[str, str], error: str
) -> None:
    house = House()
    _, transport = redeem(house, found, **extra)
    assert [frame["error"] for frame in transport.take()] == [error]
    assert transport.closed is (CloseCode.OVERLOADED if error == "server_busy" else CloseCode.AUTH)
    assert house.broker.take("attach") == []


def test_guessing_session_tokens_is_bounded_like_guessing_tokens() -> None:
    house = House()
    for _ in range(10):
        redeem(house, None)
    connection, transport = house.connect()
    house.auth(connection, auth_token=TOKEN)
    assert house.broker.take("redeem") == []
    assert [frame["error"] for frame in transport.take()] == ["rate_limited"]


def test_redis_away_means_come_back_later() -> None:
    house = House()
    house.broker.refuses = ErrorCode.STORAGE_UNAVAILABLE
    connection, transport = house.connect()
    house.auth(connection, auth_token=TOKEN)
    assert [frame["error"] for frame in transport.take()] == ["server_busy"]


def test_nothing_else_is_taken_while_a_session_token_is_looked_up() -> None:
    house = House()
    connection, transport = house.connect()
    house.auth(connection, auth_token=TOKEN)
    blocked = [connection.blocked]
    house.hub.redeemed(connection.session.connection, TICKET)
    house.hub.redeemed(connection.session.connection, TICKET)
    blocked.append(connection.blocked)
    assert len(house.broker.take("attach")) == 1
    house.hub.route([records.OpenAnswer(connection.session.connection, 0, [])])
    assert [*blocked, connection.blocked] == [True, True, False]
    assert transport.resumed == 1


def test_a_client_that_left_during_the_look_up_is_forgotten() -> None:
    house = House()
    connection, _ = house.connect()
    house.auth(connection, auth_token=TOKEN)
    connection.lost()
    house.hub.redeemed(connection.session.connection, TICKET)
    assert house.broker.take("attach") == []
    assert house.hub.counts.isolated_errors == 0


def test_a_gateway_that_began_to_drain_during_the_look_up_sends_the_client_on() -> None:
    house = House()
    connection, transport = house.connect()
    house.auth(connection, auth_token=TOKEN)
    house.hub.draining = True
    house.hub.redeemed(connection.session.connection, TICKET)
    assert [frame["error"] for frame in transport.take()] == ["draining"]


# --- over a real Valkey ----------------------------------------------------------------------------------------------

TRANSPORTS = ["epoll", "trio-websocket"]


async def start_pair(address: Address, nursery: trio.Nursery, transport: str) -> tuple[Running, Running]:
    """The gateway that will drain, and its neighbour on the other transport."""
    other = next(name for name in TRANSPORTS if name != transport)
    long = {"TRIREME_DRAIN_SECONDS": "20"}
    first = await start(nursery, address, address, TRIREME_GATEWAY_TRANSPORT=transport, **long)
    second = await start(
        nursery, address, address, TRIREME_GATEWAY_TRANSPORT=other, TRIREME_GATEWAY_ENDPOINT="ws://second", **long
    )
    return first, second


@pytest.mark.trio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_client_moves_to_the_neighbour_and_is_served_until_it_has(
    address: Address, nursery: trio.Nursery, transport: str
) -> None:
    first, second = await start_pair(address, nursery, transport)
    async with first.client() as old, second.client() as new, second.client() as thief:
        await first.open(old)
        began = trio.current_time()
        first.stopping.set()
        frame = await receive(old)
        assert (frame["type"], frame["payload"]["new_endpoint"]) == ("migration", "ws://second")
        await old.send_message(json.dumps(message("k1")))
        assert (await first.published("conv_1")).idempotency_key == "k1"
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", first.port)

        session_token = frame["payload"]["session_token"]
        second._query_position = first._query_position
        await second.open(new, auth_token=session_token)
        assert await close_code(old) == 1012
        assert trio.current_time() - began < 10.0
        await thief.send_message(auth_frame("usr_a", auth_token=session_token))
        assert (await receive(thief))["error"] == "invalid_token"
        assert await close_code(thief) == 4401
        with trio.fail_after(3):
            await first.ended.wait()
        stored = decode_registry(await second.redis.call("HGET", keys.connection("usr_a"), "d1"))
        assert stored.instance_id == second.gateway.instance_id
        assert await second.exists(0, keys.migration(session_token), keys.down(first.gateway.instance_id))


@pytest.mark.trio
async def test_of_two_who_show_the_same_session_token_at_once_one_gets_in(
    address: Address, nursery: trio.Nursery
) -> None:
    running = await start(nursery, address, address)
    expires_ms = (int(time.time_ns() / 1e9) + 60) * 1000
    value = encode_value(MigrationTicket("usr_a", "d1", expires_ms, 0))
    await running.redis.call("SET", keys.migration(TOKEN), value, "EX", keys.MIGRATION_TTL_SECONDS)
    async with running.client() as one, running.client() as two:
        answers: list[str] = []

        async def show(websocket: trio_websocket.WebSocketConnection) -> None:
            await websocket.send_message(auth_frame("usr_a", auth_token=TOKEN))
            frame = await receive(websocket)
            answers.append(frame.get("error", frame["type"]))

        async with trio.open_nursery() as clients:
            for websocket in (one, two):
                clients.start_soon(show, websocket)
            query = await running.next_query(records.OpenQuery)
            await running.down(records.OpenAnswer(query.connection, 0, []))
        assert sorted(answers) == ["auth_success", "invalid_token"]


@pytest.mark.trio
async def test_gateways_that_are_stopped_together_send_nobody_to_each_other(
    address: Address, nursery: trio.Nursery
) -> None:
    first, second = await start_pair(address, nursery, "epoll")
    async with first.client() as websocket:
        await first.open(websocket)
        for running in (first, second):
            running.stopping.set()
        with trio.fail_after(5), pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await websocket.get_message()
        assert closed.value.reason is not None
        assert closed.value.reason.code == 1012
