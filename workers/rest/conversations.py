"""Conversations, their participants and their messages, as a member sees them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.datastructures import State
from litestar.params import HeaderParameter, JSONBody, PathParameter, QueryParameter
from msgspec import Meta

from protocol import keys
from protocol.errors import ErrorCode
from protocol.models import GROUP_LIMIT, Conversation, ConversationType, Id, StoredMessage
from workers.rest import commands
from workers.rest.access import Caller, actor_guard, shape_guard, user_guard
from workers.rest.desk import Desk, DeskDependency
from workers.rest.errors import FAILURES, RestError
from workers.store.logs import NotVisible
from workers.store.overviews import Overview, Place

CallerRequest = Request[Caller, Any, State]
PathId = Annotated[str, PathParameter(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
Limit = Annotated[int, QueryParameter(ge=1, le=100)]
IdempotencyHeader = Annotated[
    str | None, HeaderParameter(name="Idempotency-Key", pattern=r"^[A-Za-z0-9._:-]{1,128}$", required=False)
]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_LONGEST_CURSOR_MS: Final = 253_402_300_799_999
_NAMED_LIMIT: Final = 1000
"""Most ids a body may name; more than a group holds, so that "too many" can be said properly."""

Item = TypeVar("Item")


class Listing(msgspec.Struct, Generic[Item], frozen=True):
    """One page. `next_cursor` is null on the last one."""

    items: list[Item]
    next_cursor: str | None


class NewConversation(msgspec.Struct, frozen=True):
    """`participants` need not name the caller; an administrator's first one is the creator."""

    conversation_type: ConversationType = msgspec.field(name="type")
    participants: Annotated[list[Id], Meta(max_length=_NAMED_LIMIT)]
    agent_id: Annotated[str, Meta(max_length=64)] = ""


class NewParticipants(msgspec.Struct, frozen=True):
    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=_NAMED_LIMIT)]


@post("/v1/conversations", guards=[actor_guard, shape_guard], responses=FAILURES, summary="Create a conversation")
async def create_conversation(
    request: CallerRequest,
    data: JSONBody[NewConversation],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Response[Conversation]:
    """201 with the conversation; 200 when the 1:1 conversation of these two was there already.

    400 for unknown users, 409 `group_full` for more than 100 participants.
    """
    actor = request.user.user_id
    if actor is None:
        if not data.participants:
            raise RestError(ErrorCode.VALIDATION_FAILED, "participants: the first one is the creator")
        actor = data.participants[0]
    participants = list(dict.fromkeys([actor, *data.participants]))
    if data.conversation_type is ConversationType.ONE_TO_ONE:
        if len(participants) != 2:
            raise RestError(ErrorCode.VALIDATION_FAILED, "a 1:1 conversation has exactly two participants")
        existing = await desk.store.overviews.overview(actor, keys.direct_conversation_id(*participants))
        if existing is not None:
            return Response(existing, status_code=200)
    elif len(participants) > GROUP_LIMIT:
        raise RestError(ErrorCode.GROUP_FULL, f"a group has at most {GROUP_LIMIT} participants")
    await _check_known(desk, participants)
    created = await commands.create(desk, actor, data.conversation_type, participants, data.agent_id, idempotency_key)
    return Response(created, status_code=201)


async def _check_known(desk: Desk, user_ids: list[str]) -> None:
    unknown = await desk.store.users.unknown(user_ids)
    if unknown:
        raise RestError(ErrorCode.VALIDATION_FAILED, f"unknown users: {', '.join(sorted(unknown)[:3])}")


@get(
    "/v1/conversations",
    guards=[user_guard, shape_guard],
    responses=FAILURES,
    opt={"query": ("cursor", "limit")},
    summary="List conversations",
)
async def list_conversations(
    request: CallerRequest,
    desk: DeskDependency,
    cursor: Annotated[str | None, QueryParameter(max_length=96, required=False)] = None,
    limit: Limit = 50,
) -> Listing[Overview]:
    """The caller's conversations, newest activity first, each with its unread count."""
    place = None if cursor is None else _parse_place(cursor)
    items, more = await desk.store.overviews.overviews(request.user.user, place, limit)
    return Listing(items, None if more is None else _format_place(more))


@get(
    "/v1/conversations/{conversation_id:str}",
    guards=[user_guard, shape_guard],
    responses=FAILURES,
    summary="Read a conversation",
)
async def read_conversation(request: CallerRequest, conversation_id: PathId, desk: DeskDependency) -> Overview:
    """404 `conversation_not_found` for one that is unknown, or that the caller is not in."""
    overview = await desk.store.overviews.overview(request.user.user, conversation_id)
    if overview is None:
        raise _not_found()
    return overview


@get(
    "/v1/conversations/{conversation_id:str}/messages",
    guards=[user_guard, shape_guard],
    responses=FAILURES,
    opt={"query": ("before_sequence", "cursor", "limit")},
    summary="Read a conversation's messages",
)
async def list_messages(
    request: CallerRequest,
    conversation_id: PathId,
    desk: DeskDependency,
    before_sequence: Annotated[int | None, QueryParameter(ge=1, le=2**53, required=False)] = None,
    cursor: Annotated[int | None, QueryParameter(ge=1, le=2**53, required=False)] = None,
    limit: Limit = 50,
) -> Listing[StoredMessage]:
    """Newest first, before a sequence (`cursor` is the same thing). Who has left sees up to where they left."""
    before = cursor or before_sequence or 2**53
    found = await desk.store.logs.history(request.user.user, conversation_id, before, limit)
    if isinstance(found, NotVisible):
        raise _not_found()
    return Listing(found.messages[::-1], str(found.from_sequence) if found.has_more else None)


@post(
    "/v1/conversations/{conversation_id:str}/participants",
    guards=[user_guard, shape_guard],
    responses=FAILURES,
    status_code=200,
    summary="Add participants to a group",
)
async def add_participants(
    request: CallerRequest,
    conversation_id: PathId,
    data: JSONBody[NewParticipants],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> Conversation:
    """200 with the conversation; 403 `forbidden` for who may not add, 409 `group_full` over 100."""
    user_ids = list(dict.fromkeys(data.user_ids))
    await _check_known(desk, user_ids)
    return await commands.add(desk, request.user.user, conversation_id, user_ids, idempotency_key)


@delete(
    "/v1/conversations/{conversation_id:str}/participants/{user_id:str}",
    guards=[user_guard, shape_guard],
    responses=FAILURES,
    status_code=200,
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
    return await commands.remove(desk, request.user.user, conversation_id, user_id, idempotency_key)


def _not_found() -> RestError:
    return RestError(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")


def _format_place(place: Place) -> str:
    return f"{(place.active_at - _EPOCH) // _MILLISECOND}.{place.conversation_id}"


def _parse_place(cursor: str) -> Place:
    milliseconds, _, conversation_id = cursor.partition(".")
    if not (milliseconds.isascii() and milliseconds.isdigit() and conversation_id):
        raise RestError(ErrorCode.VALIDATION_FAILED, "cursor: not one of ours")
    if int(milliseconds) > _LONGEST_CURSOR_MS:
        raise RestError(ErrorCode.VALIDATION_FAILED, "cursor: not one of ours")
    return Place(_EPOCH + int(milliseconds) * _MILLISECOND, conversation_id)
