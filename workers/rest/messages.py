"""The messages of a conversation: sent, read, changed, by the same rules as over the WebSocket.

Each send and change becomes the record that a gateway would have made of the frame; the conversation's owner decides.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import delete, get, patch, post, put
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import Meta

from protocol import limits, records
from protocol.errors import ErrorCode
from protocol.frames import (
    REFUSALS,
    DeleteScope,
    Message,
    MessageAckPayload,
    MessageDelete,
    MessageEdit,
    MessageReaction,
)
from protocol.models import EpochMs, Id, MediaUrl, MessagePayload, MessageType, StoredMessage
from workers.rest import commands
from workers.rest.access import shape_guard, user_guard
from workers.rest.conversations import not_found
from workers.rest.desk import Desk, DeskDependency
from workers.rest.errors import RestError
from workers.rest.shapes import (
    CallerRequest,
    IdempotencyHeader,
    Limit,
    Listing,
    NeededIdempotencyHeader,
    PathId,
)
from workers.store.logs import NotVisible
from workers.store.search import NotAuthor, Receipt

PathEmoji = Annotated[str, PathParameter(pattern=r"\A[^\x00-\x1f\x7f/]{1,64}\Z")]

_LIMITS = limits.Limits()


class NewMessage(msgspec.Struct, kw_only=True, frozen=True):
    """A message as the `message` frame carries it; its conversation is in the path."""

    receiver_id: Annotated[str, Meta(max_length=64)] = ""
    content: str
    message_type: MessageType = msgspec.field(name="type")
    media_url: MediaUrl | None = None
    reply_to_message_id: Id | None = None
    timestamp: EpochMs
    forwarded: bool = False


class NewContent(msgspec.Struct, frozen=True):
    """What a message says from now on."""

    content: Annotated[str, Meta(min_length=1)]


@get(
    "/v1/conversations/{conversation_id:str}/messages",
    guards=[user_guard, shape_guard],
    opt={"query": ("before_sequence", "cursor", "limit"), "errors": (ErrorCode.CONVERSATION_NOT_FOUND,)},
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
        raise not_found()
    return Listing(found.messages[::-1], str(found.from_sequence) if found.has_more else None)


@post(
    "/v1/conversations/{conversation_id:str}/messages",
    guards=[user_guard, shape_guard],
    opt={"errors": REFUSALS[Message]},
    summary="Send a message",
)
async def send_message(
    request: CallerRequest,
    conversation_id: PathId,
    data: JSONBody[NewMessage],
    idempotency_key: NeededIdempotencyHeader,
    desk: DeskDependency,
) -> MessageAckPayload:
    """201 with the ack: the message is committed. The same key again is answered with the same message."""
    payload = MessagePayload(conversation_id=conversation_id, **msgspec.structs.asdict(data))
    refusal = limits.check_message(payload, _LIMITS)
    if refusal is not None:
        raise RestError(*refusal)
    await _spend(desk, request.user.user)
    return await commands.send(desk, request.user.user, payload, idempotency_key)


@get(
    "/v1/conversations/{conversation_id:str}/messages/{message_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.CONVERSATION_NOT_FOUND, ErrorCode.NOT_FOUND)},
    summary="Read a message",
)
async def read_message(
    request: CallerRequest, conversation_id: PathId, message_id: PathId, desk: DeskDependency
) -> StoredMessage:
    """As the caller may see it: `content` is empty where it was deleted or has disappeared."""
    match await desk.store.search.message(request.user.user, conversation_id, message_id):
        case NotVisible():
            raise not_found()
        case None:
            raise _no_message()
        case found:
            return found


@get(
    "/v1/conversations/{conversation_id:str}/messages/{message_id:str}/receipts",
    guards=[user_guard, shape_guard],
    opt={
        "query": ("cursor", "limit"),
        "errors": (ErrorCode.CONVERSATION_NOT_FOUND, ErrorCode.NOT_FOUND, ErrorCode.FORBIDDEN),
    },
    summary="List who has a message",
)
async def list_receipts(
    request: CallerRequest,
    conversation_id: PathId,
    message_id: PathId,
    desk: DeskDependency,
    cursor: Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)] = None,
    limit: Limit = 50,
) -> Listing[Receipt]:
    """For its author, by user id; 403 `forbidden` for others. Who hides what they have read shows no `read`."""
    user_id = request.user.user
    match await desk.store.search.receipts(user_id, conversation_id, message_id, cursor or "", limit):
        case NotVisible():
            raise not_found()
        case None:
            raise _no_message()
        case NotAuthor():
            raise RestError(ErrorCode.FORBIDDEN, "only its author is told who has a message")
        case items, more:
            return Listing(items, more)


@patch(
    "/v1/conversations/{conversation_id:str}/messages/{message_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": REFUSALS[MessageEdit]},
    summary="Edit a message",
)
async def edit_message(
    request: CallerRequest,
    conversation_id: PathId,
    message_id: PathId,
    data: JSONBody[NewContent],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> MessageAckPayload:
    """200 with the ack of the log's entry that says so; 409 `too_late` where it can no longer be edited."""
    refusal = limits.check_content(data.content, _LIMITS.max_content_bytes)
    if refusal is not None:
        raise RestError(*refusal)
    return await _change(
        desk, request.user.user, conversation_id, message_id, records.Edit(data.content), idempotency_key
    )


@delete(
    "/v1/conversations/{conversation_id:str}/messages/{message_id:str}",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"query": ("scope",), "errors": REFUSALS[MessageDelete]},
    summary="Delete a message for oneself or for all",
)
async def delete_message(
    request: CallerRequest,
    conversation_id: PathId,
    message_id: PathId,
    for_whom: Annotated[DeleteScope, QueryParameter(name="scope")],
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> MessageAckPayload:
    """200 with the ack of the log's entry that says so; 403 `forbidden` for who may not delete it for all."""
    change = records.Delete(for_whom is DeleteScope.ALL)
    return await _change(desk, request.user.user, conversation_id, message_id, change, idempotency_key)


@put(
    "/v1/conversations/{conversation_id:str}/messages/{message_id:str}/reactions/{emoji:str}",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": REFUSALS[MessageReaction]},
    summary="React to a message",
)
async def add_reaction(
    request: CallerRequest,
    conversation_id: PathId,
    message_id: PathId,
    emoji: PathEmoji,
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> MessageAckPayload:
    """200 with the ack of the log's entry that says so."""
    change = records.React(emoji, add=True)
    return await _change(desk, request.user.user, conversation_id, message_id, change, idempotency_key)


@delete(
    "/v1/conversations/{conversation_id:str}/messages/{message_id:str}/reactions/{emoji:str}",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": REFUSALS[MessageReaction]},
    summary="Take a reaction back",
)
async def remove_reaction(
    request: CallerRequest,
    conversation_id: PathId,
    message_id: PathId,
    emoji: PathEmoji,
    desk: DeskDependency,
    idempotency_key: IdempotencyHeader = None,
) -> MessageAckPayload:
    """200 with the ack of the log's entry that says so."""
    change = records.React(emoji, add=False)
    return await _change(desk, request.user.user, conversation_id, message_id, change, idempotency_key)


async def _change(
    desk: Desk,
    user_id: str,
    conversation_id: str,
    message_id: str,
    change: records.Edit | records.Delete | records.React,
    idempotency_key: str | None,
) -> MessageAckPayload:
    await _spend(desk, user_id)
    return await commands.change_message(desk, user_id, conversation_id, message_id, change, idempotency_key)


async def _spend(desk: Desk, user_id: str) -> None:
    """The WebSocket's budget: the same burst, and in the long run the same rate. Raises RestError."""
    burst, rate = desk.settings.message_burst, desk.settings.message_rate
    if await desk.broker.spend("send", user_id, burst, max(1, round(burst / rate))) > 0.0:
        raise RestError(ErrorCode.RATE_LIMITED, "too many messages")


def _no_message() -> RestError:
    return RestError(ErrorCode.NOT_FOUND, "no such message")
