"""The public keys that verify access tokens, for every program that wants to check one (RFC 7517)."""

from __future__ import annotations

from typing import Final

from litestar import get
from litestar.datastructures import ResponseHeader

from workers.rest.desk import DeskDependency

_CACHE_SECONDS: Final = 300
"""So long before the first token of a new key must its public half be here: docs/accounts.md, "Changing the key"."""


@get(
    "/.well-known/jwks.json",
    include_in_schema=False,
    response_headers=[ResponseHeader(name="Cache-Control", value=f"public, max-age={_CACHE_SECONDS}")],
)
async def read_keys(desk: DeskDependency) -> dict[str, list[dict[str, str]]]:
    """All keys whose tokens are good, the signing one first. Open to everybody, and may be kept for 5 minutes."""
    return desk.tokens.public_set()
