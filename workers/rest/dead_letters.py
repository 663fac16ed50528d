"""Dead letters for the administrator: what could not be committed, and what is done about it. Nobody else learns that
there are any: to a user's token these routes do not exist.

The same rules as `python -m workers dlq`: `workers/replay.py` has them. What a message says is shown to who asks for it
(`raw=true`), and to nobody by the way.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import get, post
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import UNSET, Meta

from protocol.errors import ErrorCode
from protocol.models import DeadLetterQueueEntry, DLQErrorType, DLQStatus
from workers import replay
from workers.rest.access import operator_guard, shape_guard
from workers.rest.desk import DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import Flag, Limit, Listing, cursor_of, is_true, moment_at, spot_of
from workers.store.dead_letters import Count, Place

LetterId = Annotated[str, PathParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z")]
Cursor = Annotated[str | None, QueryParameter(pattern=r"\A[0-9]{1,15}\.[A-Za-z0-9_]{1,64}\Z", required=False)]
StatusQuery = Annotated[DLQStatus | None, QueryParameter(name="status", required=False)]
ErrorTypeQuery = Annotated[DLQErrorType | None, QueryParameter(required=False)]
RawQuery = Annotated[Flag | None, QueryParameter(required=False)]


class Resolution(msgspec.Struct, frozen=True):
    """Why nothing more is to be done."""

    reason: Annotated[str, Meta(min_length=1, max_length=500)]


class Statistics(msgspec.Struct, frozen=True):
    counts: list[Count]


class Replaying(msgspec.Struct, frozen=True):
    """`resolved`: its message was in the log already. Otherwise it is in its shard's stream again, and the letter will
    say what became of it."""

    letter: DeadLetterQueueEntry
    resolved: bool


def veiled(letter: DeadLetterQueueEntry) -> DeadLetterQueueEntry:
    """A letter without what its sender wrote."""
    message = letter.message
    if message is not UNSET:
        message = msgspec.structs.replace(message, content="")
    return msgspec.structs.replace(letter, message=message, raw=UNSET)


@get(
    "/v1/dead-letters",
    guards=[operator_guard, shape_guard],
    opt={"query": ("status", "error_type", "cursor", "limit")},
    summary="List dead letters",
)
async def list_dead_letters(
    desk: DeskDependency,
    letter_status: StatusQuery = None,
    error_type: ErrorTypeQuery = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Listing[DeadLetterQueueEntry]:
    """Newest first, without contents. To a user's token: 404 `not_found`, as all routes of dead letters."""
    after = None if cursor is None else Place(*spot_of(cursor))
    letters, more = await desk.store.dead_letters.page(letter_status, error_type, after, limit)
    next_cursor = None if more is None else cursor_of(more.created_at, more.letter_id)
    return Listing([veiled(letter) for letter in letters], next_cursor)


@get(
    "/v1/dead-letters/statistics",
    guards=[operator_guard, shape_guard],
    summary="Count dead letters",
)
async def count_dead_letters(desk: DeskDependency) -> Statistics:
    """By status and kind of failure."""
    return Statistics(await desk.store.dead_letters.counts())


@get(
    "/v1/dead-letters/{letter_id:str}",
    guards=[operator_guard, shape_guard],
    opt={"query": ("raw",)},
    summary="Read a dead letter",
)
async def read_dead_letter(letter_id: LetterId, desk: DeskDependency, raw: RawQuery = None) -> DeadLetterQueueEntry:
    """With `raw=true` also what its message says, and its record's bytes (Base64)."""
    letter = await desk.store.dead_letters.get(letter_id)
    if letter is None:
        raise _unknown()
    return letter if is_true(raw) else veiled(letter)


@post(
    "/v1/dead-letters/{letter_id:str}/replay",
    guards=[operator_guard, shape_guard],
    status_code=202,
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Replay a dead letter",
)
async def replay_dead_letter(letter_id: LetterId, desk: DeskDependency) -> Replaying:
    """202: it is appended to its shard again, with its original key. 409 `conflict` for one that is resolved, is being
    replayed, or whose sender was told for good that it failed."""
    match await replay.replay(desk.store, desk.broker, letter_id, moment_at(now_ms())):
        case replay.Unknown():
            raise _unknown()
        case replay.Refused(reason):
            raise RestError(ErrorCode.CONFLICT, reason)
        case replay.Replayed(letter, is_resolved):
            return Replaying(veiled(letter), is_resolved)


@post(
    "/v1/dead-letters/{letter_id:str}/resolve",
    guards=[operator_guard, shape_guard],
    status_code=200,
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Resolve a dead letter",
)
async def resolve_dead_letter(
    letter_id: LetterId, data: JSONBody[Resolution], desk: DeskDependency
) -> DeadLetterQueueEntry:
    """200: nothing more is done about it. 409 `conflict` for one that is resolved or is being replayed."""
    match await replay.resolve(desk.store, letter_id, data.reason, moment_at(now_ms())):
        case replay.Unknown():
            raise _unknown()
        case replay.Refused(reason):
            raise RestError(ErrorCode.CONFLICT, reason)
        case None:
            letter = await desk.store.dead_letters.get(letter_id)
    if letter is None:
        raise _unknown()
    return veiled(letter)


def _unknown() -> RestError:
    return RestError(ErrorCode.NOT_FOUND, "no such dead letter")
