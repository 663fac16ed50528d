"""One message, through all processes: where it lies now and whom it has reached. `python -m workers trace`, and REST
for the administrator.

It is looked for by its message id; or, before it has one, by its trace id, its idempotency key or its client's id. The
trace id is a hash of what names a message from the first moment (conversation, sender, key), so gateways and workers
can name it in their logs (level debug) without carrying anything. What a message says is not looked at.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from typing import TYPE_CHECKING, Final

import msgspec

from protocol import codec, keys, records
from protocol.models import SYSTEM_SENDER, DLQErrorType, DLQStatus
from workers import inspection
from workers.commands import open_seams, say
from workers.inspection import EntryState
from workers.plan import Entry
from workers.replay import key_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from protocol.models import DeadLetterQueueEntry
    from workers.broker import Broker
    from workers.entries import StreamEntry
    from workers.store import Store
    from workers.store.journeys import Journey
    from workers.store.messages import Key

ENTRIES_LIMIT: Final = 20_000
"""Entries looked at per shard: its high-water mark."""
LETTERS_LIMIT: Final = 20
PAGE: Final = 500


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """`python -m workers trace NAME`: print where it lies; 1 where nothing goes by that name."""
    parser = argparse.ArgumentParser(prog="python -m workers trace", description="Where is this message now?")
    parser.add_argument("name", help="message id, trace id, idempotency key or the client's own id")
    parser.add_argument("--conversation", default="", metavar="ID", help="with --sender: finds a key at once")
    parser.add_argument("--sender", default="", metavar="ID")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args(arguments)

    async def look(store: Store, broker: Broker) -> int:
        shards = (await inspection.condition(broker)).shards or keys.DEFAULT_SHARDS
        traces = await trace(store, broker, shards, args.name, args.conversation, args.sender)
        for found in traces:
            if args.json:
                say(msgspec.json.encode(found).decode())
                continue
            say(f"{found.trace_id}: key {found.idempotency_key} of {found.sender_id} in {found.conversation_id}")
            for line in found.story:
                say(f"  {line}")
        if not traces:
            say(
                f"{args.name}: nothing goes by that name (without --conversation and --sender a key is looked for 24 h)"
            )
        return int(not traces)

    return open_seams(environ, look)


class TracedEntry(msgspec.Struct, frozen=True):
    """A stream entry with this key. `owner`: the worker that holds the shard; empty: nobody reads it."""

    shard: int
    entry_id: str
    state: EntryState
    deliveries: int
    idle_ms: int
    owner: str
    client_message_id: str
    letter_id: str


class TracedMessage(msgspec.Struct, frozen=True):
    """Its document. `digest`: of the log up to it, hexadecimal."""

    message_id: str
    sequence_number: int
    message_type: str = msgspec.field(name="type")
    digest: str
    created_at: datetime
    is_deleted: bool


class TracedRecipient(msgspec.Struct, frozen=True):
    """A member who may see it. `cursors`: device → last sequence that it has confirmed. `online`: instances that hold
    connections now, one per device. `in_inbox`: its id waits for a device."""

    user_id: str
    is_sender: bool
    delivered: bool
    read: bool
    cursors: dict[str, int]
    online: list[str]
    in_inbox: bool


class TracedLetter(msgspec.Struct, frozen=True):
    letter_id: str
    status: DLQStatus
    error_type: DLQErrorType
    error: str
    retry_count: int
    next_retry_at: datetime | None


class Trace(msgspec.Struct, frozen=True):
    """All that is known of one message. `story`: the same in words, one line for each thing."""

    trace_id: str
    conversation_id: str
    sender_id: str
    idempotency_key: str
    shard: int
    story: list[str]
    entries: list[TracedEntry]
    message: TracedMessage | None
    recipients: list[TracedRecipient]
    dead_letters: list[TracedLetter]


async def trace(
    store: Store, broker: Broker, shards: int, name: str, conversation_id: str = "", sender_id: str = ""
) -> list[Trace]:
    """Every message that goes by this name: one for a message id, or with conversation and sender; for a key alone as
    many as used it. Raises StoreUnavailable, BrokerUnavailable.

    A key or trace id alone is looked for in the streams, in the dead letters and among the keys of the last 24 h.
    """
    found = await _keys_named(store, broker, shards, name, conversation_id, sender_id)
    return [await _trace_key(store, broker, shards, key) for key in found]


async def _keys_named(
    store: Store, broker: Broker, shards: int, name: str, conversation_id: str, sender_id: str
) -> list[Key]:
    if conversation_id and sender_id:
        return [(conversation_id, sender_id, name)]
    if name.startswith("msg_"):
        key = await store.journeys.key_of(name)
        if key is not None:
            return [key]
        letters = await store.dead_letters.of_message(name)
        return [key for letter in letters if (key := key_of(letter)) is not None]
    found: dict[Key, None] = {}
    async for entry in _named_entries(broker, range(shards), name):
        found[entry.key] = None
    for letter in await store.dead_letters.of_key(name, LETTERS_LIMIT):
        if (key := key_of(letter)) is not None:
            found[key] = None
    for key in await store.journeys.keys_like(name):
        if name in (key[2], _trace_id(key)):
            found[key] = None
    return [key for key in found if conversation_id in ("", key[0]) and sender_id in ("", key[1])]


def _trace_id(key: Key) -> str:
    """As `records.trace_of` makes it; the key of a change names its sender."""
    conversation_id, sender_id, name = key
    if sender_id == SYSTEM_SENDER and ":" in name:
        sender_id, _, name = name.partition(":")
    return keys.trace_id(conversation_id, sender_id, name)


async def _named_entries(broker: Broker, shards: Sequence[int] | range, name: str) -> AsyncIterator[Entry]:
    for shard in shards:
        async for entry in _entries(broker, shard):
            record = entry.record
            client_id = getattr(record, "client_message_id", "")
            if name in (entry.key[2], client_id, records.trace_of(record), getattr(record, "idempotency_key", "")):
                yield entry


async def _entries(broker: Broker, shard: int) -> AsyncIterator[Entry]:
    """What lies in a shard's stream for its log, as far as it can be read."""
    after = b"-"
    seen = 0
    while seen < ENTRIES_LIMIT:
        page: list[StreamEntry] = await inspection.entries(broker, shard, after, PAGE)
        for found in page:
            if found.payload is None:
                continue
            try:
                record = codec.decode_ingest(found.payload)
            except msgspec.DecodeError:
                continue
            if not isinstance(record, records.Receipts | records.Typing):
                yield Entry(shard, found.entry_id, record, redelivered=False, letter_id=found.letter_id)
        if len(page) < PAGE:
            return
        seen += len(page)
        after = b"(" + page[-1].entry_id


async def _trace_key(store: Store, broker: Broker, shards: int, key: Key) -> Trace:
    conversation_id, sender_id, name = key
    shard = keys.shard_of(conversation_id, shards)
    owner = await inspection.lease_owner(broker, shard)
    entries = []
    async for entry in _entries(broker, shard):
        if entry.key == key:
            standing = await inspection.entry_standing(broker, shard, entry.entry_id)
            entries.append(
                TracedEntry(
                    shard,
                    entry.entry_id.decode(),
                    standing.state,
                    standing.deliveries,
                    standing.idle_ms,
                    owner,
                    getattr(entry.record, "client_message_id", ""),
                    entry.letter_id,
                )
            )
    journey = await store.journeys.journey(key)
    letters = await _letters(store, key)
    recipients = [] if journey is None else await _recipients(broker, journey)
    message = None
    if journey is not None:
        message = TracedMessage(
            journey.message_id,
            journey.sequence_number,
            journey.message_type,
            journey.digest.hex(),
            journey.created_at,
            journey.is_deleted,
        )
    story = _story(entries, message, recipients, letters, owner)
    trace_id = _trace_id(key)
    return Trace(trace_id, conversation_id, sender_id, name, shard, story, entries, message, recipients, letters)


async def _recipients(broker: Broker, journey: Journey) -> list[TracedRecipient]:
    where = await broker.locate([member.user_id for member in journey.members])
    found = []
    for member in journey.members:
        in_inbox = await inspection.is_in_inbox(broker, member.user_id, journey.message_id)
        found.append(
            TracedRecipient(
                member.user_id,
                member.user_id == journey.sender_id,
                member.delivered_seq >= journey.sequence_number,
                member.read_seq >= journey.sequence_number,
                member.devices,
                list(where[member.user_id]),
                in_inbox,
            )
        )
    return found


async def _letters(store: Store, key: Key) -> list[TracedLetter]:
    own = key[2].partition(":")[2] if key[1] == SYSTEM_SENDER else ""
    found: dict[str, DeadLetterQueueEntry] = {}
    for name in {key[2], own} - {""}:
        for letter in await store.dead_letters.of_key(name, LETTERS_LIMIT):
            if key_of(letter) == key:
                found[str(letter.id)] = letter
    return [
        TracedLetter(
            name, letter.status, letter.error_type, letter.error[:200], letter.retry_count, letter.next_retry_at
        )
        for name, letter in found.items()
    ]


def _story(
    entries: Sequence[TracedEntry],
    message: TracedMessage | None,
    recipients: Sequence[TracedRecipient],
    letters: Sequence[TracedLetter],
    owner: str,
) -> list[str]:
    lines = [_entry_line(entry) for entry in entries]
    if not entries:
        lines.append("in no stream: it never came, or its entry was acknowledged and trimmed")
    if message is None:
        lines.append("not committed: nobody has an ack for it")
    else:
        at = f"{message.created_at:%Y-%m-%d %H:%M:%S}"
        lines.append(f"committed {at} as {message.message_id}, number {message.sequence_number}")
        is_told = not any(entry.state is not EntryState.ACKNOWLEDGED for entry in entries)
        lines.append(
            "its ack and deliveries were published" if is_told else "its ack and deliveries are being published"
        )
    lines += [_recipient_line(recipient) for recipient in recipients if not recipient.is_sender]
    lines += [
        f"dead letter {letter.letter_id}: {letter.status}, {letter.retry_count} retries: {letter.error}"
        for letter in letters
    ]
    if not owner and (message is None or entries):
        lines.append("nobody owns its shard: is a worker with the role ingest running?")
    return lines


def _entry_line(entry: TracedEntry) -> str:
    where = f"entry {entry.entry_id} of shard {entry.shard}"
    if entry.letter_id:
        where += f" (replay of {entry.letter_id})"
    match entry.state:
        case EntryState.WAITING:
            return f"{where} waits to be read"
        case EntryState.PENDING:
            held = f"{where} was read {entry.deliveries} times, last {entry.idle_ms / 1000:.1f} s ago"
            return f"{held}, and is not decided; its shard's owner is {entry.owner or 'nobody'}"
        case _:
            return f"{where} is acknowledged"


def _recipient_line(recipient: TracedRecipient) -> str:
    reached = "read" if recipient.read else "delivered" if recipient.delivered else "not delivered"
    online = f"online at {', '.join(sorted(set(recipient.online)))}" if recipient.online else "offline"
    cursors = ", ".join(f"{device} has {cursor}" for device, cursor in sorted(recipient.cursors.items()))
    waits = ", in the inbox" if recipient.in_inbox else ""
    return f"to {recipient.user_id}: {reached}; {online}{waits}{'; ' + cursors if cursors else ''}"
