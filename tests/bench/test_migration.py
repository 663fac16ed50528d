"""A simulated client that moves to another gateway: when it speaks where, and what it takes from the line it leaves."""

from __future__ import annotations

import msgspec
import pytest

from bench import journal
from bench.client import State
from bench.ledger import Ledger
from protocol import frames
from protocol.errors import ErrorCode
from tests.bench.scripted_log import AUTH_SUCCESS, CONVERSATION, ack, pushed, stored
from tests.bench.test_client import OTHER, Play, keys

TOKEN = "mig_1"


@pytest.fixture
def play() -> Play:
    play = Play()
    play.go_live()
    play.give(pushed(stored(1, OTHER, "m1")))
    return play


def late(play: Play, frame: frames.ServerFrame) -> list[frames.ClientFrame]:
    return play.client.receive_late(frame, 1, play.now, 0)


def test_the_second_line_shows_the_ticket_and_what_is_held_and_the_first_goes_on(play: Play) -> None:
    (auth,) = play.client.migrating(TOKEN, play.now)
    assert isinstance(auth, frames.Auth)
    assert (auth.payload.auth_token, auth.payload.resume) == (TOKEN, {CONVERSATION: 1})
    assert (play.client.state, play.client.connection) == (State.LIVE, 1)
    assert len(keys(play.send())) == 1


def test_once_it_is_in_everything_without_an_answer_goes_again_on_the_new_line(play: Play) -> None:
    play.client.migrating(TOKEN, play.now)
    sent = keys(play.send("one") + play.send("two"))
    assert keys(play.client.migrated(AUTH_SUCCESS, play.now)) == sent
    assert (play.client.connection, play.client.synced) == (2, False)
    connected = play.noted(journal.Connected)[-1]
    assert isinstance(connected, journal.Connected)
    assert (connected.migrated, connected.connection) == (True, 2)
    assert play.noted(journal.Closed) == []


def test_what_still_comes_on_the_old_line_is_taken_once(play: Play) -> None:
    (key,) = keys(play.send())
    play.client.migrating(TOKEN, play.now)
    play.client.migrated(AUTH_SUCCESS, play.now)
    late(play, pushed(stored(2, OTHER, "m2")))
    late(play, ack(key, 3))
    play.give(pushed(stored(2, OTHER, "m2")))
    assert play.client.logs[CONVERSATION].cursor == 3
    assert play.client.pending == {}
    assert [event.connection for event in play.noted(journal.Pushed)] == [1, 1, 2]


def test_the_end_of_the_old_line_s_backlog_says_nothing_about_the_new_one(play: Play) -> None:
    play.client.migrating(TOKEN, play.now)
    play.client.migrated(AUTH_SUCCESS, play.now)
    payload = frames.SyncCompletePayload(heads={}, unread_count=0, server_time=0)
    replaced = frames.ErrorPayload(code=ErrorCode.REPLACED, message="", retryable=False)
    assert late(play, frames.SyncComplete(payload=payload)) == []
    assert late(play, frames.Error(payload=replaced)) == []
    assert not play.client.synced
    assert play.noted(journal.Refused) == []


def test_a_new_line_that_comes_after_the_old_one_has_ended_still_counts(play: Play) -> None:
    play.client.migrating(TOKEN, play.now)
    play.client.closed(1012, play.now)
    states = [play.client.state]
    play.client.migrated(AUTH_SUCCESS, play.now)
    assert [*states, play.client.state] == [State.OFFLINE, State.LIVE]


def test_a_confirmation_that_the_old_line_may_not_have_carried_is_said_again(play: Play) -> None:
    play.pass_time(1)
    play.client.migrating(TOKEN, play.now)
    play.client.migrated(AUTH_SUCCESS, play.now)
    (again,) = play.pass_time(0)
    assert isinstance(again, frames.DeliveryAck)
    assert play.pass_time(6) == []
    play.client.closed(1012, play.now)
    play.go_live()
    assert play.pass_time(0) == []


def test_a_sign_of_life_goes_as_often_as_the_server_asked() -> None:
    play = Play()
    play.client.opened(play.now)
    payload = msgspec.structs.replace(AUTH_SUCCESS.payload, heartbeat_interval_ms=30_000)
    play.give(frames.AuthSuccess(payload=payload))
    assert play.client.deadline() == play.now + 30
    assert [type(frame) for frame in play.pass_time(30)] == [frames.Heartbeat]
    assert play.pass_time(29) == []
    assert len(play.pass_time(1)) == 1


def push(ledger: Ledger, connection: int, *sequences: int) -> None:
    for sequence in sequences:
        payload = pushed(stored(sequence, OTHER, f"m{sequence}")).payload
        ledger.record(
            journal.Pushed(payload=payload, at=0.0, user_id="usr_me", device_id="phone-1", connection=connection)
        )


def order(ledger: Ledger) -> list[str]:
    return [violation.detail for violation in ledger.verdict() if violation.kind == "order"]


def test_two_lines_side_by_side_are_each_judged_by_their_own_order() -> None:
    ledger = Ledger()
    push(ledger, 1, 1, 2)
    push(ledger, 2, 2, 3)
    push(ledger, 1, 3)
    push(ledger, 2, 4)
    assert order(ledger) == []
    push(ledger, 1, 3)
    assert len(order(ledger)) == 1
    push(ledger, 2, 3)
    assert len(order(ledger)) == 2
