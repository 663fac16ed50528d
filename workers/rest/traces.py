"""Where a message is now, for the administrator: the same as `python -m workers trace`. To a user it does not exist."""

from __future__ import annotations

from typing import Annotated

from litestar import get
from litestar.params import PathParameter, QueryParameter

from workers import trace
from workers.rest.access import operator_guard, shape_guard
from workers.rest.desk import DeskDependency
from workers.rest.shapes import Listing
from workers.trace import Trace

Name = Annotated[str, PathParameter(pattern=r"\A[A-Za-z0-9._:-]{1,128}\Z")]
Where = Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)]


@get(
    "/v1/traces/{name:str}",
    guards=[operator_guard, shape_guard],
    opt={"query": ("conversation_id", "sender_id")},
    summary="Trace a message",
)
async def trace_message(
    name: Name, desk: DeskDependency, conversation_id: Where = None, sender_id: Where = None
) -> Listing[Trace]:
    """By message id, trace id, idempotency key or the client's own id: stream entries, document, recipients and dead
    letters, no contents. Empty where nothing goes by that name; a key alone is found for 24 h after its commit."""
    found = await trace.trace(
        desk.store, desk.broker, desk.settings.shards, name, conversation_id or "", sender_id or ""
    )
    return Listing(found, None)
