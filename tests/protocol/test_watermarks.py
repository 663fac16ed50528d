"""Status, visibility, unread and the digest chain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.models import MessageStatus
from protocol.watermarks import (
    DIGEST_BYTES,
    NO_DIGEST,
    chain_digest,
    content_hash,
    message_status,
    unread,
    visible_range,
)

SENT, DELIVERED, READ = MessageStatus.SENT, MessageStatus.DELIVERED, MessageStatus.READ
marks = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5)
Entry = tuple[str, str, str]
entries = st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.sampled_from("uv"), st.text("xyz", max_size=3)))


@pytest.mark.parametrize(
    ("members", "status"),
    [
        ([], SENT),
        ([(4, 0)], SENT),
        ([(5, 0)], DELIVERED),
        ([(9, 4)], DELIVERED),
        ([(5, 5)], READ),
        ([(0, 5)], READ),
        ([(5, 5), (4, 4)], SENT),
        ([(5, 5), (5, 0)], DELIVERED),
        ([(5, 5), (7, 6)], READ),
    ],
)
def test_the_status_of_message_five(members: list[tuple[int, int]], status: MessageStatus) -> None:
    assert message_status(5, members) is status


@given(marks, st.integers(1, 20))
def test_c6_a_status_never_moves_back_when_a_watermark_grows(members: list[tuple[int, int]], sequence: int) -> None:
    order = [SENT, DELIVERED, READ]
    before = order.index(message_status(sequence, members))
    for position, (delivered, read) in enumerate(members):
        for grown in ((delivered + 1, read), (delivered, read + 1)):
            after = [*members[:position], grown, *members[position + 1 :]]
            assert order.index(message_status(sequence, after)) >= before


@given(marks)
def test_an_older_message_is_never_behind_a_newer_one(members: list[tuple[int, int]]) -> None:
    order = [SENT, DELIVERED, READ]
    states = [order.index(message_status(sequence, members)) for sequence in range(1, 21)]
    assert states == sorted(states, reverse=True)


def test_a_member_sees_from_joining_to_leaving() -> None:
    assert visible_range(1, None, 9) == (1, 9)
    assert visible_range(4, 7, 9) == (4, 7)
    assert visible_range(4, 12, 9) == (4, 9)
    first, last = visible_range(10, None, 9)
    assert first > last


@given(st.integers(0, 100), st.integers(0, 100))
def test_unread_is_never_negative(head: int, read: int) -> None:
    assert unread(head, read) == (head - read if head > read else 0)


def fold(log: list[Entry]) -> bytes:
    digest = NO_DIGEST
    for sequence, (message_id, sender_id, content) in enumerate(log, 1):
        digest = chain_digest(digest, message_id, sender_id, sequence, content_hash(content))
    return digest


def test_the_digest_is_fixed_for_ever() -> None:
    """Clients fold it too: another value here would make every one of them report a broken history."""
    assert len(NO_DIGEST) == DIGEST_BYTES == 16
    assert fold([("msg_1", "usr_a", "hello"), ("msg_2", "usr_b", "é")]).hex() == "554ca9954a084b2a903cbfbb9e11a409"


@given(entries, entries)
def test_two_logs_share_a_digest_only_if_they_are_the_same(one: list[Entry], other: list[Entry]) -> None:
    assert (fold(one) == fold(other)) is (one == other)


@given(entries, st.data())
def test_a_missing_doubled_or_moved_entry_shows(log: list[Entry], data: st.DataObject) -> None:
    if not log:
        return
    position = data.draw(st.integers(0, len(log) - 1))
    assert fold(log[:position] + log[position + 1 :]) != fold(log)
    assert fold([*log[: position + 1], *log[position:]]) != fold(log)
    swapped = [*log[:position], *reversed(log[position:])]
    assert (fold(swapped) == fold(log)) is (swapped == log)


def test_content_that_is_no_unicode_text_has_a_digest_too() -> None:
    assert len(content_hash("\ud800")) == DIGEST_BYTES
