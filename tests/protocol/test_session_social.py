"""Playbooks of a session: changes of messages, typing, presence, migration, a token that is no longer good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from protocol import frames, records
from protocol.backlog import State
from protocol.commands import Ask, Close, Publish, Send, Signal, Unwatch, Watch
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode
from protocol.limits import Limits, TokenBucket
from tests.protocol.playbook import (
    WALL_MS,
    delete,
    edit,
    error_of,
    live_session,
    message,
    new_session,
    open_answer,
    opening_session,
    presence_subscribe,
    reaction,
    typing,
)

if TYPE_CHECKING:
    from protocol.session import Session

STOP = frames.TypingState.STOP
Change = frames.MessageEdit | frames.MessageDelete | frames.MessageReaction


def change_of(session: Session, frame: Change) -> records.ChangeMessage:
    (command,) = session.receive(frame, 1.0, WALL_MS)
    assert isinstance(command, Publish)
    assert isinstance(command.record, records.ChangeMessage)
    return command.record


def signal(conversation_id: str, started: bool) -> Signal:
    return Signal(records.Typing("usr_a", conversation_id, started))


# --- changes of messages ---------------------------------------------------------------------------------------------


def test_a_change_is_published_with_its_return_address() -> None:
    assert change_of(live_session(), edit()) == records.ChangeMessage(
        "gw1", 7, "", "usr_a", "phone", "conv_1", "c1", "e1", "msg_1", records.Edit("better")
    )


@pytest.mark.parametrize(
    ("frame", "change"),
    [
        (delete(), records.Delete(True)),
        (delete(scope=frames.DeleteScope.ME), records.Delete(False)),
        (reaction(), records.React("+1", True)),
        (reaction(op=frames.ReactionOp.REMOVE), records.React("+1", False)),
    ],
)
def test_a_change_says_what_it_changes(frame: Change, change: object) -> None:
    assert change_of(live_session(), frame).change == change


def test_changes_share_the_window_and_the_rate_with_messages() -> None:
    session = live_session(limits=Limits(window=2), bucket=TokenBucket(rate=0.5, burst=2, now=0.0))
    blocked = []
    session.receive(message("k1"), 0.0, WALL_MS)
    blocked.append(session.blocked)
    session.receive(reaction("k2"), 0.0, WALL_MS)
    blocked.append(session.blocked)
    session.outcome("k2")
    blocked.append(session.blocked)
    assert blocked == [False, True, False]
    payload = error_of(session.receive(edit("k3"), 0.0, WALL_MS)[0])
    assert (payload.code, payload.idempotency_key, payload.client_message_id) == (ErrorCode.RATE_LIMITED, "k3", "c1")
    assert set(session.in_flight or ()) == {"k1"}


@pytest.mark.parametrize(("content", "code"), [("", ErrorCode.VALIDATION_FAILED), ("x" * 49_153, ErrorCode.TOO_LARGE)])
def test_an_edit_to_what_no_message_may_hold_is_refused(content: str, code: ErrorCode) -> None:
    session = live_session()
    payload = error_of(session.receive(edit(content=content), 1.0, WALL_MS)[0])
    assert (payload.code, payload.idempotency_key, payload.conversation_id) == (code, "e1", "conv_1")
    assert session.in_flight is None


def test_a_change_that_could_not_be_published_is_a_retryable_error_for_its_key() -> None:
    session = live_session()
    session.receive(delete("d1"), 1.0, WALL_MS)
    (error,) = session.publish_failed("d1", ErrorCode.STORAGE_UNAVAILABLE, 500, 1.0)
    assert (error_of(error).idempotency_key, error_of(error).retryable) == ("d1", True)
    assert session.in_flight is None


# --- typing ----------------------------------------------------------------------------------------------------------


def test_typing_starts_are_passed_on_once_per_three_seconds() -> None:
    session = live_session()
    told = [bool(session.receive(typing(), second / 2, WALL_MS)) for second in range(14)]
    assert [second / 2 for second, passed in enumerate(told) if passed] == [0.0, 3.0, 6.0]
    assert session.receive(typing("conv_2"), 0.5, WALL_MS) == [signal("conv_2", True)]


def test_a_stop_is_passed_on_once_and_only_after_a_start() -> None:
    session = live_session()
    assert session.receive(typing(state=STOP), 0.0, WALL_MS) == []
    session.receive(typing(), 1.0, WALL_MS)
    assert session.receive(typing(state=STOP), 1.5, WALL_MS) == [signal("conv_1", False)]
    assert session.receive(typing(state=STOP), 1.6, WALL_MS) == []


def test_starting_and_stopping_does_not_get_around_the_spacing() -> None:
    session = live_session()
    signals = []
    for step in range(60):
        signals += session.receive(typing(), step / 20, WALL_MS)
        signals += session.receive(typing(state=STOP), step / 20, WALL_MS)
    assert signals == [signal("conv_1", True), signal("conv_1", False)]


def test_typing_ends_by_itself_after_six_seconds() -> None:
    session = live_session()
    session.receive(typing(), 1.0, WALL_MS)
    session.heard_at = 1.0
    assert session.deadline(1.0) <= 2.0
    assert session.tick(6.9, WALL_MS) == []
    assert session.tick(7.0, WALL_MS) == [signal("conv_1", False)]
    assert session.tick(8.0, WALL_MS) == []
    assert session.deadline(8.0) > 10.0


def test_a_start_in_time_keeps_it_going() -> None:
    session = live_session()
    session.receive(typing(), 1.0, WALL_MS)
    session.receive(typing(), 5.0, WALL_MS)
    session.heard_at = 5.0
    assert session.tick(8.0, WALL_MS) == []
    assert session.tick(11.0, WALL_MS) == [signal("conv_1", False)]


def test_a_message_ends_typing_without_a_word() -> None:
    session = live_session()
    session.receive(typing(), 1.0, WALL_MS)
    session.receive(message("k1"), 2.0, WALL_MS)
    session.outcome("k1")
    session.heard_at = 9.0
    assert session.tick(9.0, WALL_MS) == []
    assert session.leave_typing() == []


def test_one_connection_types_in_twenty_conversations_at_most() -> None:
    session = live_session()
    passed = [bool(session.receive(typing(f"c{number}"), 1.0, WALL_MS)) for number in range(30)]
    assert passed == [True] * 20 + [False] * 10
    session.receive(typing("c0", STOP), 2.0, WALL_MS)
    assert session.receive(typing("c29"), 2.0, WALL_MS) == []
    session.tick(4.1, WALL_MS)
    assert session.receive(typing("c29"), 4.1, WALL_MS) == [signal("c29", True)]


def test_who_leaves_while_typing_has_stopped() -> None:
    session = live_session()
    session.receive(typing("conv_1"), 1.0, WALL_MS)
    session.receive(typing("conv_2"), 1.0, WALL_MS)
    session.receive(typing("conv_2", STOP), 1.0, WALL_MS)
    assert session.leave_typing() == [records.Typing("usr_a", "conv_1", False)]
    assert session.leave_typing() == []


# --- presence --------------------------------------------------------------------------------------------------------


def test_a_presence_subscription_is_watched_and_asked() -> None:
    session = live_session()
    assert session.receive(presence_subscribe("usr_b", "usr_c"), 1.0, WALL_MS) == [
        Watch(["usr_b", "usr_c"]),
        Ask(records.PresenceQuery("gw1", 7, "usr_a", ["usr_b", "usr_c"])),
    ]
    unsubscribe = frames.PresenceUnsubscribe(payload=frames.PeoplePayload(user_ids=["usr_b"]))
    assert session.receive(unsubscribe, 1.0, WALL_MS) == [Unwatch(["usr_b"])]


def test_presence_subscriptions_share_the_rate_of_lookups() -> None:
    session = live_session(limits=Limits(lookup_rate=1.0))
    for _ in range(2):
        assert isinstance(session.receive(presence_subscribe("usr_b"), 1.0, WALL_MS)[0], Watch)
    (error,) = session.receive(presence_subscribe("usr_b"), 1.0, WALL_MS)
    assert (error_of(error).code, error_of(error).in_reply_to) == (ErrorCode.RATE_LIMITED, "presence_subscribe")


def test_a_subscription_costs_in_proportion_to_its_people_and_is_never_too_large_to_take() -> None:
    session = live_session(limits=Limits(lookup_rate=5.0))
    people = [f"usr_{number}" for number in range(500)]
    assert isinstance(session.receive(presence_subscribe(*people[:50]), 1.0, WALL_MS)[0], Watch)
    assert isinstance(session.receive(presence_subscribe(*people), 1.0, WALL_MS)[0], Watch)
    (error,) = session.receive(presence_subscribe("usr_1"), 1.0, WALL_MS)
    assert (error_of(error).code, error_of(error).retry_after_ms) == (ErrorCode.RATE_LIMITED, 401)
    (error,) = session.receive(presence_subscribe("usr_1"), 1.3, WALL_MS)
    assert error_of(error).code is ErrorCode.RATE_LIMITED
    assert isinstance(session.receive(presence_subscribe("usr_1"), 1.41, WALL_MS)[0], Watch)


# --- migration and revocation ----------------------------------------------------------------------------------------


def test_a_migrating_connection_is_served_until_the_new_one_replaces_it() -> None:
    session = live_session({"conv_1": (5, 5)})
    (command,) = session.migrate("ws://there/v1/ws", "mig_1")
    assert command == Send(
        frames.Migration(payload=frames.MigrationPayload(new_endpoint="ws://there/v1/ws", session_token="mig_1"))
    )
    assert session.deliver("conv_1", 6, 6)
    assert isinstance(session.receive(message("k1"), 1.0, WALL_MS)[0], Publish)
    assert session.replaced() == [Close(CloseCode.RESTART)]


@pytest.mark.parametrize("session", [new_session(), opening_session()])
def test_only_a_live_session_is_sent_elsewhere(session: Session) -> None:
    assert session.migrate("ws://there/v1/ws", "mig_1") == []


@pytest.mark.parametrize("session", [opening_session(), live_session({"conv_1": (5, 5)})])
def test_a_refusal_ends_the_session_whenever_it_comes(session: Session) -> None:
    refusal = msgspec.structs.replace(open_answer({}), refusal=AuthErrorCode.REVOKED)
    assert session.opened(refusal, 1.0, WALL_MS) == [
        Send(frames.AuthError(error=AuthErrorCode.REVOKED)),
        Close(CloseCode.AUTH),
    ]
    assert session.state is State.CLOSED
    assert session.opened(refusal, 1.0, WALL_MS) == []


def test_the_open_query_says_when_the_token_was_made() -> None:
    session = new_session()
    commands = session.admit("usr_a", "phone", "sess_1", 1e9, None, 0.0, issued_ms=5)
    assert commands[1] == Ask(records.OpenQuery("gw1", 7, "usr_a", "phone", {}, 5))
    assert session.issued_ms == 5
