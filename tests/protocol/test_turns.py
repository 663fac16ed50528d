"""Order of a sender's messages after one of them was not taken (reliability.md section 10.2, G2; invariant I7b)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from protocol import frames
from protocol.commands import Command, Publish
from protocol.errors import ErrorCode
from protocol.limits import Limits
from tests.protocol.playbook import WALL_MS, edit, error_of, live_session, message, reaction

if TYPE_CHECKING:
    from protocol.session import Session

LIMITS = Limits()


def said(session: Session, key: str, now: float = 1.0) -> str:
    """A message is sent: "taken", or the code it is refused with."""
    return fate(session.receive(message(key), now, WALL_MS))


def fate(commands: list[Command]) -> str:
    (command,) = commands
    if isinstance(command, Publish):
        return "taken"
    payload = error_of(command)
    assert payload.retryable
    assert payload.retry_after_ms
    return payload.code.value


def lose(session: Session, *keys: str, code: ErrorCode = ErrorCode.STORAGE_UNAVAILABLE, now: float = 1.0) -> None:
    for key in keys:
        assert fate(session.publish_failed(key, code, 1000, now)) == code.value


def test_a_message_sent_before_the_error_was_read_does_not_overtake_the_refused_one() -> None:
    session = live_session()
    assert said(session, "k1") == "taken"
    lose(session, "k1")
    assert said(session, "k2") == "storage_unavailable"
    assert said(session, "k1", 2.0) == "taken"
    assert said(session, "k2", 2.0) == "taken"
    assert said(session, "k3", 2.0) == "taken"


@pytest.mark.parametrize("code", [ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.OVERLOADED])
def test_what_waits_is_refused_as_what_it_waits_for(code: ErrorCode) -> None:
    session = live_session()
    said(session, "k1")
    lose(session, "k1", code=code)
    (command,) = session.receive(message("k2"), 1.0, WALL_MS)
    payload = error_of(command)
    assert (payload.code, payload.retry_after_ms, payload.idempotency_key) == (code, 1000, "k2")
    assert (payload.client_message_id, payload.conversation_id) == ("c1", "conv_1")
    assert "k2" not in (session.in_flight or {})


def test_everything_on_the_way_when_the_line_broke_comes_again_in_its_order() -> None:
    session = live_session()
    for key in ("k1", "k2", "k3"):
        assert said(session, key) == "taken"
    lose(session, "k1", "k2", "k3")
    assert said(session, "k4") == "storage_unavailable"
    assert said(session, "k2", 2.0) == "storage_unavailable"
    assert [said(session, key, 2.0) for key in ("k1", "k2", "k3", "k4", "k5")] == ["taken"] * 5


def test_a_message_that_fails_a_second_time_is_still_the_first() -> None:
    session = live_session()
    said(session, "k1")
    said(session, "k2")
    lose(session, "k1", "k2")
    assert said(session, "k1", 2.0) == "taken"
    lose(session, "k1", now=2.5)
    assert said(session, "k2", 2.6) == "storage_unavailable"
    assert said(session, "k1", 3.5) == "taken"
    assert said(session, "k2", 3.5) == "taken"


def test_edits_and_reactions_wait_too() -> None:
    session = live_session()
    said(session, "k1")
    lose(session, "k1")
    assert fate(session.receive(edit("e1"), 1.0, WALL_MS)) == "storage_unavailable"
    assert fate(session.receive(reaction("r1"), 1.0, WALL_MS)) == "storage_unavailable"
    said(session, "k1")
    assert fate(session.receive(edit("e1"), 1.0, WALL_MS)) == "taken"
    lose(session, "e1")
    assert said(session, "k2") == "storage_unavailable"


def test_another_conversation_goes_on() -> None:
    session = live_session()
    said(session, "k1")
    lose(session, "k1")
    frame = frames.MessageEdit(
        payload=frames.EditPayload(idempotency_key="e1", conversation_id="conv_2", message_id="m", content="x")
    )
    assert fate(session.receive(frame, 1.0, WALL_MS)) == "taken"


def test_who_gives_a_message_up_waits_some_seconds_and_is_not_stuck() -> None:
    session = live_session()
    said(session, "k1")
    lose(session, "k1", now=1.0)
    assert said(session, "k2", 0.9 + LIMITS.repeat_seconds) == "storage_unavailable"
    assert said(session, "k3", 1.0 + LIMITS.repeat_seconds) == "taken"
    assert said(session, "k2", 1.0 + LIMITS.repeat_seconds) == "taken"


def test_an_ack_that_comes_after_all_sets_the_others_free() -> None:
    """Nobody heard of it for 10 s; it was in the log all the time, so its sender does not say it again."""
    session = live_session()
    said(session, "k1")
    session.heard_at = 11.0
    (command,) = session.tick(11.0, WALL_MS)
    assert error_of(command).idempotency_key == "k1"
    assert said(session, "k2", 11.5) == "storage_unavailable"
    session.outcome("k1")
    assert said(session, "k2", 12.0) == "taken"
    assert said(session, "k3", 12.0) == "taken"


def test_the_keys_kept_are_bounded_and_what_is_past_them_is_refused_all_the_same() -> None:
    session = live_session()
    said(session, "k0")
    lose(session, "k0")
    refused = [f"k{number}" for number in range(1, 2 * LIMITS.repeats)]
    assert {said(session, key) for key in refused} == {"storage_unavailable"}
    assert session._turns is not None
    assert len(session._turns) == LIMITS.repeats
    session.in_flight = None
    for key in ("k0", *refused):
        assert said(session, key, 2.0) == "taken"
        session.outcome(key)
    assert session._turns is None


def test_nothing_is_kept_of_a_sender_that_fell_silent() -> None:
    session = live_session()
    said(session, "k1")
    lose(session, "k1")
    session.heard_at = 1.0 + LIMITS.repeat_seconds
    session.tick(1.0 + LIMITS.repeat_seconds, WALL_MS)
    assert session._turns is None


class OneSender(RuleBasedStateMachine):
    """A client that says all again in its order, and a log whose line breaks at any moment: what is taken and not lost
    stands in the order of its first sending."""

    def __init__(self) -> None:
        super().__init__()
        self.session = live_session()
        self.now = 0.0
        self.unsettled: list[int] = []
        """What the client has said and has no ack of."""
        self.refused: dict[int, float] = {}
        """Message → when it may be said again."""
        self.line: list[int] = []
        """Written to Redis, which has not answered."""
        self.log: list[int] = []
        self.count = 0

    @initialize(count=st.integers(1, 4))
    def begins(self, count: int) -> None:
        for _ in range(count):
            self.says()

    @rule()
    def says(self) -> None:
        if self.session.blocked:
            return
        self.count += 1
        self.unsettled.append(self.count)
        self.send(self.count)

    def send(self, number: int) -> None:
        if said(self.session, f"k{number}", self.now) == "taken":
            self.line.append(number)
        else:
            self.refused[number] = self.now + 1.0

    @precondition(lambda self: self.line)
    @rule(count=st.integers(1, 4))
    def redis_takes(self, count: int) -> None:
        self.log += self.line[:count]
        del self.line[:count]

    @precondition(lambda self: self.line)
    @rule()
    def line_breaks(self) -> None:
        for number in self.line:
            lose(self.session, f"k{number}", now=self.now)
            self.refused[number] = self.now + 1.0
        self.line.clear()

    @precondition(lambda self: self.log)
    @rule()
    def worker_acknowledges(self) -> None:
        for number in self.log:
            if number in self.unsettled and number not in self.line:
                self.session.outcome(f"k{number}")
                self.unsettled.remove(number)
                self.refused.pop(number, None)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0]))
    def time_passes(self, seconds: float) -> None:
        """The client says again what is due, in its order."""
        self.now += seconds
        for number in sorted(self.refused):
            if self.refused[number] > self.now or self.session.blocked:
                break
            del self.refused[number]
            self.send(number)

    def teardown(self) -> None:
        self.redis_takes(1000)
        for _ in range(200):
            self.worker_acknowledges()
            self.time_passes(1.0)
            self.redis_takes(1000)
        assert not self.refused
        firsts = list(dict.fromkeys(self.log))
        assert firsts == sorted(firsts)
        assert firsts == list(range(1, self.count + 1))
        assert self.session._turns is None


OneSender.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestI7OneSender = OneSender.TestCase
