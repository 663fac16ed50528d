"""Conversations as a member sees them: made, listed, read, renamed."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from litestar import Response, get, patch, post
from litestar.params import JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from protocol import keys, records
from protocol.errors import ErrorCode
from protocol.models import AGENT_PREFIX, GROUP_LIMIT, AgentStatus, Conversation, ConversationType, Id
from workers.agents.registry import Registry
from workers.groups import LONGEST_DISAPPEARING_SECONDS, TITLE_LIMIT
from workers.rest import commands
from workers.rest.access import actor_guard, shape_guard, user_guard
from workers.rest.allowances import spend, spend_step
from workers.rest.desk import Desk, DeskDependency
from workers.rest.errors import RestError
from workers.rest.shapes import (
    CallerRequest,
    Flag,
    IdempotencyHeader,
    Limit,
    Listing,
    PathId,
    cursor_of,
    is_true,
    spot_of,
)
from workers.store.overviews import Overview, Place

_HOUR: Final = 3600
NAMED_LIMIT: Final = 1000
"""Most ids a body may name; more than a group holds, so that "too many" can be said properly."""

Title = Annotated[str, Meta(max_length=TITLE_LIMIT, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class NewConversation(msgspec.Struct, frozen=True):
    """`participants` need not name the caller; an administrator's first one is the creator. `title`: of a group.

    `agent_id`: the agent it is with, who need not be named among the participants. A 1:1 conversation that names nobody
    else is with the default agent. `plaintext`: nothing in it will be encrypted, so what is said may find the agent.
    """

    conversation_type: ConversationType = msgspec.field(name="type")
    participants: Annotated[list[Id], Meta(max_length=NAMED_LIMIT)]
    agent_id: Annotated[str, Meta(max_length=64)] = ""
    title: Title = ""
    plaintext: bool = False


class ConversationChange(msgspec.Struct, frozen=True):
    """What is left out stays. `disappearing_seconds`: how long messages sent from now on are kept; 0: for ever."""

    title: Title | UnsetType = UNSET
    disappearing_seconds: Annotated[int, Meta(ge=0, le=LONGEST_DISAPPEARING_SECONDS)] | UnsetType = UNSET


@post(
    "/v1/conversations",
    guards=[actor_guard, shape_guard],
    opt={
        "errors": (
            ErrorCode.BLOCKED,
            ErrorCode.CONFLICT,
            ErrorCode.GROUP_FULL,
            ErrorCode.OVERLOADED,
            ErrorCode.RATE_LIMITED,
        ),
        "answers": {200: Overview},
    },
    summary="Create a conversation",
)
async def create_conversation(
    request: CallerRequest,
    data: JSONBody[NewConversation],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Response[Conversation]:
    """201 with the conversation; 200 when the 1:1 conversation of these two was there already.

    400 for unknown users and agents, 403 `blocked` where one of the two blocks the other, or one of a group its
    creator, 409 `group_full` for more than 100 participants, `conflict` where this key has made a group that the caller
    has left.
    """
    actor = request.user.user_id
    if actor is None:
        if not data.participants:
            raise RestError(ErrorCode.VALIDATION_FAILED, "participants: the first one is the creator")
        actor = data.participants[0]
    agent_id, participants = await _with_agent(desk, data, list(dict.fromkeys([actor, *data.participants])))
    if data.conversation_type is ConversationType.ONE_TO_ONE:
        if len(participants) != 2:
            raise RestError(ErrorCode.VALIDATION_FAILED, "a 1:1 conversation has exactly two participants")
        existing = await desk.store.overviews.overview(actor, keys.direct_conversation_id(*participants))
        if existing is not None:
            return Response(existing, status_code=200)
    elif len(participants) > GROUP_LIMIT:
        raise RestError(ErrorCode.GROUP_FULL, f"a group has at most {GROUP_LIMIT} participants")
    if request.user.user_id is not None:
        await spend(desk, "conversations", actor, desk.settings.conversations_per_hour, _HOUR)
    if data.conversation_type is ConversationType.ONE_TO_ONE:
        if await desk.store.blocks.between(*participants):
            raise RestError(ErrorCode.BLOCKED, "one of you blocks the other")
        refusal = await _refuse_unknown(desk, participants)
    else:
        refusal = await refuse_invitation(desk, actor, participants)
    if refusal is not None:
        is_group = data.conversation_type is ConversationType.GROUP
        made = commands.group_key(desk, actor, idempotency_key) if is_group and idempotency_key else None
        if made is None or not await commands.has_entry(desk, *made):
            raise refusal
    created = await commands.create(
        desk, actor, data.conversation_type, participants, agent_id, data.title, data.plaintext, idempotency_key
    )
    return Response(created, status_code=201)


async def _with_agent(desk: Desk, data: NewConversation, participants: list[str]) -> tuple[str, list[str]]:
    """The agent of the conversation, "" for none, and everybody who is in it. Raises RestError for no enabled agent."""
    agent_id, is_pair = data.agent_id, data.conversation_type is ConversationType.ONE_TO_ONE
    if not agent_id and is_pair:
        if len(participants) == 1 and (default := await desk.store.agents.default()) is not None:
            agent_id = default.agent_id
        elif len(participants) == 2:
            agent_id = next((name for name in participants[1:] if name.startswith(AGENT_PREFIX)), "")
    if not agent_id:
        return "", participants
    agent = await Registry(desk.store, desk.broker).get(agent_id)
    if agent is None or agent.status is not AgentStatus.ENABLED:
        raise RestError(ErrorCode.VALIDATION_FAILED, "agent_id: no such agent, or it is disabled")
    return agent_id, list(dict.fromkeys([*participants, agent_id]))


async def refuse_invitation(desk: Desk, actor: str, user_ids: list[str]) -> RestError | None:
    """Why these cannot be brought into a group: one names no account, or blocks who would bring them."""
    refusal = await _refuse_unknown(desk, user_ids)
    if refusal is None and await desk.store.blocks.who_blocks(actor, user_ids):
        refusal = RestError(ErrorCode.BLOCKED, "somebody named there takes nothing from you")
    return refusal


async def _refuse_unknown(desk: Desk, user_ids: list[str]) -> RestError | None:
    unknown = await desk.store.users.unknown(user_ids)
    if not unknown:
        return None
    return RestError(ErrorCode.VALIDATION_FAILED, f"unknown users: {', '.join(sorted(unknown)[:3])}")


@get(
    "/v1/conversations",
    guards=[user_guard, shape_guard],
    opt={"query": ("archived", "cursor", "limit")},
    summary="List conversations",
)
async def list_conversations(
    request: CallerRequest,
    desk: DeskDependency,
    archived: Annotated[Flag | None, QueryParameter(required=False)] = None,
    cursor: Annotated[
        str | None, QueryParameter(pattern=r"\A[0-9]{1,15}\.[A-Za-z0-9_.:-]{1,64}\Z", required=False)
    ] = None,
    limit: Limit = 50,
) -> Listing[Overview]:
    """The caller's conversations, newest activity first, each with its last message, its unread count and the caller's
    own settings. `archived` leaves only those that are, or are not."""
    place = None if cursor is None else Place(*spot_of(cursor))
    items, more = await desk.store.overviews.overviews(request.user.user, place, limit, is_true(archived))
    return Listing(items, None if more is None else cursor_of(more.active_at, more.conversation_id))


@get(
    "/v1/conversations/{conversation_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.CONVERSATION_NOT_FOUND,)},
    summary="Read a conversation",
)
async def read_conversation(request: CallerRequest, conversation_id: PathId, desk: DeskDependency) -> Overview:
    """404 `conversation_not_found` for one that is unknown, or that the caller is not in."""
    overview = await desk.store.overviews.overview(request.user.user, conversation_id)
    if overview is None:
        raise not_found()
    return overview


@patch(
    "/v1/conversations/{conversation_id:str}",
    guards=[user_guard, shape_guard],
    opt={
        "errors": (
            ErrorCode.CONVERSATION_NOT_FOUND,
            ErrorCode.FORBIDDEN,
            ErrorCode.BLOCKED,
            ErrorCode.OVERLOADED,
            ErrorCode.RATE_LIMITED,
        )
    },
    summary="Rename a group, or let messages disappear",
)
async def change_conversation(
    request: CallerRequest,
    conversation_id: PathId,
    data: JSONBody[ConversationChange],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Overview:
    """200 with the conversation as it is then; 403 `forbidden` for who may not change that."""
    actor = request.user.user
    await spend_step(desk, actor)
    if not isinstance(data.title, UnsetType):
        await commands.change(desk, actor, conversation_id, records.Rename(data.title), idempotency_key)
    if not isinstance(data.disappearing_seconds, UnsetType):
        step = records.SetDisappearing(data.disappearing_seconds)
        await commands.change(desk, actor, conversation_id, step, idempotency_key)
    overview = await desk.store.overviews.overview(actor, conversation_id)
    if overview is None:
        raise not_found()
    return overview


def not_found() -> RestError:
    """The same answer for an unknown conversation and for a foreign one."""
    return RestError(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
