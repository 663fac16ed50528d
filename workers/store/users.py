"""Accounts: create, look up, change, end. Called by the REST and query roles.

Phone and email are unique in their comparable form (`phone_key`, `email_key`), however they were written. An account
that is being deleted loses name, phone and email at once, in the same write that says so; its document stays, because
messages name its id. `unfinished` says what REST still has to do for it elsewhere.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pymongo import ReturnDocument
from pymongo.errors import BulkWriteError

from protocol.models import Privacy, User, UserStatus, to_document
from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
_DUPLICATE_KEY: Final = 11000
DELETED_NAME: Final = "Deleted account"
_ACTIVE: Final[Document] = {"deleted_at": {"$exists": False}}
_SEPARATORS: Final = re.compile(r"[\s()./-]+")
_INTERNATIONAL: Final = re.compile(r"\+[1-9][0-9]{6,14}")
"""ITU-T E.164: a country code, 15 digits at most; shorter than 7 are nobody's."""
_MAILBOX: Final = re.compile(r"[^@\s]{1,64}@[^@\s]+")


class Taken(msgspec.Struct, frozen=True):
    """Another account has this `field` (phone or email)."""

    field: str


class Account(User, kw_only=True, frozen=True):
    """An account as its owner sees it."""

    privacy: Privacy = Privacy()


class Unfinished(msgspec.Struct, frozen=True):
    """`work`: deletion, remains or read_receipts. `token`: of the change alone that asked for it."""

    user_id: str
    work: str
    token: str


DELETION: Final = "deletion"
REMAINS: Final = "remains"
"""What a deletion has left behind."""
READ_RECEIPTS: Final = "read_receipts"
_INTENT: Final = dict.fromkeys(("unfinished", "unfinished_since", "unfinished_token"), 1)


def phone_key(text: str) -> str | None:
    """A phone number as it is compared: `+` and digits, without separators, `00` read as `+`. None: no such number.

    A number without a country code is nobody's in particular, so it is not compared.
    """
    digits = _SEPARATORS.sub("", text)
    if digits.startswith("00"):
        digits = "+" + digits[2:]
    return digits if _INTERNATIONAL.fullmatch(digits) else None


def email_key(text: str) -> str | None:
    """An email address as it is compared: the domain in lower case, the part before it as it is (RFC 5321 2.4)."""
    mailbox, _, domain = text.strip().rpartition("@")
    key = f"{mailbox}@{domain.lower()}"
    return key if _MAILBOX.fullmatch(key) and len(key) <= 254 else None


class UserStore:
    """Reader and writer of `users`. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._users = database["users"]

    async def create(self, user: User) -> User | Taken:
        """Store a new account. The unique indexes judge, not a read before the write."""
        document = to_document(user)
        comparable = {"phone_key": phone_key(user.phone or ""), "email_key": email_key(user.email or "")}
        document |= {field: key for field, key in comparable.items() if key is not None}
        try:
            with store_errors():
                # insert_many even for one: a lone insert_one's duplicate hides an unmet write concern.
                await self._users.insert_many([document])
        except StoreUnavailable as failure:
            error = failure.__cause__
            if not isinstance(error, BulkWriteError) or error.details["writeConcernErrors"]:
                raise
            refused = error.details["writeErrors"][0]
            if refused["code"] != _DUPLICATE_KEY:
                raise
            return Taken(next(iter(refused["keyPattern"])).removesuffix("_key"))
        return user

    async def get(self, user_id: str) -> User | None:
        """One account, or None; a deleted one is none."""
        with store_errors():
            document = await self._users.find_one({"_id": user_id, **_ACTIVE})
        return None if document is None else msgspec.convert(document, User)

    async def account(self, user_id: str) -> Account | None:
        """One account as its owner sees it, or None; a deleted one is none."""
        with store_errors():
            document = await self._users.find_one({"_id": user_id, **_ACTIVE})
        return None if document is None else msgspec.convert(document, Account)

    async def profile(self, user_id: str) -> Account | None:
        """What is known of an id, also of one whose account is deleted."""
        with store_errors():
            document = await self._users.find_one({"_id": user_id})
        return None if document is None else msgspec.convert(document, Account)

    async def find_by_contact(self, field: str, key: str) -> Account | None:
        """The account with this `phone_key` or `email_key`."""
        with store_errors():
            document = await self._users.find_one({field: key, **_ACTIVE})
        return None if document is None else msgspec.convert(document, Account)

    async def unknown(self, user_ids: Iterable[str]) -> set[str]:
        """Those of the ids that name no account; a deleted one is none."""
        wanted = set(user_ids)
        with store_errors():
            found = self._users.find({"_id": {"$in": list(wanted)}, **_ACTIVE}, {"_id": 1})
            known = {document["_id"] async for document in found}
        return wanted - known

    async def privacy(self, user_ids: Iterable[str]) -> dict[str, Privacy]:
        """What these accounts show of themselves; ids that name no account are left out, a deleted one is one."""
        with store_errors():
            found = self._users.find({"_id": {"$in": list(user_ids)}}, {"privacy": 1})
            return {document["_id"]: msgspec.convert(document.get("privacy", {}), Privacy) async for document in found}

    # --- changes -----------------------------------------------------------------------------------------------------

    async def change(
        self, user_id: str, values: Mapping[str, Any], gone: Iterable[str], unfinished: str | None, now: datetime
    ) -> Account | None:
        """Set and remove fields of an account; the account as it is then. `unfinished`: see `finished`."""
        update: Document = {"$set": dict(values)}
        if unfinished is not None:
            update["$set"] |= _intent(unfinished, now)
        removed = dict.fromkeys(gone, "")
        if removed:
            update["$unset"] = removed
        if not update["$set"]:
            del update["$set"]
        if not update:
            return await self.account(user_id)
        with store_errors():
            document = await self._users.find_one_and_update(
                {"_id": user_id, **_ACTIVE}, update, return_document=ReturnDocument.AFTER
            )
        return None if document is None else msgspec.convert(document, Account)

    async def seen(self, user_id: str, now: datetime) -> None:
        """The person was here; time only moves forward."""
        with store_errors():
            await self._users.update_one({"_id": user_id, **_ACTIVE}, {"$max": {"last_seen": now}})

    async def begin_deletion(self, user_id: str, now: datetime) -> None:
        """From here on nobody logs in to this account, and nothing in it says whose it was. May be repeated."""
        blank: Document = {
            "name": DELETED_NAME,
            "phone": None,
            "email": None,
            "status": UserStatus.OFFLINE.value,
            "deleted_at": now,
            **_intent(DELETION, now),
        }
        gone = dict.fromkeys(("phone_key", "email_key", "avatar_url", "last_seen", "privacy"), "")
        with store_errors():
            await self._users.update_one({"_id": user_id, **_ACTIVE}, {"$set": blank, "$unset": gone})

    async def unfinished(self, user_id: str) -> Unfinished | None:
        """What is still to be done for an account."""
        with store_errors():
            document = await self._users.find_one({"_id": user_id, "unfinished": {"$exists": True}}, _INTENT)
        return None if document is None else _unfinished(document)

    async def finished(self, done: Unfinished, later: str | None, now: datetime) -> None:
        """That is done, and `later` begun, as if by somebody who has gone; nothing happens where the account has
        changed again."""
        update: Document = {"$unset": dict.fromkeys(_INTENT, "")} if later is None else {"$set": _intent(later, now)}
        with store_errors():
            await self._users.update_one({"_id": done.user_id, "unfinished_token": done.token}, update)

    async def take_unfinished(self, before: datetime, now: datetime) -> Unfinished | None:
        """One account whose work was begun, or taken up, before a time and did not end; it is the caller's for now."""
        with store_errors():
            document = await self._users.find_one_and_update(
                {"unfinished_since": {"$lt": before}},
                {"$set": {"unfinished_since": now}},
                projection=_INTENT,
                sort=[("unfinished_since", 1)],
            )
        return None if document is None else _unfinished(document)


def _intent(work: str, now: datetime) -> Document:
    """What a change writes down with itself: this is to be done elsewhere."""
    return {"unfinished": work, "unfinished_since": now, "unfinished_token": secrets.token_hex(8)}


def _unfinished(document: Document) -> Unfinished:
    return Unfinished(document["_id"], document["unfinished"], document["unfinished_token"])
