"""Single messages and searches by metadata, as their viewer may see them. The server never reads `content`.

Called by the REST role. Every search is bounded by what it may look at, not by what it finds: a page covers a span of
the log, and may hold few messages or none while there is still more to come.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from protocol.models import MessageType, StoredMessage
from workers.store.audience import Audience, shown_marks
from workers.store.errors import store_errors
from workers.store.indexes import SEQUENCE_INDEX
from workers.store.logs import NotVisible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

SPAN: Final = 10_000
"""Entries that one page of a conversation's search covers at most."""
CONVERSATIONS: Final = 200
"""The most recently active ones, which a search over all of them covers."""
CHANGES: Final = 1000
"""Entries looked back over for the last message of a conversation that is no change of another; behind more of them it
has none to show in a list."""
ENTRIES: Final = 100_000
"""Entries that a search over all conversations covers at most, shared equally among them."""
_END: Final = 2**53
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to look for; None: whatever. Times are the server's, of the commit: `after` ≤ time < `before`."""

    sender_id: str | None = None
    message_type: MessageType | None = None
    after: datetime | None = None
    before: datetime | None = None
    has_media: bool | None = None
    reply_to: str | None = None
    forwarded: bool | None = None

    def filter(self, user_id: str, now: datetime) -> Document:
        """The query's part about single messages: what fits, and still has something to show to this viewer."""
        found: Document = {
            "deleted_at": {"$exists": False},
            "hidden_by": {"$ne": user_id},
            "$nor": [{"expires_at": {"$lte": now}}],
            "type": {"$ne": MessageType.SYSTEM.value} if self.message_type is None else self.message_type.value,
        }
        if self.sender_id is not None:
            found["sender_id"] = self.sender_id
        if self.has_media is not None:
            found["media_url"] = {"$exists": self.has_media}
        if self.reply_to is not None:
            found["reply_to_message_id"] = self.reply_to
        if self.forwarded is not None:
            found["forwarded"] = True if self.forwarded else {"$ne": True}
        return found


class Spot(NamedTuple):
    """Where in a search over all conversations a message stands: later first, then the greater id."""

    created_at: datetime
    message_id: str


class Receipt(msgspec.Struct, frozen=True):
    """How one of the others stands to a message."""

    user_id: str
    delivered: bool
    read: bool


class NotAuthor(msgspec.Struct, frozen=True):
    """Only its author is told who has a message."""


class SearchReader:
    """Reader of `messages` for their viewers. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._messages = database["messages"]
        self._memberships = database["memberships"]
        self._conversations = database["conversations"]

    async def message(self, user_id: str, conversation_id: str, message_id: str) -> StoredMessage | NotVisible | None:
        """One message, or None where this conversation has none of that id that the user may see."""
        with store_errors():
            audience = (await self._audiences(user_id, [conversation_id])).get(conversation_id)
            if audience is None:
                return NotVisible()
            document = await self._messages.find_one({"_id": message_id, "conversation_id": conversation_id})
        return None if document is None or not _sees(audience, document) else audience.show(document)

    async def newest(self, user_id: str, conversation_ids: Sequence[str]) -> dict[str, StoredMessage]:
        """The last visible message of each of these conversations, among its last `CHANGES` entries: no entry that only
        changes another one."""
        pipeline: list[Document] = [
            {"$match": {"_id": {"$in": list(conversation_ids)}}},
            {
                "$lookup": {
                    "from": "messages",
                    "localField": "_id",
                    "foreignField": "conversation_id",
                    "pipeline": [
                        {"$sort": {"sequence_number": -1}},
                        {"$limit": CHANGES},
                        {"$match": {"target_message_id": {"$exists": False}}},
                        {"$limit": 1},
                    ],
                    "as": "found",
                }
            },
            {"$project": {"found": 1}},
        ]
        with store_errors():
            cursor = await self._conversations.aggregate(pipeline)
            found = {document["_id"]: document["found"][0] async for document in cursor if document["found"]}
            audiences = await self._audiences(user_id, list(found))
        return {
            name: audiences[name].show(document)
            for name, document in found.items()
            if name in audiences and _sees(audiences[name], document)
        }

    async def receipts(
        self, user_id: str, conversation_id: str, message_id: str, after: str, limit: int
    ) -> tuple[list[Receipt], str | None] | NotVisible | NotAuthor | None:
        """How those stand to a message who, besides its author, could see it; for the author only. By id."""
        with store_errors():
            members = await self._memberships.find({"conversation_id": conversation_id}).to_list()
            audience = Audience.of(user_id, members, datetime.now(UTC))
            if audience is None:
                return NotVisible()
            document = await self._messages.find_one({"_id": message_id, "conversation_id": conversation_id})
        if document is None or not _sees(audience, document):
            return None
        if document["sender_id"] != user_id:
            return NotAuthor()
        sequence = document["sequence_number"]
        found = [
            _receipt(member, sequence)
            for member in sorted(members, key=lambda member: str(member["user_id"]))
            if member["user_id"] != user_id and member["user_id"] > after
            if member["join_seq"] <= sequence <= member.get("leave_seq", _END)
        ]
        return found[:limit], found[limit - 1].user_id if len(found) > limit else None

    async def in_conversation(
        self, user_id: str, conversation_id: str, wanted: Wanted, before: int, limit: int
    ) -> tuple[list[StoredMessage], int | None] | NotVisible:
        """Newest first before a sequence; and the sequence to go on before, or None at the end of what is visible."""
        with store_errors():
            audience = (await self._audiences(user_id, [conversation_id])).get(conversation_id)
            if audience is None:
                return NotVisible()
            low, high = audience.first, min(before - 1, audience.last(await self._last(conversation_id)))
            if wanted.before is not None:
                high = await self._sequence_before(conversation_id, wanted.before, low, high)
            if wanted.after is not None:
                low = await self._sequence_before(conversation_id, wanted.after, low, high) + 1
            floor = max(low, high - SPAN + 1)
            query = conversation_query(conversation_id, floor, high, wanted.filter(user_id, _now()))
            order = [("conversation_id", -1), ("sequence_number", -1)]
            found = await self._messages.find(query, sort=order, limit=limit + 1, hint=SEQUENCE_INDEX).to_list()
        page = [audience.show(document) for document in found[:limit]]
        if len(found) > limit:
            return page, found[limit - 1]["sequence_number"]
        return page, floor if floor > low else None

    async def everywhere(
        self, user_id: str, wanted: Wanted, before: Spot | None, limit: int
    ) -> tuple[list[StoredMessage], Spot | None]:
        """Newest first, in the newest entries of the most recently active conversations that the user is in."""
        with store_errors():
            joined = await self._joined(user_id)
            if not joined:
                return [], None
            pipeline = everywhere_pipeline(joined, wanted.filter(user_id, _now()), wanted, before, limit + 1)
            found = await (await self._messages.aggregate(pipeline, hint=SEQUENCE_INDEX)).to_list()
            audiences = await self._audiences(user_id, {document["conversation_id"] for document in found})
        page = [
            audience.show(document)
            for document in found[:limit]
            # Whoever was removed since the look at where they are sees nothing of after.
            if (audience := audiences.get(document["conversation_id"])) is not None and _sees(audience, document)
        ]
        if len(found) <= limit:
            return page, None
        return page, Spot(found[limit - 1]["created_at"], found[limit - 1]["_id"])

    # --- pieces, all inside `store_errors` ---------------------------------------------------------------------------

    async def _audiences(self, user_id: str, conversation_ids: Iterable[str]) -> dict[str, Audience]:
        names = list(conversation_ids)
        members: dict[str, list[Document]] = {name: [] for name in names}
        async for member in self._memberships.find({"conversation_id": {"$in": names}}):
            members[member["conversation_id"]].append(member)
        found = {name: Audience.of(user_id, members[name], datetime.now(UTC)) for name in names}
        return {name: audience for name, audience in found.items() if audience is not None}

    async def _joined(self, user_id: str) -> list[tuple[str, int]]:
        """(conversation, first sequence to look at) of the user's most recently active conversations."""
        live = {"user_id": user_id, "leave_seq": {"$exists": False}}
        joined = {
            member["conversation_id"]: member["join_seq"]
            async for member in self._memberships.find(live, {"_id": 0, "conversation_id": 1, "join_seq": 1})
        }
        fields = {"last_message_at": 1, "created_at": 1, "last_sequence_number": 1}
        active = await self._conversations.find({"_id": {"$in": list(joined)}}, fields).to_list()
        active.sort(key=lambda document: document.get("last_message_at") or document["created_at"], reverse=True)
        active = active[:CONVERSATIONS]
        share = ENTRIES // max(len(active), 1)
        # The flushed sequence is up to a second old; what is newer is covered all the same.
        return [
            (document["_id"], max(joined[document["_id"]], document["last_sequence_number"] - share + 1))
            for document in active
        ]

    async def _last(self, conversation_id: str) -> int:
        document = await self._messages.find_one(
            {"conversation_id": conversation_id},
            {"sequence_number": 1},
            sort=[("conversation_id", -1), ("sequence_number", -1)],
            hint=SEQUENCE_INDEX,
        )
        return 0 if document is None else int(document["sequence_number"])

    async def _sequence_before(self, conversation_id: str, moment: datetime, low: int, high: int) -> int:
        """The greatest sequence in low..high committed before a time, low - 1 for none. Commit times never go back, so
        it is found by halving; what has expired was before."""
        below, above = low - 1, high + 1
        while above - below > 1:
            middle = (below + above) // 2
            document = await self._messages.find_one(
                {"conversation_id": conversation_id, "sequence_number": middle}, {"created_at": 1}, hint=SEQUENCE_INDEX
            )
            if document is None or document["created_at"] < moment:
                below = middle
            else:
                above = middle
        return below


def conversation_query(conversation_id: str, low: int, high: int, more: Document) -> Document:
    """Entries low..high of a conversation, as its index finds them."""
    return {"conversation_id": conversation_id, "sequence_number": {"$gte": low, "$lte": high}, **more}


def everywhere_pipeline(
    joined: Sequence[tuple[str, int]], fitting: Document, wanted: Wanted, before: Spot | None, limit: int
) -> list[Document]:
    """The search over several conversations, each from a sequence on.

    Time is compared and sorted by as a computed number: by the field, the planner might walk the retention index, and
    with it everybody's messages.
    """
    times: list[Document] = []
    if wanted.after is not None:
        times.append({"at": {"$gte": _ms(wanted.after)}})
    if wanted.before is not None:
        times.append({"at": {"$lt": _ms(wanted.before)}})
    if before is not None:
        at = _ms(before.created_at)
        times.append({"$or": [{"at": {"$lt": at}}, {"at": at, "_id": {"$lt": before.message_id}}]})
    return [
        {"$match": {"$or": [conversation_query(name, low, _END, {}) for name, low in joined], **fitting}},
        {"$set": {"at": {"$toLong": "$created_at"}}},
        {"$match": {"$and": times} if times else {}},
        {"$sort": {"at": -1, "_id": -1}},
        {"$limit": limit},
    ]


def _ms(moment: datetime) -> int:
    return (moment - _EPOCH) // _MILLISECOND


def _sees(audience: Audience, document: Document) -> bool:
    return audience.first <= int(document["sequence_number"]) <= audience.last(_END)


def _receipt(member: Document, sequence: int) -> Receipt:
    delivered, read = shown_marks(member)
    return Receipt(member["user_id"], delivered >= sequence, read >= sequence)


def _now() -> datetime:
    return datetime.now(UTC)
