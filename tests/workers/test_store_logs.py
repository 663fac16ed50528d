"""Excerpts of a log: what each viewer may see, what a frame accounts for, what has expired; and no oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from protocol import watermarks
from protocol.models import ConversationType, MessageStatus, StoredMessage
from tests.workers.seeding import Log
from workers.store.logs import PAGE_BYTES, Excerpt, NotVisible

if TYPE_CHECKING:
    from workers.store import Store

pytestmark = pytest.mark.anyio


def sequences(excerpt: Excerpt | NotVisible) -> list[int]:
    assert isinstance(excerpt, Excerpt)
    return [message.sequence_number for message in excerpt.messages]


def bounds(excerpt: Excerpt | NotVisible) -> tuple[int, int, bool, int | None]:
    """(from, to, has_more, expired_through)."""
    assert isinstance(excerpt, Excerpt)
    return excerpt.from_sequence, excerpt.to_sequence, excerpt.has_more, excerpt.expired_through


async def ten(store: Store) -> Log:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * 10)
    return log


# --- pages -----------------------------------------------------------------------------------------------------------


async def test_pages_follow_one_another_to_the_head(store: Store) -> None:
    log = await ten(store)
    first = await store.logs.page("b", "c", 0, 4)
    assert sequences(first) == [1, 2, 3, 4]
    assert bounds(first) == (1, 4, True, None)
    last = await store.logs.page("b", "c", 4, 6)
    assert sequences(last) == [5, 6, 7, 8, 9, 10]
    assert bounds(last) == (5, 10, False, None)
    assert isinstance(last, Excerpt)
    assert (last.head_sequence, last.head_digest, last.digest) == (10, log.digest, log.digest)


async def test_a_page_never_goes_past_the_end_of_a_stay_that_ends_while_it_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was removed between the two reads of a page was shown what was written after it. Simulator, seed 49."""
    log = await ten(store)
    read = store.logs._read

    async def leave_and_read(*args: Any, **options: Any) -> Any:
        await log.leave("b", 10)
        await log.append("a")
        return await read(*args, **options)

    monkeypatch.setattr(store.logs, "_read", leave_and_read)
    assert sequences(await store.logs.page("b", "c", 8, 100)) == [9, 10]


async def test_a_page_behind_the_head_is_empty_and_moves_nothing(store: Store) -> None:
    await ten(store)
    assert bounds(await store.logs.page("b", "c", 10, 100)) == (11, 10, False, None)


async def test_a_page_is_bounded_by_its_size_but_holds_at_least_one(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * 8, content="x" * (PAGE_BYTES // 4))
    page = await store.logs.page("b", "c", 0, 100)
    assert sequences(page) == [1, 2, 3, 4]
    assert bounds(page) == (1, 4, True, None)
    await log.append("a", content="y" * (2 * PAGE_BYTES))
    assert sequences(await store.logs.page("b", "c", 8, 100)) == [9]


async def test_a_page_over_expired_entries_says_so_and_moves_on(store: Store) -> None:
    log = await ten(store)
    await log.expire_through(4)
    page = await store.logs.page("b", "c", 1, 3)
    assert sequences(page) == [5, 6, 7]
    assert bounds(page) == (2, 7, True, 4)


async def test_a_page_of_nothing_but_expired_entries_moves_to_where_the_log_ended(store: Store) -> None:
    log = await ten(store)
    await log.flush()
    await log.expire_through(10)
    page = await store.logs.page("b", "c", 3, 100)
    assert sequences(page) == []
    assert bounds(page) == (4, 10, False, 10)


# --- retransmit ------------------------------------------------------------------------------------------------------


async def test_a_range_is_inclusive_and_names_the_head(store: Store) -> None:
    log = await ten(store)
    found = await store.logs.retransmit("b", "c", 2, 4)
    assert sequences(found) == [2, 3, 4]
    assert bounds(found) == (2, 4, False, None)
    assert isinstance(found, Excerpt)
    assert (found.head_sequence, found.head_digest) == (10, log.digest)


async def test_a_range_beyond_the_head_accounts_only_for_what_there_is(store: Store) -> None:
    await ten(store)
    assert bounds(await store.logs.retransmit("b", "c", 8, 20)) == (8, 10, False, None)
    assert bounds(await store.logs.retransmit("b", "c", 11, 20)) == (11, 10, False, None)


async def test_a_range_is_at_most_five_hundred_long(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * 510)
    found = await store.logs.retransmit("b", "c", 1, 2**53)
    assert sequences(found) == list(range(1, 501))
    assert bounds(found) == (1, 500, True, None)


async def test_a_range_is_bounded_by_its_size(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * 8, content="x" * (PAGE_BYTES // 4))
    assert bounds(await store.logs.retransmit("b", "c", 2, 7)) == (2, 5, True, None)


@pytest.mark.parametrize(
    ("asked", "found", "expired"),
    [((1, 10), [5, 6, 7, 8, 9, 10], 4), ((1, 3), [], 4), ((4, 5), [5], 4), ((5, 6), [5, 6], None)],
)
async def test_a_range_below_the_floor_says_what_expired(
    store: Store, asked: tuple[int, int], found: list[int], expired: int | None
) -> None:
    log = await ten(store)
    await log.expire_through(4)
    answer = await store.logs.retransmit("b", "c", *asked)
    assert sequences(answer) == found
    assert bounds(answer) == (*asked, False, expired)


async def test_a_range_of_a_log_that_expired_altogether(store: Store) -> None:
    log = await ten(store)
    await log.flush()
    await log.expire_through(10)
    assert bounds(await store.logs.retransmit("b", "c", 3, 20)) == (3, 10, False, 10)


# --- history ---------------------------------------------------------------------------------------------------------


async def test_history_goes_back_page_by_page_to_the_beginning(store: Store) -> None:
    await ten(store)
    newest = await store.logs.history("b", "c", 2**53, 4)
    assert sequences(newest) == [7, 8, 9, 10]
    assert bounds(newest) == (7, 10, True, None)
    assert sequences(await store.logs.history("b", "c", 7, 4)) == [3, 4, 5, 6]
    oldest = await store.logs.history("b", "c", 3, 4)
    assert sequences(oldest) == [1, 2]
    assert bounds(oldest) == (1, 2, False, None)
    assert bounds(await store.logs.history("b", "c", 1, 4))[2:] == (False, None)


async def test_history_ends_at_the_floor_and_says_so(store: Store) -> None:
    log = await ten(store)
    await log.expire_through(4)
    found = await store.logs.history("b", "c", 7, 4)
    assert sequences(found) == [5, 6]
    assert bounds(found) == (1, 6, False, 4)
    assert bounds(await store.logs.history("b", "c", 3, 4)) == (1, 2, False, 4)


async def test_history_is_bounded_by_its_size_from_the_newest(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * 8, content="x" * (PAGE_BYTES // 4))
    found = await store.logs.history("b", "c", 8, 100)
    assert sequences(found) == [4, 5, 6, 7]
    assert bounds(found) == (4, 7, True, None)


# --- who sees what ---------------------------------------------------------------------------------------------------


async def test_a_late_member_sees_nothing_from_before_and_is_not_told_it_expired(store: Store) -> None:
    log = await ten(store)
    await log.join("late", 6)
    assert sequences(await store.logs.page("late", "c", 0, 100)) == [6, 7, 8, 9, 10]
    assert bounds(await store.logs.page("late", "c", 0, 100)) == (1, 10, False, None)
    assert bounds(await store.logs.retransmit("late", "c", 1, 5)) == (1, 5, False, None)
    assert sequences(await store.logs.retransmit("late", "c", 1, 7)) == [6, 7]
    assert sequences(await store.logs.history("late", "c", 8, 100)) == [6, 7]
    assert sequences(await store.logs.history("late", "c", 6, 100)) == []
    await log.expire_through(4)
    assert bounds(await store.logs.retransmit("late", "c", 1, 7)) == (1, 7, False, None)


async def test_who_left_reads_up_to_where_they_left(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * 6)
    digest = log.digest
    await log.append(*["a"] * 4)
    await log.leave("b", 6)
    assert bounds(await store.logs.page("b", "c", 4, 100)) == (5, 6, False, None)
    found = await store.logs.retransmit("b", "c", 5, 10)
    assert sequences(found) == [5, 6]
    assert isinstance(found, Excerpt)
    assert (found.head_sequence, found.head_digest) == (6, digest)
    assert sequences(await store.logs.history("b", "c", 2**53, 2)) == [5, 6]


async def test_foreign_and_unknown_conversations_look_the_same(store: Store) -> None:
    await ten(store)
    for user, conversation in (("x", "c"), ("a", "nowhere"), ("a", "c\0"), ("a", "$where")):
        assert await store.logs.page(user, conversation, 0, 10) == NotVisible()
        assert await store.logs.retransmit(user, conversation, 1, 10) == NotVisible()
        assert await store.logs.history(user, conversation, 10, 10) == NotVisible()


async def test_only_the_sender_sees_the_idempotency_key_and_nobody_the_servers_own_fields(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "b")
    for user, keys in (("a", ["k1", None]), ("b", [None, "k2"])):
        found = await store.logs.page(user, "c", 0, 10)
        assert isinstance(found, Excerpt)
        assert [getattr(m, "idempotency_key", None) or None for m in found.messages] == keys
        assert all(type(message) is StoredMessage for message in found.messages)


async def test_the_status_of_a_message_follows_the_other_persons_marks(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create(ConversationType.ONE_TO_ONE)
    await log.append("a", "a", "a", "b")
    await log.mark("b", delivered=2, read=1, read_countable=1)
    found = await store.logs.history("a", "c", 2**53, 10)
    assert isinstance(found, Excerpt)
    sent, delivered, read = MessageStatus.SENT, MessageStatus.DELIVERED, MessageStatus.READ
    assert [message.status for message in found.messages] == [read, delivered, sent, sent]
    await log.mark("a", delivered=4)
    found = await store.logs.history("b", "c", 2**53, 1)
    assert isinstance(found, Excerpt)
    assert found.messages[0].status is delivered


async def test_in_a_group_all_who_could_see_it_decide(store: Store) -> None:
    log = await Log(store, "c", ["a", "b", "d"]).create()
    await log.append("a", "a")
    await log.join("late", 3)
    await log.append("system", "a")
    await log.mark("b", delivered=4, read=4, read_countable=3)
    await log.mark("d", delivered=2)
    found = await store.logs.page("a", "c", 0, 10)
    assert isinstance(found, Excerpt)
    assert [message.status.value for message in found.messages] == ["delivered", "delivered", "sent", "sent"]
    # Who comes later does not change what was delivered to those who were there.
    await log.mark("d", delivered=4, read=4, read_countable=3)
    found = await store.logs.page("a", "c", 0, 10)
    assert isinstance(found, Excerpt)
    assert [message.status.value for message in found.messages] == ["read", "read", "sent", "sent"]


async def test_the_digest_of_a_page_is_the_chain_over_what_it_shows(store: Store) -> None:
    await ten(store)
    digest = watermarks.NO_DIGEST
    for after in (0, 4, 8):
        page = await store.logs.page("b", "c", after, 4)
        assert isinstance(page, Excerpt)
        for message in page.messages:
            assert isinstance(message.message_id, str)
            digest = watermarks.chain_digest(
                digest,
                message.message_id,
                message.sender_id,
                message.sequence_number,
                watermarks.content_hash(message.content),
            )
        assert page.digest == digest


async def test_inbox_ids_are_dropped_once_delivered_expired_or_foreign(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a", "a", "a")
    other = await Log(store, "d", ["a", "x"]).create()
    await other.append("a")
    page = await store.logs.page("b", "c", 0, 10)
    foreign = await store.logs.page("x", "d", 0, 10)
    assert isinstance(page, Excerpt)
    assert isinstance(foreign, Excerpt)
    ids = [str(message.message_id) for message in page.messages]
    await log.mark("b", delivered=2)
    wanted = [*ids, str(foreign.messages[0].message_id), "msg_gone"]
    assert await store.logs.delivered_ids("b", wanted) == [*ids[:2], *wanted[3:]]
