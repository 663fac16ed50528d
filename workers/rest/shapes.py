"""What requests and answers of many routes share: the caller's request, ids, times, pages. Called by every resource."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.params import HeaderParameter, PathParameter, QueryParameter
from msgspec import Meta

from workers.rest.access import Caller

CallerRequest = Request[Caller, Any, State]
PathId = Annotated[str, PathParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z")]
QueryId = Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)]
Limit = Annotated[int, QueryParameter(ge=1, le=100)]
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
IdempotencyHeader = Annotated[
    str | None, HeaderParameter(name=IDEMPOTENCY_KEY, pattern=r"\A[A-Za-z0-9._:-]{1,128}\Z", required=False)
]
NeededIdempotencyHeader = Annotated[str, HeaderParameter(name=IDEMPOTENCY_KEY, pattern=r"\A[A-Za-z0-9._:-]{1,128}\Z")]
Moment = Annotated[datetime, Meta(tz=True, extra_json_schema={"pattern": "^[1-9]"})]
"""RFC 3339, with its offset."""
MomentQuery = Annotated[int | None, QueryParameter(ge=0, le=253_402_300_799_999, required=False)]
"""Epoch milliseconds, as in frames and cursors."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND: Final = timedelta(milliseconds=1)
LAST_MS: Final = 253_402_300_799_999
"""The last millisecond that a `datetime` holds."""

Item = TypeVar("Item")


class Listing(msgspec.Struct, Generic[Item], frozen=True):
    """One page. `next_cursor` is null on the last one."""

    items: list[Item]
    next_cursor: str | None


class Flag(StrEnum):
    """A query parameter that says yes or no."""

    TRUE = "true"
    FALSE = "false"


def is_true(flag: Flag | None) -> bool | None:
    """What the parameter says; None where it was left out."""
    return None if flag is None else flag is Flag.TRUE


def moment_at(epoch_ms: int) -> datetime:
    """Epoch milliseconds → UTC datetime, exact to the last one."""
    return EPOCH + epoch_ms * MILLISECOND


def cursor_of(moment: datetime, name: str) -> str:
    """Where the next page of what is in the order of time begins: behind this one."""
    return f"{ms_of(moment)}.{name}"


def spot_of(cursor: str) -> tuple[datetime, str]:
    """What `cursor_of` was given; a time that no datetime holds becomes the last that one does."""
    milliseconds, _, name = cursor.partition(".")
    return moment_at(min(int(milliseconds), LAST_MS)), name


def clamped(moment: datetime) -> datetime:
    """The same time in UTC; one that no epoch millisecond holds becomes the nearest that does."""
    return moment_at(ms_of(moment))


def ms_of(moment: datetime) -> int:
    """Epoch milliseconds, 0 for what is before 1970."""
    return min(max((moment - EPOCH) // MILLISECOND, 0), LAST_MS)
