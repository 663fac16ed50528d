"""Key names, ids and the shard written in a message id."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import keys

moments = st.integers(0, 2**44 - 1)
entropies = st.integers(0, 2**128)
shard_counts = st.integers(1, keys.MAX_SHARDS)


def test_the_seeds_keys_and_lifetimes() -> None:
    assert keys.connection("u") == "connection:u"
    assert keys.presence("u") == "presence:u"
    assert keys.inbox("u") == "inbox:u"
    assert keys.user_channel("u") == "user:u"
    assert keys.notification_channel("u") == "notification:u"
    assert keys.agent("a") == "agent:a"
    assert keys.session("u") == "session:u"
    assert keys.intent("h") == "intent:h"
    assert keys.CONNECTION_TTL_SECONDS == 3600
    assert keys.PRESENCE_TTL_SECONDS == 300
    assert keys.INBOX_TTL_SECONDS == 30 * 24 * 3600


def test_streams_and_leases() -> None:
    assert keys.ingest(3) == "ingest:3"
    assert keys.lease(3) == "lease:shard:3"
    assert keys.down("gw1") == "down:gw1"
    assert keys.instance("gw1") == "instance:gw1"


@given(st.text(), shard_counts)
def test_a_shard_is_within_its_count_and_stays(conversation_id: str, shards: int) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in conversation_id):
        return
    shard = keys.shard_of(conversation_id, shards)
    assert 0 <= shard < shards
    assert keys.shard_of(conversation_id, shards) == shard


def test_the_shard_function_is_fixed_for_ever() -> None:
    """Messages of a conversation lie where its ids say: another function would lose every receipt."""
    assert [keys.shard_of(f"conv_{number}", 64) for number in range(5)] == [46, 56, 2, 20, 55]


def test_conversations_spread_over_the_shards() -> None:
    counts = [0] * 64
    for number in range(6_400):
        counts[keys.shard_of(keys.new_id("conv", 1_732_300_000_000 + number, number * 7919), 64)] += 1
    assert min(counts) > 50
    assert max(counts) < 160


@given(moments, entropies, shard_counts, st.data())
def test_a_message_id_names_its_shard(now_ms: int, entropy: int, shards: int, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    message_id = keys.new_message_id(now_ms, entropy, shard)
    assert len(message_id) == keys.MESSAGE_ID_LENGTH
    assert keys.shard_of_message(message_id, shards) == shard


@given(st.tuples(moments, entropies), st.tuples(moments, entropies))
def test_ids_sort_by_time(one: tuple[int, int], other: tuple[int, int]) -> None:
    if one[0] < other[0]:
        assert keys.new_id("usr", *one) < keys.new_id("usr", *other)
        assert keys.new_message_id(*one, 4095) < keys.new_message_id(*other, 0)


@pytest.mark.parametrize(
    "message_id",
    [
        "",
        "msg_",
        "msg_1",
        "usr_" + "0" * 26,
        "msg_" + "0" * 23 + "xyz",
        "msg_" + "0" * 23 + "040",
        "m" * 30,
        "msg_" + "0" * 27,
    ],
)
def test_w77_what_is_no_message_id_of_ours_has_no_shard(message_id: str) -> None:
    assert keys.shard_of_message(message_id, 64) is None


@given(st.text(max_size=64))
def test_any_text_is_asked_for_its_shard_without_harm(message_id: str) -> None:
    shard = keys.shard_of_message(message_id, 64)
    assert shard is None or 0 <= shard < 64


@given(st.text("abc", min_size=1), st.text("abc", min_size=1))
def test_a_direct_conversation_has_one_id_whoever_asks(one: str, other: str) -> None:
    name = keys.direct_conversation_id(one, other)
    assert name == keys.direct_conversation_id(other, one)
    assert name.startswith("conv_")
    assert len(name) <= 64


def test_direct_conversations_of_other_pairs_have_other_ids() -> None:
    names = {keys.direct_conversation_id(f"usr_{one}", f"usr_{other}") for one in range(40) for other in range(one)}
    assert len(names) == 40 * 39 // 2
