"""Arrivals: how many connections one address may open, and what the hub makes of it."""

from __future__ import annotations

import pytest

from gateway.arrivals import Arrivals, TrustedProxies
from tests.gateway.fakes import House

HERE, THERE = "203.0.113.9", "198.51.100.7"


def test_w17_the_51st_new_connection_within_a_second_waits_for_the_next() -> None:
    arrivals = Arrivals(50, 200)
    waits = [arrivals.enter(HERE, 10.0 + number / 100) for number in range(50)]
    assert waits == [0.0] * 50
    assert arrivals.enter(HERE, 10.75) == 0.25
    assert arrivals.enter(THERE, 10.75) == 0.0
    assert arrivals.enter(HERE, 11.0) == 0.0


def test_connections_that_are_refused_do_not_prolong_the_wait() -> None:
    arrivals = Arrivals(2, 200)
    assert [arrivals.enter(HERE, at) for at in (10.0, 10.0, 10.5, 10.5, 10.5, 11.0)] == [0.0, 0.0, 0.5, 0.5, 0.5, 0.0]


def test_w17_the_201st_that_nobody_knows_has_to_wait_until_one_of_them_is_known() -> None:
    arrivals = Arrivals(1000, 200)
    assert [arrivals.enter(HERE, 10.0) for _ in range(200)] == [0.0] * 200
    assert arrivals.enter(HERE, 12.0) == 1.0
    assert arrivals.enter(THERE, 12.0) == 0.0
    arrivals.leave(HERE)
    assert [arrivals.enter(HERE, 12.0) for _ in range(2)] == [0.0, 1.0]


def test_the_addresses_of_one_household_count_as_one() -> None:
    arrivals = Arrivals(2, 200)
    assert [arrivals.enter(f"2001:db8::{number}", 10.0) for number in range(3)] == [0.0, 0.0, 1.0]
    assert arrivals.enter("2001:db8:0:1::1", 10.0) == 0.0


def test_addresses_are_forgotten_so_that_nothing_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.arrivals.ADDRESSES", 10)
    arrivals = Arrivals(50, 200)
    for number in range(100):
        assert arrivals.enter(f"10.0.0.{number}", 10.0) == 0.0
        arrivals.leave(f"10.0.0.{number}")
    assert len(arrivals._seconds) == 10
    assert arrivals._unknown == {}


def test_whoever_has_shown_a_token_makes_room_for_the_next() -> None:
    house = House(arrivals=Arrivals(1000, 2))
    first, _ = house.connect(HERE)
    second, _ = house.connect(HERE)
    assert house.hub.let_in(HERE, house.now) == 1.0
    house.auth(first)
    third, _ = house.connect(HERE)
    assert house.hub.let_in(HERE, house.now) == 1.0
    second.lost()
    third.lost()
    first.lost()
    assert house.hub.counts.turned_away == 2
    assert house.hub._arrivals._unknown == {}


def test_whoever_shows_no_good_token_makes_room_as_well() -> None:
    house = House(arrivals=Arrivals(1000, 1))
    for bad in ("x", "y"):
        connection, transport = house.connect(HERE)
        house.auth(connection, auth_token=bad)
        assert transport.closed is not None
    silent, transport = house.connect(HERE)
    house.pass_time(12)
    assert transport.closed is not None
    silent.lost()
    assert house.hub._arrivals._unknown == {}


@pytest.mark.parametrize("text", ["somewhere", "10.0.0.1/8", "10.0.0.1, *", "10.0.0.0/33"])
def test_what_is_no_address_is_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(ValueError, match="addresses and networks") as caught:
        TrustedProxies(text)
    assert text not in str(caught.value)
