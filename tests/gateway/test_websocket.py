"""Playbooks of the frame layer: bytes in, outcomes out; no socket."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.websocket import FrameMeter, FrameReader, FrameRefused, Message, Reply, Shut, close_frame, frame_length
from protocol.errors import CloseCode
from tests.gateway.peers import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, frame


def new_reader() -> FrameReader:
    return FrameReader(max_message_bytes=100, max_fragments=4)


def shut_code(outcome: object) -> int:
    assert isinstance(outcome, Shut)
    assert outcome.frame[0] == 0x88
    return int.from_bytes(outcome.frame[2:4])


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_the_length_of_a_frame_is_known_when_it_is_all_there(size: int) -> None:
    whole = frame(BINARY, bytes(size))
    assert frame_length(b"??" + whole + b"next", 2, 65536) == len(whole)
    assert frame_length(whole[:-1], 0, 65536) == -len(whole)


def test_the_length_asks_for_the_bytes_it_needs_first() -> None:
    whole = frame(TEXT, bytes(200))
    assert frame_length(b"", 0, 1000) == -2
    assert frame_length(whole[:2], 0, 1000) == -4
    assert frame_length(whole[:4], 0, 1000) == -208
    assert frame_length(frame(TEXT, bytes(70000))[:2], 0, 100000) == -10


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, bytes(101)), CloseCode.TOO_LARGE),
        (frame(TEXT, bytes(300))[:4], CloseCode.TOO_LARGE),
        (b"\x82\xff\x80" + bytes(7), CloseCode.PROTOCOL_ERROR),
        (frame(PING, bytes(126))[:2], CloseCode.PROTOCOL_ERROR),
    ],
)
def test_a_header_can_be_refused_before_its_payload(data: bytes, code: CloseCode) -> None:
    with pytest.raises(FrameRefused) as refused:
        frame_length(data, 0, 100)
    assert refused.value.code is code


def test_two_bytes_of_an_unmasked_frame_are_enough() -> None:
    assert frame_length(b"\x81\x05", 0, 100) == 2
    assert shut_code(new_reader().feed(b"\x81\x05", binary=False)) == 1002


def test_a_reader_answers_pings_and_ignores_pongs() -> None:
    reader = new_reader()
    assert reader.feed(frame(PING, b"abc"), binary=False) == Reply(b"\x8a\x03abc")
    assert reader.feed(frame(PONG, b"abc"), binary=False) is None
    assert reader.idle


def test_a_reader_is_busy_exactly_while_a_message_is_under_way() -> None:
    reader = new_reader()
    assert (reader.idle, reader.room) == (True, 100)
    assert reader.feed(frame(TEXT, b"a" * 60, fin=False), binary=False) is None
    assert (reader.idle, reader.room) == (False, 40)
    assert reader.feed(frame(PING, b"p" * 100), binary=False) == Reply(b"\x8a\x64" + b"p" * 100)
    assert reader.feed(frame(CONTINUATION, b"b" * 40), binary=False) == Message(b"a" * 60 + b"b" * 40)
    assert (reader.idle, reader.room) == (True, 100)


def test_a_close_inside_a_message_is_echoed() -> None:
    reader = new_reader()
    reader.feed(frame(TEXT, b"half", fin=False), binary=False)
    assert shut_code(reader.feed(frame(CLOSE, b"\x03\xe8ok"), binary=False)) == 1000
    assert not reader.idle


def test_an_empty_close_is_echoed_empty() -> None:
    assert new_reader().feed(frame(CLOSE), binary=False) == Shut(b"\x88\x00")


def test_utf8_may_be_cut_between_fragments_but_not_at_the_end() -> None:
    reader = new_reader()
    assert reader.feed(frame(TEXT, b"\xe2\x82", fin=False), binary=False) is None
    assert reader.feed(frame(CONTINUATION, b"\xac"), binary=False) == Message("€".encode())
    reader.feed(frame(TEXT, b"\xe2\x82", fin=False), binary=False)
    assert shut_code(reader.feed(frame(CONTINUATION), binary=False)) == 1007


def test_binary_fragments_are_not_checked() -> None:
    reader = new_reader()
    reader.feed(frame(BINARY, b"\xff", fin=False), binary=True)
    assert reader.feed(frame(CONTINUATION, b"\xfe"), binary=True) == Message(b"\xff\xfe")


@pytest.mark.parametrize("code", CloseCode)
def test_close_frames_fit_a_control_frame(code: CloseCode) -> None:
    built = close_frame(code)
    assert built[0] == 0x88
    assert built[1] == len(built) - 2 <= 125
    assert int.from_bytes(built[2:4]) == code


STREAM = b"".join(
    (
        frame(TEXT, b"abc"),
        frame(TEXT, bytes(90), fin=False),
        frame(PING, b"p" * 20),
        frame(CONTINUATION, bytes(10)),
        frame(BINARY, bytes(100)),
    )
)
TAILS = {
    CloseCode.TOO_LARGE: [
        frame(TEXT, bytes(101)),
        frame(TEXT, bytes(99), fin=False) + frame(CONTINUATION, bytes(2)),
        frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 4,
    ],
    CloseCode.POLICY: [frame(PONG) * 5],
    CloseCode.PROTOCOL_ERROR: [b"\x81\xff\xff" + bytes(20), frame(PING, bytes(126))],
}


@given(
    cuts=st.lists(st.integers(0, len(STREAM) + 200), max_size=20),
    tail=st.sampled_from([(code, tail) for code, tails in TAILS.items() for tail in tails]),
)
def test_the_meter_refuses_the_same_at_any_segmentation(cuts: list[int], tail: tuple[CloseCode, bytes]) -> None:
    code, refused_part = tail
    data = STREAM + refused_part
    meter = FrameMeter(max_message_bytes=100, max_fragments=4, control_frames=5, now=0.0)
    edges = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    passed = 0
    for start, end in itertools.pairwise(edges):
        count, refused = meter.measure(data[start:end], 0.0)
        passed += count
        if refused is not None:
            assert refused is code
            assert passed >= len(STREAM)
            return
        assert count == end - start
    raise AssertionError("never refused")


def test_the_meter_knows_since_when_a_message_is_under_way() -> None:
    meter = FrameMeter(max_message_bytes=100, max_fragments=4, control_frames=5, now=0.0)
    steps = [
        (frame(TEXT, b"abc"), 1.0, None),
        (frame(TEXT, b"abc", fin=False), 2.0, 2.0),
        (frame(PING), 3.0, 2.0),
        (frame(CONTINUATION, b"abc") + b"\x81", 4.0, 4.0),
        (frame(TEXT)[1:], 5.0, None),
    ]
    for data, now, since in steps:
        assert meter.measure(data, now) == (len(data), None)
        assert meter.under_way_since == since
