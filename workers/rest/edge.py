"""Around the application: the deadline of a request's body, headers of every answer, the request's name, the metrics.

The head's deadline and sizes are `server.py`'s: they come before there is a request.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import structlog
from litestar.enums import ScopeType

from protocol.errors import ErrorCode
from workers import metrics
from workers.rest.errors import RestError

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Of every answer that does not bring its own: it is data, for the one who asked, and no page (OWASP REST Security
Cheat Sheet)."""
_HSTS: Final = (b"strict-transport-security", b"max-age=63072000; includeSubDomains")
"""Two years (the preload list wants one or more). Only where this API is reached by TLS, which ends before us."""


class Edge:
    """`body_seconds`: a body that takes longer is a slow attack (reliability.md H-07). `behind_tls`: clients speak
    https."""

    def __init__(self, app: ASGIApp, body_seconds: float, *, behind_tls: bool) -> None:
        self._app = app
        self._body_seconds = body_seconds
        self._headers = (*_HEADERS, _HSTS) if behind_tls else _HEADERS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "other"
        started = time.perf_counter()
        status = 500
        name = secrets.token_hex(8)
        body_deadline: float | None = anyio.current_time() + self._body_seconds

        async def receive_in_time() -> Any:
            nonlocal body_deadline
            if body_deadline is None:
                return await receive()
            with anyio.CancelScope(deadline=body_deadline):
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    body_deadline = None
                return message
            raise RestError(ErrorCode.VALIDATION_FAILED, "the body took too long", 408)

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {header for header, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(pair for pair in self._headers if pair[0] not in present),
                    (b"x-request-id", name.encode()),
                ]
            await send(message)

        try:
            # The name stands in the answer and in each line of the log that the request causes.
            with structlog.contextvars.bound_contextvars(request=name), metrics.REST_UNDER_WAY.track_inprogress():
                await self._app(scope, receive_in_time, send_counted)
        finally:
            metrics.REST_REQUESTS.labels(method, str(status)).inc()
            metrics.REST_SECONDS.labels(method).observe(time.perf_counter() - started)
