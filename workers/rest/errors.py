"""Failures of a request → `{"error": {"code", "message"}}`, whoever raised them: a handler, the framework, a seam.

Every code is a row of `protocol.errors`. Nothing of an exception but its intended message ever reaches the client.

A route declares the codes of its own in `opt={"errors": (ErrorCode.CONFLICT, …)}`; what its guards, parameters and body
imply is added in `openapi.py`. The OpenAPI document and `docs/reference.md` are made from that.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from protocol.errors import ErrorCode
from workers.broker import BrokerUnavailable
from workers.instances import TooManyWaiting
from workers.objects import ObjectsUnavailable
from workers.store.errors import StoreUnavailable

MESSAGE_LIMIT: Final = 200
"""Most characters of an error's message."""
_RETRY_AFTER_SECONDS: Final = 1
_BY_STATUS: Final = {
    401: ErrorCode.UNAUTHORIZED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.TOO_LARGE,
    429: ErrorCode.RATE_LIMITED,
    503: ErrorCode.OVERLOADED,
}
"""The framework's own refusals."""

log = structlog.get_logger(__name__)


class ErrorDetail(msgspec.Struct, frozen=True):
    code: ErrorCode
    message: str


class ErrorBody(msgspec.Struct, frozen=True):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class RestError(Exception):
    """A refusal with its code; `status` where it differs from the code's own."""

    def __init__(
        self, code: ErrorCode, message: str, status: int | None = None, *, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.code = code
        self.message = message
        self.status = code.http_status if status is None else status


def error_response(code: ErrorCode, message: str, status: int, headers: dict[str, str] | None = None) -> Response[Any]:
    """The answer for a refusal, with the headers its status asks for."""
    headers = dict(headers or {})
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if code.retryable:
        headers.setdefault("Retry-After", str(_RETRY_AFTER_SECONDS))
    body = ErrorBody(ErrorDetail(code, message[:MESSAGE_LIMIT]))
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def on_refusal(_: Request[Any, Any, Any], error: RestError) -> Response[Any]:
    """A refusal of ours, as it is."""
    headers = {} if error.retry_after_seconds is None else {"Retry-After": str(error.retry_after_seconds)}
    return error_response(error.code, error.message, error.status, headers)


def on_framework_error(_: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """What Litestar refuses: routes, methods, bodies, parameters."""
    status = error.status_code
    if status >= 500:
        log.error("request_failed", exc_info=error)
        return error_response(ErrorCode.INTERNAL, "internal error", 500)
    code = _BY_STATUS.get(status, ErrorCode.VALIDATION_FAILED)
    allow = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
    return error_response(code, _reason(error), status, allow)


def _reason(error: HTTPException) -> str:
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        first = error.extra[0]
        if isinstance(first, dict):
            return f"{first.get('key', 'body')}: {first.get('message', 'not valid')}"
    return str(error.detail).splitlines()[0] if error.detail else "refused"


def on_store_away(
    _: Request[Any, Any, Any], error: StoreUnavailable | BrokerUnavailable | ObjectsUnavailable
) -> Response[Any]:
    """503: what is behind us is away, and nothing is known of the request's effect."""
    log.warning("request_unserved", error=str(error))
    return error_response(ErrorCode.STORAGE_UNAVAILABLE, "storage is unavailable; try again", 503)


def on_overload(_: Request[Any, Any, Any], __: TooManyWaiting) -> Response[Any]:
    """503: as many requests wait for shard owners as one process lets wait."""
    return error_response(ErrorCode.OVERLOADED, "too many requests are waiting", 503)


def on_deep_nesting(_: Request[Any, Any, Any], __: RecursionError) -> Response[Any]:
    """Nothing here recurses but the decoder, over a body that nests as deep as its sender likes."""
    return error_response(ErrorCode.VALIDATION_FAILED, "the body nests too deep", 400)


def on_bug(_: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """The request boundary: one request fails, the process goes on."""
    log.error("request_failed", exc_info=error)
    return error_response(ErrorCode.INTERNAL, "internal error", 500)


EXCEPTION_HANDLERS: Final[dict[Any, Any]] = {
    RestError: on_refusal,
    HTTPException: on_framework_error,
    StoreUnavailable: on_store_away,
    BrokerUnavailable: on_store_away,
    ObjectsUnavailable: on_store_away,
    TooManyWaiting: on_overload,
    RecursionError: on_deep_nesting,
    Exception: on_bug,
}
