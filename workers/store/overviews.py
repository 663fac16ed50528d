"""Conversations as one member lists them: newest activity first, with what is unread. Called by the REST role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from protocol.models import Conversation
from workers.store.errors import store_errors
from workers.store.heads import HeadReader, Standing

if TYPE_CHECKING:
    from datetime import datetime

    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class Overview(Conversation, kw_only=True, frozen=True):
    """A conversation as one of its members sees it. `unread_count` is derived, never stored."""

    unread_count: int


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

    async def overview(self, user_id: str, conversation_id: str) -> Overview | None:
        """One conversation, or None where the user is not a member now; unknown and foreign look the same."""
        found = await self._overviews(user_id, [conversation_id])
        return found[0] if found else None

    async def overviews(self, user_id: str, after: Place | None, limit: int) -> tuple[list[Overview], Place | None]:
        """At most `limit` live conversations behind a place, and the place to go on from when there are more."""
        with store_errors():
            wanted = {"user_id": user_id, "leave_seq": {"$exists": False}}
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
        return [
            _overview(documents[name], standings[name])
            for name in conversation_ids
            if name in documents and name in standings
        ]


def _place(document: Document) -> Place:
    return Place(document.get("last_message_at") or document["created_at"], document["_id"])


def _overview(document: Document, standing: Standing) -> Overview:
    """The flushed document is up to a second old; the head is not."""
    shown = dict(document)
    shown["last_sequence_number"] = standing.head
    shown["unread_count"] = standing.unread
    return msgspec.convert(shown, Overview)
