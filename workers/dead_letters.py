"""Dead letters as a shard's owner knows them: records that cannot succeed now for their own reason.

Called by a lane of the ingest role, before it commits (`sift`), when an entry fails (`bury`), and after a commit
(`settle`). A letter is written before its entry is acknowledged. Until it is resolved, a retry of its sender is not
committed behind its back: pending and retrying answer `queued_for_retry`, failed is final, and is never replayed once a
sender has been told so. So no key has both an ack and a permanent error (I10), and a late success takes the next number
of its log. Where no letter is known in a lane's shards, nothing of this costs anything.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import msgspec
import structlog

from protocol import codec, records
from protocol.errors import ErrorCode
from protocol.models import (
    DeadLetterQueueEntry,
    DLQErrorType,
    DLQStatus,
    MessageStatus,
    StoredMessage,
    to_document,
)
from workers import metrics
from workers.broker import BrokerUnavailable
from workers.outcomes import refused
from workers.plan import Entry, Plan
from workers.store.errors import StoreUnavailable
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from datetime import datetime

    from workers.entries import StreamEntry
    from workers.store.dead_letters import DeadLetterStore
    from workers.store.messages import MessageStore

Outcomes = list[tuple[str, records.DownItem]]
Result = TypeVar("Result")

DEAD_LETTER_DAYS: Final = 7
MAX_RETRIES: Final = 5
FIRST_RETRY_SECONDS: Final = 0.1
LONGEST_RETRY_SECONDS: Final = 300.0
_JITTER: Final = 0.2
"""Reliability.md section 10.5: 100 ms × 2^n, at most 5 minutes, ±20 %."""
WAITING_RETRY_MS: Final = 30_000
"""What a sender is told to wait while a person has to look."""
_LONGEST_WAIT_SECONDS: Final = 2.0

log = structlog.get_logger()


def dead_letter_id(*parts: str) -> str:
    """One dead letter per (conversation, sender, key), or per (stream, entry id) of what could not be read."""
    return "dlq_" + blake2b("\0".join(parts).encode(), digest_size=14).hexdigest()


def letter_id_of(entry: Entry) -> str:
    """The letter of an entry. To look at an account has no key of its own, so there each entry counts."""
    if isinstance(entry.record, records.LookAtAccount):
        return dead_letter_id(str(entry.shard), entry.entry_id.decode())
    return dead_letter_id(*entry.key)


def retry_at(now: datetime, retries: int) -> datetime:
    """When to try again after so many retries."""
    seconds = min(FIRST_RETRY_SECONDS * 2**retries, LONGEST_RETRY_SECONDS)
    return now + timedelta(seconds=seconds * random.uniform(1 - _JITTER, 1 + _JITTER))


def error_type_of(error: Exception) -> DLQErrorType:
    """What kind of failure an exception is that nobody foresaw."""
    match error:
        case TimeoutError():
            return DLQErrorType.TIMEOUT
        case StoreUnavailable():
            return DLQErrorType.STORAGE_FAILED
        case BrokerUnavailable():
            return DLQErrorType.BROKER_PUBLISH_FAILED
        case msgspec.MsgspecError():
            return DLQErrorType.VALIDATION_FAILED
        case OSError():
            return DLQErrorType.NETWORK_ERROR
        case _:
            return DLQErrorType.UNKNOWN


def _letter(
    shard: int, raw: bytes, reason: str, error_type: DLQErrorType, now_ms: int, next_retry_at: datetime | None
) -> DeadLetterQueueEntry:
    now = from_ms(now_ms)
    return DeadLetterQueueEntry(
        raw=raw,
        shard=shard,
        error=reason[:1000],
        error_type=error_type,
        retry_count=0,
        max_retries=MAX_RETRIES,
        next_retry_at=next_retry_at,
        created_at=now,
        last_retry_at=None,
        status=DLQStatus.PENDING,
        expires_at=now + timedelta(days=DEAD_LETTER_DAYS),
    )


def unread_letter(shard: int, raw: bytes, reason: str, error_type: DLQErrorType, now_ms: int) -> dict[str, Any]:
    """The document, without its id, of bytes that nobody could read. It waits for a person: bytes do not mend."""
    return to_document(_letter(shard, raw, reason, error_type, now_ms, None))


def letter_of(
    entry: Entry, raw: bytes, reason: str, error_type: DLQErrorType, now_ms: int, next_retry_at: datetime | None
) -> dict[str, Any]:
    """The document, without its id, of an entry."""
    record = entry.record
    conversation_id, sender_id, key = entry.key
    letter = msgspec.structs.replace(
        _letter(entry.shard, raw, reason, error_type, now_ms, next_retry_at),
        conversation_id=conversation_id,
        sender_id=record.sender_id if isinstance(record, records.ChangeMessage) else sender_id,
        idempotency_key=record.idempotency_key if isinstance(record, records.ChangeMessage) else key,
        message=_unplaced(record, entry.message_id, now_ms)
        if isinstance(record, records.SendMessage)
        else msgspec.UNSET,
    )
    return to_document(letter)


def _unplaced(record: records.SendMessage, message_id: str, now_ms: int) -> StoredMessage:
    """A message that got no place in its log: sequence 0."""
    return StoredMessage(
        message_id=message_id or msgspec.UNSET,
        idempotency_key=record.idempotency_key,
        conversation_id=record.conversation_id,
        sequence_number=0,
        sender_id=record.sender_id,
        receiver_id=record.receiver_id,
        message_type=record.message_type,
        content=record.content,
        media_url=msgspec.UNSET if record.media_url is None else record.media_url,
        reply_to_message_id=msgspec.UNSET if record.reply_to_message_id is None else record.reply_to_message_id,
        timestamp=from_ms(record.timestamp),
        status=MessageStatus.SENT,
        created_at=from_ms(now_ms),
    )


class _Known:
    """Letters that are, or were lately, in the way; the store knows which of the two. The id of an entry's letter is a
    hash: it is made only where the conversation has a letter."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, str]] = {}
        self._letters: Counter[str] = Counter()
        """Conversation → letters."""

    def __bool__(self) -> bool:
        return bool(self._places)

    def names(self, entry: Entry) -> bool:
        """Is there a letter of what this entry asks for?"""
        return entry.conversation_id in self._letters and letter_id_of(entry) in self._places

    def add(self, letter_id: str, shard: int, conversation_id: str) -> None:
        if letter_id not in self._places:
            self._places[letter_id] = (shard, conversation_id)
            self._letters[conversation_id] += 1

    def drop(self, letter_id: str) -> None:
        place = self._places.pop(letter_id, None)
        if place is not None:
            self._letters[place[1]] -= 1
            if not self._letters[place[1]]:
                del self._letters[place[1]]

    def keep(self, shards: frozenset[int]) -> None:
        """Forget those of other shards."""
        self._places = {name: place for name, place in self._places.items() if place[0] in shards}
        self._letters = Counter(conversation_id for _, conversation_id in self._places.values())


class DeadLetters:
    """The letters of one lane's shards. `load` before the first entry of a shard is taken."""

    def __init__(self, letters: DeadLetterStore, messages: MessageStore) -> None:
        self._letters = letters
        self._messages = messages
        self._known = _Known()

    async def load(self, shards: Iterable[int]) -> None:
        """These shards are the lane's now. Raises StoreUnavailable."""
        for letter_id, shard, conversation_id in await self._letters.of_shards(shards):
            self._known.add(letter_id, shard, conversation_id)

    def forget_shards(self, kept: frozenset[int]) -> None:
        """The others are another owner's now."""
        self._known.keep(kept)

    # --- before a commit ---------------------------------------------------------------------------------------------

    async def sift(self, batch: list[Entry], now_ms: int) -> tuple[list[Entry], Outcomes]:
        """The entries that may be committed, and what the senders of the others are told. Waits for the store."""
        if not self._known and not any(entry.letter_id for entry in batch):
            return batch, []
        doubtful = [entry for entry in batch if entry.letter_id or self._known.names(entry)]
        if not doubtful:
            return batch, []
        named = {entry.entry_id: letter_id_of(entry) for entry in doubtful}
        wanted = {entry.letter_id or named[entry.entry_id] for entry in doubtful}
        letters = await _insist(self._letters.by_ids, wanted)
        placed = await _insist(self._messages.find_keys, [entry.key for entry in doubtful])
        outcomes: Outcomes = []
        held: set[int] = set()
        for entry in doubtful:
            letter = letters.get(entry.letter_id or named[entry.entry_id])
            if entry.letter_id:
                if letter is None or letter.status is not DLQStatus.RETRYING:
                    # An older try: its letter has been decided since.
                    held.add(id(entry))
            elif not await self._may_go_on(letter, named[entry.entry_id], entry.key in placed, now_ms):
                assert letter is not None
                held.add(id(entry))
                outcomes += await self._held(entry, letter, now_ms)
        return [entry for entry in batch if id(entry) not in held], outcomes

    async def _may_go_on(
        self, letter: DeadLetterQueueEntry | None, letter_id: str, is_placed: bool, now_ms: int
    ) -> bool:
        """Is the letter no longer in the way of its sender's retry?"""
        if letter is not None and is_placed:
            # Committed after all, by an owner who died before it could say so.
            await _insist(self._letters.resolve, letter_id, "its message is in the log", from_ms(now_ms))
        is_settled = letter is None or (letter.status is DLQStatus.RESOLVED and letter.refused_at is msgspec.UNSET)
        if is_placed or is_settled:
            self._known.drop(letter_id)
            return True
        return False

    async def _held(self, entry: Entry, letter: DeadLetterQueueEntry, now_ms: int) -> Outcomes:
        """What the sender of a retry is told: final once the letter says so, and then for ever."""
        now = from_ms(now_ms)
        is_final = letter.status in (DLQStatus.FAILED, DLQStatus.RESOLVED)
        letter_id = letter_id_of(entry)
        if is_final and await _insist(self._letters.refuse, letter_id, now):
            return _told(entry.record, ErrorCode.VALIDATION_FAILED, "the message cannot be stored")
        waits = WAITING_RETRY_MS
        if letter.next_retry_at is not None:
            waits = max(100, int((letter.next_retry_at - now).total_seconds() * 1000))
        return _queued(entry.record, waits)

    # --- an entry fails ----------------------------------------------------------------------------------------------

    async def bury(
        self, batch: list[Entry], entry: Entry, reason: str, error_type: DLQErrorType, now_ms: int
    ) -> Outcomes:
        """Take an entry that failed for its own reason, and its repeats, out of `batch`; returns what their senders are
        told. Waits for the store."""
        metrics.INGESTED.labels("dead_letter").inc()
        now = from_ms(now_ms)
        if entry.letter_id:
            await self.fail_try(entry.letter_id, reason, error_type, now)
            batch.remove(entry)
            return []  # its sender knows that it is queued
        raw = codec.encode_record(entry.record)
        letter = letter_of(entry, raw, reason, error_type, now_ms, retry_at(now, 0))
        letter_id = letter_id_of(entry)
        await _insist(self._letters.bury, letter_id, letter)
        if not isinstance(entry.record, records.LookAtAccount):
            self._known.add(letter_id, entry.shard, entry.conversation_id)
        log.error("entry_buried", letter=letter_id, conversation_id=entry.conversation_id, reason=reason[:200])
        twins = [other for other in batch if other is entry or letter_id_of(other) == letter_id]
        for twin in twins:
            batch.remove(twin)
        return [outcome for twin in twins for outcome in _queued(twin.record, int(FIRST_RETRY_SECONDS * 2000))]

    async def fail_try(
        self, letter_id: str, reason: str, error_type: DLQErrorType, now: datetime, *, mends: bool = True
    ) -> None:
        """A replay failed as its record did before. `mends`: time alone may help, so it is tried again by itself until
        it has failed `max_retries` times."""
        letter = (await _insist(self._letters.by_ids, [letter_id])).get(letter_id)
        if letter is None:
            return
        status, next_retry_at = DLQStatus.PENDING, None
        if mends and letter.retry_count >= letter.max_retries:
            status = DLQStatus.FAILED
        elif mends:
            next_retry_at = retry_at(now, letter.retry_count)
        await _insist(self._letters.fail_try, letter_id, reason[:1000], error_type, status, next_retry_at)
        metrics.REPLAYS.labels("failed").inc()
        log.warning("replay_failed", letter=letter_id, status=status.value, reason=reason[:200])

    async def bury_unread(self, entry: StreamEntry, reason: str, error_type: DLQErrorType, now_ms: int) -> str:
        """An entry that nobody can read, or that nobody survived reading; returns its letter's id. Waits for the
        store."""
        metrics.INGESTED.labels("dead_letter").inc()
        if entry.letter_id:
            await self.fail_try(entry.letter_id, reason, error_type, from_ms(now_ms), mends=False)
            return entry.letter_id
        assert entry.payload is not None
        letter_id = dead_letter_id(str(entry.shard), entry.entry_id.decode())
        letter = unread_letter(entry.shard, entry.payload, reason, error_type, now_ms)
        await _insist(self._letters.bury, letter_id, letter)
        log.error("entry_buried", letter=letter_id, shard=entry.shard, reason=reason[:200])
        return letter_id

    async def name(self, letter_id: str, entry: StreamEntry, reason: str, now_ms: int) -> Outcomes:
        """Read what was buried unread, so that its sender's retries are known for what they are. Only when the entry
        has left the stream: reading it may end this process."""
        assert entry.payload is not None
        try:
            record = codec.decode_ingest(entry.payload)
        except msgspec.DecodeError:
            return []
        if isinstance(record, records.Receipts | records.Typing | records.LookAtAccount):
            return []
        named = Entry(entry.shard, entry.entry_id, record, redelivered=True)
        if await _insist(self._messages.find_keys, [named.key]):
            await _insist(self._letters.resolve, letter_id, "its message is in the log", from_ms(now_ms))
            return []
        letter = letter_of(named, entry.payload, reason, DLQErrorType.UNKNOWN, now_ms, None)
        known_id = letter_id_of(named)
        await _insist(self._letters.bury, known_id, letter)
        await _insist(self._letters.remove, letter_id)
        self._known.add(known_id, entry.shard, named.conversation_id)
        log.warning("letter_named", letter=known_id, before=letter_id)
        return _queued(record, WAITING_RETRY_MS)

    # --- after a commit ----------------------------------------------------------------------------------------------

    async def settle(self, batch: Sequence[Entry], plan: Plan, now_ms: int) -> None:
        """Replays that were decided: their letters are resolved, or have failed for good. Waits for the store."""
        replays = [entry for entry in batch if entry.letter_id]
        now = from_ms(now_ms)
        for entry in replays:
            letter_id = entry.letter_id
            why = next((why for record, why in plan.rejected if record is entry.record), None)
            if why is not None:
                reason = f"{why.code}: {why.message}"
                await _insist(self._letters.reject_try, letter_id, reason, now)
                self._known.add(letter_id_of(entry), entry.shard, entry.conversation_id)
                metrics.REPLAYS.labels("rejected").inc()
                log.warning("replay_rejected", letter=letter_id, reason=reason)
                continue
            place = plan.known.get(entry.key)
            reason = "done" if place is None else f"committed as {place.message_id}, number {place.sequence_number}"
            await _insist(self._letters.resolve, letter_id, reason, now)
            self._known.drop(letter_id)
            metrics.REPLAYS.labels("resolved").inc()
            log.info("replay_committed", letter=letter_id, reason=reason)

    async def settle_unlogged(self, letter_id: str, now_ms: int) -> None:
        """A replay that turned out to be nothing for the log (receipts, typing) was taken. Waits for the store."""
        await _insist(self._letters.resolve, letter_id, "done", from_ms(now_ms))


def _queued(record: records.LogRecord, retry_after_ms: int) -> Outcomes:
    """It is not lost, and not committed. REST knows no such code for a command: there it is undecided."""
    if isinstance(record, records.SendMessage | records.ChangeMessage):
        reason = "not stored now; it is tried again, and so may you with the same key"
        return [refused(record, ErrorCode.QUEUED_FOR_RETRY, reason, retry_after_ms)]
    return _told(record, ErrorCode.STORAGE_UNAVAILABLE, "not done now; it is tried again")


def _told(record: records.LogRecord, code: ErrorCode, reason: str) -> Outcomes:
    if isinstance(record, records.SendMessage | records.ChangeMessage):
        return [refused(record, code, reason)]
    if isinstance(record, records.LookAtAccount):
        return []
    return [(record.instance, records.CommandOutcome(record.request, code, reason, b""))]


async def _insist(ask: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
    """An entry stays pending until the store has said what it must say."""
    seconds = 0.1
    while True:
        try:
            return await ask(*arguments)
        except StoreUnavailable as error:
            log.warning("dead_letters_wait", error=str(error)[:200])
            await anyio.sleep(seconds)
            seconds = min(seconds * 2, _LONGEST_WAIT_SECONDS)
