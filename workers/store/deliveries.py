"""`webhook_deliveries`: the queue of every webhook, what could not be delivered, and for a day what was.

Called by the events role, which queues and sends, and by the REST role, which shows and queues again. A delivery holds
no content: what is erased from a message is gone from here as well. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from pymongo import ReturnDocument, UpdateOne

from protocol.models import to_document
from protocol.webhooks import Delivery, DeliveryStatus
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

PENDING: Final = DeliveryStatus.PENDING.value
DELIVERED: Final = DeliveryStatus.DELIVERED.value
FAILED: Final = DeliveryStatus.FAILED.value
KEPT: Final = timedelta(days=7)
"""How long a delivery that has not arrived is kept: five days of retries, and two for somebody to look."""
DELIVERED_KEPT: Final = timedelta(days=1)
"""How long one that has: so long a repeat of its event is known for one."""


class Place(NamedTuple):
    """Where in the list a delivery stands: newest first, then the greater id."""

    queued_at: datetime
    delivery_id: str


class DeliveryStore:
    """Reader and writer of `webhook_deliveries`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._deliveries = database["webhook_deliveries"]

    # --- queueing ----------------------------------------------------------------------------------------------------

    async def queue(self, deliveries: Sequence[Delivery], first_place: int) -> None:
        """Behind all others, in this order; one that is there already stays as it is."""
        await self._put(deliveries, first_place, "$setOnInsert")

    async def queue_again(self, deliveries: Sequence[Delivery], first_place: int) -> None:
        """Behind all others, whatever became of them before."""
        await self._put(deliveries, first_place, "$set")

    async def _put(self, deliveries: Sequence[Delivery], first_place: int, operator: str) -> None:
        writes = [
            UpdateOne({"_id": delivery.delivery_id}, {operator: _document(delivery, first_place + number)}, upsert=True)
            for number, delivery in enumerate(deliveries)
        ]
        with store_errors():
            await self._deliveries.bulk_write(writes, ordered=False)

    async def requeue(self, webhook_id: str, event_id: str, now: datetime, place: int) -> Delivery | None:
        """A dead letter goes behind the others, as if it were new; None where there is no such dead letter."""
        fresh = {
            "status": PENDING,
            "tries": 0,
            "next_try_at": None,
            "queued_at": now,
            "place": place,
            "expires_at": now + KEPT,
        }
        which = {"webhook_id": webhook_id, "event_id": event_id, "status": FAILED}
        with store_errors():
            found = await self._deliveries.find_one_and_update(
                which, {"$set": fresh}, return_document=ReturnDocument.AFTER
            )
        return None if found is None else _delivery(found)

    # --- sending -----------------------------------------------------------------------------------------------------

    async def waiting(self, webhook_id: str, limit: int) -> list[Delivery]:
        """The head of a webhook's queue."""
        wanted = {"webhook_id": webhook_id, "status": PENDING}
        with store_errors():
            found = self._deliveries.find(wanted, sort=[("place", 1)], limit=limit)
            return [_delivery(document) async for document in found]

    async def overdue(self, webhook_id: str, now: datetime, limit: int) -> list[Delivery]:
        """Dead letters whose next try is due, the longest first."""
        wanted = {"webhook_id": webhook_id, "status": FAILED, "next_try_at": {"$lte": now}}
        with store_errors():
            found = self._deliveries.find(wanted, sort=[("next_try_at", 1)], limit=limit)
            return [_delivery(document) async for document in found]

    async def delivered(self, delivery: Delivery, tries: int, status: int | None, now: datetime) -> None:
        """It has arrived."""
        change = {
            "status": DELIVERED,
            "tries": tries,
            "last_status": status,
            "last_error": None,
            "last_try_at": now,
            "next_try_at": None,
            "delivered_at": now,
            "expires_at": now + DELIVERED_KEPT,
        }
        await self._settle(delivery, change)

    async def failed(
        self,
        delivery: Delivery,
        tries: int,
        status: int | None,
        error: str,
        now: datetime,
        next_try_at: datetime | None,
    ) -> None:
        """It is a dead letter."""
        change = {
            "status": FAILED,
            "tries": tries,
            "last_status": status,
            "last_error": error[:200],
            "last_try_at": now,
            "next_try_at": next_try_at,
        }
        await self._settle(delivery, change)

    async def _settle(self, delivery: Delivery, change: Document) -> None:
        """Unless it was queued again, or delivered by another process, in the meantime."""
        same = {"_id": delivery.delivery_id, "status": delivery.status.value, "queued_at": delivery.queued_at}
        with store_errors():
            await self._deliveries.update_one(same, {"$set": change})

    async def hasten(self, webhook_id: str, now: datetime) -> None:
        """The webhook is up again: dead letters that wait for their next try need wait no longer."""
        which = {"webhook_id": webhook_id, "status": FAILED, "next_try_at": {"$gt": now}}
        with store_errors():
            await self._deliveries.update_many(which, {"$set": {"next_try_at": now}})

    async def count(self, webhook_id: str, status: DeliveryStatus, at_most: int) -> int:
        """How many there are with this status, as far as that."""
        wanted = {"webhook_id": webhook_id, "status": status.value}
        with store_errors():
            return await self._deliveries.count_documents(wanted, limit=at_most)

    async def forget(self, webhook_id: str) -> None:
        """The webhook is no more."""
        with store_errors():
            await self._deliveries.delete_many({"webhook_id": webhook_id})

    # --- who looks ---------------------------------------------------------------------------------------------------

    async def page(
        self, webhook_id: str, status: DeliveryStatus | None, after: Place | None, limit: int
    ) -> tuple[list[Delivery], Place | None]:
        """At most `limit`, newest first, and the place to go on from when there are more."""
        wanted: Document = {"webhook_id": webhook_id}
        if status is not None:
            wanted["status"] = status.value
        if after is not None:
            wanted["$or"] = [
                {"queued_at": {"$lt": after.queued_at}},
                {"queued_at": after.queued_at, "_id": {"$lt": after.delivery_id}},
            ]
        with store_errors():
            found = await self._deliveries.find(
                wanted, {"event": 0}, sort=[("queued_at", -1), ("_id", -1)], limit=limit + 1
            ).to_list()
        page = [_delivery(document) for document in found[:limit]]
        last = found[limit - 1] if len(found) > limit else None
        return page, None if last is None else Place(last["queued_at"], last["_id"])


def _document(delivery: Delivery, place: int) -> Document:
    document = to_document(delivery)
    del document["_id"]
    return {**document, "place": place, "expires_at": delivery.queued_at + KEPT}


def _delivery(document: Document) -> Delivery:
    return msgspec.convert(document, Delivery)
