"""Where devices are reached that have no connection: one document per device, `_id` = `{user_id}:{device_id}`.

Called by the REST role and the push role. An address belongs to whoever registered it last, so a phone that changes
hands tells its old owner nothing. What is not registered again for a time is forgotten (`expires_at`). Every method
raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
from pymongo.errors import DuplicateKeyError

from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class PushToken(msgspec.Struct, frozen=True, kw_only=True):
    """How one device is reached. `address`: the provider's token, or the URL of a Web Push subscription, whose two keys
    (Base64url) are `p256dh` and `auth`. It is good while an access token that was made then would be."""

    user_id: str
    device_id: str
    kind: str
    address: str
    p256dh: str = ""
    auth: str = ""
    registered_at: datetime
    expires_at: datetime


class PushTokenStore:
    """Reader and writer of `push_tokens`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._tokens = database["push_tokens"]

    async def put(self, token: PushToken, limit: int) -> bool:
        """Register a device's token in place of its earlier one; False where the user has `limit` others. Whoever else
        had this address has it no longer."""
        name = _name(token.user_id, token.device_id)
        hashed = _hash(token)
        document = msgspec.to_builtins(token, builtin_types=(datetime,)) | {"address_hash": hashed}
        with store_errors():
            others = {"user_id": token.user_id, "_id": {"$ne": name}}
            if await self._tokens.count_documents(others, limit=limit) >= limit:
                return False
            while True:
                await self._tokens.delete_many({"address_hash": hashed, "_id": {"$ne": name}})
                try:
                    await self._tokens.replace_one({"_id": name}, document, upsert=True)
                except DuplicateKeyError:
                    continue  # somebody else has just registered it: the later one has it
                return True

    async def get(self, user_id: str, device_id: str) -> PushToken | None:
        """How this device is reached."""
        with store_errors():
            document = await self._tokens.find_one({"_id": _name(user_id, device_id)})
        return None if document is None else msgspec.convert(document, PushToken)

    async def remove(self, user_id: str, device_id: str) -> bool:
        """This device is not reached any more; False where it was not."""
        with store_errors():
            gone = await self._tokens.delete_one({"_id": _name(user_id, device_id)})
        return gone.deleted_count > 0

    async def expired(self, token: PushToken) -> None:
        """The provider says that it is gone: unless the device has registered another meanwhile."""
        wanted = {"_id": _name(token.user_id, token.device_id), "address_hash": _hash(token)}
        with store_errors():
            await self._tokens.delete_one(wanted)

    async def forget_user(self, user_id: str) -> None:
        """All of a deleted account's."""
        with store_errors():
            await self._tokens.delete_many({"user_id": user_id})

    async def forget_others(self, user_id: str, keep: str | None) -> None:
        """All of an account but that of one device."""
        wanted: Document = {"user_id": user_id}
        if keep is not None:
            wanted["device_id"] = {"$ne": keep}
        with store_errors():
            await self._tokens.delete_many(wanted)

    async def of(self, user_ids: Iterable[str]) -> dict[str, list[PushToken]]:
        """User → tokens, by device."""
        found: dict[str, list[PushToken]] = {}
        with store_errors():
            async for document in self._tokens.find({"user_id": {"$in": list(user_ids)}}, sort=[("_id", 1)]):
                token = msgspec.convert(document, PushToken)
                found.setdefault(token.user_id, []).append(token)
        return found

    async def listed(self, user_id: str) -> Sequence[PushToken]:
        """All of a user's; their number is bounded."""
        return (await self.of([user_id])).get(user_id, [])


def _hash(token: PushToken) -> bytes:
    return blake2b(f"{token.kind}\0{token.address}".encode(), digest_size=16).digest()


def _name(user_id: str, device_id: str) -> str:
    return f"{user_id}:{device_id}"
