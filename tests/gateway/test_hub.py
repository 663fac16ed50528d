"""Playbooks of the hub between a recording transport and a recording broker: what comes in, what goes out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from gateway.sweep import HEADS_CHUNK
from protocol import frames, keys, records
from protocol.codec import JSON
from protocol.errors import CloseCode, ErrorCode
from protocol.limits import Limits
from protocol.models import MessageStatus
from tests.gateway.fakes import FakeTransport, House, delivery, message, token


@pytest.fixture
def house() -> House:
    return House()


def types(transport: FakeTransport) -> list[str]:
    return [frame["type"] for frame in transport.take()]


def outcome(connection: Any, key: str) -> records.Outcome:
    return records.Outcome(connection.session.connection, key, b'{"type":"message_ack"}')


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_good_token_attaches_before_it_asks_and_opens_with_the_answer(house: House) -> None:
    connection, transport = house.connect()
    house.auth(connection)
    assert [name for name, _ in house.broker.log] == ["attach", "ask"]
    attachment, query = house.broker.log[0][1], house.broker.log[1][1]
    assert (attachment.user_id, attachment.device_id, attachment.connection) == ("usr_a", "d1", 1)
    assert query == records.OpenQuery("gw_test", 1, "usr_a", "d1", {}, query.issued_ms)
    assert connection.blocked
    assert transport.take() == []
    house.hub.route([records.OpenAnswer(1, 7, [])])
    assert types(transport) == ["auth_success", "sync_complete"]
    assert transport.resumed == 1
    assert not connection.blocked


@pytest.mark.parametrize(
    ("extra", "error", "code"),
    [
        ({"auth_token": "nonsense"}, "invalid_token", CloseCode.AUTH),
        ({"auth_token": token("usr_b")}, "user_mismatch", CloseCode.AUTH),
        ({"auth_token": token(exp=5)}, "expired_token", CloseCode.AUTH),
    ],
)
def test_a_bad_token_is_refused_and_attaches_nothing(
    house: House, extra: dict[str, Any], error: str, code: CloseCode
) -> None:
    connection, transport = house.connect()
    house.auth(connection, **extra)
    assert transport.take() == [{"type": "auth_error", "error": error}]
    assert transport.closed is code
    assert house.broker.log == []
    assert house.hub.users == {}


def test_before_redis_is_there_clients_are_told_to_come_back(house: House) -> None:
    house.broker.lacks = ["redis_commands"]
    connection, transport = house.connect()
    house.auth(connection)
    assert transport.take() == [{"type": "auth_error", "error": "server_busy", "retry_after_ms": 1000}]
    assert transport.closed is CloseCode.OVERLOADED


def test_who_comes_while_too_many_wait_for_a_worker_is_told_to_come_back() -> None:
    house = House(opening_sessions=2)
    first, _ = house.connect()
    for number, connection in enumerate((first, house.connect()[0])):
        house.auth(connection, f"usr_{number}")
    third, transport = house.connect()
    house.auth(third, "usr_3")
    assert transport.take() == [{"type": "auth_error", "error": "server_busy", "retry_after_ms": 1000}]
    assert transport.closed is CloseCode.OVERLOADED
    house.hub.route([records.OpenAnswer(first.session.connection, 0, [])])
    again, transport = house.connect()
    house.auth(again, "usr_3")
    assert transport.closed is None
    # Who is in already may show a fresh token, however many wait.
    house.auth(first, "usr_0")
    assert first.transport is not None
    assert len(house.hub.opening) == 2


def test_the_query_of_an_opening_that_is_lost_ends_it_with_server_busy(house: House) -> None:
    connection, transport = house.connect()
    house.auth(connection)
    (query,) = house.broker.take("ask")
    house.hub.query_failed(query, ErrorCode.STORAGE_UNAVAILABLE)
    assert [frame["error"] for frame in transport.take()] == ["server_busy"]
    assert transport.closed is CloseCode.OVERLOADED
    assert len(house.broker.take("detach")) == 1


def test_the_ninth_device_is_refused_and_a_known_one_is_not(house: House) -> None:
    for number in range(8):
        house.open(device_id=f"d{number}")
    connection, transport = house.connect()
    house.auth(connection, device_id="d8")
    assert [frame["error"] for frame in transport.take()] == ["device_limit"]
    house.open(device_id="d3")
    assert len(house.hub.users["usr_a"]) == 8


def test_the_same_device_again_replaces_the_old_connection(house: House) -> None:
    old, old_transport = house.open(heads={"conv_1": 0})
    new, new_transport = house.open(heads={"conv_1": 0})
    assert [frame["payload"]["code"] for frame in old_transport.take()] == ["replaced"]
    assert old_transport.closed is CloseCode.REPLACED
    assert house.hub.users["usr_a"] == (new,)
    house.hub.route([delivery(["usr_a"], 1)])
    assert types(new_transport) == ["messages"]
    old.lost()
    assert house.hub.users["usr_a"] == (new,)
    assert not new.blocked


def test_a_device_that_connected_elsewhere_is_replaced_here(house: House) -> None:
    connection, transport = house.open()
    house.hub.route([records.Replaced(connection.session.connection)])
    assert transport.closed is CloseCode.REPLACED
    assert house.hub.users == {}


def test_who_never_authenticates_is_closed_after_ten_seconds(house: House) -> None:
    _, transport = house.connect()
    house.pass_time(9)
    assert transport.closed is None
    house.pass_time(3)
    assert transport.take() == [{"type": "auth_error", "error": "auth_required"}]
    assert transport.closed is CloseCode.AUTH_TIMEOUT


# --- sending ---------------------------------------------------------------------------------------------------------


def test_a_message_is_published_and_its_outcome_reaches_the_sender(house: House) -> None:
    connection, transport = house.open()
    house.send(connection, message("k1"))
    (record,) = house.broker.take("publish")
    assert (record.sender_id, record.idempotency_key, record.client_message_id) == ("usr_a", "k1", "c-k1")
    assert house.hub.in_flight == 1
    house.hub.route([outcome(connection, "k1")])
    assert transport.take() == [{"type": "message_ack"}]
    assert house.hub.in_flight == 0
    assert transport.resumed == 0


def test_a_full_window_blocks_until_an_outcome(house: House) -> None:
    connection, transport = house.open()
    for number in range(32):
        assert not connection.blocked
        house.send(connection, message(f"k{number}"))
        house.now += 0.001
    assert connection.session.blocked
    house.hub.route([outcome(connection, "k0")])
    assert not connection.blocked
    assert transport.resumed == 1


@pytest.mark.parametrize("code", [ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.OVERLOADED])
def test_a_message_redis_does_not_take_gets_a_retryable_error_at_once(house: House, code: ErrorCode) -> None:
    connection, transport = house.open()
    house.broker.refuses = code
    house.send(connection, message("k1"))
    (frame,) = transport.take()
    assert frame["payload"]["code"] == code
    assert frame["payload"]["retryable"] is True
    assert frame["payload"]["idempotency_key"] == "k1"
    assert house.hub.in_flight == 0


def test_a_message_whose_answer_is_lost_gets_a_retryable_error_and_opens_the_window(house: House) -> None:
    connection, transport = house.open()
    for number in range(32):
        house.send(connection, message(f"k{number}"))
    assert connection.blocked
    house.hub.publish_failed(connection.session.connection, "k5", ErrorCode.STORAGE_UNAVAILABLE)
    assert [frame["payload"]["idempotency_key"] for frame in transport.take()] == ["k5"]
    assert transport.resumed == 1


def test_a_message_without_outcome_gets_a_retryable_error_after_ten_seconds(house: House) -> None:
    connection, transport = house.open()
    house.pass_time(5)
    house.send(connection, message("k1"))
    house.pass_time(9)
    assert transport.take() == []
    house.pass_time(3)
    assert [frame["payload"]["code"] for frame in transport.take()] == ["storage_unavailable"]


def test_the_message_rate_is_shared_by_the_devices_of_a_user() -> None:
    house = House(Limits(message_rate=1.0, message_burst=4))
    first, first_transport = house.open(device_id="d1")
    second, second_transport = house.open(device_id="d2")
    for number in range(2):
        house.send(first, message(f"a{number}"))
        house.send(second, message(f"b{number}"))
    house.send(first, message("a9"))
    house.send(second, message("b9"))
    codes = [frame["payload"]["code"] for frame in first_transport.take() + second_transport.take()]
    assert codes == ["rate_limited", "rate_limited"]
    other, other_transport = house.open("usr_b")
    house.send(other, message("k"))
    assert other_transport.take() == []


def test_a_bot_has_a_budget_of_its_own_since_it_talks_to_many() -> None:
    house = House(Limits(message_rate=1.0, message_burst=2, bot_message_rate=1.0, bot_message_burst=5))
    bot, transport = house.open("agt_1")
    for number in range(5):
        house.send(bot, message(f"k{number}"))
    assert transport.take() == []
    house.send(bot, message("k5"))
    assert [frame["payload"]["code"] for frame in transport.take()] == ["rate_limited"]


def test_a_message_rate_does_not_start_afresh_with_a_new_connection() -> None:
    house = House(Limits(message_rate=1.0, message_burst=2))
    connection, _ = house.open()
    house.send(connection, message("k1"))
    house.send(connection, message("k2"))
    connection.lost()
    connection, transport = house.open()
    house.send(connection, message("k3"))
    assert [frame["payload"]["code"] for frame in transport.take()] == ["rate_limited"]


def test_receipts_are_handed_on(house: House) -> None:
    connection, _ = house.open()
    house.send(connection, {"type": "delivery_ack", "message_id": "msg_x", "timestamp": 1})
    house.send(connection, {"type": "read_receipt", "message_ids": ["msg_x", "msg_y"], "timestamp": 1})
    assert house.broker.take("acknowledge") == [
        records.DeliveredMark("usr_a", "d1", "msg_x"),
        records.ReadMark("usr_a", "d1", ["msg_x", "msg_y"]),
    ]


def test_a_question_redis_does_not_take_gets_an_answer(house: House) -> None:
    connection, transport = house.open()
    house.broker.refuses = ErrorCode.STORAGE_UNAVAILABLE
    house.send(connection, {"type": "retransmit", "conversation_id": "conv_1", "from_sequence": 1, "to_sequence": 2})
    (frame,) = transport.take()
    assert (frame["payload"]["code"], frame["payload"]["in_reply_to"]) == ("storage_unavailable", "retransmit")


def test_a_refused_frame_is_answered_and_the_connection_lives_on(house: House) -> None:
    connection, transport = house.open()
    connection.receive(b"{", house.now)
    house.send(connection, {"type": "heartbeat", "timestamp": 1})
    assert types(transport) == ["error", "heartbeat_ack"]


# --- delivering ------------------------------------------------------------------------------------------------------


def test_a_delivery_is_encoded_once_for_everybody(house: House) -> None:
    transports = [house.open(f"usr_{n}", heads={"conv_1": 4})[1] for n in range(5)]
    house.hub.route([delivery([f"usr_{n}" for n in range(9)], 5)])
    shared = {id(transport.outgoing[0]) for transport in transports}
    assert len(shared) == 1
    assert house.hub.counts.deliveries == 5


def test_deliveries_of_a_conversation_arrive_in_order_and_once(house: House) -> None:
    _, transport = house.open(heads={"conv_1": 0})
    for first, last in ((1, 1), (2, 4), (2, 4), (5, 5), (1, 1)):
        house.hub.route([delivery(["usr_a"], first, last)])
    assert [frame["payload"]["to"] for frame in transport.take()] == [1, 4, 5]


def test_the_sender_gets_no_copy_but_its_cursor_moves_and_its_other_device_gets_one(house: House) -> None:
    sender, sender_transport = house.open(device_id="d1", heads={"conv_1": 0})
    _, other_transport = house.open(device_id="d2", heads={"conv_1": 0})
    house.hub.route([delivery(["usr_a"], 1, skip=sender.session.connection)])
    assert sender_transport.take() == []
    assert types(other_transport) == ["messages"]
    house.hub.route([delivery(["usr_a"], 2)])
    assert types(sender_transport) == ["messages"]
    assert house.broker.take("ask") == []


def test_a_gap_is_paged_and_live_goes_on_behind_it(house: House) -> None:
    connection, transport = house.open(heads={"conv_1": 1})
    number = connection.session.connection
    house.hub.route([delivery(["usr_a"], 3), delivery(["usr_a"], 4)])
    assert transport.take() == []
    assert house.broker.take("ask") == [records.PageQuery("gw_test", number, "usr_a", "conv_1", 1, 100)]
    house.hub.route([records.PageAnswer(number, "conv_1", 2, 4, False, b"\0" * 16, b'{"type":"messages"}')])
    assert types(transport) == ["messages"]
    house.hub.route([delivery(["usr_a"], 5)])
    assert types(transport) == ["messages"]
    assert house.broker.take("ask") == []


def test_a_lost_page_is_asked_for_again(house: House) -> None:
    _, _ = house.open(heads={"conv_1": 1})
    house.hub.route([delivery(["usr_a"], 3)])
    assert len(house.broker.take("ask")) == 1
    house.pass_time(8)
    assert [type(query) for query in house.broker.take("ask")].count(records.PageQuery) == 1


def test_a_lagging_connection_gets_no_live_frames_and_pages_once_it_has_drained(house: House) -> None:
    connection, transport = house.open(heads={"conv_1": 0})
    connection.overflowed()
    house.hub.route([delivery(["usr_a"], 1), delivery(["usr_a"], 2)])
    assert transport.take() == []
    assert house.broker.take("ask") == []
    connection.drained(house.now)
    (query,) = house.broker.take("ask")
    assert (query.conversation_id, query.after_sequence) == ("conv_1", 0)


def test_a_notice_and_a_reply_reach_whom_they_name(house: House) -> None:
    connection, transport = house.open()
    _, other = house.open("usr_b")
    house.hub.route([records.Notice(["usr_a", "usr_x"], b'{"type":"receipt_update"}')])
    house.hub.route([records.Reply(connection.session.connection, b'{"type":"messages"}')])
    house.hub.route([records.Reply(999, b'{"type":"messages"}')])
    assert types(transport) == ["receipt_update", "messages"]
    assert other.take() == []


def test_a_binary_client_shares_the_delivery(house: House) -> None:
    connection, transport = house.open(heads={"conv_1": 0}, binary=True)
    house.hub.route([delivery(["usr_a"], 1)])
    decoded = msgspec.msgpack.decode(transport.outgoing[0].payload(connection.codec))
    assert decoded["payload"]["to"] == 1


# --- neighbours (contract C7) ----------------------------------------------------------------------------------------


def test_one_broken_connection_costs_nobody_else_a_message(house: House) -> None:
    broken, broken_transport = house.open("usr_a", heads={"conv_1": 0})
    _, good_transport = house.open("usr_b", heads={"conv_1": 0})
    broken_transport.broken = True
    house.hub.route([delivery(["usr_a", "usr_b"], 1)])
    assert types(good_transport) == ["messages"]
    assert broken_transport.closed is CloseCode.INTERNAL
    assert house.hub.counts.isolated_errors == 1
    assert "usr_a" not in house.hub.users
    house.hub.route([outcome(broken, "k"), delivery(["usr_a", "usr_b"], 2)])
    assert types(good_transport) == ["messages"]


def test_nothing_is_written_to_a_connection_that_is_gone(house: House) -> None:
    connection, transport = house.open(heads={"conv_1": 0})
    house.send(connection, message("k1"))
    connection.lost()
    transport.broken = True
    house.hub.route([outcome(connection, "k1"), delivery(["usr_a"], 1), records.Notice(["usr_a"], b"{}")])
    house.hub.publish_failed(connection.session.connection, "k1", ErrorCode.OVERLOADED)
    house.pass_time(70)
    assert house.hub.counts.isolated_errors == 0
    assert [attachment.connection for attachment in house.broker.take("detach")] == [connection.session.connection]
    assert house.hub.load == 0


def test_nothing_is_written_after_a_close(house: House) -> None:
    connection, transport = house.open(heads={"conv_1": 0})
    house.send(connection, {"type": "goodbye"})
    assert transport.closed is CloseCode.NORMAL
    house.hub.route([delivery(["usr_a"], 1)])
    house.pass_time(70)
    connection.lost()
    assert house.hub.counts.isolated_errors == 0
    assert len(house.broker.take("detach")) == 1


# --- sweeps ----------------------------------------------------------------------------------------------------------


def heads_answer(head: int) -> records.HeadsAnswer:
    return records.HeadsAnswer([records.UserHead("usr_a", "conv_1", head)])


def test_c8_a_push_that_vanished_is_repaired_by_the_sweep(house: House) -> None:
    """The whole repair, without the client doing anything: asked within 10 s, believed after 2 s, paged at once."""
    _, _ = house.open(heads={"conv_1": 3})
    house.pass_time(1)
    assert house.broker.take("ask") == [records.HeadsQuery("gw_test", ["usr_a"])]
    house.hub.route([heads_answer(4)])
    house.pass_time(1)
    assert house.broker.take("ask") == []
    house.pass_time(2)
    (query,) = house.broker.take("ask")
    assert (query.conversation_id, query.after_sequence) == ("conv_1", 3)
    assert house.hub.counts.repairs == 1


def test_c8_the_lost_push_of_a_removal_is_repaired_where_something_was_seen_before(house: House) -> None:
    house.open(heads={"conv_1": 3})
    house.open("usr_b")
    house.pass_time(1)
    house.broker.take("ask")
    ends = [records.UserHead(user_id, "conv_1", 4, ended=True) for user_id in ("usr_a", "usr_b")]
    house.hub.route([records.HeadsAnswer(ends)])
    house.pass_time(3)
    (query,) = house.broker.take("ask")
    assert (query.user_id, query.conversation_id, query.after_sequence) == ("usr_a", "conv_1", 3)


def test_a_push_that_was_only_on_its_way_is_no_suspect(house: House) -> None:
    _, transport = house.open(heads={"conv_1": 3})
    house.pass_time(1)
    assert len(house.broker.take("ask")) == 1
    house.hub.route([heads_answer(4)])
    house.hub.route([delivery(["usr_a"], 4)])
    house.pass_time(4)
    assert types(transport) == ["messages"]
    assert house.broker.take("ask") == []
    assert house.hub.counts.repairs == 0


def test_every_user_is_asked_for_once_in_ten_seconds(house: House) -> None:
    for number in range(2 * HEADS_CHUNK + 100):
        house.open(f"usr_{number}")
    house.pass_time(10)
    queries = house.broker.take("ask")
    asked = [user_id for query in queries for user_id in query.user_ids]
    assert sorted(asked) == sorted(house.hub.users)
    assert max(len(query.user_ids) for query in queries) == HEADS_CHUNK


def test_every_registration_is_refreshed_well_within_the_lifetime_of_presence(house: House) -> None:
    for number in range(7):
        house.open(f"usr_{number % 5}", device_id=f"d{number}")
    house.pass_time(100)
    refreshed = house.broker.take("refresh")
    assert sorted(attachments[0].user_id for attachments in refreshed) == [f"usr_{n}" for n in range(5)]
    assert sum(len(attachments) for attachments in refreshed) == 7


def test_a_redis_that_forgot_gets_every_registration_and_every_head_is_compared(house: House) -> None:
    for number in range(700):
        house.open(f"usr_{number}")
    house.hub.recovered(forgotten=True)
    house.pass_time(1)
    assert len(house.broker.take("refresh")) == 700
    assert sum(len(query.user_ids) for query in house.broker.take("ask")) == 700


def test_what_was_on_its_way_when_redis_forgot_is_asked_for_again_at_once(house: House) -> None:
    """The message is lost, or its ack is: without a word the client would wait for ten seconds."""
    connection, transport = house.open()
    other, _ = house.open("usr_b")
    for key in ("k1", "k2"):
        house.send(connection, message(key))
    house.hub.route([outcome(connection, "k1")])
    transport.take()
    house.hub.recovered(forgotten=False)
    assert transport.take() == []
    house.hub.recovered(forgotten=True)
    (frame,) = transport.take()
    assert frame["type"] == "error"
    assert frame["payload"]["idempotency_key"] == "k2"
    assert frame["payload"]["retryable"]
    assert frame["payload"]["retry_after_ms"] == 1000
    assert house.hub.in_flight == 0
    assert not other.session.in_flight


# --- drain -----------------------------------------------------------------------------------------------------------


def test_a_drain_lets_nobody_in_and_takes_nothing_new_at_its_end(house: House) -> None:
    connection, transport = house.open()
    house.hub.draining = True
    served = not connection.blocked
    house.send(connection, message("k1"))
    house.hub.holding = True
    assert (served, connection.blocked) == (True, True)
    late, late_transport = house.connect()
    house.auth(late, "usr_b")
    assert [frame["error"] for frame in late_transport.take()] == ["draining"]
    assert late_transport.closed is CloseCode.RESTART
    house.hub.route([outcome(connection, "k1")])
    assert types(transport) == ["message_ack"]
    assert house.hub.in_flight == 0
    house.hub.close_all(CloseCode.RESTART)
    assert transport.closed is CloseCode.RESTART
    assert house.hub.users == {}
    assert len(house.broker.take("detach")) == 1


def test_a_silent_client_is_pinged_and_then_given_up(house: House) -> None:
    _, transport = house.open()
    house.pass_time(35)
    assert transport.pings == 1
    house.pass_time(30)
    assert transport.closed is CloseCode.AUTH_TIMEOUT


def test_many_devices_type_no_more_than_one(house: House) -> None:
    """Eight devices of one user were eight times as loud."""
    phones = [house.open(device_id=f"d{number}")[0] for number in range(3)]
    other, _ = house.open("usr_b")
    start = {"type": "typing", "payload": {"conversation_id": "conv_1", "state": "start"}}
    for connection in (*phones, other):
        house.send(connection, start)
    signals = house.broker.take("signal")
    assert [(signal.user_id, signal.started) for signal in signals] == [("usr_a", True), ("usr_b", True)]
    house.pass_time(4)
    house.send(phones[1], start)
    assert len(house.broker.take("signal")) == 1


def test_one_id_names_a_message_in_the_log_on_its_way_in_and_out(house: House) -> None:
    connection, _ = house.open()
    with capture_logs() as lines:
        house.send(connection, message("k1", content="not to be shown"))
        (record,) = house.broker.take("publish")
        payload = frames.MessageAckPayload(
            message_id="msg_1",
            sequence_number=1,
            status=MessageStatus.SENT,
            timestamp=1,
            conversation_id=record.conversation_id,
        )
        ack = frames.MessageAck(client_message_id="c1", payload=payload)
        house.hub.route([records.Outcome(connection.session.connection, "k1", JSON.encode(ack))])
    trace = keys.trace_id(record.conversation_id, "usr_a", "k1")
    assert [line["event"] for line in lines if line.get("trace") == trace] == ["< message", "> outcome"]
    assert record.content not in str(lines)
