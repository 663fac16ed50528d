"""Who may see whether somebody is online, and when people were last seen.

Called by `workers/presence.py`. Contacts are those one shares a live conversation with; a block, in either direction,
or the other's wish not to be seen takes the right away.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pymongo import UpdateOne, WriteConcern

from protocol import keys
from protocol.models import LastSeen
from workers.store.blocks import BlockStore
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pymongo.asynchronous.database import AsyncDatabase

    from protocol.models import Presence

Document = dict[str, Any]
_LIVE = {"leave_seq": {"$exists": False}}


class ContactStore:
    """Reader of memberships, accounts and blocks; writer of `users.status` and `users.last_seen`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._memberships = database["memberships"]
        self._users = database["users"]
        # Lost at worst until the person comes or goes again.
        self._seen = database["users"].with_options(write_concern=WriteConcern(1))
        self._blocks = BlockStore(database)

    async def watchable(self, user_id: str, user_ids: Sequence[str]) -> dict[str, int]:
        """Those of the people asked for whom this user may watch → when they were last seen (epoch ms, 0: unknown).

        A constant number of round trips. Raises StoreUnavailable.
        """
        wanted = [name for name in dict.fromkeys(user_ids) if name != user_id]
        contacts = await self._contacts(user_id, wanted)
        if not contacts:
            return {}
        hidden = await self._blocks.apart(user_id, contacts)
        shown = {
            "_id": {"$in": [name for name in contacts if name not in hidden]},
            "privacy.last_seen": {"$ne": LastSeen.NOBODY.value},
            "deleted_at": {"$exists": False},
        }
        with store_errors():
            found = await self._users.find(shown, {"last_seen": 1}).to_list()
        return {document["_id"]: _ms(document.get("last_seen")) for document in found}

    async def _contacts(self, user_id: str, user_ids: list[str]) -> set[str]:
        """Those of these people who are in a conversation with this user now: 1:1 first, whose ids are known."""
        direct = {f"{keys.direct_conversation_id(user_id, other)}:{other}": other for other in user_ids}
        with store_errors():
            pairs = self._memberships.find({"_id": {"$in": list(direct)}, **_LIVE}, {"_id": 1})
            found = {direct[document["_id"]] async for document in pairs}
            rest = [other for other in user_ids if other not in found]
            if rest:
                mine = self._memberships.find({"user_id": user_id, **_LIVE}, {"_id": 0, "conversation_id": 1})
                names = [document["conversation_id"] async for document in mine]
                theirs = {"user_id": {"$in": rest}, "conversation_id": {"$in": names}, **_LIVE}
                found.update(await self._memberships.distinct("user_id", theirs))
        return found

    async def note_seen(self, people: Mapping[str, Presence]) -> None:
        """Write down how these users are; time only moves forward. Raises StoreUnavailable."""
        updates = [
            UpdateOne(
                {"_id": user_id, "deleted_at": {"$exists": False}},
                {
                    "$set": {"status": presence.status.value},
                    "$max": {"last_seen": datetime.fromtimestamp(presence.last_seen / 1000, UTC)},
                },
            )
            for user_id, presence in people.items()
        ]
        if updates:
            with store_errors():
                await self._seen.bulk_write(updates, ordered=False)


def _ms(at: datetime | None) -> int:
    return 0 if at is None else int(at.timestamp() * 1000)
