"""The bounded buffers and the deadlines, without sockets."""

from __future__ import annotations

from gateway.buffers import HELD_OVERHEAD_BYTES, Deadlines, Held, Outbox
from gateway.transport import TransportLimits

LIMITS = TransportLimits(outbox_bytes=100, outbox_frames=8)


def test_an_outbox_says_once_that_its_bound_is_passed() -> None:
    outbox = Outbox(LIMITS)
    assert not outbox.append(b"x" * 100)
    assert outbox.append(b"y")
    assert not outbox.append(b"z")
    assert outbox.full
    assert not outbox.hopeless


def test_frames_are_bounded_too() -> None:
    outbox = Outbox(LIMITS)
    assert [outbox.append(b"x") for _ in range(9)] == [False] * 8 + [True]
    for _ in range(7):
        outbox.append(b"x")
    assert not outbox.hopeless
    outbox.append(b"x")
    assert outbox.hopeless


def test_an_outbox_says_once_that_half_of_it_is_free() -> None:
    outbox = Outbox(LIMITS)
    for _ in range(6):
        outbox.append(b"x" * 20)
    assert outbox.full
    assert not outbox.written(60)
    assert outbox.written(10)
    assert not outbox.written(10)
    assert outbox.size_bytes == 40


def test_a_partly_written_chunk_is_cut() -> None:
    outbox = Outbox(LIMITS)
    outbox.append(b"hello")
    outbox.append(b"world")
    outbox.written(3)
    assert [bytes(chunk) for chunk in outbox.oldest()] == [b"lo", b"world"]
    outbox.written(7)
    assert not outbox


def test_chunks_can_be_taken_whole() -> None:
    outbox = Outbox(LIMITS)
    outbox.append(b"x" * 90)
    outbox.append(b"y" * 20)
    assert outbox.pop() == (b"x" * 90, True)
    assert outbox.pop() == (b"y" * 20, False)
    assert outbox.size_bytes == 0


def test_empty_held_messages_count() -> None:
    held = Held()
    assert [held.append(b"", 2 * HELD_OVERHEAD_BYTES) for _ in range(2)] == [False, True]
    assert held.pop() == b""
    assert held.append(b"", 2 * HELD_OVERHEAD_BYTES)


def test_deadlines_expire_in_the_order_of_their_start() -> None:
    deadlines: Deadlines[str] = Deadlines(5.0)
    deadlines.start("a", 0.0)
    deadlines.start("b", 1.0)
    deadlines.start("c", 2.0)
    deadlines.start("a", 3.0)
    deadlines.clear("c")
    deadlines.clear("nobody")
    assert deadlines.expired(5.9) == []
    assert deadlines.expired(6.0) == ["b"]
    assert deadlines.expired(100.0) == ["a"]
    assert len(deadlines) == 0
