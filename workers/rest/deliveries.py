"""What became of the events that a webhook was to get, for the administrator, and the way back of its dead letters."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import get, post
from litestar.params import PathParameter, QueryParameter

from protocol.errors import ErrorCode
from protocol.webhooks import Delivery, DeliveryStatus
from workers.rest.access import operator_guard, shape_guard
from workers.rest.desk import DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import Limit, Listing, PathId, cursor_of, moment_at, spot_of
from workers.store.deliveries import Place
from workers.webhooks.sink import place_at

Cursor = Annotated[str | None, QueryParameter(pattern=r"\A[0-9]{1,15}\.[A-Za-z0-9_.:-]{1,140}\Z", required=False)]
StatusQuery = Annotated[DeliveryStatus | None, QueryParameter(name="status", required=False)]
EventId = Annotated[str, PathParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,100}\Z")]


@get(
    "/v1/webhooks/{webhook_id:str}/deliveries",
    guards=[operator_guard, shape_guard],
    opt={"query": ("status", "cursor", "limit")},
    summary="List a webhook's deliveries",
)
async def list_deliveries(
    webhook_id: PathId,
    desk: DeskDependency,
    delivery_status: StatusQuery = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Listing[Delivery]:
    """Newest first, without contents: what waits or has failed, for a week, and for a day what has arrived. With
    `status=failed` its dead letters."""
    if await desk.store.webhooks.get(webhook_id) is None:
        raise RestError(ErrorCode.NOT_FOUND, "no such webhook")
    after = None if cursor is None else Place(*spot_of(cursor))
    page, more = await desk.store.deliveries.page(webhook_id, delivery_status, after, limit)
    next_cursor = None if more is None else cursor_of(more.queued_at, more.delivery_id)
    return Listing([veiled(delivery) for delivery in page], next_cursor)


@post(
    "/v1/webhooks/{webhook_id:str}/deliveries/{event_id:str}/replay",
    guards=[operator_guard, shape_guard],
    status_code=202,
    summary="Replay a webhook's dead letter",
)
async def replay_delivery(webhook_id: PathId, event_id: EventId, desk: DeskDependency) -> Delivery:
    """202: it is queued behind the others, as if it were new. 404 `not_found` where there is no such dead letter."""
    now = moment_at(now_ms())
    delivery = await desk.store.deliveries.requeue(webhook_id, event_id, now, place_at(now))
    if delivery is None:
        raise RestError(ErrorCode.NOT_FOUND, "no such dead letter of this webhook")
    return veiled(delivery)


def veiled(delivery: Delivery) -> Delivery:
    """A delivery without its event."""
    return msgspec.structs.replace(delivery, event=msgspec.UNSET)
