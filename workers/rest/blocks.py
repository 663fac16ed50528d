"""The caller's block list. Who is blocked cannot begin a 1:1 conversation, write into one, add the caller to a group,
or see whether they are online."""

from __future__ import annotations

from typing import Annotated

from litestar import delete, get, put
from litestar.params import QueryParameter

from protocol import records
from protocol.errors import ErrorCode
from protocol.models import UserStatus
from workers.rest import upkeep
from workers.rest.access import shape_guard, user_guard
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, Limit, Listing, PathId, moment_at
from workers.store.blocks import Block, Change


@get(
    "/v1/blocks",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit")},
    summary="List whom the caller blocks",
)
async def list_blocks(
    request: CallerRequest,
    desk: DeskDependency,
    cursor: Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)] = None,
    limit: Limit = 50,
) -> Listing[Block]:
    """By id."""
    return Listing(*await desk.store.blocks.listed(request.user.user, cursor or "", limit))


@put(
    "/v1/blocks/{user_id:str}",
    guards=[user_guard, shape_guard],
    status_code=204,
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Block a user",
)
async def block(request: CallerRequest, user_id: PathId, desk: DeskDependency) -> None:
    """204, also where it was so; 404 `not_found` for an unknown user."""
    blocker = request.user.user
    if user_id == blocker:
        raise RestError(ErrorCode.VALIDATION_FAILED, "nobody blocks themselves")
    if await desk.store.users.unknown([user_id]):
        raise RestError(ErrorCode.NOT_FOUND, "no such user")
    change = await desk.store.blocks.block(blocker, user_id, moment_at(now_ms()))
    for one, other in ((blocker, user_id), (user_id, blocker)):
        await desk.broker.publish_presence(one, records.PresenceChange(UserStatus.OFFLINE, 0, hidden_from=other))
    await _finish(desk, change)


@delete(
    "/v1/blocks/{user_id:str}",
    guards=[user_guard, shape_guard],
    status_code=204,
    summary="Unblock a user",
)
async def unblock(request: CallerRequest, user_id: PathId, desk: DeskDependency) -> None:
    """204, also where there was no block."""
    change = await desk.store.blocks.unblock(request.user.user, user_id, moment_at(now_ms()))
    if change is not None:
        await _finish(desk, change)


async def _finish(desk: Desk, change: Change) -> None:
    """Answered once it is in force. What fails here is finished by `upkeep`. Raises RestError, BrokerUnavailable."""
    try:
        await upkeep.finish_block(desk, change)
    except upkeep.Undecided as error:
        raise upkeep.stored_only() from error
