"""`webhooks`: which apps listen by HTTP, with what secret, how they fare, and which process sends to them.

Called by the REST role, which writes what the administrator wants, and by the events role, which sends. Secrets leave
this module only to sign. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from pymongo import ReturnDocument

from protocol import webhooks
from protocol.models import to_document
from protocol.webhooks import Reason, Webhook, WebhookStatus
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

_ENABLED: Final = {"status": WebhookStatus.ENABLED.value}
_WELL: Final = {"failures": 0, "failing_since": None}


class Registered(NamedTuple):
    """A webhook and what its requests are signed with, the newest key first."""

    webhook: Webhook
    keys: tuple[bytes, ...]


class Notice(NamedTuple):
    """A webhook was disabled, and not everybody who is to hear of it has."""

    webhook: Webhook
    due: datetime


class WebhookStore:
    """Reader and writer of `webhooks`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._webhooks = database["webhooks"]

    # --- the administrator -------------------------------------------------------------------------------------------

    async def create(self, webhook: Webhook, key: bytes) -> bool:
        """Write a new one; False where there are as many as may be (two at the same moment may both be the last)."""
        with store_errors():
            if await self._webhooks.count_documents({}, limit=webhooks.LIMIT) >= webhooks.LIMIT:
                return False
            await self._webhooks.insert_one({**to_document(webhook), "secret": key})
        return True

    async def get(self, webhook_id: str) -> Webhook | None:
        """One of them."""
        with store_errors():
            return _shown(await self._webhooks.find_one({"_id": webhook_id}))

    async def signing(self, webhook_id: str, now: datetime) -> Registered | None:
        """One of them with its keys."""
        with store_errors():
            found = await self._webhooks.find_one({"_id": webhook_id})
        return None if found is None else _registered(found, now)

    async def page(self, app: str | None, after: str, limit: int) -> tuple[list[Webhook], str | None]:
        """At most `limit` behind an id, of one app or of all, and where to go on when there are more."""
        wanted = {"_id": {"$gt": after}} | ({} if app is None else {"app": app})
        with store_errors():
            found = await self._webhooks.find(wanted, sort=[("_id", 1)], limit=limit + 1).to_list()
        page = [webhook_of(document) for document in found[:limit]]
        return page, page[-1].webhook_id if len(found) > limit else None

    async def change(self, webhook_id: str, changes: Mapping[str, object], now: datetime) -> Webhook | None:
        """Set these fields; None where there is no such webhook."""
        return await self._update({"_id": webhook_id}, {"$set": {**changes, "updated_at": now}})

    async def rotate(self, webhook_id: str, key: bytes, now: datetime) -> Webhook | None:
        """Another secret; the one before signs too for a while."""
        fresh = {
            "old_secret": "$secret",
            "secret": {"$literal": key},
            "old_secret_until": now + webhooks.OVERLAP,
            "updated_at": now,
        }
        return await self._update({"_id": webhook_id}, [{"$set": fresh}])

    async def enable(self, webhook_id: str, now: datetime) -> Webhook | None:
        """It gets events again; what has failed before counts no more."""
        fresh = {
            "status": WebhookStatus.ENABLED.value,
            "status_reason": None,
            "disabled_at": None,
            "updated_at": now,
            **_WELL,
        }
        return await self._update({"_id": webhook_id}, {"$set": fresh, "$unset": {"notice_due": ""}})

    async def disable(self, webhook_id: str, reason: Reason, now: datetime) -> Webhook | None:
        """It gets nothing more, and a notice of that is due: one write. None where it is not enabled."""
        changes = {
            "status": WebhookStatus.DISABLED.value,
            "status_reason": reason.value,
            "disabled_at": now,
            "notice_due": now,
            "updated_at": now,
        }
        return await self._update({"_id": webhook_id, **_ENABLED}, {"$set": changes})

    async def delete(self, webhook_id: str) -> bool:
        """False where there is no such webhook. Its deliveries are the caller's to remove."""
        with store_errors():
            return (await self._webhooks.delete_one({"_id": webhook_id})).deleted_count == 1

    async def begin_replay(self, webhook_id: str, span: webhooks.Span) -> Webhook | None:
        """Messages of a span are to be sent again; None where a replay is under way, or no such webhook."""
        free = {"_id": webhook_id, "replay": None}
        return await self._update(free, {"$set": {"replay": to_document(span)}})

    # --- who sends ---------------------------------------------------------------------------------------------------

    async def enabled(self) -> list[Webhook]:
        """All that get events."""
        with store_errors():
            return [webhook_of(document) async for document in self._webhooks.find(_ENABLED)]

    async def claim(self, owner: str, seconds: float, now: datetime) -> list[Registered]:
        """Those that this process sends to, for so long: its own, and those that nobody has. Leases live by MongoDB's
        clock."""
        free = {
            **_ENABLED,
            "$or": [
                {"courier.owner": owner},
                {"courier": {"$exists": False}},
                {"$expr": {"$lt": ["$courier.until", "$$NOW"]}},
            ],
        }
        lease = {"owner": owner, "until": {"$add": ["$$NOW", int(seconds * 1000)]}}
        with store_errors():
            await self._webhooks.update_many(free, [{"$set": {"courier": lease}}])
            return [
                _registered(document, now)
                async for document in self._webhooks.find({**_ENABLED, "courier.owner": owner})
            ]

    async def release(self, owner: str) -> None:
        """Another process may send to them at once."""
        with store_errors():
            await self._webhooks.update_many({"courier.owner": owner}, {"$unset": {"courier": ""}})

    async def failed(self, webhook_id: str, now: datetime) -> Webhook | None:
        """A delivery came to nothing."""
        changes = {"failures": {"$add": ["$failures", 1]}, "failing_since": {"$ifNull": ["$failing_since", now]}}
        return await self._update({"_id": webhook_id}, [{"$set": changes}])

    async def succeeded(self, webhook_id: str) -> None:
        """A delivery arrived after others had not."""
        await self._update({"_id": webhook_id}, {"$set": _WELL})

    async def replayed(self, webhook_id: str, span: webhooks.Span, after: str | None) -> None:
        """The span is in the queue up to this message; None: all of it."""
        change = None if after is None else to_document(msgspec.structs.replace(span, after=after))
        await self._update({"_id": webhook_id, "replay.since": span.since}, {"$set": {"replay": change}})

    async def notices(self) -> list[Notice]:
        """Those whose end is to be told."""
        with store_errors():
            found = await self._webhooks.find({"notice_due": {"$exists": True}}).to_list()
        return [Notice(webhook_of(document), document["notice_due"]) for document in found]

    async def told(self, notice: Notice) -> None:
        """Everybody has that notice safe."""
        same = {"_id": notice.webhook.webhook_id, "notice_due": notice.due}
        await self._update(same, {"$unset": {"notice_due": ""}})

    async def _update(self, which: Document, change: Document | list[Document]) -> Webhook | None:
        with store_errors():
            return _shown(await self._webhooks.find_one_and_update(which, change, return_document=ReturnDocument.AFTER))


def webhook_of(document: Document) -> Webhook:
    """Without its secrets."""
    return msgspec.convert(document, Webhook)


def _shown(document: Document | None) -> Webhook | None:
    return None if document is None else webhook_of(document)


def _registered(document: Document, now: datetime) -> Registered:
    webhook = webhook_of(document)
    keys = [document["secret"]]
    if webhook.old_secret_until is not None and now < webhook.old_secret_until:
        keys.append(document["old_secret"])
    return Registered(webhook, tuple(keys))
