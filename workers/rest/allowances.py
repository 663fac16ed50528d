"""How often somebody may do something, over all REST processes: counted in Redis, refused with the time to wait."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from protocol.errors import ErrorCode
from protocol.limits import counted_address
from workers.rest.errors import RestError

if TYPE_CHECKING:
    from litestar import Request

    from workers.rest.desk import Desk


async def spend(desk: Desk, purpose: str, subject: str, limit: int, window_seconds: int) -> None:
    """Take one of `limit` per window. Raises RestError when none is left, BrokerUnavailable: nobody goes uncounted."""
    wait = await desk.broker.spend(purpose, subject, limit, window_seconds)
    if wait:
        seconds = math.ceil(wait)
        raise RestError(ErrorCode.RATE_LIMITED, f"too often; again in {seconds} s", retry_after_seconds=seconds)


async def spend_login(desk: Desk, request: Request[Any, Any, Any]) -> None:
    """Take one proof of who somebody is, of the address it comes from. Raises as `spend`."""
    await spend(desk, "logins_from", address_of(request), desk.settings.logins_per_address, 60)


async def spend_step(desk: Desk, user_id: str) -> None:
    """Take one change of a group. Raises as `spend`."""
    await spend(desk, "group_steps", user_id, desk.settings.group_steps_per_minute, 60)


def address_of(request: Request[Any, Any, Any]) -> str:
    """Whom to count: the network address a request comes from."""
    return counted_address("" if request.client is None else request.client.host)
