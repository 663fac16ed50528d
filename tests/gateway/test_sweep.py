"""The hub's sweeps: what was lost on the way is asked again, and asking harms nobody."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import records
from protocol.errors import CloseCode, ErrorCode
from protocol.limits import Limits
from tests.gateway.fakes import House, message, token


@pytest.fixture
def house() -> House:
    return House()


def checks(house: House) -> list[int]:
    """The connections whose tokens are asked about, since the last look."""
    asked = house.broker.take("ask")
    return [query.connection for query in asked if isinstance(query, records.OpenQuery) and query.is_check]


def test_a_check_of_a_token_that_was_lost_is_asked_again_until_it_is_answered(house: House) -> None:
    (one, _), (other, _), (gone, _) = [house.open(user_id=f"usr_{name}") for name in "abc"]
    house.broker.log.clear()
    house.hub.heard_again()
    house.pass_time(1)
    numbers = [connection.session.connection for connection in (one, other, gone)]
    assert sorted(checks(house)) == numbers
    house.hub.route([records.TokenGood(numbers[0])])
    gone.lost()
    house.pass_time(10)
    assert checks(house) == [], "not before it may have been answered"
    house.pass_time(6)
    assert checks(house) == [numbers[1]]
    house.hub.route([records.TokenGood(numbers[1])])
    house.pass_time(40)
    assert checks(house) == []


@pytest.mark.parametrize("is_check", [True, False])
def test_a_query_that_is_lost_while_the_window_is_full_ends_nothing(is_check: bool) -> None:
    house = House(Limits(window=2))
    connection, transport = house.open()
    house.send(connection, {"type": "sync", "payload": {"cursors": {}}})
    for key in ("k1", "k2"):
        house.send(connection, message(key))
    assert connection.blocked
    number = connection.session.connection
    query = records.OpenQuery("gw_test", number, "usr_a", "d1", {}, is_check=is_check)
    house.hub.query_failed(query, ErrorCode.STORAGE_UNAVAILABLE)
    assert transport.closed is None
    assert house.hub.users["usr_a"] == (connection,)


def test_a_check_that_is_lost_while_the_session_opens_does_not_end_it(house: House) -> None:
    connection, transport = house.connect()
    house.auth(connection)
    check = records.OpenQuery("gw_test", connection.session.connection, "usr_a", "d1", {}, is_check=True)
    house.hub.query_failed(check, ErrorCode.STORAGE_UNAVAILABLE)
    assert transport.closed is None


@pytest.mark.parametrize("trouble", ["draining", "redis away"])
def test_a_fresh_token_on_a_live_connection_is_taken_whatever_the_gateway_is_at(house: House, trouble: str) -> None:
    """While it drains, or Redis is away: who was let in keeps the connection until it goes elsewhere."""
    connection, transport = house.open()
    before = connection.session.expires_at
    if trouble == "draining":
        house.hub.draining = True
    else:
        house.broker.lacks = ["redis_commands"]
        house.broker.refuses = ErrorCode.STORAGE_UNAVAILABLE
    fresh: dict[str, Any] = {"auth_token": token(exp=9_999_999_999)}
    house.auth(connection, **fresh)
    assert transport.closed is None
    assert connection.session.expires_at > before
    late, late_transport = house.connect()
    house.auth(late, user_id="usr_b", auth_token=token("usr_b"))
    assert late_transport.closed in (CloseCode.RESTART, CloseCode.OVERLOADED)
