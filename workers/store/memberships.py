"""Memberships as people see and arrange them: who is in, who is banned, and a member's own order of things.

Called by the REST role. Roles, stays and marks are written by the conversation's owner alone (`conversations.py`,
`marks.py`); only `arrange` writes here, and only what nobody else writes.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, UnsetType
from pymongo import ReturnDocument

from protocol.models import Role
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

_LIVE: Final[Document] = {"$exists": False}


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """One of those who are in a conversation. `joined_sequence`: the first entry of its log that they see."""

    user_id: str
    name: str
    role: Role
    joined_sequence: int
    silenced_until: datetime | UnsetType = UNSET


class Banned(msgspec.Struct, frozen=True):
    """Somebody who must not come back."""

    user_id: str
    name: str


class OwnSettings(msgspec.Struct, frozen=True):
    """How a member has arranged a conversation for themselves."""

    archived: bool
    pinned: bool
    muted_until: datetime | None


class MembershipStore:
    """Reader of `memberships`, and writer of a member's own settings. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._memberships = database["memberships"]
        self._conversations = database["conversations"]
        self._users = database["users"]

    async def role(self, conversation_id: str, user_id: str) -> Role | None:
        """The role of a member, or None for who is not in it now."""
        wanted = {"_id": f"{conversation_id}:{user_id}", "leave_seq": _LIVE}
        with store_errors():
            document = await self._memberships.find_one(wanted, {"role": 1})
        return None if document is None else Role(document["role"])

    async def participant(self, conversation_id: str, user_id: str) -> Participant | None:
        """One of those who are in it now, or None."""
        wanted = {"_id": f"{conversation_id}:{user_id}", "leave_seq": _LIVE}
        with store_errors():
            document = await self._memberships.find_one(wanted)
            if document is None:
                return None
            names = await self._names([user_id])
        return _participant(document, names)

    async def participants(self, conversation_id: str, after: str, limit: int) -> tuple[list[Participant], str | None]:
        """At most `limit` of those who are in it now, by id, behind one; and where to go on when there are more."""
        wanted = {"conversation_id": conversation_id, "leave_seq": _LIVE, "user_id": {"$gt": after}}
        with store_errors():
            # A group has a hundred at most: sorting them needs no index.
            found = await self._memberships.find(wanted, sort=[("user_id", 1)], limit=limit + 1).to_list()
            names = await self._names(document["user_id"] for document in found)
        page = [_participant(document, names) for document in found[:limit]]
        return page, page[-1].user_id if len(found) > limit else None

    async def bans(self, conversation_id: str, after: str, limit: int) -> tuple[list[Banned], str | None]:
        """At most `limit` of those who are banned, by id, behind one; and where to go on when there are more."""
        with store_errors():
            document = await self._conversations.find_one({"_id": conversation_id}, {"banned": 1})
            banned = sorted(name for name in (document or {}).get("banned", ()) if name > after)
            names = await self._names(banned[:limit])
        page = [Banned(user_id, names.get(user_id, "")) for user_id in banned[:limit]]
        return page, page[-1].user_id if len(banned) > limit else None

    async def arrange(self, conversation_id: str, user_id: str, values: Mapping[str, object]) -> OwnSettings | None:
        """Write a member's own settings (None takes one away); how they stand then, or None for no member."""
        wanted = {"_id": f"{conversation_id}:{user_id}", "leave_seq": _LIVE}
        update: Document = {}
        for name, value in values.items():
            update.setdefault("$unset" if value is None else "$set", {})[name] = value
        with store_errors():
            if update:
                document = await self._memberships.find_one_and_update(
                    wanted, update, return_document=ReturnDocument.AFTER
                )
            else:
                document = await self._memberships.find_one(wanted)
        return None if document is None else own_settings(document)

    async def _names(self, user_ids: Iterable[str]) -> dict[str, str]:
        wanted = {"_id": {"$in": list(user_ids)}}
        return {document["_id"]: document["name"] async for document in self._users.find(wanted, {"name": 1})}


def own_settings(membership: Document) -> OwnSettings:
    """What a `memberships` document says of its member's own order of things."""
    return OwnSettings(bool(membership.get("archived")), "pinned_at" in membership, membership.get("muted_until"))


def _participant(document: Document, names: Mapping[str, str]) -> Participant:
    return Participant(
        user_id=document["user_id"],
        name=names.get(document["user_id"], ""),
        role=Role(document["role"]),
        joined_sequence=document["join_seq"],
        silenced_until=document.get("silenced_until", UNSET),
    )
