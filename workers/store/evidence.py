"""What an audit reads: whole conversations at one moment, and everything beside them. Never writes.

Called by `workers/audit`. Majority reads; a conversation's documents and its log come from one snapshot of what a
majority holds, so what is in flight in a running system is no contradiction.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import bson

from workers.store.errors import store_errors
from workers.store.indexes import DAY_SECONDS, RETENTION_INDEX, SEQUENCE_INDEX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from datetime import datetime

    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

_KEYS_AT_ONCE: Final = 1000
_ENTRIES_AT_ONCE: Final = 2000
"""By itself a batch grows to 16 MiB, which is 100 MiB once it is decoded."""
_decode: Callable[[Any, Any], list[Document]] = bson.decode_all
"""A batch as the driver's raw cursor gives it, which its types do not know."""
_LOG_ORDER: Final = {"conversation_id": 1, "sequence_number": 1}


class StoredHead(NamedTuple):
    """A conversation's documents but its log; None for one that is not there."""

    conversation_id: str
    conversation: Document | None
    counter: Document | None
    memberships: list[Document]


class Moment:
    """Conversations as they were at one moment: the first read decides which."""

    def __init__(self, database: AsyncDatabase[Document], session: AsyncClientSession, *, has_index: bool) -> None:
        self._db = database
        self._session = session
        self._has_index = has_index

    async def heads(self, conversation_ids: Sequence[str]) -> list[StoredHead]:
        """Everything about these conversations but their logs. Raises StoreUnavailable."""
        by_id, by_conversation = (
            {"_id": {"$in": [*conversation_ids]}},
            {"conversation_id": {"$in": [*conversation_ids]}},
        )
        with store_errors():
            conversations = {
                document["_id"]: document
                async for document in self._db["conversations"].find(by_id, session=self._session)
            }
            counters = {
                document["_id"]: document
                async for document in self._db["sequence_numbers"].find(by_id, session=self._session)
            }
            members: dict[str, list[Document]] = {}
            async for document in self._db["memberships"].find(by_conversation, session=self._session):
                members.setdefault(document["conversation_id"], []).append(document)
        return [
            StoredHead(name, conversations.get(name), counters.get(name), members.get(name, []))
            for name in conversation_ids
        ]

    async def entries(self, conversation_ids: Sequence[str], fields: Sequence[str]) -> AsyncIterator[list[Document]]:
        """Their logs, by conversation and sequence number, in batches. Raises StoreUnavailable."""
        wanted = {"conversation_id": {"$in": [*conversation_ids]}}
        # Whole batches in one go: decoding them one by one through the driver costs twice as much.
        cursor = self._db["messages"].find_raw_batches(
            wanted,
            dict.fromkeys(fields, 1),
            sort=[*_LOG_ORDER.items()],
            session=self._session,
            batch_size=_ENTRIES_AT_ONCE,
            allow_disk_use=True,
        )
        if self._has_index:
            cursor = cursor.hint(SEQUENCE_INDEX)
        options = self._db.codec_options
        with store_errors():
            async for batch in cursor:
                yield _decode(batch, options)


class EvidenceReader:
    """Reader of the whole database for an audit. Every method raises StoreUnavailable."""

    def __init__(self, client: AsyncMongoClient[Document], database: AsyncDatabase[Document]) -> None:
        self._client = client
        self._db = database

    async def now(self) -> datetime:
        """The server's clock."""
        with store_errors():
            hello = await self._db.command("hello", codec_options=self._db.codec_options)
        at: datetime = hello["localTime"]
        return at

    async def indexes(self) -> dict[str, list[Document]]:
        """Collection → its indexes."""
        found = {}
        with store_errors():
            for name in await self._db.list_collection_names():
                found[name] = [dict(index) async for index in await self._db[name].list_indexes()]
        return found

    @asynccontextmanager
    async def moment(self, indexes: dict[str, list[Document]]) -> AsyncIterator[Moment]:
        """Reads at one moment, for as long as the server keeps it (5 minutes by default)."""
        has_index = any(
            index["name"] == SEQUENCE_INDEX and dict(index["key"]) == _LOG_ORDER
            for index in indexes.get("messages", ())
        )
        async with self._client.start_session(snapshot=True) as session:
            yield Moment(self._db, session, has_index=has_index)

    async def conversation_ids(self) -> list[str]:
        """Of every conversation of which there is anything, in order."""
        first: list[Document] = [
            {"$sort": _LOG_ORDER},
            {"$group": {"_id": "$conversation_id", "first": {"$first": "$sequence_number"}}},
        ]
        names: set[str] = set()
        with store_errors():
            for collection in ("conversations", "sequence_numbers"):
                async for document in self._db[collection].find({}, {"_id": 1}):
                    names.add(document["_id"])
            async for document in await self._db["messages"].aggregate(first, allowDiskUse=True):
                names.add(document["_id"])
            async for document in await self._db["memberships"].aggregate([{"$group": {"_id": "$conversation_id"}}]):
                names.add(document["_id"])
        return sorted(names)

    async def keys(self) -> AsyncIterator[list[tuple[Document, Document | None]]]:
        """Every idempotency record with the message it names, in batches."""
        fields = {"conversation_id": 1, "sender_id": 1, "idempotency_key": 1}
        with store_errors():
            cursor = self._db["idempotency_keys"].find({}, batch_size=_KEYS_AT_ONCE)
            while records := await cursor.to_list(_KEYS_AT_ONCE):
                wanted = {"_id": {"$in": [record["message_id"] for record in records]}}
                found = {document["_id"]: document async for document in self._db["messages"].find(wanted, fields)}
                yield [(record, found.get(record["message_id"])) for record in records]

    async def dead_letters(self) -> AsyncIterator[Document]:
        """Every dead letter without what it holds."""
        with store_errors():
            async for document in self._db["dead_letter_queue"].find({}, {"message.content": 0, "raw": 0}):
                yield document

    async def message_id(self, conversation_id: str, sender_id: str, key: str) -> str | None:
        """The stored message with this key."""
        wanted = {"conversation_id": conversation_id, "sender_id": sender_id, "idempotency_key": key}
        with store_errors():
            found = await self._db["messages"].find_one(wanted, {"_id": 1})
        return None if found is None else str(found["_id"])


def retention_seconds(indexes: dict[str, list[Document]]) -> int:
    """How long a message is kept, by its index; for ever (a hundred years) without one."""
    for index in indexes.get("messages", ()):
        if index["name"] == RETENTION_INDEX:
            return int(index["expireAfterSeconds"])
    return 36_500 * DAY_SECONDS
