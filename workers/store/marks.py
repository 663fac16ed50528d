"""The coalesced flush: watermarks and device cursors of members, and how far each conversation's flush reaches.

Called by the ingest role's flusher. Everything is a maximum, so repeating, reordering or losing a flush never moves a
mark backwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pymongo import UpdateOne

from workers.store.conversations import escape_device
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


CHUNK = 64
"""Updates per command: encoding one costs the event loop about 15 us, and a commit must not wait for many."""


class Mark(NamedTuple):
    """One member's watermarks; `devices`: those cursors that moved; `shown_read_seq`: see `Membership`."""

    conversation_id: str
    user_id: str
    delivered_seq: int
    read_seq: int
    read_countable: int
    devices: dict[str, int]
    shown_read_seq: int | None = None


class HeadMark(NamedTuple):
    """All marks caused by messages up to `sequence_number` are flushed. `active_at`: when the conversation was last
    active, None where nothing but changes of its messages came."""

    conversation_id: str
    sequence_number: int
    countable: int
    digest: bytes
    created_at: datetime
    active_at: datetime | None


class MarkStore:
    """Writers of `memberships` marks, `sequence_numbers` and `conversations.last_*`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._memberships = database["memberships"]
        # With majority, once a second: the gateways' sweep knows the ends of logs from here, and one that a failover
        # took back would be missing until somebody spoke there again.
        self._sequences = database["sequence_numbers"]
        self._conversations = database["conversations"]

    async def flush_marks(self, marks: Sequence[Mark]) -> None:
        """Raise the members' marks, majority-journalled: their stream entries are acknowledged after this. Raises
        StoreUnavailable.
        """
        operations = []
        for mark in marks:
            maxima: Document = {
                "delivered_seq": mark.delivered_seq,
                "read_seq": mark.read_seq,
                "read_countable": mark.read_countable,
            }
            if mark.shown_read_seq is not None:
                # In the same update as the real mark: nobody sees a moment when what is hidden shows.
                maxima["shown_read_seq"] = mark.shown_read_seq
            for device_id, sequence in mark.devices.items():
                maxima[f"devices.{escape_device(device_id)}"] = sequence
            operations.append(UpdateOne({"_id": f"{mark.conversation_id}:{mark.user_id}"}, {"$max": maxima}))
        with store_errors():
            for chunk in _chunks(operations):
                await self._memberships.bulk_write(chunk, ordered=False)

    async def flush_heads(self, heads: Sequence[HeadMark]) -> None:
        """Raise `sequence_numbers` and `conversations.last_*`, after the marks of those messages. Raises
        StoreUnavailable.
        """
        if not heads:
            return
        sequences = []
        conversations = []
        for head in heads:
            # One update for all four: a smaller sequence never overwrites a greater one's digest.
            newer = {"_id": head.conversation_id, "last_sequence_number": {"$lt": head.sequence_number}}
            values = {
                "last_sequence_number": head.sequence_number,
                "countable": head.countable,
                "digest": head.digest,
                "updated_at": head.created_at,
            }
            sequences.append(UpdateOne(newer, {"$set": values}))
            maxima: Document = {"last_sequence_number": head.sequence_number}
            if head.active_at is not None:
                maxima["last_message_at"] = head.active_at
            conversations.append(UpdateOne({"_id": head.conversation_id}, {"$max": maxima}))
        with store_errors():
            for chunk in _chunks(sequences):
                await self._sequences.bulk_write(chunk, ordered=False)
            for chunk in _chunks(conversations):
                await self._conversations.bulk_write(chunk, ordered=False)


def _chunks(operations: Sequence[UpdateOne]) -> Iterator[Sequence[UpdateOne]]:
    for start in range(0, len(operations), CHUNK):
        yield operations[start : start + CHUNK]
