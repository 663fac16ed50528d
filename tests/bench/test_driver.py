"""The load driver: its frames are the protocol's, its tally sees every kind of violation, its process answers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from bench import templates
from bench.driver import Check
from bench.driver_process import open_driver, open_peer
from bench.echo import EchoConnect, EchoRun
from bench.social import more_percent
from bench.tally import COUNTS, NO_MARK, Log, Reader, Violations, check_all
from protocol import frames
from protocol.codec import JSON, MSGPACK, FrameCodec
from protocol.models import MessageStatus, MessageType, StoredMessage, UserStatus

BOTH_CODECS = pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=["json", "msgpack"])
NOW = datetime(2026, 11, 22, tzinfo=UTC)


# --- frames ----------------------------------------------------------------------------------------------------------


@BOTH_CODECS
def test_a_message_from_the_template_is_a_valid_frame(codec: FrameCodec) -> None:
    fill = templates.message_template(codec, "conv_1", "usr_2", 120, "run", 1_732_300_000_000)
    frame = codec.decode(fill(b"00000300000042"))
    assert isinstance(frame, frames.Message)
    assert frame.client_message_id == "00000300000042"
    assert frame.idempotency_key == "run-00000300000042"
    assert frame.payload.content.startswith("00000300000042")
    assert len(frame.payload.content) == 120


@BOTH_CODECS
def test_a_delivery_ack_from_the_template_is_a_valid_frame(codec: FrameCodec) -> None:
    message_id = "msg_" + "0123456789abcdef0123456789"
    frame = codec.decode(templates.delivery_ack_template(codec, 1)(message_id.encode()))
    assert isinstance(frame, frames.DeliveryAck)
    assert frame.message_id == message_id


@BOTH_CODECS
def test_every_server_frame_the_driver_meets_is_decoded(codec: FrameCodec) -> None:
    decode = templates.lean_decoder(codec)
    row = StoredMessage(
        message_id="msg_1",
        conversation_id="conv_1",
        sequence_number=7,
        sender_id="usr_1",
        receiver_id="usr_2",
        message_type=MessageType.TEXT,
        content="hello",
        timestamp=NOW,
        status=MessageStatus.SENT,
        created_at=NOW,
    )
    ack = frames.MessageAckPayload(message_id="msg_1", sequence_number=7, status=MessageStatus.SENT, timestamp=1)
    receipt = frames.ReceiptUpdatePayload(conversation_id="conv_1", user_id="usr_2", delivered_through=7, timestamp=1)
    got_ack = decode(codec.encode(frames.MessageAck(client_message_id="5", payload=ack)))
    assert isinstance(got_ack, templates.Ack)
    assert (got_ack.client_message_id, got_ack.payload.message_id, got_ack.payload.sequence_number) == ("5", "msg_1", 7)
    payload = frames.MessagesPayload(conversation_id="conv_1", messages=[row], origin="live")
    got_rows = decode(codec.encode(frames.Messages(payload=payload)))
    assert isinstance(got_rows, templates.Messages)
    assert [(got.message_id, got.sequence_number, got.content) for got in got_rows.payload.messages] == [
        ("msg_1", 7, "hello")
    ]
    got_receipt = decode(codec.encode(frames.ReceiptUpdate(payload=receipt)))
    assert isinstance(got_receipt, templates.Receipt)
    assert (got_receipt.payload.delivered_through, got_receipt.payload.read_through) == (7, 0)
    typing = frames.TypingNoticePayload(conversation_id="c", user_id="u", state=frames.TypingState.START)
    assert isinstance(decode(codec.encode(frames.TypingNotice(payload=typing))), templates.Typing)
    presence = frames.PresencePayload(user_id="u", status=UserStatus.ONLINE)
    assert isinstance(decode(codec.encode(frames.PresenceNotice(payload=presence))), templates.Presence)


# --- tally -----------------------------------------------------------------------------------------------------------


class Pair:
    """A sender (member 0) and a receiver (member 1) of one conversation."""

    def __init__(self) -> None:
        self.violations = Violations()
        self.log = Log("conv_1", self.violations)
        self.sender = Reader(0, self.log, self.violations)
        self.receiver = Reader(1, self.log, self.violations)

    def exchange(self, sequence: int) -> None:
        """One message that goes as it should."""
        count = self.sender.sends(0.0)
        self.sender.ack(count, sequence, f"m{sequence}")
        self.receiver.saw(sequence, f"m{sequence}", count)
        self.sender.receipt(sequence, 0)

    def verdict(self) -> list[str]:
        check_all([self.log], [self.sender, self.receiver], self.violations)
        return self.violations.listed()


@pytest.fixture
def pair() -> Pair:
    pair = Pair()
    for sequence in (1, 2, 3):
        pair.exchange(sequence)
    return pair


def test_a_good_exchange_has_no_violations(pair: Pair) -> None:
    assert pair.verdict() == []


def test_a_message_without_ack_is_lost(pair: Pair) -> None:
    pair.sender.sends(0.0)
    assert any(line.startswith("lost: conv_1 member 0 never got an ack for 1") for line in pair.verdict())


def test_an_acked_message_that_is_not_delivered_is_lost(pair: Pair) -> None:
    pair.sender.ack(pair.sender.sends(0.0), 4, "m4")
    pair.sender.receipt(4, 0)
    assert pair.verdict() == ["lost: conv_1 member 1 never got 1 messages, first sequence 4"]


def test_a_gap_at_the_receiver_is_lost(pair: Pair) -> None:
    for sequence in (4, 5):
        pair.sender.ack(pair.sender.sends(0.0), sequence, f"m{sequence}")
    pair.receiver.saw(5, "m5", 4)
    pair.sender.receipt(5, 0)
    assert pair.verdict() == ["lost: conv_1 member 1 never got 1 messages, first sequence 4"]


def test_a_message_delivered_twice_is_doubled(pair: Pair) -> None:
    assert not pair.receiver.saw(3, "m3", 2)
    assert pair.verdict() == ["doubled: conv_1 member 1 got sequence 3 after 3"]


def test_a_late_message_is_out_of_order(pair: Pair) -> None:
    for sequence in (4, 5):
        pair.sender.ack(pair.sender.sends(0.0), sequence, f"m{sequence}")
    pair.sender.receipt(5, 0)
    pair.receiver.saw(5, "m5", 4)
    pair.receiver.saw(4, "m4", 3)
    assert pair.verdict() == ["out of order: conv_1 member 1 got sequence 4 after 5"]


def test_an_ack_that_names_another_sequence_is_contradicted(pair: Pair) -> None:
    assert pair.sender.ack(2, 9, "m3") is None
    assert pair.verdict()[0].startswith("ack contradicted: conv_1 member 0 message 2 acked as sequence 3, then 9")


def test_an_ack_and_a_delivery_that_disagree_are_contradicted(pair: Pair) -> None:
    pair.sender.ack(pair.sender.sends(0.0), 4, "m4")
    pair.receiver.saw(4, "another", 3)
    assert pair.verdict()[0].startswith("ack contradicted: conv_1 sequence 4 is m4 and another")


def test_a_message_that_took_two_positions_is_doubled(pair: Pair) -> None:
    pair.receiver.saw(4, "m4", 2)
    assert "doubled: conv_1 message 2 stands at 3 and 4" in pair.verdict()


def test_a_receipt_that_goes_backwards_is_seen(pair: Pair) -> None:
    pair.sender.receipt(2, 0)
    assert pair.verdict() == ["receipt backwards: conv_1 member 0 was told 3/0, then 2/0"]


def test_a_missing_receipt_is_lost(pair: Pair) -> None:
    pair.sender.ack(pair.sender.sends(0.0), 4, "m4")
    pair.receiver.saw(4, "m4", 3)
    assert pair.verdict() == ["lost: conv_1 member 0 got delivery receipts for 3 of 4 messages, delivered_through 3"]


def test_own_messages_fill_the_holes_of_a_member_that_gets_no_copies() -> None:
    violations = Violations()
    log = Log("conv_1", violations)
    alice, bob = Reader(0, log, violations), Reader(1, log, violations)
    for reader in (alice, bob):
        reader.saw(1, "m1", NO_MARK)
    bob.ack(COUNTS + bob.sends(0.0), 2, "m2")
    alice.saw(2, "m2", COUNTS)
    alice.ack(alice.sends(0.0), 3, "m3")
    bob.saw(3, "m3", 0)
    alice.receipt(3, 0)
    bob.receipt(2, 0)
    check_all([log], [alice, bob], violations)
    assert violations.listed() == []


def test_only_the_first_violations_are_spelled_out() -> None:
    violations = Violations()
    for number in range(60):
        violations.add("lost", str(number))
    assert violations.count == 60
    assert violations.listed()[-1] == "and 10 more"


# --- presence and typing beside the load -----------------------------------------------------------------------------


def test_what_is_more_is_told_of_the_medians() -> None:
    plain = [{"total": 100.0, "rest": 0.0}, {"total": 900.0, "rest": 0.0}, {"total": 200.0, "rest": 0.0}]
    social = [{"total": 210.0, "rest": 1.0}, {"total": 50.0, "rest": 1.0}, {"total": 800.0, "rest": 1.0}]
    assert more_percent(plain, social, "total") == 5.0
    assert more_percent(plain, social, "rest") == 0.0


# --- the process -----------------------------------------------------------------------------------------------------


def test_the_driver_process_echoes_against_a_real_server() -> None:
    with open_peer("picows") as (_, port), open_driver() as driver:
        connected = driver.command(EchoConnect(url=f"ws://127.0.0.1:{port}/", connections=5), 10)
        assert connected == {"connected": 5}
        run = EchoRun(connections=5, messages=500, payload_bytes=200, timeout_seconds=10)
        answer = driver.command(run, 10)
        assert answer["missing"] == answer["wrong"] == 0
        assert driver.command(Check(), 5) == {"violations": [], "count": 0}
