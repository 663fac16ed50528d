"""Public keys of devices: identities, prekeys in upload order, and the version of each user's device list.

Called by the REST role. `device_keys` holds a document per device (`_id` = `{user_id}:{device_id}`), `one_time_keys`
one per prekey, `device_lists` the version. A claimed key stays as a mark for `CLAIMED_SECONDS`, so that an upload whose
answer was lost cannot put it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec
import pymongo
from pymongo.read_concern import ReadConcern

from protocol.prekeys import SignedKey
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
    from datetime import datetime

    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
Result = TypeVar("Result")

CLAIMED_SECONDS: Final = 30 * 86_400
"""Longer than any client repeats an upload it has no answer to."""
LOW: Final = 20
"""One-time keys below which a device is told to upload more."""
STORED_LIMIT: Final = 500
"""One-time keys kept for one device."""
_TRANSACTION_SECONDS: Final = 5.0
_PAGE: Final = 50
"""Conversations per page of `neighbours`: with groups of 100 at most 5,000 people at a time."""


class KeyDevice(msgspec.Struct, frozen=True):
    """One device with keys. `generation`: the list's version that brought this identity; its prekeys carry it too."""

    user_id: str
    device_id: str
    identity_key: str
    signing_key: str
    fallback_key: SignedKey
    generation: int
    low_told: bool

    @property
    def name(self) -> str:
        """The document's id."""
        return _name(self.user_id, self.device_id)


class Identity(NamedTuple):
    """What a device uploads of itself."""

    identity_key: str
    signing_key: str
    fallback_key: SignedKey


class Stored(msgspec.Struct, frozen=True):
    """How things are after `put`. `changed`: the list's version has grown. `left`: one-time keys there."""

    version: int
    changed: bool
    left: int


class TooManyDevices(msgspec.Struct, frozen=True):
    """The user has as many devices with keys as may be."""

    limit: int


class Added(msgspec.Struct, frozen=True):
    """`left`: one-time keys stored now."""

    left: int


class AnotherKey(msgspec.Struct, frozen=True):
    """This id was uploaded before, with another key. Nothing was stored."""

    key_id: str


class Full(msgspec.Struct, frozen=True):
    """The new keys do not fit beside the `left` that are there. Nothing was stored."""

    left: int


class IdentityMoved(msgspec.Struct, frozen=True):
    """The device has another identity by now, or none: the keys were signed for a past one. Nothing was stored."""


class DeviceKeyStore:
    """Reader and writer of device keys. Every method raises StoreUnavailable."""

    def __init__(self, client: AsyncMongoClient[Document], database: AsyncDatabase[Document]) -> None:
        self._client = client
        self._write_concern = database.write_concern
        self._devices = database["device_keys"]
        self._keys = database["one_time_keys"]
        self._lists = database["device_lists"]
        self._memberships = database["memberships"]

    # --- uploads -----------------------------------------------------------------------------------------------------

    async def put(
        self, user_id: str, device_id: str, identity: Identity, now: datetime, limit: int
    ) -> Stored | TooManyDevices:
        """Set a device's identity and fallback key. Another identity takes the one-time keys of the last with it."""
        name = _name(user_id, device_id)

        async def work(session: AsyncClientSession) -> Stored | TooManyDevices:
            before = await self._devices.find_one({"_id": name}, session=session)
            fresh: Document = {"fallback_key": msgspec.to_builtins(identity.fallback_key), "updated_at": now}
            if before is not None and (before["identity_key"], before["signing_key"]) == identity[:2]:
                await self._devices.update_one({"_id": name}, {"$set": fresh}, session=session)
                left = await self._count(name, before["generation"], session)
                return Stored(await self._version(user_id, session), False, left)
            if before is None and await self._devices.count_documents({"user_id": user_id}, session=session) >= limit:
                return TooManyDevices(limit)
            version = await self._grow(user_id, session)
            await self._keys.delete_many({"device": name}, session=session)
            fresh |= {"user_id": user_id, "device_id": device_id, "generation": version}
            fresh |= {"identity_key": identity.identity_key, "signing_key": identity.signing_key}
            fresh |= {"next_position": 0, "low_told": False}
            await self._devices.replace_one({"_id": name}, fresh, upsert=True, session=session)
            return Stored(version, True, 0)

        return await self._transaction(work)

    async def add_one_time(
        self, device: KeyDevice, keys: Sequence[SignedKey], now: datetime, limit: int = STORED_LIMIT
    ) -> Added | AnotherKey | Full | IdentityMoved:
        """Store these behind the ones that are there, all or none; those known already are left as they are."""
        wanted: dict[str, SignedKey] = {}
        for key in keys:
            if wanted.setdefault(f"{device.name}:{device.generation}:{key.key_id}", key).key != key.key:
                return AnotherKey(key.key_id)

        async def work(session: AsyncClientSession) -> Added | AnotherKey | Full | IdentityMoved:
            # The first write is to the device, so uploads of one device come one after another.
            before = await self._devices.find_one_and_update(
                {"_id": device.name, "generation": device.generation},
                {"$inc": {"next_position": len(wanted)}},
                session=session,
            )
            if before is None:
                return IdentityMoved()
            found = self._keys.find({"_id": {"$in": list(wanted)}}, {"key": 1}, session=session)
            known = {document["_id"]: document["key"] async for document in found}
            for name, key in wanted.items():
                if known.get(name, key.key) != key.key:
                    await session.abort_transaction()
                    return AnotherKey(key.key_id)
            places = enumerate(wanted.items(), before["next_position"])
            fresh = [_document(device, name, key, at, now) for at, (name, key) in places if name not in known]
            count = await self._count(device.name, device.generation, session)
            if count + len(fresh) > limit:
                await session.abort_transaction()
                return Full(count)
            if fresh:
                await self._keys.insert_many(fresh, session=session)
            if count + len(fresh) >= LOW:
                await self._devices.update_one({"_id": device.name}, {"$set": {"low_told": False}}, session=session)
            return Added(count + len(fresh))

        return await self._transaction(work)

    # --- reads -------------------------------------------------------------------------------------------------------

    async def find(self, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], KeyDevice]:
        """Those of the (user, device) pairs that have keys."""
        with store_errors():
            found = self._devices.find({"_id": {"$in": [_name(*name) for name in names]}})
            return {(document["user_id"], document["device_id"]): _device(document) async for document in found}

    async def listed(self, user_id: str, after: str, limit: int) -> tuple[list[KeyDevice], str | None]:
        """At most `limit` of a user's devices, by id, behind one; and where to go on when there are more."""
        wanted = {"user_id": user_id, "device_id": {"$gt": after}}
        with store_errors():
            found = await self._devices.find(wanted, sort=[("device_id", 1)], limit=limit + 1).to_list()
        page = [_device(document) for document in found[:limit]]
        return page, page[-1].device_id if len(found) > limit else None

    async def version(self, user_id: str) -> int:
        """Of the user's device list; 0 where there has never been a device with keys."""
        with store_errors():
            return await self._version(user_id, None)

    async def counts(self, devices: Sequence[KeyDevice]) -> list[int]:
        """One-time keys left of each."""
        with store_errors():
            return [await self._count(device.name, device.generation, None) for device in devices]

    async def neighbours(self, user_id: str) -> AsyncIterator[set[str]]:
        """Everybody who is in a conversation with the user now, in pages that overlap; the user too."""
        live: Document = {"leave_seq": {"$exists": False}}
        after = ""
        while True:
            wanted = {"user_id": user_id, "conversation_id": {"$gt": after}, **live}
            with store_errors():
                page = await self._memberships.find(
                    wanted, {"conversation_id": 1}, sort=[("conversation_id", 1)], limit=_PAGE
                ).to_list()
                if not page:
                    return
                names = [member["conversation_id"] for member in page]
                others = self._memberships.find({"conversation_id": {"$in": names}, **live}, {"user_id": 1})
                people = {member["user_id"] async for member in others}
            yield people
            after = names[-1]

    # --- claims ------------------------------------------------------------------------------------------------------

    async def claim(self, device: KeyDevice, now: datetime) -> SignedKey | None:
        """The oldest one-time key of a device, given to nobody else ever; None where none is left."""
        wanted = {"device": device.name, "generation": device.generation, "free": True}
        with store_errors():
            found = await self._keys.find_one_and_update(
                wanted, {"$set": {"claimed_at": now}, "$unset": {"free": ""}}, sort=[("position", 1)]
            )
        return None if found is None else msgspec.convert(found, SignedKey)

    async def running_low(self, device: KeyDevice) -> int | None:
        """How many are left, for the one caller that is to tell the device so; None for everybody else."""
        if device.low_told:
            return None
        with store_errors():
            count = await self._count(device.name, device.generation, None, limit=LOW)
            if count >= LOW:
                return None
            wanted = {"_id": device.name, "generation": device.generation, "low_told": False}
            told = await self._devices.update_one(wanted, {"$set": {"low_told": True}})
        return count if told.modified_count else None

    # --- the end of a device -----------------------------------------------------------------------------------------

    async def forget(self, user_id: str, device_id: str) -> int | None:
        """The device and its keys are gone: the list's new version. None where it had no keys.

        Whoever calls this tells the others: `workers.rest.device_keys.announce`.
        """
        name = _name(user_id, device_id)

        async def work(session: AsyncClientSession) -> int | None:
            if not (await self._devices.delete_one({"_id": name}, session=session)).deleted_count:
                return None
            await self._keys.delete_many({"device": name}, session=session)
            return await self._grow(user_id, session)

        return await self._transaction(work)

    async def forget_user(self, user_id: str) -> None:
        """All devices of a deleted account, their keys and the list."""

        async def work(session: AsyncClientSession) -> None:
            names = [device["_id"] async for device in self._devices.find({"user_id": user_id}, session=session)]
            await self._keys.delete_many({"device": {"$in": names}}, session=session)
            await self._devices.delete_many({"user_id": user_id}, session=session)
            await self._lists.delete_one({"_id": user_id}, session=session)

        await self._transaction(work)

    # --- parts -------------------------------------------------------------------------------------------------------

    async def _transaction(self, work: Callable[[AsyncClientSession], Awaitable[Result]]) -> Result:
        """Repeated by the driver while it meets another one, within a bound."""
        with store_errors(), pymongo.timeout(_TRANSACTION_SECONDS):
            async with self._client.start_session() as session:
                return await session.with_transaction(
                    work, read_concern=ReadConcern("snapshot"), write_concern=self._write_concern
                )

    async def _count(
        self, name: str, generation: int, session: AsyncClientSession | None, limit: int = STORED_LIMIT
    ) -> int:
        wanted = {"device": name, "generation": generation, "free": True}
        return await self._keys.count_documents(wanted, session=session, limit=limit)

    async def _version(self, user_id: str, session: AsyncClientSession | None) -> int:
        document = await self._lists.find_one({"_id": user_id}, session=session)
        return 0 if document is None else int(document["version"])

    async def _grow(self, user_id: str, session: AsyncClientSession) -> int:
        document = await self._lists.find_one_and_update(
            {"_id": user_id}, {"$inc": {"version": 1}}, upsert=True, return_document=True, session=session
        )
        return int(document["version"]) if document else 0


def _name(user_id: str, device_id: str) -> str:
    return f"{user_id}:{device_id}"


def _device(document: Document) -> KeyDevice:
    return msgspec.convert(document, KeyDevice)


def _document(device: KeyDevice, name: str, key: SignedKey, position: int, now: datetime) -> Document:
    place = {"_id": name, "device": device.name, "generation": device.generation, "position": position}
    return {**place, **msgspec.structs.asdict(key), "free": True, "uploaded_at": now}
