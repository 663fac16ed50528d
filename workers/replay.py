"""What is done about a dead letter: replayed, or resolved by somebody's word. One way for the role `retry`, for REST
and for the command line.

A replay is a claim with a lease, then the same bytes appended to the same shard. What becomes of it is decided by the
shard's owner (`dead_letters.py`); a try nobody heard of again is tried again when its lease has ended.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import UNSET

from protocol import codec, records
from protocol.models import SYSTEM_SENDER, DeadLetterQueueEntry, DLQStatus
from workers.broker import Broker, BrokerUnavailable

if TYPE_CHECKING:
    from workers.store import Store
    from workers.store.messages import Key

LEASE_SECONDS: Final = 60.0
"""Reliability.md section 10.5: no letter is `retrying` for longer without anybody working at it."""
BROKER_AWAY_SECONDS: Final = 1.0
"""How long a letter waits that Redis did not take."""


class Replayed(msgspec.Struct, frozen=True):
    """It is in its shard's stream again, or was found in the log already (`is_resolved`)."""

    letter: DeadLetterQueueEntry
    is_resolved: bool = False


class Unknown(msgspec.Struct, frozen=True):
    """There is no such letter."""


class Refused(msgspec.Struct, frozen=True):
    """It is not to be replayed, or resolved, now; why."""

    reason: str


class Foreseen(msgspec.Struct, frozen=True):
    """What a replay would do. `would`: append, resolve or refuse."""

    would: str
    because: str
    shard: int | None = None
    size_bytes: int = 0


async def replay(store: Store, broker: Broker, letter_id: str, now: datetime) -> Replayed | Unknown | Refused:
    """Try a letter again now. Of two who ask at once, one is refused.

    Raises StoreUnavailable, BrokerUnavailable: it may be in the stream; asking again is safe.
    """
    lease_until = now + timedelta(seconds=LEASE_SECONDS)
    before = await store.dead_letters.claim(letter_id, now, lease_until)
    if before is None:
        letter = await store.dead_letters.get(letter_id)
        return Unknown() if letter is None else Refused(_why_not(letter))
    return await append(store, broker, before, now, lease_until)


async def append(
    store: Store, broker: Broker, before: DeadLetterQueueEntry, now: datetime, lease_until: datetime
) -> Replayed | Refused:
    """Bring a claimed letter, as it was `before`, into its stream. Raises as `replay`; the claim is given back then."""
    assert isinstance(before.id, str)
    try:
        if await _is_placed(store, before):
            await store.dead_letters.resolve(before.id, "its message is in the log", now)
            return Replayed(msgspec.structs.replace(before, status=DLQStatus.RESOLVED), is_resolved=True)
        if not isinstance(before.raw, bytes) or not isinstance(before.shard, int):
            await store.dead_letters.give_back(
                msgspec.structs.replace(before, next_retry_at=None), lease_until, lease_until
            )
            return Refused("it holds no bytes to replay")
        await broker.append_replay(before.shard, before.raw, before.id)
    except BrokerUnavailable:
        again = now + timedelta(seconds=BROKER_AWAY_SECONDS)
        await store.dead_letters.give_back(before, lease_until, again)
        raise
    return Replayed(msgspec.structs.replace(before, status=DLQStatus.RETRYING, next_retry_at=lease_until))


async def resolve(store: Store, letter_id: str, reason: str, now: datetime) -> Unknown | Refused | None:
    """Nothing more is to be done about a letter, by somebody's word. None when that is so now. Raises
    StoreUnavailable."""
    if await store.dead_letters.close(letter_id, reason, now):
        return None
    letter = await store.dead_letters.get(letter_id)
    if letter is None:
        return Unknown()
    if letter.status is DLQStatus.RESOLVED:
        return Refused("it is resolved already")
    return Refused("it is being replayed; look again in a minute")


async def foresee(store: Store, letter: DeadLetterQueueEntry, now: datetime) -> Foreseen:
    """What a replay of this letter would do now; does nothing. Raises StoreUnavailable."""
    is_under_way = letter.status is DLQStatus.RETRYING and letter.next_retry_at is not None
    if letter.status is DLQStatus.RESOLVED or letter.refused_at is not UNSET:
        return Foreseen("refuse", _why_not(letter))
    if is_under_way and letter.next_retry_at is not None and letter.next_retry_at > now:
        return Foreseen("refuse", _why_not(letter))
    if await _is_placed(store, letter):
        return Foreseen("resolve", "a message with its key is in the log")
    if not isinstance(letter.raw, bytes) or not isinstance(letter.shard, int):
        return Foreseen("refuse", "it holds no bytes to replay")
    return Foreseen("append", await _expectation(store, letter, letter.raw), letter.shard, len(letter.raw))


async def _expectation(store: Store, letter: DeadLetterQueueEntry, raw: bytes) -> str:
    """What the owner will make of it, as far as can be told from here."""
    if isinstance(letter.idempotency_key, str) and letter.next_retry_at is None and letter.message is UNSET:
        return "its owner decides again, with its original key"
    try:
        record = codec.decode_ingest(raw)
    except msgspec.DecodeError as error:
        return f"its bytes still cannot be read here ({error}), so it would come back"
    if not isinstance(record, records.SendMessage):
        return f"it is a {type(record).__name__}; its owner decides again, with its original key"
    if await store.memberships.role(record.conversation_id, record.sender_id) is None:
        return "its sender is not in the conversation (any more), so its owner would reject it"
    return "its owner commits it with its original key and the next number of its conversation"


def key_of(letter: DeadLetterQueueEntry) -> Key | None:
    """The key of the log entry that a letter would become; None where that is not known."""
    conversation_id, sender_id, key = letter.conversation_id, letter.sender_id, letter.idempotency_key
    if not isinstance(conversation_id, str) or not isinstance(sender_id, str) or not isinstance(key, str):
        return None
    if letter.message is UNSET and sender_id != SYSTEM_SENDER:
        return conversation_id, SYSTEM_SENDER, f"{sender_id}:{key}"
    return conversation_id, sender_id, key


async def _is_placed(store: Store, letter: DeadLetterQueueEntry) -> bool:
    key = key_of(letter)
    return key is not None and bool(await store.messages.find_keys([key]))


def _why_not(letter: DeadLetterQueueEntry) -> str:
    if letter.status is DLQStatus.RESOLVED:
        return "it is resolved already"
    if letter.refused_at is not UNSET:
        return "its sender was told that it failed; resolve it instead"
    return "it is being replayed; look again in a minute"
