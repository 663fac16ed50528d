"""Search by metadata, in one conversation or in all of the caller's. Nobody but the clients can search content."""

from __future__ import annotations

from typing import Annotated, Final

from litestar import get
from litestar.params import QueryParameter

from protocol.errors import ErrorCode
from protocol.models import MessageType, StoredMessage
from workers.rest.access import shape_guard, user_guard
from workers.rest.conversations import not_found
from workers.rest.desk import Desk, DeskDependency
from workers.rest.errors import RestError
from workers.rest.shapes import (
    CallerRequest,
    Flag,
    Limit,
    Listing,
    MomentQuery,
    PathId,
    QueryId,
    cursor_of,
    is_true,
    moment_at,
    spot_of,
)
from workers.store.logs import NotVisible
from workers.store.search import Spot, Wanted

_FILTERS: Final = ("sender_id", "type", "after", "before", "has_media", "reply_to", "forwarded")
_SEARCHES: Final = 300
"""A minute, per user: as many lookups as a connection has."""

FlagQuery = Annotated[Flag | None, QueryParameter(required=False)]
TypeQuery = Annotated[MessageType | None, QueryParameter(name="type", required=False)]


@get(
    "/v1/conversations/{conversation_id:str}/search",
    guards=[user_guard, shape_guard],
    opt={
        "query": (*_FILTERS, "cursor", "limit"),
        "errors": (ErrorCode.CONVERSATION_NOT_FOUND, ErrorCode.RATE_LIMITED),
    },
    summary="Search a conversation by metadata",
)
async def search_conversation(
    request: CallerRequest,
    conversation_id: PathId,
    desk: DeskDependency,
    sender_id: QueryId = None,
    message_type: TypeQuery = None,
    after: MomentQuery = None,
    before: MomentQuery = None,
    has_media: FlagQuery = None,
    reply_to: QueryId = None,
    forwarded: FlagQuery = None,
    cursor: Annotated[int | None, QueryParameter(ge=1, le=2**53, required=False)] = None,
    limit: Limit = 50,
) -> Listing[StoredMessage]:
    """Newest first. `after` (inclusive) and `before` are epoch ms of the server's clock. System messages only where
    `type` asks for them; nothing that was deleted or has disappeared. A page covers 10,000 entries of the log at most,
    so it may be short, or empty, while `next_cursor` says that the search goes on."""
    await _spend(desk, request.user.user)
    wanted = _wanted(sender_id, message_type, after, before, has_media, reply_to, forwarded)
    found = await desk.store.search.in_conversation(request.user.user, conversation_id, wanted, cursor or 2**53, limit)
    if isinstance(found, NotVisible):
        raise not_found()
    items, more = found
    return Listing(items, None if more is None else str(more))


@get(
    "/v1/search",
    guards=[user_guard, shape_guard],
    opt={"query": (*_FILTERS, "cursor", "limit"), "errors": (ErrorCode.RATE_LIMITED,)},
    summary="Search all conversations by metadata",
)
async def search_everywhere(
    request: CallerRequest,
    desk: DeskDependency,
    sender_id: QueryId = None,
    message_type: TypeQuery = None,
    after: MomentQuery = None,
    before: MomentQuery = None,
    has_media: FlagQuery = None,
    reply_to: QueryId = None,
    forwarded: FlagQuery = None,
    cursor: Annotated[
        str | None, QueryParameter(pattern=r"\A[0-9]{1,15}\.[A-Za-z0-9_]{1,64}\Z", required=False)
    ] = None,
    limit: Limit = 50,
) -> Listing[StoredMessage]:
    """As the search of one conversation, over the 200 most recently active ones that the caller is in now, and in them
    over the newest 100,000 entries, shared equally."""
    await _spend(desk, request.user.user)
    wanted = _wanted(sender_id, message_type, after, before, has_media, reply_to, forwarded)
    spot = None if cursor is None else Spot(*spot_of(cursor))
    items, more = await desk.store.search.everywhere(request.user.user, wanted, spot, limit)
    return Listing(items, None if more is None else cursor_of(more.created_at, more.message_id))


def _wanted(
    sender_id: str | None,
    message_type: MessageType | None,
    after: int | None,
    before: int | None,
    has_media: Flag | None,
    reply_to: str | None,
    forwarded: Flag | None,
) -> Wanted:
    return Wanted(
        sender_id=sender_id,
        message_type=message_type,
        after=None if after is None else moment_at(after),
        before=None if before is None else moment_at(before),
        has_media=is_true(has_media),
        reply_to=reply_to,
        forwarded=is_true(forwarded),
    )


async def _spend(desk: Desk, user_id: str) -> None:
    if await desk.broker.spend("search", user_id, _SEARCHES, 60) > 0.0:
        raise RestError(ErrorCode.RATE_LIMITED, "too many searches")
