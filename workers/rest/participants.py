"""Who is in a conversation, who may do what there, and who may never come back."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import delete, get, patch, post, put
from litestar.params import JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from protocol import records
from protocol.errors import ErrorCode
from protocol.models import Conversation, Id, Role
from workers.rest import commands
from workers.rest.access import shape_guard, user_guard
from workers.rest.allowances import spend_step
from workers.rest.conversations import NAMED_LIMIT, not_found, refuse_invitation
from workers.rest.desk import Desk, DeskDependency
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, IdempotencyHeader, Limit, Listing, Moment, PathId, ms_of
from workers.store.memberships import Banned, Participant

_STEP_ERRORS = (
    ErrorCode.CONVERSATION_NOT_FOUND,
    ErrorCode.NOT_FOUND,
    ErrorCode.FORBIDDEN,
    ErrorCode.OVERLOADED,
    ErrorCode.RATE_LIMITED,
)
_Cursor = Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)]
"""The last user id of the page before."""


class NewParticipants(msgspec.Struct, frozen=True):
    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=NAMED_LIMIT)]


class ParticipantChange(msgspec.Struct, frozen=True):
    """What is left out stays. `silenced_until`: null or a time that is over lets the member speak again."""

    role: Role | UnsetType = UNSET
    silenced_until: Moment | UnsetType | None = UNSET


@get(
    "/v1/conversations/{conversation_id:str}/participants",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit"), "errors": (ErrorCode.CONVERSATION_NOT_FOUND,)},
    summary="List participants",
)
async def list_participants(
    request: CallerRequest,
    conversation_id: PathId,
    desk: DeskDependency,
    cursor: _Cursor = None,
    limit: Limit = 50,
) -> Listing[Participant]:
    """Those who are in the conversation now, by id, for its members."""
    await _own_role(desk, conversation_id, request.user.user)
    return Listing(*await desk.store.memberships.participants(conversation_id, cursor or "", limit))


@post(
    "/v1/conversations/{conversation_id:str}/participants",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": (*_STEP_ERRORS, ErrorCode.BLOCKED, ErrorCode.BANNED, ErrorCode.GROUP_FULL)},
    summary="Add participants to a group",
)
async def add_participants(
    request: CallerRequest,
    conversation_id: PathId,
    data: JSONBody[NewParticipants],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Conversation:
    """200 with the conversation; 403 `forbidden` for who may not add, `blocked` where one of them blocks the caller,
    `banned` where one must not come back, 409 `group_full` over 100."""
    actor = request.user.user
    await spend_step(desk, actor)
    user_ids = list(dict.fromkeys(data.user_ids))
    refusal = await refuse_invitation(desk, actor, user_ids)
    if refusal is not None:
        key = commands.add_key(desk, actor, conversation_id, idempotency_key)
        if idempotency_key is None or not await commands.has_entry(desk, conversation_id, key):
            raise refusal
    return await commands.add(desk, actor, conversation_id, user_ids, idempotency_key)


@patch(
    "/v1/conversations/{conversation_id:str}/participants/{user_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (*_STEP_ERRORS, ErrorCode.CONFLICT)},
    summary="Promote, demote or silence a participant",
)
async def change_participant(
    request: CallerRequest,
    conversation_id: PathId,
    user_id: PathId,
    data: JSONBody[ParticipantChange],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Participant:
    """200 with the participant as they are then; 403 `forbidden` for who may not change that.

    409 `conflict` for the role of the last owner: a group keeps one.
    """
    actor = request.user.user
    await spend_step(desk, actor)
    await _own_role(desk, conversation_id, actor)
    if not isinstance(data.role, UnsetType):
        await commands.change(desk, actor, conversation_id, records.SetRole(user_id, data.role), idempotency_key)
    if not isinstance(data.silenced_until, UnsetType):
        until = 0 if data.silenced_until is None else ms_of(data.silenced_until)
        await commands.change(desk, actor, conversation_id, records.Silence(user_id, until), idempotency_key)
    participant = await desk.store.memberships.participant(conversation_id, user_id)
    if participant is None:
        raise RestError(ErrorCode.NOT_FOUND, "not a participant")
    return participant


@delete(
    "/v1/conversations/{conversation_id:str}/participants/{user_id:str}",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": _STEP_ERRORS},
    summary="Remove a participant from a group, or leave it",
)
async def remove_participant(
    request: CallerRequest,
    conversation_id: PathId,
    user_id: PathId,
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Conversation:
    """200 with the conversation as it is then; 403 `forbidden` for who may not remove that one."""
    await spend_step(desk, request.user.user)
    return await commands.remove(desk, request.user.user, conversation_id, user_id, idempotency_key)


@get(
    "/v1/conversations/{conversation_id:str}/bans",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit"), "errors": (ErrorCode.CONVERSATION_NOT_FOUND, ErrorCode.FORBIDDEN)},
    summary="List who is banned from a group",
)
async def list_bans(
    request: CallerRequest,
    conversation_id: PathId,
    desk: DeskDependency,
    cursor: _Cursor = None,
    limit: Limit = 50,
) -> Listing[Banned]:
    """For its owners and admins, by id; 403 `forbidden` for other members."""
    if await _own_role(desk, conversation_id, request.user.user) is Role.MEMBER:
        raise RestError(ErrorCode.FORBIDDEN, "only an owner or admin sees who is banned")
    return Listing(*await desk.store.memberships.bans(conversation_id, cursor or "", limit))


@put(
    "/v1/conversations/{conversation_id:str}/bans/{user_id:str}",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": (*_STEP_ERRORS, ErrorCode.CONFLICT)},
    summary="Ban somebody from a group",
)
async def ban(
    request: CallerRequest,
    conversation_id: PathId,
    user_id: PathId,
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Conversation:
    """200 with the conversation as it is then: that one is out, if in, and is not let in again before the ban ends.

    409 `conflict` where the group keeps a thousand out already.
    """
    actor = request.user.user
    await spend_step(desk, actor)
    await _own_role(desk, conversation_id, actor)
    if await desk.store.users.unknown([user_id]):
        raise RestError(ErrorCode.NOT_FOUND, "no such user")
    return await commands.change(desk, actor, conversation_id, records.Ban(user_id), idempotency_key)


@delete(
    "/v1/conversations/{conversation_id:str}/bans/{user_id:str}",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": _STEP_ERRORS},
    summary="End a ban",
)
async def unban(
    request: CallerRequest,
    conversation_id: PathId,
    user_id: PathId,
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Conversation:
    """200 with the conversation; who was banned may be added again, but is not in it."""
    await spend_step(desk, request.user.user)
    return await commands.change(desk, request.user.user, conversation_id, records.Unban(user_id), idempotency_key)


async def _own_role(desk: Desk, conversation_id: str, user_id: str) -> Role:
    role = await desk.store.memberships.role(conversation_id, user_id)
    if role is None:
        raise not_found()
    return role
