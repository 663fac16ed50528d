"""`media_metadata`: who has uploaded what, and who may see it. Called by REST, the sweep and the ingest role.

A medium is seen by its owner, and by whoever sees a message that carries it: a membership and a place in its log
decide, as for the message itself. So there is no second list of rights to keep. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pymongo import ReturnDocument

from protocol.media import MediaKind, MediaMetadata, MediaStatus, id_of, url_of
from protocol.models import to_document
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

Use = tuple[str, str]
"""(sender id, media url) of a message that wants to carry a medium."""
CARRIERS: Final = 500
"""Most messages looked at to find one that lets somebody see a medium they do not own, newest first."""
GRACE: Final = timedelta(minutes=5)
"""Between the decision to delete and the deletion: longer than any commit that saw it ready can take."""


class MediaStore:
    """Reader and writer of `media_metadata`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._media = database["media_metadata"]
        self._messages = database["messages"]
        self._memberships = database["memberships"]

    # --- uploads -----------------------------------------------------------------------------------------------------

    async def begin(self, media: MediaMetadata, quota_bytes: int) -> bool:
        """Write it down; False, and nothing written, where its owner would hold more than `quota_bytes`.

        Counted with it in, so two at once may both be refused but never both pass.
        """
        with store_errors():
            await self._media.insert_one(to_document(media))
            if await self.used_bytes(media.owner_id) <= quota_bytes:
                return True
            await self._media.delete_one({"_id": media.media_id})
            return False

    async def used_bytes(self, owner_id: str) -> int:
        """What a user's uploads take, begun ones too."""
        stages: list[Document] = [
            {"$match": {"owner_id": owner_id}},
            {"$group": {"_id": None, "bytes": {"$sum": "$size_bytes"}}},
        ]
        with store_errors():
            async for found in await self._media.aggregate(stages):
                return int(found["bytes"])
        return 0

    async def same(
        self, owner_id: str, sha256: str, size_bytes: int, kind: MediaKind, not_before: datetime
    ) -> MediaMetadata | None:
        """An upload of the same bytes by the same user that lives for long enough; a finished one first."""
        wanted = {
            "owner_id": owner_id,
            "sha256": sha256,
            "size_bytes": size_bytes,
            "kind": kind.value,
            "status": {"$in": [MediaStatus.READY.value, MediaStatus.PENDING.value]},
            "expires_at": {"$gte": not_before},
        }
        with store_errors():
            document = await self._media.find_one(wanted, sort=[("status", -1), ("_id", -1)])
        return None if document is None else _media(document)

    async def get(self, media_id: str) -> MediaMetadata | None:
        """The document, whoever asks."""
        with store_errors():
            document = await self._media.find_one({"_id": media_id})
        return None if document is None else _media(document)

    async def owned(self, owner_id: str, after: str, limit: int) -> tuple[list[MediaMetadata], str | None]:
        """At most `limit` of a user's uploads, oldest first, behind one; and where to go on when there are more."""
        with store_errors():
            found = await self._media.find(
                {"owner_id": owner_id, "_id": {"$gt": after}}, sort=[("_id", 1)], limit=limit + 1
            ).to_list()
        page = [_media(document) for document in found[:limit]]
        return page, page[-1].media_id if len(found) > limit else None

    async def note_parts(self, media_id: str, upload_id: str) -> str:
        """The upload in parts has this name, or the one that came first, which is returned."""
        unnamed = {"_id": media_id, "upload_id": {"$exists": False}}
        with store_errors():
            await self._media.update_one(unnamed, {"$set": {"upload_id": upload_id}})
            document = await self._media.find_one({"_id": media_id}, {"upload_id": 1})
        return upload_id if document is None else str(document["upload_id"])

    async def finish(self, media_id: str, due_at: datetime) -> MediaMetadata | None:
        """The bytes are there; None where the upload is gone meanwhile. Repeating it changes nothing."""
        ready = {"$set": {"status": MediaStatus.READY.value, "due_at": due_at}, "$unset": {"upload_id": ""}}
        with store_errors():
            await self._media.update_one({"_id": media_id, "status": MediaStatus.PENDING.value}, ready)
        found = await self.get(media_id)
        return found if found is not None and found.status is MediaStatus.READY else None

    # --- who may use and see it --------------------------------------------------------------------------------------

    async def usable(self, uses: Iterable[Use], now: datetime) -> dict[Use, MediaKind]:
        """Those of the uses that are allowed: of one's own finished upload, or of one that a message shows one."""
        wanted = set(uses)
        with store_errors():
            found = self._media.find(
                {"_id": {"$in": list({id_of(url) for _, url in wanted})}, "status": MediaStatus.READY.value},
                {"owner_id": 1, "kind": 1},
            )
            ready = {url_of(document["_id"]): document async for document in found}
        allowed: dict[Use, MediaKind] = {}
        for use in wanted:
            user_id, url = use
            document = ready.get(url)
            if document is None:
                continue
            if document["owner_id"] == user_id or await self.shown_to(user_id, url, now):
                allowed[use] = MediaKind(document["kind"])
        return allowed

    async def shown_to(self, user_id: str, media_url: str, now: datetime) -> bool:
        """Does a message carry it that this user may see, neither deleted, disappeared nor hidden by them?"""
        carried = {
            "media_url": media_url,
            "deleted_at": {"$exists": False},
            "hidden_by": {"$ne": user_id},
            "expires_at": {"$not": {"$lte": now}},
        }
        fields = {"conversation_id": 1, "sequence_number": 1}
        with store_errors():
            places = await self._messages.find(carried, fields, sort=[("_id", -1)], limit=CARRIERS).to_list()
            names = {f"{place['conversation_id']}:{user_id}" for place in places}
            stays = {
                stay["conversation_id"]: stay
                async for stay in self._memberships.find(
                    {"_id": {"$in": list(names)}}, {"conversation_id": 1, "join_seq": 1, "leave_seq": 1}
                )
            }
        return any(
            (stay := stays.get(place["conversation_id"])) is not None
            and stay["join_seq"] <= place["sequence_number"] <= stay.get("leave_seq", place["sequence_number"])
            for place in places
        )

    # --- the sweep ---------------------------------------------------------------------------------------------------

    async def take_due(self, now: datetime, again_at: datetime) -> MediaMetadata | None:
        """One that is due, as it is; nobody else gets it before `again_at`."""
        with store_errors():
            document = await self._media.find_one_and_update(
                {"due_at": {"$lte": now}}, {"$set": {"due_at": again_at}}, sort=[("due_at", 1)]
            )
        return None if document is None else _media(document)

    async def carried(self, media_id: str) -> bool:
        """Is it in any message?"""
        with store_errors():
            return await self._messages.find_one({"media_url": url_of(media_id)}, {"_id": 1}) is not None

    async def move(self, media_id: str, status: MediaStatus, due_at: datetime) -> MediaMetadata | None:
        """Another status, and when to look again."""
        with store_errors():
            document = await self._media.find_one_and_update(
                {"_id": media_id},
                {"$set": {"status": status.value, "due_at": due_at}},
                return_document=ReturnDocument.AFTER,
            )
        return None if document is None else _media(document)

    async def forget(self, media_id: str) -> None:
        """The object is gone: so is its document."""
        with store_errors():
            await self._media.delete_one({"_id": media_id})

    async def abandon(self, owner_id: str, now: datetime) -> None:
        """The account is deleted: what no message carries need not wait for its day."""
        with store_errors():
            await self._media.update_many({"owner_id": owner_id}, {"$set": {"due_at": now}})


def _media(document: Document) -> MediaMetadata:
    return msgspec.convert(document, MediaMetadata)
