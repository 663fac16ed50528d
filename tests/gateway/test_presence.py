"""Playbooks of presence, typing and signals in the hub: what watchers are told, when, and what it costs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.presence import RIGHTS_SECONDS, Presence
from protocol import records
from protocol.errors import CloseCode
from protocol.limits import Limits
from protocol.models import UserStatus
from tests.gateway.fakes import WALL_SECONDS, FakeTransport, House, message

ONLINE, OFFLINE = UserStatus.ONLINE, UserStatus.OFFLINE


@pytest.fixture
def house() -> House:
    return House()


def subscribe(house: House, connection: Any, *user_ids: str) -> list[records.PresenceQuery]:
    house.send(connection, {"type": "presence_subscribe", "payload": {"user_ids": list(user_ids)}})
    return house.broker.take("ask")


def answer(house: House, connection: Any, *people: tuple[str, UserStatus, int], refused: tuple[str, ...] = ()) -> None:
    watched = [records.Watched(*person) for person in people]
    house.hub.route([records.PresenceAnswer(connection.session.connection, watched, list(refused))])


def change(house: House, user_id: str, status: UserStatus, last_seen: int, **more: Any) -> None:
    house.hub.presence_changed(user_id, records.PresenceChange(status, last_seen, **more))


def told(transport: FakeTransport) -> list[tuple[str, str, int | None]]:
    frames = [frame["payload"] for frame in transport.take() if frame["type"] == "presence"]
    return [(frame["user_id"], frame["status"], frame.get("last_seen")) for frame in frames]


def watching(house: House, *people: tuple[str, UserStatus, int], user_id: str = "usr_a") -> tuple[Any, FakeTransport]:
    """A client that watches these people and has been told how they are."""
    connection, transport = house.open(user_id)
    subscribe(house, connection, *(person[0] for person in people))
    answer(house, connection, *people)
    transport.take()
    transport.outgoing.clear()
    return connection, transport


# --- subscribing -----------------------------------------------------------------------------------------------------


def test_whoever_may_be_watched_is_told_at_once(house: House) -> None:
    connection, transport = house.open()
    assert subscribe(house, connection, "usr_b", "usr_c", "usr_d") == [
        records.PresenceQuery("gw_test", connection.session.connection, "usr_a", ["usr_b", "usr_c", "usr_d"])
    ]
    assert sorted(house.broker.take("watch")) == ["usr_b", "usr_c", "usr_d"]
    assert transport.take() == []
    answer(house, connection, ("usr_b", ONLINE, 5), ("usr_c", OFFLINE, 0), refused=("usr_d",))
    assert told(transport) == [("usr_b", "online", 5), ("usr_c", "offline", None)]
    assert set(house.hub.watched) == {"usr_b", "usr_c"}
    assert house.broker.take("watch") == ["usr_d"]


def test_a_second_watcher_is_told_what_the_first_knows(house: House) -> None:
    watching(house, ("usr_b", ONLINE, 5))
    house.broker.log.clear()
    connection, transport = house.open("usr_c")
    subscribe(house, connection, "usr_b")
    assert house.broker.take("watch") == []
    answer(house, connection, ("usr_b", ONLINE, 7))
    assert told(transport) == [("usr_b", "online", 5)]


def test_nobody_is_watched_any_more_when_the_last_watcher_goes(house: House) -> None:
    first, transport = watching(house, ("usr_b", ONLINE, 5), ("usr_c", ONLINE, 5))
    second, _ = watching(house, ("usr_b", ONLINE, 5), user_id="usr_d")
    house.broker.log.clear()
    house.send(first, {"type": "presence_unsubscribe", "payload": {"user_ids": ["usr_b", "usr_c", "usr_x"]}})
    assert house.broker.take("watch") == ["usr_c"]
    change(house, "usr_b", OFFLINE, 6, settled=True)
    assert told(transport) == []
    second.lost()
    assert house.broker.take("watch") == ["usr_b"]
    assert house.hub.presence._watchers == {}
    assert house.hub.watched == {}


def test_more_than_the_limit_is_refused_as_a_whole_and_by_name() -> None:
    house = House(Limits(watched_people=3, lookup_rate=100))
    connection, transport = watching(house, ("usr_b", ONLINE, 5), ("usr_c", ONLINE, 5))
    assert subscribe(house, connection, "usr_b", "usr_d", "usr_e") == []
    (error,) = transport.take()
    assert (error["payload"]["code"], error["payload"]["in_reply_to"]) == ("validation_failed", "presence_subscribe")
    assert "at most 3 people" in error["payload"]["message"]
    assert len(house.hub.watched) == 2
    assert len(subscribe(house, connection, "usr_b", "usr_d")) == 1


def test_a_gateway_watches_a_bounded_number_of_people(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.presence.PEOPLE_LIMIT", 2)
    connection, transport = watching(house, ("usr_b", ONLINE, 5), ("usr_c", ONLINE, 5))
    subscribe(house, connection, "usr_d")
    (error,) = transport.take()
    assert (error["payload"]["code"], error["payload"]["retryable"]) == ("overloaded", True)
    assert set(house.hub.watched) == {"usr_b", "usr_c"}


def test_asking_again_and_again_keeps_one_place_in_the_queue_of_questions() -> None:
    """A client that subscribed in a loop while workers were slow grew the gateway by an entry for each question."""
    house = House(Limits(lookup_rate=1000))
    connection, _ = house.open()
    for number in range(100):
        subscribe(house, connection, f"usr_{number % 3}")
    assert len(house.hub.presence._ask_again) == 1
    house.pass_time(10)
    subscribe(house, connection, "usr_1")
    house.pass_time(10)
    assert presence_queries(house) == [], "asked 10 s ago"
    house.pass_time(7)
    (asked,) = presence_queries(house)
    assert sorted(asked.user_ids) == ["usr_0", "usr_1", "usr_2"]
    assert len(house.hub.presence._ask_again) == 1


def test_a_question_without_an_answer_is_asked_again(house: House) -> None:
    connection, transport = house.open()
    (query,) = subscribe(house, connection, "usr_b", "usr_c")
    answer(house, connection, ("usr_b", ONLINE, 5))
    house.pass_time(17)
    assert [asked.user_ids for asked in presence_queries(house)] == [["usr_c"]]
    answer(house, connection, ("usr_c", ONLINE, 5))
    assert len(told(transport)) == 2
    house.pass_time(20)
    assert presence_queries(house) == []
    assert query.user_id == "usr_a"


def test_workers_who_are_behind_are_asked_less_and_less() -> None:
    house = House(Limits(dead_seconds=1e6, heartbeat_seconds=1e6))
    connection, _ = house.open()
    subscribe(house, connection, "usr_b")
    asked = []
    for second in range(1, 290):
        house.pass_time(1)
        asked += [second] * len(presence_queries(house))
    assert asked == [15, 45, 105, 225]


def presence_queries(house: House) -> list[records.PresenceQuery]:
    return [query for query in house.broker.take("ask") if isinstance(query, records.PresenceQuery)]


def test_a_connection_that_watches_nobody_leaves_no_trace(house: House) -> None:
    connection, _ = house.open()
    house.send(connection, {"type": "presence_unsubscribe", "payload": {"user_ids": ["usr_b"]}})
    house.pass_time(RIGHTS_SECONDS + 5)
    assert house.hub.presence._watchers == {}
    assert presence_queries(house) == []
    connection.lost()


# --- changes ---------------------------------------------------------------------------------------------------------


def test_a_change_is_told_when_it_has_held_for_three_seconds(house: House) -> None:
    _, transport = watching(house, ("usr_b", ONLINE, 5))
    change(house, "usr_b", OFFLINE, 9)
    house.pass_time(2)
    assert told(transport) == []
    house.pass_time(2)
    assert told(transport) == [("usr_b", "offline", 9)]


def test_a_quick_reconnect_is_not_told(house: House) -> None:
    _, transport = watching(house, ("usr_b", ONLINE, 5))
    change(house, "usr_b", OFFLINE, 9)
    house.pass_time(1)
    change(house, "usr_b", ONLINE, 10)
    house.pass_time(10)
    assert told(transport) == []
    change(house, "usr_b", OFFLINE, 30)
    house.pass_time(2)
    change(house, "usr_b", ONLINE, 31)
    house.pass_time(1)
    change(house, "usr_b", OFFLINE, 32)
    house.pass_time(2)
    assert told(transport) == []
    house.pass_time(2)
    assert told(transport) == [("usr_b", "offline", 32)]


def test_the_users_of_a_dead_gateway_are_gone_at_once(house: House) -> None:
    _, transport = watching(house, ("usr_b", ONLINE, 5))
    change(house, "usr_b", OFFLINE, 9, settled=True)
    assert told(transport) == [("usr_b", "offline", 9)]
    house.pass_time(10)
    assert told(transport) == []


def test_another_device_is_no_news(house: House) -> None:
    _, transport = watching(house, ("usr_b", ONLINE, 5))
    change(house, "usr_b", ONLINE, 9)
    house.pass_time(10)
    assert told(transport) == []


def test_all_watchers_get_the_same_bytes(house: House) -> None:
    transports = [watching(house, ("usr_b", ONLINE, 5), user_id=f"usr_{number}")[1] for number in range(3)]
    change(house, "usr_b", OFFLINE, 9, settled=True)
    sent = [transport.outgoing[-1] for transport in transports]
    assert sent[0] is sent[1] is sent[2]


def test_a_change_between_question_and_answer_is_newer_than_the_answer(house: House) -> None:
    connection, transport = house.open()
    subscribe(house, connection, "usr_b")
    house.now += 1
    change(house, "usr_b", OFFLINE, 9)
    answer(house, connection, ("usr_b", ONLINE, 5))
    assert told(transport) == [("usr_b", "offline", 9)]


def test_an_answer_of_an_emptied_redis_does_not_overrule_the_channel_that_confirmed_what_is_known(
    house: House,
) -> None:
    """The worker looked before the gateway of usr_b had written its presence again, the channel said it after."""
    connection, transport = watching(house, ("usr_b", ONLINE, 5))
    house.hub.heard_again()
    house.pass_time(1)
    assert len(presence_queries(house)) == 1
    house.now += 0.5
    change(house, "usr_b", ONLINE, 9)
    house.now += 0.5
    answer(house, connection, ("usr_b", OFFLINE, 5))
    house.pass_time(10)
    assert told(transport) == []


def test_an_older_answer_does_not_overrule_a_newer_one_that_confirmed_what_is_known(house: House) -> None:
    first, first_hears = watching(house, ("usr_b", ONLINE, 5), user_id="usr_a")
    second, second_hears = watching(house, ("usr_b", ONLINE, 5), user_id="usr_c")
    house.now += 10
    subscribe(house, first, "usr_b")
    house.now += 1
    subscribe(house, second, "usr_b")
    house.now += 1
    answer(house, second, ("usr_b", ONLINE, 9))
    answer(house, first, ("usr_b", OFFLINE, 5))
    house.pass_time(10)
    assert {status for _, status, _ in (*told(first_hears), *told(second_hears))} == {"online"}


def test_a_newer_answer_still_overrules_what_an_older_one_confirmed(house: House) -> None:
    first, _ = watching(house, ("usr_b", ONLINE, 5), user_id="usr_a")
    second, hears = watching(house, ("usr_b", ONLINE, 5), user_id="usr_c")
    house.now += 10
    subscribe(house, first, "usr_b")
    house.now += 1
    subscribe(house, second, "usr_b")
    house.now += 1
    answer(house, first, ("usr_b", ONLINE, 9))
    answer(house, second, ("usr_b", OFFLINE, 10))
    house.pass_time(5)
    assert told(hears)[-1] == ("usr_b", "offline", 10)


def test_a_watcher_whose_connection_breaks_does_not_disturb_the_others(house: House) -> None:
    _, broken = watching(house, ("usr_b", ONLINE, 5), ("usr_d", ONLINE, 5))
    _, transport = watching(house, ("usr_b", ONLINE, 5), user_id="usr_c")
    broken.broken = True
    change(house, "usr_b", OFFLINE, 9, settled=True)
    assert broken.closed is CloseCode.INTERNAL
    assert told(transport) == [("usr_b", "offline", 9)]
    assert set(house.hub.watched) == {"usr_b"}


# --- clients that read slowly ----------------------------------------------------------------------------------------


class Narrow(FakeTransport):
    """A socket that takes nothing: what is sent stays in the outbox, `size` frames are its bound."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.connection: Any = None

    def send_nowait(self, outgoing: Any) -> None:
        super().send_nowait(outgoing)
        assert len(self.outgoing) <= 2 * self.size, "cut off"
        if len(self.outgoing) == self.size:
            self.connection.overflowed()

    def drain(self, now: float) -> list[tuple[str, str, int | None]]:
        """The client reads all there is; what it is told of presence."""
        heard = told(self)
        self.outgoing.clear()
        self.connection.drained(now)
        return heard


def slow(house: House, *people: str, size: int = 4) -> tuple[Any, Narrow]:
    """A client that watches these people, with an empty outbox of `size` frames."""
    connection, _ = house.open()
    connection.transport = transport = Narrow(size)
    transport.connection = connection
    subscribe(house, connection, *people)
    return connection, transport


def test_a_slow_client_that_watches_500_people_is_not_cut_off_by_one_answer() -> None:
    house = House()
    people = [f"usr_{number}" for number in range(500)]
    connection, transport = slow(house, *people, size=256)
    answer(house, connection, *((name, ONLINE, 5) for name in people))
    assert len(transport.outgoing) == 256
    heard = transport.drain(house.now)
    heard += transport.drain(house.now)
    assert heard == [(name, "online", 5) for name in people]
    assert transport.drain(house.now) == []


def test_a_slow_client_hears_the_latest_of_everybody_and_of_each_once(house: House) -> None:
    people = [f"usr_{number}" for number in range(10)]
    connection, transport = slow(house, *people)
    answer(house, connection, *((name, ONLINE, 5) for name in people))
    for seen in (11, 12, 13):
        for name in people:
            change(house, name, ONLINE if seen == 12 else OFFLINE, seen, settled=True)
    heard: list[tuple[str, str, int | None]] = []
    for _ in range(4):
        heard += transport.drain(house.now)
    assert heard == [(name, "online", 5) for name in people[:4]] + [
        (name, "offline", 13) for name in (*people[4:], *people[:4])
    ]
    assert house.hub.presence.told == len(heard)


def test_a_slow_client_hears_of_the_end_and_of_nobody_it_has_left(house: House) -> None:
    people = [f"usr_{number}" for number in range(7)]
    connection, transport = slow(house, *people)
    answer(house, connection, *((name, ONLINE, 5) for name in people))
    change(house, "usr_5", ONLINE, 9, hidden_from="usr_a")
    house.send(connection, {"type": "presence_unsubscribe", "payload": {"user_ids": ["usr_6"]}})
    assert [name for name, _, _ in transport.drain(house.now)] == people[:4]
    assert transport.drain(house.now) == [("usr_4", "online", 5), ("usr_5", "offline", None)]
    assert set(house.hub.watched) == set(people[:5])


def test_who_may_be_watched_again_meanwhile_is_told_as_they_are(house: House) -> None:
    people = [f"usr_{number}" for number in range(5)]
    connection, transport = slow(house, *people)
    answer(house, connection, *((name, ONLINE, 5) for name in people))
    change(house, "usr_4", ONLINE, 9, hidden_from="usr_a")
    subscribe(house, connection, "usr_4")
    answer(house, connection, ("usr_4", ONLINE, 10))
    transport.drain(house.now)
    assert transport.drain(house.now) == [("usr_4", "online", 10)]


def test_who_is_refused_when_asked_for_again_meanwhile_is_told_offline(house: House) -> None:
    people = [f"usr_{number}" for number in range(5)]
    connection, transport = slow(house, *people)
    answer(house, connection, *((name, ONLINE, 5) for name in people))
    subscribe(house, connection, "usr_4")
    answer(house, connection, refused=("usr_4",))
    transport.drain(house.now)
    assert transport.drain(house.now) == [("usr_4", "offline", None)]
    assert transport.closed is None


def test_what_waits_for_a_slow_client_is_bounded_and_goes_with_it() -> None:
    house = House(Limits(watched_people=6, lookup_rate=1000))
    connection, transport = slow(house, *(f"usr_{number}" for number in range(6)))
    answer(house, connection, *((f"usr_{number}", ONLINE, 5) for number in range(6)))
    for number in range(6):
        change(house, f"usr_{number}", ONLINE, 9, hidden_from="*")
    subscribe(house, connection, "usr_7")
    assert transport.sent[-1]["payload"]["code"] == "validation_failed"
    connection.lost()
    assert house.hub.presence._watchers == {}
    assert house.hub.watched == {}


# --- rights and gaps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_from", "left"), [("usr_a", {"usr_c"}), ("*", set())])
def test_who_may_not_watch_any_more_hears_offline_once(house: House, hidden_from: str, left: set[str]) -> None:
    transports = {name: watching(house, ("usr_b", ONLINE, 5), user_id=name)[1] for name in ("usr_a", "usr_c")}
    change(house, "usr_b", ONLINE, 9, hidden_from=hidden_from)
    for name, transport in transports.items():
        assert told(transport) == ([] if name in left else [("usr_b", "offline", None)])
    change(house, "usr_b", OFFLINE, 10, settled=True)
    for name, transport in transports.items():
        assert told(transport) == ([("usr_b", "offline", 10)] if name in left else [])


def test_rights_are_looked_at_again_every_five_minutes() -> None:
    house = House(Limits(dead_seconds=1e6, heartbeat_seconds=1e6))
    watchers = [watching(house, ("usr_b", ONLINE, 5), user_id=f"usr_{number}") for number in range(3)]
    house.broker.log.clear()
    house.pass_time(RIGHTS_SECONDS)
    assert presence_queries(house) == []
    house.pass_time(len(watchers))
    asked = presence_queries(house)
    assert sorted(query.connection for query in asked) == [c.session.connection for c, _ in watchers]
    connection, transport = watchers[0]
    answer(house, connection, refused=("usr_b",))
    assert told(transport) == [("usr_b", "offline", None)]
    answer(house, watchers[1][0], ("usr_b", ONLINE, 5))
    assert told(watchers[1][1]) == []


def test_after_a_gap_everybody_is_asked_for_again_and_what_was_missed_is_told(house: House) -> None:
    connection, transport = watching(house, ("usr_b", ONLINE, 5), ("usr_c", ONLINE, 5))
    house.broker.log.clear()
    house.hub.heard_again()
    house.pass_time(1)
    (query,) = presence_queries(house)
    assert sorted(query.user_ids) == ["usr_b", "usr_c"]
    answer(house, connection, ("usr_b", OFFLINE, 9), ("usr_c", ONLINE, 5))
    house.pass_time(5)
    assert told(transport) == [("usr_b", "offline", 9)]


def test_after_a_gap_tokens_are_looked_at_and_a_revoked_one_ends(house: House) -> None:
    connection, transport = house.open(heads={"conv_1": 3})
    house.hub.heard_again()
    house.pass_time(1)
    number = connection.session.connection
    checks = [query for query in house.broker.take("ask") if isinstance(query, records.OpenQuery)]
    assert checks == [records.OpenQuery("gw_test", number, "usr_a", "d1", {}, WALL_SECONDS * 1000, is_check=True)]
    refusal = msgspec.json.decode(b'"revoked"')
    house.hub.route([records.OpenAnswer(number, 0, [], refusal)])
    assert transport.closed is CloseCode.AUTH


def test_watching_is_spread_after_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.presence.ASKS_PER_SECOND", 2)
    house = House()
    for number in range(5):
        watching(house, ("usr_b", ONLINE, 5), user_id=f"usr_{number}")
    house.broker.log.clear()
    house.hub.heard_again()
    asked = []
    for _ in range(4):
        house.pass_time(1)
        asked.append(len(presence_queries(house)))
    assert asked == [2, 2, 1, 0]


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_revoked_device_is_told_and_closed_and_a_newer_token_is_not(house: House) -> None:
    old, old_transport = house.open(device_id="d1")
    _, other_transport = house.open(device_id="d2")
    before_ms = old.session.issued_ms + 1
    closed = []
    for signal in (
        records.Revoked("d1", before_ms - 1),
        records.Revoked("d1", before_ms),
        records.Revoked("", before_ms),
    ):
        house.hub.signalled("usr_a", signal)
        closed.append((old_transport.closed, other_transport.closed))
    assert closed == [(None, None), (CloseCode.AUTH, None), (CloseCode.AUTH, CloseCode.AUTH)]
    assert old_transport.take() == [{"type": "auth_error", "error": "revoked"}]


def test_what_is_told_reaches_the_named_device_or_all(house: House) -> None:
    _, first = house.open(device_id="d1")
    _, second = house.open(device_id="d2", binary=True)
    frame = {"type": "keys_low", "payload": {"device_id": "d1", "remaining": 3}}
    raw = msgspec.Raw(msgspec.json.encode(frame))
    house.hub.signalled("usr_a", records.Tell(raw, "d1"))
    assert (first.take(), second.take()) == ([frame], [])
    house.hub.signalled("usr_a", records.Tell(raw))
    assert (first.take(), second.take()) == ([frame], [frame])
    house.hub.signalled("usr_b", records.Tell(raw))


# --- typing ----------------------------------------------------------------------------------------------------------


def typing(conversation_id: str = "conv_1", state: str = "start") -> dict[str, Any]:
    return {"type": "typing", "payload": {"conversation_id": conversation_id, "state": state}}


def test_typing_goes_to_the_shard_and_ends_by_itself(house: House) -> None:
    connection, transport = house.open()
    house.send(connection, typing())
    assert house.broker.take("signal") == [records.Typing("usr_a", "conv_1", True)]
    house.pass_time(5)
    assert house.broker.take("signal") == []
    house.pass_time(3)
    assert house.broker.take("signal") == [records.Typing("usr_a", "conv_1", False)]
    assert transport.take() == []


def test_who_is_lost_while_typing_has_stopped(house: House) -> None:
    connection, _ = house.open()
    house.send(connection, typing("conv_1"))
    house.send(connection, typing("conv_2"))
    house.send(connection, message("k1", "conv_2"))
    house.broker.log.clear()
    connection.lost()
    assert house.broker.take("signal") == [records.Typing("usr_a", "conv_1", False)]


def test_presence_knows_no_socket_and_no_key() -> None:
    """What it is given is all it may use, so that it can be driven here without either."""
    assert set(Presence.__init__.__annotations__) - {"return"} == {"instance_id", "channels", "people_per_connection"}
