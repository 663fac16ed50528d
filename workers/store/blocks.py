"""Who takes nothing from whom: one document per pair, `_id` = `{user_id}:{blocked_id}`.

Called by the REST and query roles; the owner of a 1:1 conversation reads it too (`conversations.py`), when it loads the
conversation and when it is told to look. Whoever changes a block writes down in the same document that this is to be
told, so that a process which dies in between leaves it to the next (`rest/upkeep.py`).
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
IN_FORCE: Final[Document] = {"lifted": {"$exists": False}}
"""A block that was not lifted."""


class Block(msgspec.Struct, frozen=True):
    """One entry of a user's block list."""

    user_id: str
    created_at: datetime


class Change(NamedTuple):
    """A block that was put or lifted, and of which not everybody has heard. `token`: of this change alone."""

    user_id: str
    blocked_id: str
    token: str


class BlockStore:
    """Reader and writer of `blocks`. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._blocks = database["blocks"]

    # --- changes: the block and the intent to tell of it are one write ------------------------------------------------

    async def block(self, user_id: str, blocked_id: str, now: datetime) -> Change:
        """`user_id` takes nothing from `blocked_id` any more; repeating it changes nothing but the intent."""
        change = Change(user_id, blocked_id, _new_token())
        update = {
            "$setOnInsert": {"user_id": user_id, "blocked_id": blocked_id},
            "$min": {"created_at": now},
            "$set": {"unfinished_since": now, "token": change.token},
            "$unset": {"lifted": ""},
        }
        with store_errors():
            await self._blocks.update_one({"_id": block_name(user_id, blocked_id)}, update, upsert=True)
        return change

    async def unblock(self, user_id: str, blocked_id: str, now: datetime) -> Change | None:
        """Undo `block`; None where there is nothing to undo. What is left says that it was lifted, until `finished`."""
        change = Change(user_id, blocked_id, _new_token())
        update = {
            "$set": {"lifted": True, "unfinished_since": now, "token": change.token},
            "$unset": {"created_at": ""},
        }
        with store_errors():
            result = await self._blocks.update_one({"_id": block_name(user_id, blocked_id)}, update)
        return change if result.matched_count else None

    async def finished(self, change: Change) -> None:
        """Everybody has heard of it; nothing happens where it has changed again."""
        same = {"_id": block_name(change.user_id, change.blocked_id), "token": change.token}
        with store_errors():
            await self._blocks.delete_one({**same, "lifted": True})
            await self._blocks.update_one(same, {"$unset": {"unfinished_since": "", "token": ""}})

    async def take_unfinished(self, before: datetime, now: datetime) -> Change | None:
        """One change that was made, or taken up, before a time and is not finished; it is the caller's for now."""
        with store_errors():
            document = await self._blocks.find_one_and_update(
                {"unfinished_since": {"$lt": before}},
                {"$set": {"unfinished_since": now}},
                sort=[("unfinished_since", 1)],
            )
        return None if document is None else Change(document["user_id"], document["blocked_id"], document["token"])

    # --- who blocks whom ---------------------------------------------------------------------------------------------

    async def listed(self, user_id: str, after: str, limit: int) -> tuple[list[Block], str | None]:
        """At most `limit` of those whom a user blocks, by id, behind one; and where to go on when there are more."""
        wanted = {"user_id": user_id, "blocked_id": {"$gt": after}, **IN_FORCE}
        with store_errors():
            found = await self._blocks.find(wanted, sort=[("blocked_id", 1)], limit=limit + 1).to_list()
        page = [Block(document["blocked_id"], document["created_at"]) for document in found[:limit]]
        return page, page[-1].user_id if len(found) > limit else None

    async def between(self, user_id: str, other_id: str) -> bool:
        """Does one of the two block the other?"""
        names = [block_name(user_id, other_id), block_name(other_id, user_id)]
        with store_errors():
            return await self._blocks.find_one({"_id": {"$in": names}, **IN_FORCE}, {"_id": 1}) is not None

    async def apart(self, user_id: str, others: Iterable[str]) -> set[str]:
        """Those of the others who block this user or are blocked."""
        names = {name: other for other in others for name in (block_name(user_id, other), block_name(other, user_id))}
        with store_errors():
            return {
                names[document["_id"]]
                async for document in self._blocks.find({"_id": {"$in": list(names)}, **IN_FORCE}, {"_id": 1})
            }

    async def who_blocks(self, user_id: str, others: Iterable[str]) -> set[str]:
        """Those of the others who block this user."""
        wanted = {"_id": {"$in": [block_name(other, user_id) for other in others]}, **IN_FORCE}
        with store_errors():
            return {document["user_id"] async for document in self._blocks.find(wanted, {"user_id": 1})}


def block_name(user_id: str, blocked_id: str) -> str:
    """`_id` of the block of one by the other."""
    return f"{user_id}:{blocked_id}"


def _new_token() -> str:
    return secrets.token_hex(8)
