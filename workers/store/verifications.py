"""Verification codes under way: at most one per phone number or email address. Called by the REST role.

`_id` is what the code was sent to, so a new one takes the place of the last. A code is spent by the first who proves
it; tries are counted down before anything is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class Target(msgspec.Struct, frozen=True):
    """Where a code goes: `field` is phone or email, `key` its comparable form."""

    field: str
    key: str

    @property
    def name(self) -> str:
        """The document's id."""
        return f"{self.field}:{self.key}"


class Attempt(msgspec.Struct, frozen=True):
    """One try that may be compared."""

    target: Target
    code_hash: str


class VerificationStore:
    """Reader and writer of `verifications`. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._verifications = database["verifications"]

    async def begin(
        self, target: Target, verification_id: str, code_hash: str, tries: int, expires_at: datetime
    ) -> None:
        """Expect this code; the last one for the target is void."""
        fresh: Document = {"verification_id": verification_id, "code_hash": code_hash}
        fresh |= {"field": target.field, "key": target.key, "tries_left": tries, "expires_at": expires_at}
        try:
            await self._replace(target, fresh)
        except StoreUnavailable as failure:
            # Two upserts of the same document may meet; the second time it is there.
            if not isinstance(failure.__cause__, DuplicateKeyError):
                raise
            await self._replace(target, fresh)

    async def _replace(self, target: Target, fresh: Document) -> None:
        with store_errors():
            await self._verifications.replace_one({"_id": target.name}, fresh, upsert=True)

    async def take_try(self, verification_id: str, now: datetime) -> Attempt | None:
        """Count one try; None where there is none left, or nothing to try."""
        wanted = {"verification_id": verification_id, "tries_left": {"$gt": 0}, "expires_at": {"$gt": now}}
        with store_errors():
            document = await self._verifications.find_one_and_update(
                wanted, {"$inc": {"tries_left": -1}}, return_document=ReturnDocument.AFTER
            )
        if document is None:
            return None
        return Attempt(Target(document["field"], document["key"]), document["code_hash"])

    async def spend(self, verification_id: str) -> bool:
        """The code was proven: is it the caller who may use it? Only the first one may."""
        with store_errors():
            gone = await self._verifications.delete_one({"verification_id": verification_id})
        return gone.deleted_count == 1
