"""Who takes nothing from whom: one document per pair, `_id` = `{user_id}:{blocked_id}`.

Called by the REST and query roles. The account's side of it: a 1:1 conversation's owner hears of it by `SetMember`.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class Block(msgspec.Struct, frozen=True):
    """One entry of a user's block list."""

    user_id: str
    created_at: datetime


class BlockStore:
    """Reader and writer of `blocks`. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._blocks = database["blocks"]

    async def block(self, user_id: str, blocked_id: str, now: datetime) -> None:
        """`user_id` takes nothing from `blocked_id` any more; repeating it changes nothing."""
        document = {"user_id": user_id, "blocked_id": blocked_id, "created_at": now}
        with store_errors():
            await self._blocks.update_one({"_id": _name(user_id, blocked_id)}, {"$setOnInsert": document}, upsert=True)

    async def unblock(self, user_id: str, blocked_id: str) -> None:
        """Undo `block`; nothing where there is none."""
        with store_errors():
            await self._blocks.delete_one({"_id": _name(user_id, blocked_id)})

    async def forget_user(self, user_id: str) -> None:
        """Whom a deleted account blocked."""
        with store_errors():
            await self._blocks.delete_many({"user_id": user_id})

    async def listed(self, user_id: str, after: str, limit: int) -> tuple[list[Block], str | None]:
        """At most `limit` of those whom a user blocks, by id, behind one; and where to go on when there are more."""
        wanted = {"user_id": user_id, "blocked_id": {"$gt": after}}
        with store_errors():
            found = await self._blocks.find(wanted, sort=[("blocked_id", 1)], limit=limit + 1).to_list()
        page = [Block(document["blocked_id"], document["created_at"]) for document in found[:limit]]
        return page, page[-1].user_id if len(found) > limit else None

    async def between(self, user_id: str, other_id: str) -> bool:
        """Does one of the two block the other?"""
        names = [_name(user_id, other_id), _name(other_id, user_id)]
        with store_errors():
            return await self._blocks.find_one({"_id": {"$in": names}}, {"_id": 1}) is not None

    async def apart(self, user_id: str, others: Iterable[str]) -> set[str]:
        """Those of the others who block this user or are blocked."""
        names = {name: other for other in others for name in (_name(user_id, other), _name(other, user_id))}
        with store_errors():
            return {
                names[document["_id"]]
                async for document in self._blocks.find({"_id": {"$in": list(names)}}, {"_id": 1})
            }

    async def who_blocks(self, user_id: str, others: Iterable[str]) -> set[str]:
        """Those of the others who block this user."""
        names = [_name(other, user_id) for other in others]
        with store_errors():
            return {
                document["user_id"] async for document in self._blocks.find({"_id": {"$in": names}}, {"user_id": 1})
            }


def _name(user_id: str, blocked_id: str) -> str:
    return f"{user_id}:{blocked_id}"
