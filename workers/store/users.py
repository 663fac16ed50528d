"""Accounts: create, look up, check that named users exist. Called by the REST role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from pymongo.errors import BulkWriteError

from protocol.models import User, to_document
from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
_DUPLICATE_KEY = 11000


class Taken(msgspec.Struct, frozen=True):
    """Another account has this `field` (phone or email)."""

    field: str


class UserStore:
    """Reader and writer of `users`. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._users = database["users"]

    async def create(self, user: User) -> User | Taken:
        """Store a new account. The unique indexes judge, not a read before the write."""
        try:
            with store_errors():
                # insert_many even for one: a lone insert_one's duplicate hides an unmet write concern.
                await self._users.insert_many([to_document(user)])
        except StoreUnavailable as failure:
            error = failure.__cause__
            if not isinstance(error, BulkWriteError) or error.details["writeConcernErrors"]:
                raise
            refused = error.details["writeErrors"][0]
            if refused["code"] != _DUPLICATE_KEY:
                raise
            return Taken(next(iter(refused["keyPattern"])))
        return user

    async def get(self, user_id: str) -> User | None:
        """One account, or None."""
        with store_errors():
            document = await self._users.find_one({"_id": user_id})
        return None if document is None else msgspec.convert(document, User)

    async def unknown(self, user_ids: Iterable[str]) -> set[str]:
        """Those of the ids that name no account."""
        wanted = set(user_ids)
        with store_errors():
            known = {document["_id"] async for document in self._users.find({"_id": {"$in": list(wanted)}}, {"_id": 1})}
        return wanted - known
