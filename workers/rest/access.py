"""Who may call what: bearer tokens, and the shape every request must have before a handler sees it.

Guards run before the body is read, so a stranger learns nothing from a validation message; a body may take its time, so
the token is looked at again when it is there. Foreign and unknown conversations are told apart by nobody: that is the
handlers' part.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec
from litestar.connection import ASGIConnection

from protocol.errors import ErrorCode
from workers.rest.desk import Desk, now_ms
from workers.rest.errors import RestError
from workers.revocation import is_good

if TYPE_CHECKING:
    from litestar.handlers.base import BaseRouteHandler

Connection = ASGIConnection[Any, Any, Any, Any]

_TOKEN_LIMIT: Final = 4096
_JSON: Final = "application/json"
_FRESH_SECONDS: Final = 0.1
"""A look at a token that is no older needs no second one: a request that brings its body with it pays for one."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks: a user, or the administrator (`user_id` None). `device_id`: the one a token is bound to.

    `looked_at`: when the token was found good, seconds of the loop's clock.
    """

    user_id: str | None
    device_id: str | None = None
    issued_ms: int = 0
    looked_at: float = 0.0

    @property
    def user(self) -> str:
        """The user's id. Raises RestError for the administrator."""
        if self.user_id is None:
            raise RestError(ErrorCode.FORBIDDEN, "this needs a user's token")
        return self.user_id


def _bearer(connection: Connection) -> str:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > _TOKEN_LIMIT:
        raise _unauthorized()
    return token.strip()


def _unauthorized() -> RestError:
    return RestError(ErrorCode.UNAUTHORIZED, "a valid bearer token is needed")


def _desk(connection: Connection) -> Desk:
    desk: Desk = connection.app.state.desk
    return desk


def _is_admin(desk: Desk, token: str) -> bool:
    return hmac.compare_digest(token.encode(), desk.settings.admin_token.encode())


def admin_guard(connection: Connection, _: BaseRouteHandler) -> None:
    """Only the administrator."""
    if not _is_admin(_desk(connection), _bearer(connection)):
        raise _unauthorized()
    connection.scope["user"] = Caller(None)


def metrics_guard(connection: Connection, _: BaseRouteHandler) -> None:
    """A peer on this machine that speaks for nobody else, or the administrator. To others there is nothing here."""
    host = "" if connection.client is None else connection.client.host
    is_forwarded = any(name in connection.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    if is_forwarded or not _is_loopback(host):
        try:
            admin_guard(connection, _)
        except RestError:
            raise RestError(ErrorCode.NOT_FOUND, "Not Found") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def operator_guard(connection: Connection, handler: BaseRouteHandler) -> None:
    """Only the administrator; to a user there is no such route."""
    if _is_admin(_desk(connection), _bearer(connection)):
        connection.scope["user"] = Caller(None)
        return
    await user_guard(connection, handler)
    raise RestError(ErrorCode.NOT_FOUND, "Not Found")


async def user_guard(connection: Connection, _: BaseRouteHandler) -> None:
    """Only a user with a good token, of a device that was not revoked since."""
    desk = _desk(connection)
    claims = desk.tokens.verify(_bearer(connection), now_ms())
    if claims is None:
        raise _unauthorized()
    caller = Caller(claims.sub, claims.device_id, claims.issued_ms, anyio.current_time())
    await check_good(desk, caller)
    connection.scope["user"] = caller


async def check_good(desk: Desk, caller: Caller) -> None:
    """Raises RestError where the token of this user was revoked since it was made."""
    if not await is_good(desk.store, desk.broker, caller.user, caller.device_id, caller.issued_ms):
        raise RestError(ErrorCode.REVOKED, "this device was logged out, or the account is deleted")


async def check_still_good(connection: Connection) -> None:
    """The body is there, some time after its head. Raises RestError where the token was revoked meanwhile."""
    caller = connection.scope.get("user")
    is_user = isinstance(caller, Caller) and caller.user_id is not None
    if is_user and anyio.current_time() - caller.looked_at > _FRESH_SECONDS:
        await check_good(_desk(connection), caller)


async def actor_guard(connection: Connection, handler: BaseRouteHandler) -> None:
    """A user, or the administrator acting for one."""
    if _is_admin(_desk(connection), _bearer(connection)):
        connection.scope["user"] = Caller(None)
    else:
        await user_guard(connection, handler)


def shape_guard(connection: Connection, handler: BaseRouteHandler) -> None:
    """A body is plain JSON; query parameters are those of the route (`opt["query"]`), each at most once."""
    if handler.parsed_data_field is not None:
        media_type = connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != _JSON:
            raise RestError(ErrorCode.VALIDATION_FAILED, f"the body must be {_JSON}", 415)
        if connection.headers.get("content-encoding", "identity").lower() != "identity":
            raise RestError(ErrorCode.VALIDATION_FAILED, "the body must not be compressed", 415)
    allowed: tuple[str, ...] = handler.opt.get("query", ())
    seen: set[str] = set()
    for name, value in connection.query_params.multi_items():
        if name not in allowed:
            raise RestError(ErrorCode.VALIDATION_FAILED, "unknown query parameter")
        if value.lower() == "null":
            # The framework would take it for an absent one.
            raise RestError(ErrorCode.VALIDATION_FAILED, f"{name}: null is no value")
        if name in seen:
            raise RestError(ErrorCode.VALIDATION_FAILED, f"{name}: given more than once")
        seen.add(name)
