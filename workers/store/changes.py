"""Messages changed after their commit: what a change needs to know of its target, and what it does to it.

Called by the ingest role. The change itself is an entry of the log; its effect on the target is a projection, written
after the entry and redone at load. Each effect carries its entry's sequence, and a target takes none older than the
last it took, so a late owner never undoes a later change. The janitor erases what has disappeared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pymongo import UpdateMany, UpdateOne

from protocol.models import EventKind
from protocol.watermarks import content_hash
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class Target:
    """A message as the changes see it that name it: from a majority read, moved on by the changes of one batch."""

    __slots__ = (
        "content_hash",
        "conversation_id",
        "created_ms",
        "deleted",
        "expires_ms",
        "has_content",
        "hidden_by",
        "is_system",
        "key",
        "message_id",
        "reactions",
        "sender_id",
        "sequence_number",
    )

    def __init__(self, document: Document) -> None:
        self.message_id: str = document["_id"]
        self.conversation_id: str = document["conversation_id"]
        self.sequence_number: int = document["sequence_number"]
        self.sender_id: str = document["sender_id"]
        self.key: str = document["idempotency_key"]
        self.is_system = document["type"] == "system"
        self.created_ms = _ms(document["created_at"])
        self.has_content = bool(document["content"])
        self.deleted = "deleted_at" in document
        self.expires_ms = _ms(document["expires_at"]) if "expires_at" in document else 0
        """0: never."""
        self.content_hash = original_hash(document)
        self.reactions = {(given["user_id"], given["emoji"]) for given in document.get("reactions", ())}
        self.hidden_by: set[str] = set(document.get("hidden_by", ()))


class Effect(NamedTuple):
    """What the entry at `sequence` does to its target. `original`: hash of what the target said first, hexadecimal."""

    kind: EventKind
    message_id: str
    sequence: int
    at: datetime
    actor: str
    content: str
    emoji: str
    original: str


class ChangeStore:
    """`messages` as those see it who change them after the commit. Every method raises StoreUnavailable."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._messages = database["messages"]

    async def targets(self, message_ids: Sequence[str]) -> dict[str, Target]:
        """These messages as a majority holds them; unknown ids are left out."""
        fields = {"digest": 0, "countable": 0, "status": 0, "timestamp": 0, "media_url": 0}
        with store_errors():
            found = self._messages.find({"_id": {"$in": list(message_ids)}}, fields)
            return {document["_id"]: Target(document) async for document in found}

    async def erase_expired(self, now: datetime, limit: int) -> int:
        """Erase the content of at most `limit` messages whose time is over; returns how many. Safe to repeat, and to
        run in several processes at once."""
        with store_errors():
            due = self._messages.find({"erase_at": {"$lte": now}}, {"_id": 1}, sort=[("erase_at", 1)], limit=limit)
            ids = [document["_id"] async for document in due]
            if ids:
                erase = {"content": "", "deleted_at": {"$ifNull": ["$deleted_at", "$expires_at"]}}
                await self._messages.update_many(
                    {"_id": {"$in": ids}}, [{"$set": erase}, {"$unset": ["erase_at", "media_url", "reactions"]}]
                )
        return len(ids)


def operations(effect: Effect) -> Iterator[UpdateOne | UpdateMany]:
    """The updates of an effect, in order. Done again they change nothing."""
    newer: Document = {"_id": effect.message_id, "changed_seq": {"$not": {"$gte": effect.sequence}}}
    done = {"changed_seq": effect.sequence}
    match effect.kind:
        case EventKind.EDITED:
            # What has disappeared meanwhile stays so.
            edit = done | {
                "content": effect.content,
                "edited_at": effect.at,
                "edited_seq": effect.sequence,
                "content_hash": effect.original,
            }
            yield UpdateOne(newer | {"deleted_at": {"$exists": False}}, {"$set": edit})
        case EventKind.DELETED:
            gone = {"content": "", "deleted_at": effect.at}
            left = {
                "$set": done | gone | {"content_hash": effect.original},
                "$unset": {"media_url": "", "reactions": ""},
            }
            yield UpdateOne(newer, left)
            # Only edits among the entries about it have a hash (`drafts.py`): what they said goes too.
            edits = {"target_message_id": effect.message_id, "content_hash": {"$exists": True}, "content": {"$ne": ""}}
            yield UpdateMany(edits, {"$set": gone})
        case EventKind.HIDDEN:
            hide = {"$addToSet": {"hidden_by": effect.actor}}
            yield UpdateOne(newer, {"$set": done, **hide})
            # What its edits said goes with it; later ones are hidden from the start (`plan.py`).
            yield UpdateMany({"target_message_id": effect.message_id, "content_hash": {"$exists": True}}, hide)
        case EventKind.REACTED:
            given = {"user_id": effect.actor, "emoji": effect.emoji}
            yield UpdateOne(newer, {"$set": done, "$addToSet": {"reactions": given}})
        case EventKind.UNREACTED:
            given = {"user_id": effect.actor, "emoji": effect.emoji}
            yield UpdateOne(newer, {"$set": done, "$pull": {"reactions": given}})


def original_hash(document: Document) -> str:
    """Hash of what was committed, whatever became of it since; hexadecimal."""
    stored: str | None = document.get("content_hash")
    return content_hash(document["content"]).hex() if stored is None else stored


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
