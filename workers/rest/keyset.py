"""The public keys that verify access tokens, for every program that wants to check one (RFC 7517)."""

from __future__ import annotations

from typing import Final

from litestar import Response, get

from workers.rest.desk import DeskDependency

_CACHE_SECONDS: Final = 300
"""So long before the first token of a new key must its public half be here: docs/accounts.md, "Changing the key"."""


@get("/.well-known/jwks.json", include_in_schema=False)
async def read_keys(desk: DeskDependency) -> Response[dict[str, list[dict[str, str]]]]:
    """All keys whose tokens are good, the signing one first. Open to everybody, and may be kept for 5 minutes."""
    return Response(desk.tokens.public_set(), headers={"Cache-Control": f"public, max-age={_CACHE_SECONDS}"})
