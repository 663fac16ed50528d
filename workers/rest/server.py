"""The HTTP server under the application: uvicorn, with bounds on what comes before a request is one.

Called by `app.py`. uvicorn itself waits for ever for a request's head, and takes one of any size; so whoever opened
enough connections and sent nothing kept everybody else out.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from protocol import codec
from protocol.errors import ErrorCode
from workers import metrics
from workers.rest.errors import ErrorBody, ErrorDetail

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from workers.settings import Settings

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_HEAD_LINES: Final = 100
MAX_TARGET_BYTES: Final = 8 * 1024
"""Of a request's head, of its header lines, of its path with the query: the gateway's numbers (reliability.md W-09)."""

_TOO_MANY: Final = (503, ErrorCode.OVERLOADED, "too many connections")
_TOO_LATE: Final = (408, ErrorCode.VALIDATION_FAILED, "the request's head took too long")
_HEAD_TOO_LARGE: Final = (431, ErrorCode.TOO_LARGE, "the request's head is too large")
_TARGET_TOO_LONG: Final = (414, ErrorCode.TOO_LARGE, "the request's target is too long")
_NO_REQUEST: Final = (400, ErrorCode.VALIDATION_FAILED, "no HTTP request")


class _Refused(Exception):
    """Stops the parser, which answers through `send_400_response`."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. At most `most` of them; a head must come whole within `head_seconds`, and within its sizes."""

    def __init__(self, most: int, head_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._most = most
        self._head_seconds = head_seconds
        self._head_bytes = 0
        self._in_head = True
        """No request of this connection is under way: what comes is the head of one."""
        self._refusal = _NO_REQUEST
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        metrics.REST_CONNECTIONS.set(len(self.connections))
        if len(self.connections) > self._most:
            self._refuse(_TOO_MANY)
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)
        metrics.REST_CONNECTIONS.set(len(self.connections))

    def _expect_head(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._forget_deadline()
        self._deadline = self.loop.call_later(self._head_seconds, self._refuse, _TOO_LATE)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES + MAX_TARGET_BYTES and not self.transport.is_closing():
            self._refuse(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # another request on the same connection
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._forget_deadline()
        size = sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(self.url) > MAX_TARGET_BYTES:
            self._refusal = _TARGET_TOO_LONG
        elif size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEAD_LINES:
            self._refusal = _HEAD_TOO_LARGE
        else:
            super().on_headers_complete()
            return
        raise _Refused

    def send_400_response(self, msg: str) -> None:
        """See the base class: the parser has given up."""
        self._refuse(self._refusal)

    def _refuse(self, refusal: tuple[int, ErrorCode, str]) -> None:
        """Answer in the API's own shape and close."""
        self._forget_deadline()
        if self.transport.is_closing():
            return
        status, code, message = refusal
        metrics.REST_REQUESTS.labels("other", str(status)).inc()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_answer(status, code, message))
        self.transport.close()


def _answer(status: int, code: ErrorCode, message: str) -> bytes:
    body = codec.encode_value(ErrorBody(ErrorDetail(code, message)))
    retry = "Retry-After: 1\r\n" if code.retryable else ""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
        f"{retry}Connection: close\r\n\r\n"
    )
    return head.encode() + body


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: `workers/__main__.py` has them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def open_server(app: Any, settings: Settings) -> Server:
    """A server that is not running yet."""
    protocol: Any = functools.partial(BoundedProtocol, settings.rest_connections, settings.head_seconds)
    return Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=settings.trusted_proxies,
        )
    )
