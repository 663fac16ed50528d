"""Devices: one document per device of an account, with its session. Called by the REST and query roles.

`_id` = `{user_id}:{device_id}`. `session_id` and `refresh_hash` are the session that the device's refresh token
continues; without them there is none. `tokens_valid_from`: access tokens made before are no longer good. A revoked
device stays until the last of its tokens has ended (`forget_at`), and is not shown; `untold_since` it has not been said
everywhere that it was revoked.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pymongo import ReturnDocument

from workers.settings import LONGEST_TOKEN_SECONDS
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
_SHOWN: Final[Document] = {"revoked_at": {"$exists": False}}
_SESSION: Final = dict.fromkeys(("session_id", "refresh_hash", "refresh_expires_at"), "")
_MILLISECOND: Final = timedelta(milliseconds=1)
REMEMBERED: Final = 1000
"""Devices of one account that are known at most, revoked ones of the last year with them: who may name devices at will
could fill the collection."""


class Device(msgspec.Struct, frozen=True):
    """A device of an account. `last_seen` is when it was last known to be in use, exact to an hour."""

    device_id: str
    platform: str
    name: str
    created_at: datetime
    last_seen: datetime


class Session(msgspec.Struct, frozen=True):
    """What a refresh token continues."""

    user_id: str
    device_id: str
    refresh_hash: bytes
    refresh_expires_at: datetime
    tokens_valid_from: datetime | None = None


class NewSession(msgspec.Struct, frozen=True):
    """A login. `refresh_hash`: what the refresh token is compared with; the token itself is the client's alone."""

    session_id: str
    refresh_hash: bytes
    refresh_expires_at: datetime


class Validity(msgspec.Struct, frozen=True):
    """Which access tokens of an account are good: those made at `valid_from` or later.

    `devices` has those for which another time than the account's applies.
    """

    deleted: bool
    valid_from: datetime | None
    devices: dict[str, datetime]


class Untold(msgspec.Struct, frozen=True):
    """A device of which nobody may have said that it was revoked."""

    user_id: str
    device_id: str
    tokens_valid_from: datetime


class DeviceStore:
    """Reader and writer of `devices`, and of `users.tokens_valid_from`. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._devices = database["devices"]
        self._users = database["users"]

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def log_in(
        self, user_id: str, device_id: str, platform: str, name: str, session: NewSession, now: datetime
    ) -> datetime:
        """Begin a session, ending the device's earlier one; from when on its access tokens may be made.

        That is now, or a moment later where a revocation was written by a clock ahead of ours.
        """
        update: list[Document] = [
            {
                "$set": {
                    "user_id": user_id,
                    "device_id": device_id,
                    "platform": {"$literal": platform},
                    "name": {"$literal": name},
                    "created_at": {"$ifNull": ["$created_at", now]},
                    "last_seen": now,
                    "session_id": session.session_id,
                    "refresh_hash": session.refresh_hash,
                    "refresh_expires_at": session.refresh_expires_at,
                    "issued_at": {"$max": [now, "$tokens_valid_from", "$issued_at"]},
                }
            },
            {"$unset": ["revoked_at", "forget_at"]},
        ]
        with store_errors():
            document = await self._devices.find_one_and_update(
                {"_id": _name(user_id, device_id)}, update, upsert=True, return_document=ReturnDocument.AFTER
            )
        assert document is not None, "an upsert finds what it writes"
        issued_at: datetime = document["issued_at"]
        return issued_at

    async def session(self, session_id: str) -> Session | None:
        """The session a refresh token names."""
        with store_errors():
            document = await self._devices.find_one({"session_id": session_id})
        return None if document is None else msgspec.convert(document, Session)

    async def rotate(self, session_id: str, used: bytes, fresh: NewSession, now: datetime) -> datetime | None:
        """Replace the refresh token that was used; from when on access tokens may be made.

        None where it is not the last one any more: of two uses one wins.
        """
        update = [
            {
                "$set": {
                    "refresh_hash": fresh.refresh_hash,
                    "refresh_expires_at": fresh.refresh_expires_at,
                    "last_seen": now,
                    "issued_at": {"$max": [now, "$tokens_valid_from", "$issued_at"]},
                }
            }
        ]
        with store_errors():
            document = await self._devices.find_one_and_update(
                {"session_id": session_id, "refresh_hash": used}, update, return_document=ReturnDocument.AFTER
            )
        if document is None:
            return None
        issued_at: datetime = document["issued_at"]
        return issued_at

    # --- revocation --------------------------------------------------------------------------------------------------

    async def revoke(self, user_id: str, device_id: str, now: datetime, *, has_token: bool = False) -> datetime | None:
        """End a device's session; its access tokens made before the returned time are no longer good.

        None for a device that was never there; one that `has_token`, which the administrator may have made before
        anybody saw the device, is written down for it. Repeating it is harmless: whoever got no answer does.
        """
        update = [_known(user_id, device_id, now), *_revocation(now)] if has_token else _revocation(now)
        with store_errors():
            document = await self._devices.find_one_and_update(
                {"_id": _name(user_id, device_id)}, update, upsert=has_token, return_document=ReturnDocument.AFTER
            )
        if document is None:
            return None
        valid_from: datetime = document["tokens_valid_from"]
        return valid_from

    async def revoke_all(self, user_id: str, keep: str | None, now: datetime) -> None:
        """End every session but that of `keep`, and every access token that is not of that device, known or not."""
        with store_errors():
            if keep is not None:
                # The device's own time replaces the account's, which is about to move.
                account = await self._users.find_one({"_id": user_id}, {"tokens_valid_from": 1}) or {}
                before = account.get("tokens_valid_from", now - timedelta(seconds=LONGEST_TOKEN_SECONDS))
                own = {"$set": {"tokens_valid_from": {"$ifNull": ["$tokens_valid_from", before]}}}
                here = [_known(user_id, keep, now), own]
                await self._devices.update_one({"_id": _name(user_id, keep)}, here, upsert=True)
            await self._users.update_one({"_id": user_id}, {"$max": {"tokens_valid_from": now + _MILLISECOND}})
            # The revoked ones too: the administrator may have made tokens for them since.
            others: Document = {"user_id": user_id}
            if keep is not None:
                others["device_id"] = {"$ne": keep}
            await self._devices.update_many(others, _revocation(now))

    async def told(self, user_id: str, device_id: str | None, valid_from: datetime) -> None:
        """Everybody has heard that tokens made before `valid_from` are void: of this device, or (None) of all."""
        wanted: Document = {"user_id": user_id, "tokens_valid_from": {"$lte": valid_from}}
        if device_id is not None:
            wanted["device_id"] = device_id
        with store_errors():
            await self._devices.update_many(wanted, {"$unset": {"untold_since": ""}})

    async def take_untold(self, before: datetime, now: datetime) -> Untold | None:
        """A device that was revoked before a time by somebody who did not get to say so; it is the caller's for now."""
        with store_errors():
            document = await self._devices.find_one_and_update(
                {"untold_since": {"$lt": before}}, {"$set": {"untold_since": now}}, sort=[("untold_since", 1)]
            )
        return None if document is None else msgspec.convert(document, Untold)

    async def validity(self, user_id: str) -> Validity:
        """Which access tokens of an account are good."""
        with store_errors():
            account = await self._users.find_one({"_id": user_id}, {"tokens_valid_from": 1, "deleted_at": 1}) or {}
            found = self._devices.find(
                {"user_id": user_id, "tokens_valid_from": {"$exists": True}}, {"device_id": 1, "tokens_valid_from": 1}
            )
            devices = {document["device_id"]: document["tokens_valid_from"] async for document in found}
        return Validity("deleted_at" in account, account.get("tokens_valid_from"), devices)

    async def forget_user(self, user_id: str) -> None:
        """All devices of a deleted account."""
        with store_errors():
            await self._devices.delete_many({"user_id": user_id})

    # --- the list ----------------------------------------------------------------------------------------------------

    async def get(self, user_id: str, device_id: str) -> Device | None:
        """One device that is shown."""
        with store_errors():
            document = await self._devices.find_one({"_id": _name(user_id, device_id), **_SHOWN})
        return None if document is None else msgspec.convert(document, Device)

    async def listed(self, user_id: str, after: str, limit: int) -> tuple[list[Device], str | None]:
        """At most `limit` of an account's devices, by id, behind one; and where to go on when there are more."""
        wanted = {"user_id": user_id, "device_id": {"$gt": after}, **_SHOWN}
        with store_errors():
            found = await self._devices.find(wanted, sort=[("device_id", 1)], limit=limit + 1).to_list()
        page = [msgspec.convert(document, Device) for document in found[:limit]]
        return page, page[-1].device_id if len(found) > limit else None

    async def surplus(self, user_id: str, keep: str, limit: int) -> list[str]:
        """The devices that were seen longest ago, as many as are over the limit; never `keep`."""
        wanted = {"user_id": user_id, "device_id": {"$ne": keep}, **_SHOWN}
        with store_errors():
            found = self._devices.find(wanted, {"device_id": 1}, sort=[("last_seen", -1)], skip=limit - 1)
            return [document["device_id"] async for document in found]

    async def seen(self, user_id: str, device_id: str, limit: int, issued: datetime, now: datetime) -> None:
        """A device connected with a token made at `issued`. One that was revoked before is shown again.

        One that was never heard of is added. Where there are `limit` already, the one that was seen longest ago is
        forgotten, of those that have no session and were never revoked: nothing is lost with it, and it is added again
        when it connects.
        """
        name = _name(user_id, device_id)
        good: list[Document] = [{"tokens_valid_from": {"$exists": False}}, {"tokens_valid_from": {"$lte": issued}}]
        here: Document = {"$max": {"last_seen": now}, "$unset": {"revoked_at": "", "forget_at": ""}}
        with store_errors():
            known = await self._devices.update_one({"_id": name, "$or": good}, here)
            if known.matched_count:
                return
            if await self._devices.count_documents({"user_id": user_id}, limit=REMEMBERED) >= REMEMBERED:
                return
            if await self._devices.count_documents({"user_id": user_id, **_SHOWN}, limit=limit) >= limit:
                idle = {"user_id": user_id, "session_id": None, "tokens_valid_from": None}
                await self._devices.find_one_and_delete(idle, sort=[("last_seen", 1)])
            await self._devices.update_one({"_id": name}, [_known(user_id, device_id, now)], upsert=True)


def _known(user_id: str, device_id: str, now: datetime) -> Document:
    """Written down, where it was not."""
    fresh: Document = {"platform": "", "name": "", "created_at": now, "last_seen": now}
    kept = {field: {"$ifNull": [f"${field}", value]} for field, value in fresh.items()}
    return {"$set": {"user_id": user_id, "device_id": device_id, **kept}}


def _revocation(now: datetime) -> list[Document]:
    """No token made until now is good, nor one made by a clock ahead of ours."""
    beyond = {"$add": [{"$ifNull": ["$issued_at", now]}, 1]}
    return [
        {
            "$set": {
                "tokens_valid_from": {"$max": [now + _MILLISECOND, beyond, "$tokens_valid_from"]},
                "revoked_at": now,
                "untold_since": now,
                "forget_at": now + timedelta(seconds=LONGEST_TOKEN_SECONDS),
            }
        },
        {"$unset": list(_SESSION)},
    ]


def _name(user_id: str, device_id: str) -> str:
    return f"{user_id}:{device_id}"
