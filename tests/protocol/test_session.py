"""Playbooks of `protocol.session`: one frame or event in, the expected commands out. Delivery has a file of its own."""

from __future__ import annotations

import msgspec
import pytest

from protocol import frames, records
from protocol.backlog import State
from protocol.commands import PING, Acknowledge, Ask, Attach, Close, Publish, Send, Verify
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.limits import Limits, TokenBucket
from protocol.models import MessageType
from protocol.session import TRANSITIONS, Session
from tests.protocol.playbook import (
    WALL_MS,
    auth,
    delete,
    edit,
    error_of,
    live_session,
    message,
    new_session,
    open_answer,
    open_query,
    opening_session,
    page_query,
    presence_subscribe,
    reaction,
    typing,
)

EVERY_FRAME: list[frames.ClientFrame] = [
    auth(),
    message(),
    frames.DeliveryAck(message_id="msg_1", timestamp=WALL_MS),
    frames.ReadReceipt(message_ids=["msg_1"], timestamp=WALL_MS),
    frames.Heartbeat(timestamp=WALL_MS),
    frames.Retransmit(conversation_id="conv_1", from_sequence=1, to_sequence=2),
    frames.Sync(payload=frames.SyncPayload()),
    frames.History(payload=frames.HistoryPayload(conversation_id="conv_1", before_sequence=9)),
    edit(),
    delete(),
    reaction(),
    typing(),
    presence_subscribe("usr_b"),
    frames.PresenceUnsubscribe(payload=frames.PeoplePayload(user_ids=["usr_b"])),
    frames.Goodbye(),
]


def auth_refusal(
    error: AuthErrorCode, code: CloseCode, retry_after_ms: int | msgspec.UnsetType = msgspec.UNSET
) -> list[object]:
    return [Send(frames.AuthError(error=error, retry_after_ms=retry_after_ms)), Close(code)]


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_client_frame_has_a_row_in_the_live_table() -> None:
    assert set(TRANSITIONS[State.LIVE]) == {type(frame) for frame in EVERY_FRAME}
    assert {type(frame).__struct_config__.tag for frame in EVERY_FRAME} == frames.CLIENT_TAGS


def test_every_state_has_a_table() -> None:
    assert set(TRANSITIONS) == set(State)


@pytest.mark.parametrize("frame", EVERY_FRAME, ids=lambda frame: type(frame).__name__)
def test_w41_before_auth_only_auth_and_goodbye_are_taken(frame: frames.ClientFrame) -> None:
    session = new_session()
    commands = session.receive(frame, 0.0, WALL_MS)
    if isinstance(frame, frames.Auth):
        assert commands == [Verify(frame.payload)]
        assert session.state is State.AWAITING_AUTH
    elif isinstance(frame, frames.Goodbye):
        assert commands == [Close(CloseCode.NORMAL)]
    else:
        assert commands == auth_refusal(AuthErrorCode.AUTH_REQUIRED, CloseCode.AUTH)
        assert session.state is State.CLOSED


@pytest.mark.parametrize("frame", EVERY_FRAME, ids=lambda frame: type(frame).__name__)
def test_no_frame_may_be_given_while_opening(frame: frames.ClientFrame) -> None:
    session = opening_session()
    assert session.blocked
    with pytest.raises(LocalProtocolError):
        session.receive(frame, 0.0, WALL_MS)


@pytest.mark.parametrize("frame", EVERY_FRAME, ids=lambda frame: type(frame).__name__)
def test_a_closed_session_is_silent(frame: frames.ClientFrame) -> None:
    session = live_session()
    assert session.close(CloseCode.RESTART) == [Close(CloseCode.RESTART)]
    assert session.receive(frame, 0.0, WALL_MS) == []
    assert session.receive_refused(RemoteProtocolError(ErrorCode.BAD_FRAME, "x"), 0.0) == []
    assert session.tick(1e9, WALL_MS) == []
    assert session.replaced() == []
    assert session.close(CloseCode.RESTART) == []
    assert session.admit("usr_a", "phone", "sess_1", 1e9, None, 0.0) == []
    assert session.opened(open_answer({"conv_1": (0, 5)}), 0.0, WALL_MS) == []
    assert session.pump(0.0, WALL_MS) == []


# --- admission -------------------------------------------------------------------------------------------------------


def test_a_good_token_attaches_and_asks_where_the_user_stands() -> None:
    session = new_session()
    session.receive(auth({"conv_1": 4}), 0.0, WALL_MS)
    commands = session.admit("usr_a", "phone", "sess_1", 1e9, None, 0.0)
    assert commands == [Attach("usr_a", "phone"), Ask(open_query({"conv_1": 4}))]
    assert session.state is State.OPENING


def test_auth_success_then_sync_complete_when_nothing_is_behind() -> None:
    session = opening_session()
    auth_success, sync_complete = session.opened(open_answer({"conv_1": (5, 5)}, unread=3), 1.0, WALL_MS)
    assert auth_success == Send(
        frames.AuthSuccess(
            payload=frames.AuthSuccessPayload(
                session_id="sess_1",
                server_time=WALL_MS,
                unread_count=3,
                heartbeat_interval_ms=30_000,
                max_frame_bytes=65_536,
                resumed=False,
            )
        )
    )
    head = frames.Head(sequence_number=5, digest=bytes(range(16)).hex())
    assert sync_complete == Send(
        frames.SyncComplete(
            payload=frames.SyncCompletePayload(heads={"conv_1": head}, unread_count=3, server_time=WALL_MS)
        )
    )
    assert session.state is State.LIVE
    assert not session.blocked


def test_a_second_answer_to_the_same_open_query_is_ignored() -> None:
    session = live_session({"conv_1": (5, 5)})
    assert session.opened(open_answer({"conv_1": (0, 5)}), 1.0, WALL_MS) == []
    assert session.cursors == {"conv_1": 5}


def test_two_auth_frames_before_an_answer_do_not_change_the_user() -> None:
    session = opening_session()
    assert session.admit("usr_b", "phone", "sess_2", 1e9, None, 0.0) == []
    assert session.user_id == "usr_a"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AuthErrorCode.INVALID_TOKEN, CloseCode.AUTH),
        (AuthErrorCode.EXPIRED_TOKEN, CloseCode.AUTH),
        (AuthErrorCode.USER_MISMATCH, CloseCode.AUTH),
        (AuthErrorCode.DEVICE_LIMIT, CloseCode.AUTH),
        (AuthErrorCode.RATE_LIMITED, CloseCode.RATE),
        (AuthErrorCode.DRAINING, CloseCode.RESTART),
        (AuthErrorCode.SERVER_BUSY, CloseCode.OVERLOADED),
    ],
)
def test_a_refused_token_ends_the_connection(error: AuthErrorCode, code: CloseCode) -> None:
    session = new_session()
    session.receive(auth(), 0.0, WALL_MS)
    assert session.refuse(error, 1500) == auth_refusal(error, code, 1500)


def test_re_auth_on_a_live_session_refreshes_the_token() -> None:
    session = live_session({"conv_1": (5, 5)})
    frame = auth()
    assert session.receive(frame, 50.0, WALL_MS) == [Verify(frame.payload)]
    assert session.admit("usr_a", "phone", "sess_1", 500.0, None, 50.0) == [Ask(open_query({"conv_1": 5}))]
    auth_success, sync_complete = session.opened(open_answer({"conv_1": (5, 5)}), 51.0, WALL_MS)
    assert isinstance(auth_success, Send)
    assert isinstance(auth_success.frame, frames.AuthSuccess)
    assert isinstance(sync_complete, Send)
    session.heard_at = 499.0
    assert session.tick(499.0, WALL_MS) == []
    assert session.tick(500.0, WALL_MS) == auth_refusal(AuthErrorCode.EXPIRED_TOKEN, CloseCode.AUTH)


def test_w50_re_auth_as_another_user_is_forbidden() -> None:
    session = live_session()
    session.receive(auth(), 1.0, WALL_MS)
    error, close = session.admit("usr_b", "phone", "sess_2", 1e9, None, 1.0)
    assert error_of(error).code is ErrorCode.FORBIDDEN
    assert close == Close(CloseCode.AUTH)


def test_w51_the_same_device_again_replaces_this_connection() -> None:
    error, close = live_session().replaced()
    assert error_of(error).code is ErrorCode.REPLACED
    assert close == Close(CloseCode.REPLACED)


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_message_is_published_with_its_return_address() -> None:
    session = live_session()
    commands = session.receive(message("k1"), 1.0, WALL_MS)
    assert commands == [
        Publish(
            records.SendMessage(
                instance="gw1",
                connection=7,
                sender_id="usr_a",
                device_id="phone",
                conversation_id="conv_1",
                client_message_id="c1",
                idempotency_key="k1",
                receiver_id="",
                content="hello",
                message_type=MessageType.TEXT,
                media_url=None,
                reply_to_message_id=None,
                timestamp=WALL_MS,
            )
        )
    ]


def test_w79_a_full_window_blocks_until_an_outcome() -> None:
    session = live_session(limits=Limits(window=3))
    blocked = [session.blocked]
    for number in range(3):
        session.receive(message(f"k{number}"), 1.0, WALL_MS)
        blocked.append(session.blocked)
    for key in ("another key", "k1"):
        session.outcome(key)
        blocked.append(session.blocked)
    assert blocked == [False, False, False, True, True, False]
    session.outcome("k0")
    session.outcome("k2")
    assert session.in_flight is None


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (message(content="é" * 24_576), None),
        (message(content="é" * 24_576 + "x"), ErrorCode.TOO_LARGE),
        (message(content="x" * 49_152), None),
        (message(content="x" * 49_153), ErrorCode.TOO_LARGE),
        (message(content=""), ErrorCode.VALIDATION_FAILED),
        (message(content="", kind=MessageType.IMAGE), ErrorCode.VALIDATION_FAILED),
        (message(content="", kind=MessageType.VIDEO, media_url="/v1/media/med_" + "0" * 27), None),
        (message(content="{}", kind=MessageType.SYSTEM), ErrorCode.FORBIDDEN),
        (message(content="", kind=MessageType.LOCATION), ErrorCode.VALIDATION_FAILED),
        (message(content="48.1 11.6", kind=MessageType.LOCATION), None),
        (message(media_url="/v1/media/med_" + "0" * 27), ErrorCode.VALIDATION_FAILED),
    ],
)
def test_w67_w68_what_a_message_may_hold(frame: frames.Message, code: ErrorCode | None) -> None:
    session = live_session()
    (command,) = session.receive(frame, 1.0, WALL_MS)
    if code is None:
        assert isinstance(command, Publish)
        return
    payload = error_of(command)
    assert payload.code is code
    assert not payload.retryable
    assert payload.client_message_id == "c1"
    assert payload.idempotency_key == "k1"
    assert payload.conversation_id == "conv_1"
    assert session.in_flight is None


def test_w78_the_rate_is_the_users_and_a_refused_key_is_not_consumed() -> None:
    bucket = TokenBucket(rate=2.0, burst=2, now=0.0)
    session = live_session(bucket=bucket)
    other_device = live_session(bucket=bucket)
    assert isinstance(session.receive(message("k1"), 0.0, WALL_MS)[0], Publish)
    assert isinstance(other_device.receive(message("k2"), 0.0, WALL_MS)[0], Publish)
    payload = error_of(session.receive(message("k3"), 0.0, WALL_MS)[0])
    assert payload.code is ErrorCode.RATE_LIMITED
    assert payload.retryable
    assert payload.retry_after_ms == 501
    assert session.in_flight is not None
    assert set(session.in_flight) == {"k1"}
    assert isinstance(session.receive(message("k3"), 0.501, WALL_MS)[0], Publish)


def test_w78_a_hundred_rate_refusals_in_a_minute_are_answered_the_next_closes() -> None:
    session = live_session(bucket=TokenBucket(rate=1e-6, burst=1, now=0.0))
    session.receive(message("k0"), 0.0, WALL_MS)
    for number in range(100):
        assert error_of(session.receive(message(f"k{number}"), 59.0, WALL_MS)[0]).code is ErrorCode.RATE_LIMITED
    assert session.receive(message("k"), 59.5, WALL_MS) == [Close(CloseCode.RATE)]


def test_rate_refusals_are_forgotten_after_a_minute() -> None:
    session = live_session(bucket=TokenBucket(rate=1e-6, burst=1, now=0.0))
    session.receive(message("k0"), 0.0, WALL_MS)
    for second in range(300):
        (command,) = session.receive(message("k"), float(second), WALL_MS)
        assert isinstance(command, Send)


def test_a_failed_publish_is_a_retryable_error_for_its_key() -> None:
    session = live_session()
    session.receive(message("k1"), 1.0, WALL_MS)
    (command,) = session.publish_failed("k1", ErrorCode.STORAGE_UNAVAILABLE, 1000, 1.0)
    payload = error_of(command)
    assert (payload.code, payload.retryable, payload.retry_after_ms) == (ErrorCode.STORAGE_UNAVAILABLE, True, 1000)
    assert (payload.client_message_id, payload.idempotency_key) == ("c1", "k1")
    assert session.publish_failed("k1", ErrorCode.STORAGE_UNAVAILABLE, 1000, 1.0) == []


def test_a_message_without_an_outcome_after_ten_seconds_is_reported_and_leaves_the_window() -> None:
    session = live_session()
    session.receive(message("k1"), 1.0, WALL_MS)
    session.receive(message("k2"), 5.0, WALL_MS)
    session.heard_at = 5.0
    assert session.tick(10.9, WALL_MS) == []
    (command,) = session.tick(11.0, WALL_MS)
    assert error_of(command).idempotency_key == "k1"
    assert error_of(command).code is ErrorCode.STORAGE_UNAVAILABLE
    assert session.in_flight is not None
    assert set(session.in_flight) == {"k2"}


# --- the other frames ------------------------------------------------------------------------------------------------


def test_receipts_are_handed_on_with_user_and_device() -> None:
    session = live_session()
    assert session.receive(frames.DeliveryAck(message_id="msg_1", timestamp=1), 1.0, WALL_MS) == [
        Acknowledge(records.DeliveredMark("usr_a", "phone", "msg_1"))
    ]
    assert session.receive(frames.ReadReceipt(message_ids=["msg_1", "msg_2"], timestamp=1), 1.0, WALL_MS) == [
        Acknowledge(records.ReadMark("usr_a", "phone", ["msg_1", "msg_2"]))
    ]
    assert session.receive(frames.ReadReceipt(message_ids=[], timestamp=1), 1.0, WALL_MS) == []


def test_a_heartbeat_is_answered_with_the_servers_time() -> None:
    assert live_session().receive(frames.Heartbeat(timestamp=1), 1.0, WALL_MS) == [
        Send(frames.HeartbeatAck(server_time=WALL_MS))
    ]


def test_retransmit_and_history_are_asked_of_a_worker() -> None:
    session = live_session()
    retransmit = frames.Retransmit(conversation_id="conv_1", from_sequence=2, to_sequence=4)
    assert session.receive(retransmit, 1.0, WALL_MS) == [Ask(records.RangeQuery("gw1", 7, "usr_a", "conv_1", 2, 4))]
    history = frames.History(payload=frames.HistoryPayload(conversation_id="conv_1", before_sequence=9, limit=20))
    assert session.receive(history, 1.0, WALL_MS) == [Ask(records.HistoryQuery("gw1", 7, "usr_a", "conv_1", 9, 20))]


def test_w60_retransmit_backwards_is_refused() -> None:
    frame = frames.Retransmit(conversation_id="conv_1", from_sequence=4, to_sequence=3)
    payload = error_of(live_session().receive(frame, 1.0, WALL_MS)[0])
    assert (payload.code, payload.in_reply_to) == (ErrorCode.VALIDATION_FAILED, "retransmit")


def test_lookups_have_a_rate_of_their_own() -> None:
    session = live_session(limits=Limits(lookup_rate=5.0))
    frame = frames.Retransmit(conversation_id="conv_1", from_sequence=1, to_sequence=2)
    answers = [session.receive(frame, 1.0, WALL_MS)[0] for _ in range(11)]
    assert all(isinstance(answer, Ask) for answer in answers[:10])
    payload = error_of(answers[10])
    assert (payload.code, payload.in_reply_to) == (ErrorCode.RATE_LIMITED, "retransmit")
    assert isinstance(session.receive(message(), 1.0, WALL_MS)[0], Publish)


def test_goodbye_closes_at_once() -> None:
    session = live_session()
    assert session.receive(frames.Goodbye(), 1.0, WALL_MS) == [Close(CloseCode.NORMAL)]
    assert session.state is State.CLOSED


# --- refused frames --------------------------------------------------------------------------------------------------


def test_the_tenth_bad_frame_within_a_minute_is_answered_and_closes() -> None:
    session = live_session()
    refusal = RemoteProtocolError(ErrorCode.BAD_FRAME, "not JSON", client_message_id="c1", idempotency_key="k1")
    for _ in range(9):
        (told,) = session.receive_refused(refusal, 1.0)
        payload = error_of(told)
        assert (payload.code, payload.client_message_id, payload.idempotency_key) == (ErrorCode.BAD_FRAME, "c1", "k1")
    told, closed = session.receive_refused(refusal, 60.0)
    assert error_of(told).code is ErrorCode.BAD_FRAME
    assert closed == Close(CloseCode.BAD_FRAME)


def test_bad_frames_are_forgotten_after_a_minute() -> None:
    session = live_session()
    for minute in range(5):
        for _ in range(9):
            (command,) = session.receive_refused(RemoteProtocolError(ErrorCode.UNKNOWN_TYPE, "?"), minute * 61.0)
            assert error_of(command).code is ErrorCode.UNKNOWN_TYPE


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        (ErrorCode.BAD_FRAME, AuthErrorCode.AUTH_REQUIRED),
        (ErrorCode.UNKNOWN_TYPE, AuthErrorCode.AUTH_REQUIRED),
        (ErrorCode.VALIDATION_FAILED, AuthErrorCode.VALIDATION_FAILED),
    ],
)
def test_w48_a_refused_frame_before_auth_closes(code: ErrorCode, answer: AuthErrorCode) -> None:
    commands = new_session().receive_refused(RemoteProtocolError(code, "?"), 0.0)
    assert commands == auth_refusal(answer, CloseCode.AUTH)


# --- deadlines -------------------------------------------------------------------------------------------------------


def ticked(session: Session, now: float, heard_at: float) -> list[object]:
    session.heard_at = heard_at
    return list(session.tick(now, WALL_MS))


def test_w40_no_auth_within_ten_seconds() -> None:
    session = new_session()
    assert session.deadline(0.0) == 10.0
    assert session.tick(9.9, WALL_MS) == []
    assert session.tick(10.0, WALL_MS) == auth_refusal(AuthErrorCode.AUTH_REQUIRED, CloseCode.AUTH_TIMEOUT)


def test_the_open_query_is_asked_again_and_then_the_server_is_busy() -> None:
    session = opening_session()
    assert session.deadline(0.0) == 5.0
    assert session.tick(4.9, WALL_MS) == []
    assert session.tick(5.0, WALL_MS) == [Ask(open_query({}))]
    assert session.deadline(5.0) == 10.0
    assert session.tick(9.9, WALL_MS) == []
    assert session.tick(10.0, WALL_MS) == auth_refusal(AuthErrorCode.SERVER_BUSY, CloseCode.OVERLOADED, 2000)


def test_silence_is_pinged_once_per_interval_and_ends_after_a_minute() -> None:
    session = live_session()
    assert session.deadline(0.0) == 30.0
    assert ticked(session, 29.9, 0.0) == []
    assert ticked(session, 30.0, 0.0) == [PING]
    assert ticked(session, 31.0, 0.0) == []
    assert session.deadline(31.0) == 60.0
    assert ticked(session, 59.9, 0.0) == []
    assert ticked(session, 60.0, 0.0) == [Close(CloseCode.AUTH_TIMEOUT)]


def test_any_byte_is_life() -> None:
    session = live_session()
    for second in range(0, 600, 20):
        assert ticked(session, float(second), float(second)) == []


def test_a_page_without_an_answer_is_asked_again() -> None:
    session = live_session({"conv_1": (0, 5)})
    session.heard_at = 4.9
    assert session.tick(4.9, WALL_MS) == []
    assert session.tick(5.0, WALL_MS) == [Ask(page_query("conv_1", 0))]
    assert session.tick(5.1, WALL_MS) == []


def test_a_sync_without_an_answer_is_asked_again_with_the_clients_cursors() -> None:
    session = live_session({"conv_1": (9, 9)})
    sync = frames.Sync(payload=frames.SyncPayload(cursors={"conv_1": 3}))
    assert session.receive(sync, 1.0, WALL_MS) == [Ask(open_query({"conv_1": 3}))]
    session.heard_at = 11.0
    assert session.tick(10.9, WALL_MS) == []
    assert session.tick(11.0, WALL_MS) == [Ask(open_query({"conv_1": 3}))]


def test_a_re_auth_keeps_its_auth_success_when_a_sync_follows() -> None:
    session = live_session({"conv_1": (9, 9)})
    session.receive(auth(), 1.0, WALL_MS)
    session.admit("usr_a", "phone", "sess_1", 1e9, None, 1.0)
    session.receive(frames.Sync(payload=frames.SyncPayload()), 1.0, WALL_MS)
    commands = session.opened(open_answer({"conv_1": (9, 9)}), 2.0, WALL_MS)
    sent = [type(command.frame) for command in commands if isinstance(command, Send)]
    assert sent == [frames.AuthSuccess, frames.SyncComplete]
