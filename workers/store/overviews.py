"""Conversations as one member lists them: newest activity first, with the last message, what is unread, and how the
member has arranged them. Called by the REST role.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec reads the annotations of Overview
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from protocol.models import Conversation, StoredMessage
from workers.store.errors import store_errors
from workers.store.heads import HeadReader, Standing
from workers.store.memberships import own_settings
from workers.store.search import SearchReader

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class Overview(Conversation, kw_only=True, frozen=True):
    """A conversation as one of its members sees it. `unread_count` is derived, never stored.

    `last_message`: the newest that the member may see and that is no change of another one. `archived`, `pinned` and
    `muted_until` are the member's own.
    """

    unread_count: int
    last_message: StoredMessage | None
    archived: bool
    pinned: bool
    muted_until: datetime | None


class Place(NamedTuple):
    """Where in the order a conversation stands: later activity first, then the greater id."""

    active_at: datetime
    conversation_id: str


class OverviewReader:
    """Readers of `conversations` for their members. Every method raises StoreUnavailable."""

    def __init__(self, client: AsyncMongoClient[Document], database: AsyncDatabase[Document]) -> None:
        self._conversations = database["conversations"]
        self._memberships = database["memberships"]
        self._heads = HeadReader(client, database)
        self._search = SearchReader(database)

    async def overview(self, user_id: str, conversation_id: str) -> Overview | None:
        """One conversation, or None where the user is not a member now; unknown and foreign look the same."""
        found = await self._overviews(user_id, [conversation_id])
        return found[0] if found else None

    async def overviews(
        self, user_id: str, after: Place | None, limit: int, archived: bool | None = None
    ) -> tuple[list[Overview], Place | None]:
        """At most `limit` live conversations behind a place, and the place to go on from when there are more.

        `archived`: only those that are (True) or are not (False).
        """
        with store_errors():
            wanted: Document = {"user_id": user_id, "leave_seq": {"$exists": False}}
            if archived is not None:
                wanted["archived"] = True if archived else {"$ne": True}
            names = [
                member["conversation_id"]
                async for member in self._memberships.find(wanted, {"_id": 0, "conversation_id": 1})
            ]
            fields = {"last_message_at": 1, "created_at": 1}
            places = [_place(document) async for document in self._conversations.find({"_id": {"$in": names}}, fields)]
        places.sort(reverse=True)
        rest = [place for place in places if after is None or place < after]
        found = await self._overviews(user_id, [place.conversation_id for place in rest[:limit]])
        return found, rest[limit - 1] if len(rest) > limit else None

    async def _overviews(self, user_id: str, conversation_ids: list[str]) -> list[Overview]:
        if not conversation_ids:
            return []
        standings = {
            standing.membership["conversation_id"]: standing
            for standing in await self._heads.standings(user_id, conversation_ids)
        }
        with store_errors():
            documents = {
                document["_id"]: document
                async for document in self._conversations.find({"_id": {"$in": list(standings)}})
            }
        newest = await self._search.newest(user_id, list(documents))
        return [
            _overview(documents[name], standings[name], newest.get(name))
            for name in conversation_ids
            if name in documents and name in standings
        ]


def _place(document: Document) -> Place:
    return Place(document.get("last_message_at") or document["created_at"], document["_id"])


def _overview(document: Document, standing: Standing, newest: StoredMessage | None) -> Overview:
    """The flushed document is up to a second old; the head is not."""
    settings = own_settings(standing.membership)
    shown = dict(document)
    shown["last_sequence_number"] = standing.head
    shown["unread_count"] = standing.unread
    shown["last_message"] = newest
    shown["archived"] = settings.archived
    shown["pinned"] = settings.pinned
    shown["muted_until"] = settings.muted_until
    return msgspec.convert(shown, Overview)
