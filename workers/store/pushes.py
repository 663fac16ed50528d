"""What the push role has to know of the log: who is behind, on which message, and whether they want to hear of it.

Called by the push role, and by the ingest role for what a dead owner may have missed. Every method raises
StoreUnavailable.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pymongo import ASCENDING, DESCENDING, UpdateOne

from protocol import keys
from protocol.models import AGENT_PREFIX, MessageType
from workers.store.errors import store_errors
from workers.store.indexes import SEQUENCE_INDEX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
Pair = tuple[str, str]
"""(user id, conversation id)."""

_LIVE: Final[Document] = {"$exists": False}
_AT_ONCE: Final = 1000
"""Conversations per query."""
_CHECKPOINT: Final = "push"


class Standing(msgspec.Struct, frozen=True):
    """A live membership. `heard`: everything up to there was confirmed by a device; `pushed`: or told by a push."""

    heard: int
    pushed: int
    muted_until: datetime | None


class Unheard(msgspec.Struct, frozen=True):
    """The newest message that a member has not confirmed, and since when there is one."""

    message_id: str
    sequence_number: int
    said_at: datetime
    since: datetime


class PushStore:
    """Reader of `memberships` and `messages`, writer of `memberships.pushed_seq`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._memberships = database["memberships"]
        self._messages = database["messages"]
        self._users = database["users"]
        self._state = database["push_state"]

    async def behind(self, ends: Mapping[str, int]) -> list[Pair]:
        """People whose delivered mark is below these sequences (conversation → sequence)."""
        names = list(ends)
        found: list[Pair] = []
        fields = {"user_id": 1, "conversation_id": 1, "delivered_seq": 1}
        for start in range(0, len(names), _AT_ONCE):
            wanted = {"conversation_id": {"$in": names[start : start + _AT_ONCE]}, "leave_seq": _LIVE}
            with store_errors():
                members = await self._memberships.find(wanted, fields).to_list()
            found += [
                (member["user_id"], member["conversation_id"])
                for member in members
                if member["delivered_seq"] < ends[member["conversation_id"]]
                and not member["user_id"].startswith(AGENT_PREFIX)
            ]
        return found

    async def said_since(self, since_ms: int) -> AsyncIterator[dict[str, int]]:
        """Conversation → sequence of its last message, of all that were committed since then, some at a time."""
        wanted = {"_id": {"$gte": keys.new_message_id(since_ms, 0, 0)}, "type": {"$ne": MessageType.SYSTEM.value}}
        last = {"_id": "$conversation_id", "last": {"$max": "$sequence_number"}}
        page: dict[str, int] = {}
        with store_errors():
            async for document in await self._messages.aggregate([{"$match": wanted}, {"$group": last}]):
                page[document["_id"]] = document["last"]
                if len(page) == _AT_ONCE:
                    yield page
                    page = {}
        yield page

    async def standings(self, pairs: Iterable[Pair]) -> dict[Pair, Standing]:
        """Of those who are in the conversation and whose account was not deleted."""
        names = [f"{conversation_id}:{user_id}" for user_id, conversation_id in pairs]
        with store_errors():
            members = await self._memberships.find({"_id": {"$in": names}, "leave_seq": _LIVE}).to_list()
            users = list({member["user_id"] for member in members})
            gone = self._users.find({"_id": {"$in": users}, "deleted_at": {"$exists": True}}, {"_id": 1})
            deleted = {document["_id"] async for document in gone}
        return {
            (member["user_id"], member["conversation_id"]): Standing(
                heard=max(member["delivered_seq"], member["read_seq"], member["join_seq"] - 1),
                pushed=member.get("pushed_seq", 0),
                muted_until=member.get("muted_until"),
            )
            for member in members
            if member["user_id"] not in deleted
        }

    async def unheard(self, pair: Pair, after: int, now: datetime) -> Unheard | None:
        """What others have said there after a sequence, as far as this member can still see it."""
        user_id, conversation_id = pair
        wanted: Document = {
            "conversation_id": conversation_id,
            "sequence_number": {"$gt": after},
            "type": {"$ne": MessageType.SYSTEM.value},
            "sender_id": {"$ne": user_id},
            "deleted_at": {"$exists": False},
            "hidden_by": {"$ne": user_id},
            "expires_at": {"$not": {"$lte": now}},
        }
        fields = {"sequence_number": 1, "created_at": 1}
        ends = []
        with store_errors():
            for direction in (DESCENDING, ASCENDING):
                found = await self._messages.find_one(
                    wanted, fields, sort=[("sequence_number", direction)], hint=SEQUENCE_INDEX
                )
                if found is None:
                    return None
                ends.append(found)
        newest, oldest = ends
        return Unheard(newest["_id"], newest["sequence_number"], newest["created_at"], oldest["created_at"])

    async def told(self, through: Mapping[Pair, int]) -> None:
        """A push has named these sequences: no other names them again."""
        marks = [
            UpdateOne({"_id": f"{conversation_id}:{user_id}"}, {"$max": {"pushed_seq": sequence}})
            for (user_id, conversation_id), sequence in through.items()
        ]
        if marks:
            with store_errors():
                await self._memberships.bulk_write(marks, ordered=False)

    async def checkpoint(self) -> datetime | None:
        """Everything that was committed before was looked at, or is among what is due."""
        with store_errors():
            document = await self._state.find_one({"_id": _CHECKPOINT})
        return None if document is None else document["through"]

    async def set_checkpoint(self, through: datetime) -> None:
        """See `checkpoint`; it only moves forward."""
        with store_errors():
            await self._state.update_one({"_id": _CHECKPOINT}, {"$max": {"through": through}}, upsert=True)
