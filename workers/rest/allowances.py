"""How often somebody may do something, over all REST processes: counted in Redis, refused with the time to wait."""

from __future__ import annotations

import ipaddress
import math
from typing import TYPE_CHECKING, Any

from protocol.errors import ErrorCode
from workers.rest.errors import RestError

if TYPE_CHECKING:
    from litestar import Request

    from workers.rest.desk import Desk

_IPV6_PREFIX = 64
"""What one household gets; whoever has one has 2^64 addresses."""


async def spend(desk: Desk, purpose: str, subject: str, limit: int, window_seconds: int) -> None:
    """Take one of `limit` per window. Raises RestError when none is left, BrokerUnavailable: nobody goes uncounted."""
    wait = await desk.broker.spend(purpose, subject, limit, window_seconds)
    if wait:
        seconds = math.ceil(wait)
        raise RestError(ErrorCode.RATE_LIMITED, f"too often; again in {seconds} s", retry_after_seconds=seconds)


def address_of(request: Request[Any, Any, Any]) -> str:
    """Whom to count: the network address a request comes from, of IPv6 the network's part."""
    host = "" if request.client is None else request.client.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), _IPV6_PREFIX), strict=False))
    return str(address)
