"""Reads of a conversation's log: backlog pages, ranges, history, each as its viewer may see it.

Called by the query and REST roles. Each answer is of one snapshot of what a majority holds: a membership and a log read
one after the other would show what was written after somebody had been removed. A log has no hole but the one at its
start, where messages have expired; so what is missing in front of the first entry found is gone for good, and the
answer says so.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from protocol import watermarks
from protocol.models import StoredMessage
from workers.store.audience import Audience
from workers.store.errors import store_errors
from workers.store.indexes import SEQUENCE_INDEX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

PAGE_BYTES: Final = 256 * 1024
"""Content of one answer: a quarter of a connection's outbox (protocol.md, "Slow and fast clients")."""
SPAN: Final = 500
"""Longest range of one `retransmit` (protocol.md)."""
_END: Final = 2**53
"""Greater than any sequence (`protocol.models.Sequence`)."""
_MARKS: Final = dict.fromkeys(("user_id", "join_seq", "leave_seq", "delivered_seq", "read_seq", "shown_read_seq"), 1)


class NotVisible(msgspec.Struct, frozen=True):
    """The user is not and never was a member, or there is no such conversation. Which of the two is not told."""


class Excerpt(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a log as one viewer sees it, ascending.

    It accounts for `from_sequence`..`to_sequence` (empty when the first is greater): what is not in `messages` there is
    invisible to the viewer or expired. `digest` is the chain at `to_sequence` where that is a stored
    entry. `head_sequence`/`head_digest`: the last entry the viewer may see.
    """

    messages: list[StoredMessage]
    from_sequence: int
    to_sequence: int
    has_more: bool
    expired_through: int | None
    digest: bytes
    head_sequence: int
    head_digest: bytes


class _Head(NamedTuple):
    sequence_number: int
    digest: bytes


class LogReader:
    """Readers of `messages`. Every method answers NotVisible or an Excerpt, and raises StoreUnavailable."""

    def __init__(self, client: AsyncMongoClient[Document], database: AsyncDatabase[Document]) -> None:
        self._client = client
        self._messages = database["messages"]
        self._memberships = database["memberships"]
        self._sequences = database["sequence_numbers"]

    async def page(self, user_id: str, conversation_id: str, after: int, limit: int) -> Excerpt | NotVisible:
        """The next `limit` messages after a sequence. `head_*` is the end of the page, the log's on the last one."""
        async with self._snapshot() as session:
            audience = await self._audience(user_id, conversation_id, session)
            if audience is None:
                return NotVisible()
            low, last = max(after + 1, audience.first), audience.last(_END)
            documents, more = await self._read(conversation_id, low, last, limit, session)
            if not documents and low <= last:
                # What is counted was committed, so entries up to there that are missing have expired.
                counted = min(await self._counted(conversation_id, session), last)
                if counted >= low:
                    return _empty(after + 1, counted, counted, _Head(counted, watermarks.NO_DIGEST))
        if not documents:
            return _empty(after + 1, after, None, _Head(after, watermarks.NO_DIGEST))
        end = _Head(documents[-1]["sequence_number"], documents[-1]["digest"])
        return Excerpt(
            messages=[audience.show(document) for document in documents],
            from_sequence=after + 1,
            to_sequence=end.sequence_number,
            has_more=more,
            expired_through=_expired(documents, low),
            digest=end.digest,
            head_sequence=end.sequence_number,
            head_digest=end.digest,
        )

    async def retransmit(
        self, user_id: str, conversation_id: str, from_sequence: int, to_sequence: int
    ) -> Excerpt | NotVisible:
        """An inclusive range again, at most 500 long. What is behind the head is not accounted for: it may yet come."""
        async with self._snapshot() as session:
            audience = await self._audience(user_id, conversation_id, session)
            if audience is None:
                return NotVisible()
            head = await self._head(conversation_id, audience, session)
            asked = min(to_sequence, head.sequence_number)
            high = min(asked, from_sequence + SPAN - 1)
            low = max(from_sequence, audience.first)
            documents, more = await self._read(conversation_id, low, high, SPAN, session)
            expired = _expired(documents, low)
            if not documents and low <= high:
                expired = await self._floor(conversation_id, high, session) - 1
        end = documents[-1]["sequence_number"] if more else max(high, from_sequence - 1)
        return Excerpt(
            messages=[audience.show(document) for document in documents],
            from_sequence=from_sequence,
            to_sequence=end,
            has_more=end < asked,
            expired_through=expired,
            digest=_digest_at(documents, end),
            head_sequence=head.sequence_number,
            head_digest=head.digest,
        )

    async def history(self, user_id: str, conversation_id: str, before: int, limit: int) -> Excerpt | NotVisible:
        """The `limit` messages before a sequence. `has_more`: the log goes on before them."""
        async with self._snapshot() as session:
            audience = await self._audience(user_id, conversation_id, session)
            if audience is None:
                return NotVisible()
            head = await self._head(conversation_id, audience, session)
            low, high = audience.first, min(before - 1, head.sequence_number)
            documents, more = await self._read(conversation_id, low, high, limit, session, backwards=True)
            expired = None if more else _expired(documents, low)
            if not documents and low <= high:
                expired = await self._floor(conversation_id, high, session) - 1
        return Excerpt(
            messages=[audience.show(document) for document in documents],
            from_sequence=documents[0]["sequence_number"] if more else min(low, high + 1),
            to_sequence=high,
            has_more=more,
            expired_through=expired,
            digest=_digest_at(documents, high),
            head_sequence=head.sequence_number,
            head_digest=head.digest,
        )

    async def delivered_ids(self, user_id: str, message_ids: Sequence[str]) -> list[str]:
        """Those of the ids that no longer wait for this user: delivered, expired, or in no conversation of theirs."""
        fields = {"conversation_id": 1, "sequence_number": 1}
        with store_errors():
            found = await self._messages.find({"_id": {"$in": list(message_ids)}}, fields).to_list()
            names = list({document["conversation_id"] for document in found})
            wanted = {"user_id": user_id, "conversation_id": {"$in": names}}
            delivered = {
                member["conversation_id"]: member["delivered_seq"]
                async for member in self._memberships.find(wanted, {"conversation_id": 1, "delivered_seq": 1})
            }
        waiting = {
            document["_id"]
            for document in found
            if delivered.get(document["conversation_id"], _END) < document["sequence_number"]
        }
        return [message_id for message_id in message_ids if message_id not in waiting]

    # --- pieces, all inside `_snapshot` ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[AsyncClientSession]:
        with store_errors():
            async with self._client.start_session(snapshot=True) as session:
                yield session

    async def _audience(self, user_id: str, conversation_id: str, session: AsyncClientSession) -> Audience | None:
        wanted = {"conversation_id": conversation_id}
        members = await self._memberships.find(wanted, _MARKS, session=session).to_list()
        return Audience.of(user_id, members, datetime.now(UTC))

    async def _read(
        self,
        conversation_id: str,
        low: int,
        high: int,
        limit: int,
        session: AsyncClientSession,
        *,
        backwards: bool = False,
    ) -> tuple[list[Document], bool]:
        """Ascending documents of low..high, at most `limit` and PAGE_BYTES but at least one; True when there are more.

        `backwards` takes them from the upper end.
        """
        if low > high:
            return [], False
        wanted = {"conversation_id": conversation_id, "sequence_number": {"$gte": low, "$lte": high}}
        direction = -1 if backwards else 1
        order = [("conversation_id", direction), ("sequence_number", direction)]
        documents: list[Document] = []
        size = 0
        more = False
        found = self._messages.find(wanted, sort=order, limit=limit + 1, hint=SEQUENCE_INDEX, session=session)
        async with found as cursor:
            async for document in cursor:
                size += len(document["content"].encode())
                if documents and (len(documents) == limit or size > PAGE_BYTES):
                    more = True
                    break
                documents.append(document)
        if backwards:
            documents.reverse()
        return documents, more

    async def _head(self, conversation_id: str, audience: Audience, session: AsyncClientSession) -> _Head:
        """The last entry this viewer may see; of a log that has expired altogether, where it ended."""
        wanted = {"conversation_id": conversation_id, "sequence_number": {"$lte": audience.last(_END)}}
        document = await self._messages.find_one(
            wanted,
            {"sequence_number": 1, "digest": 1},
            sort=[("conversation_id", -1), ("sequence_number", -1)],
            hint=SEQUENCE_INDEX,
            session=session,
        )
        if document is not None:
            return _Head(document["sequence_number"], document["digest"])
        return _Head(audience.last(await self._counted(conversation_id, session)), watermarks.NO_DIGEST)

    async def _counted(self, conversation_id: str, session: AsyncClientSession) -> int:
        """The last sequence that is flushed to the counter; everything up to it was committed."""
        document = await self._sequences.find_one({"_id": conversation_id}, session=session)
        return 0 if document is None else int(document["last_sequence_number"])

    async def _floor(self, conversation_id: str, missing: int, session: AsyncClientSession) -> int:
        """Lowest stored sequence, when all up to `missing` are known to be gone."""
        document = await self._messages.find_one(
            {"conversation_id": conversation_id, "sequence_number": {"$gt": missing}},
            {"sequence_number": 1},
            sort=[("conversation_id", 1), ("sequence_number", 1)],
            hint=SEQUENCE_INDEX,
            session=session,
        )
        return missing + 1 if document is None else int(document["sequence_number"])


def _empty(from_sequence: int, to_sequence: int, expired_through: int | None, head: _Head) -> Excerpt:
    return Excerpt(
        messages=[],
        from_sequence=from_sequence,
        to_sequence=to_sequence,
        has_more=False,
        expired_through=expired_through,
        digest=watermarks.NO_DIGEST,
        head_sequence=head.sequence_number,
        head_digest=head.digest,
    )


def _expired(documents: Sequence[Document], low: int) -> int | None:
    """The last expired sequence, when entries from `low` on were asked for and later ones came."""
    if documents and documents[0]["sequence_number"] > low:
        return int(documents[0]["sequence_number"]) - 1
    return None


def _digest_at(documents: Sequence[Document], sequence: int) -> bytes:
    if documents and documents[-1]["sequence_number"] == sequence:
        digest: bytes = documents[-1]["digest"]
        return digest
    return watermarks.NO_DIGEST
