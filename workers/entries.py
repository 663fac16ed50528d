"""Entries of the ingest streams as they come from Redis. Called by the broker, and by who looks at single entries."""

from __future__ import annotations

from typing import Any, NamedTuple

from protocol import keys


class StreamEntry(NamedTuple):
    """One ingest entry. `payload` is None where somebody trimmed it while it was pending. `letter_id`: the dead letter
    that it is a replay of, "" for what came from a client."""

    shard: int
    entry_id: bytes
    payload: bytes | None
    letter_id: str = ""


def entries_of(reply: Any) -> list[StreamEntry]:
    """The reply of a read of several shards."""
    entries = []
    for stream, items in reply or ():
        shard = int(stream[stream.rindex(b":") + 1 :])
        for entry_id, fields in items:
            if fields is not None and len(fields) == 2:
                entries.append(StreamEntry(shard, entry_id, fields[1]))
            else:
                entries.append(unusual_entry(shard, entry_id, fields))
    return entries


def unusual_entry(shard: int, entry_id: bytes, fields: list[bytes] | None) -> StreamEntry:
    """Trimmed while it was pending, or the replay of a dead letter."""
    named = dict(zip(fields[::2], fields[1::2], strict=False)) if fields else {}
    letter_id = named.get(keys.LETTER_FIELD, b"").decode(errors="replace")
    return StreamEntry(shard, entry_id, named.get(keys.FIELD), letter_id)
