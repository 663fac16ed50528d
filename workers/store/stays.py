"""Every stay of one user, live or ended, in pages; and whether two people are in something together.

Called by the REST role, for what goes over all of an account's conversations: export, deletion, settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workers.store.conversations import conversation_of, membership_of
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pymongo.asynchronous.database import AsyncDatabase

    from protocol.models import Conversation, Membership

Document = dict[str, Any]
_LIVE: Final[Document] = {"leave_seq": {"$exists": False}}
_PAGE: Final = 100


class Stay(NamedTuple):
    """A membership and the conversation it is in."""

    membership: Membership
    conversation: Conversation


class StayReader:
    """Reader of `memberships` by user. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._memberships = database["memberships"]
        self._conversations = database["conversations"]

    async def stays(self, user_id: str, *, live: bool) -> AsyncIterator[list[Stay]]:
        """All stays by conversation id, or the live ones only, in pages; no cursor is open between two of them."""
        after = ""
        while True:
            wanted: Document = {"user_id": user_id, "conversation_id": {"$gt": after}} | (_LIVE if live else {})
            with store_errors():
                members = await self._memberships.find(wanted, sort=[("conversation_id", 1)], limit=_PAGE).to_list()
                names = [member["conversation_id"] for member in members]
                found = self._conversations.find({"_id": {"$in": names}})
                conversations = {document["_id"]: conversation_of(document) async for document in found}
            if not members:
                return
            yield [
                Stay(membership_of(member), conversations[member["conversation_id"]])
                for member in members
                if member["conversation_id"] in conversations
            ]
            after = names[-1]

    async def share(self, user_id: str, other_id: str) -> bool:
        """Are both in a conversation now?"""
        with store_errors():
            found = self._memberships.find({"user_id": other_id, **_LIVE}, {"_id": 0, "conversation_id": 1})
            names = [member["conversation_id"] async for member in found]
            wanted = {"user_id": user_id, "conversation_id": {"$in": names}, **_LIVE}
            return await self._memberships.find_one(wanted, {"_id": 1}) is not None
