"""`dead_letter_queue`: what could not succeed, until it does or somebody says that it need not.

Called by the lanes (`workers/dead_letters.py`), by whoever replays (`workers/replay.py`), and by those who look. Every
step from one status to another is one conditional update of one document, so of two who want the same letter one gets
it. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from pymongo import ReturnDocument

from protocol.models import DeadLetterQueueEntry, DLQErrorType, DLQStatus
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

PENDING: Final = DLQStatus.PENDING.value
RETRYING: Final = DLQStatus.RETRYING.value
FAILED: Final = DLQStatus.FAILED.value
RESOLVED: Final = DLQStatus.RESOLVED.value
KNOWN_LIMIT: Final = 200_000
"""Most letters whose ids one owner remembers (about 150 bytes each)."""
_BODIES: Final = {"raw": 0, "message.content": 0}
_UNSETTLED: Final = {"$or": [{"status": {"$ne": RESOLVED}}, {"refused_at": {"$exists": True}}]}


class Place(NamedTuple):
    """Where in the list a letter stands: newest first, then the greater id."""

    created_at: datetime
    letter_id: str


class Count(msgspec.Struct, frozen=True):
    """How many letters have this status for this reason. `oldest_at`: when the first of them was written."""

    status: DLQStatus
    error_type: DLQErrorType
    letters: int
    oldest_at: datetime


class DeadLetterStore:
    """Every read and write of the dead letter queue."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._letters = database["dead_letter_queue"]

    # --- a shard's owner ---------------------------------------------------------------------------------------------

    async def bury(self, letter_id: str, letter: Document) -> None:
        """Write a letter; one that is there stays as it is, unless it was resolved: then this is another failure."""
        is_open = {
            "$or": [
                {"$in": ["$status", [PENDING, RETRYING, FAILED]]},
                {"$ne": [{"$type": "$refused_at"}, "missing"]},
            ]
        }
        new = {"$literal": {**letter, "_id": letter_id}}
        with store_errors():
            await self._letters.update_one(
                {"_id": letter_id}, [{"$replaceWith": {"$cond": [is_open, "$$ROOT", new]}}], upsert=True
            )

    async def remove(self, letter_id: str) -> None:
        """Another letter says the same, and better."""
        with store_errors():
            await self._letters.delete_one({"_id": letter_id})

    async def of_shards(self, shards: Iterable[int]) -> list[tuple[str, int, str]]:
        """(letter id, shard, conversation) of all whose records must not be committed without looking at the letter
        first. Those that nobody could read are in nobody's way."""
        wanted = {"shard": {"$in": list(shards)}, "conversation_id": {"$exists": True}, **_UNSETTLED}
        with store_errors():
            return [
                (letter["_id"], letter["shard"], letter["conversation_id"])
                async for letter in self._letters.find(wanted, {"shard": 1, "conversation_id": 1}, limit=KNOWN_LIMIT)
            ]

    async def by_ids(self, letter_ids: Iterable[str]) -> dict[str, DeadLetterQueueEntry]:
        """These letters without their bodies; unknown ids are left out."""
        with store_errors():
            found = self._letters.find({"_id": {"$in": list(letter_ids)}}, _BODIES)
            return {letter["_id"]: _letter(letter) async for letter in found}

    async def refuse(self, letter_id: str, now: datetime) -> bool:
        """Its sender is about to be told for good. False where it has not failed after all: somebody replays it."""
        with store_errors():
            done = await self._letters.update_one(
                {"_id": letter_id, "$or": [{"status": FAILED}, {"refused_at": {"$exists": True}}]},
                [{"$set": {"refused_at": {"$ifNull": ["$refused_at", now]}}}],
            )
        return done.matched_count == 1

    async def fail_try(
        self, letter_id: str, error: str, error_type: DLQErrorType, status: DLQStatus, next_retry_at: datetime | None
    ) -> None:
        """A try did not succeed."""
        change = {
            "error": error,
            "error_type": error_type.value,
            "status": status.value,
            "next_retry_at": next_retry_at,
        }
        with store_errors():
            await self._letters.update_one({"_id": letter_id, "status": RETRYING}, {"$set": change})

    async def reject_try(self, letter_id: str, error: str, now: datetime) -> None:
        """A try was decided: the record is not allowed, and its sender has been told."""
        change = {
            "error": error,
            "error_type": DLQErrorType.VALIDATION_FAILED.value,
            "status": FAILED,
            "next_retry_at": None,
            "refused_at": now,
        }
        with store_errors():
            await self._letters.update_one({"_id": letter_id, "status": RETRYING}, {"$set": change})

    # --- who replays -------------------------------------------------------------------------------------------------

    async def claim_due(self, now: datetime, lease_until: datetime) -> DeadLetterQueueEntry | None:
        """The letter that is due for longest, as it was before; until `lease_until` it is the caller's."""
        due = {"status": {"$in": [PENDING, RETRYING]}, "next_retry_at": {"$lte": now}}
        with store_errors():
            found = await self._letters.find_one_and_update(
                due, _claimed(now, lease_until), sort=[("next_retry_at", 1)], return_document=ReturnDocument.BEFORE
            )
        return None if found is None else _letter(found)

    async def claim(self, letter_id: str, now: datetime, lease_until: datetime) -> DeadLetterQueueEntry | None:
        """This letter as it was before, now the caller's; None where it is not there to be replayed."""
        free = {
            "_id": letter_id,
            "refused_at": {"$exists": False},
            "$or": [{"status": {"$in": [PENDING, FAILED]}}, {"status": RETRYING, "next_retry_at": {"$lte": now}}],
        }
        with store_errors():
            found = await self._letters.find_one_and_update(
                free, _claimed(now, lease_until), return_document=ReturnDocument.BEFORE
            )
        return None if found is None else _letter(found)

    async def give_back(self, before: DeadLetterQueueEntry, lease_until: datetime, next_retry_at: datetime) -> None:
        """A claim came to nothing for another's reason: as it was, to be tried at `next_retry_at`."""
        change = {
            "status": before.status.value,
            "retry_count": before.retry_count,
            "last_retry_at": before.last_retry_at,
            "next_retry_at": None if before.next_retry_at is None else next_retry_at,
        }
        with store_errors():
            await self._letters.update_one(
                {"_id": before.id, "status": RETRYING, "next_retry_at": lease_until}, {"$set": change}
            )

    async def resolve(self, letter_id: str, reason: str, now: datetime) -> None:
        """There is nothing left to do."""
        with store_errors():
            await self._letters.update_one({"_id": letter_id, "status": {"$ne": RESOLVED}}, _resolved(reason, now))

    async def close(self, letter_id: str, reason: str, now: datetime) -> bool:
        """Somebody says that there is nothing left to do; False where it is resolved already, or being replayed."""
        free = {
            "_id": letter_id,
            "$or": [{"status": {"$in": [PENDING, FAILED]}}, {"status": RETRYING, "next_retry_at": {"$lte": now}}],
        }
        with store_errors():
            done = await self._letters.update_one(free, _resolved(reason, now))
        return done.matched_count == 1

    # --- who looks ---------------------------------------------------------------------------------------------------

    async def get(self, letter_id: str) -> DeadLetterQueueEntry | None:
        """One letter with everything that it holds."""
        with store_errors():
            found = await self._letters.find_one({"_id": letter_id})
        return None if found is None else _letter(found)

    async def page(
        self, status: DLQStatus | None, error_type: DLQErrorType | None, after: Place | None, limit: int
    ) -> tuple[list[DeadLetterQueueEntry], Place | None]:
        """At most `limit` letters without bodies, newest first, and the place to go on from when there are more."""
        wanted: Document = {}
        if status is not None:
            wanted["status"] = status.value
        if error_type is not None:
            wanted["error_type"] = error_type.value
        if after is not None:
            wanted["$or"] = [
                {"created_at": {"$lt": after.created_at}},
                {"created_at": after.created_at, "_id": {"$lt": after.letter_id}},
            ]
        with store_errors():
            found = await self._letters.find(
                wanted, _BODIES, sort=[("created_at", -1), ("_id", -1)], limit=limit + 1
            ).to_list()
        letters = [_letter(document) for document in found[:limit]]
        last = found[limit - 1] if len(found) > limit else None
        return letters, None if last is None else Place(last["created_at"], last["_id"])

    async def counts(self) -> list[Count]:
        """How many there are of each kind."""
        group = {
            "_id": {"status": "$status", "error_type": "$error_type"},
            "letters": {"$sum": 1},
            "oldest_at": {"$min": "$created_at"},
        }
        with store_errors():
            cursor = await self._letters.aggregate([{"$group": group}, {"$sort": {"_id": 1}}])
            return [
                Count(
                    DLQStatus(row["_id"]["status"]),
                    DLQErrorType(row["_id"]["error_type"]),
                    row["letters"],
                    row["oldest_at"],
                )
                async for row in cursor
            ]

    async def next_due(self) -> datetime | None:
        """When the next letter is to be tried."""
        wanted = {"status": {"$in": [PENDING, RETRYING]}, "next_retry_at": {"$ne": None}}
        with store_errors():
            found = await self._letters.find_one(wanted, {"next_retry_at": 1}, sort=[("next_retry_at", 1)])
        at: datetime | None = None if found is None else found["next_retry_at"]
        return at

    async def of_message(self, message_id: str) -> list[DeadLetterQueueEntry]:
        """The letters, without bodies, of the message that was to have this id."""
        with store_errors():
            return [_letter(letter) async for letter in self._letters.find({"message._id": message_id}, _BODIES)]

    async def of_key(self, idempotency_key: str, at_most: int) -> Sequence[DeadLetterQueueEntry]:
        """Letters, without bodies, with this idempotency key, whoever's it is. Reads the whole queue."""
        with store_errors():
            found = self._letters.find({"idempotency_key": idempotency_key}, _BODIES, limit=at_most)
            return [_letter(letter) async for letter in found]


def _claimed(now: datetime, lease_until: datetime) -> list[Document]:
    count = {"$min": [{"$add": ["$retry_count", 1]}, "$max_retries"]}
    return [
        {"$set": {"status": RETRYING, "retry_count": count, "last_retry_at": now, "next_retry_at": lease_until}},
    ]


def _resolved(reason: str, now: datetime) -> Document:
    return {"$set": {"status": RESOLVED, "resolved_at": now, "resolved_reason": reason[:1000], "next_retry_at": None}}


def _letter(document: Document) -> DeadLetterQueueEntry:
    message = document.get("message")
    if message is not None and "content" not in message:
        document = {**document, "message": {**message, "content": ""}}
    return msgspec.convert(document, DeadLetterQueueEntry)
