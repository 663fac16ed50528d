"""The HTTP side of the gateway's port: which request becomes a WebSocket, and what every other one is answered.

Both transports collect the head of a request (`head_length`) and ask `answer` about it. Sans-IO: bytes in, a decision
out. HTTP and WebSocket syntax belong to the `websockets` library; this module adds the rules of the house (one path,
no token in the URL, no cookie without an origin, so many connections per address). No request has a body and none is
followed by a second one.
"""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import msgspec
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from gateway.transport import WEBSOCKET_PATH, Host, TransportLimits
from gateway.websocket import LIBRARY_LOG
from protocol.codec import FRAME_CODECS, FrameCodec

if TYPE_CHECKING:
    from collections.abc import Sequence

_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")


class Upgraded(msgspec.Struct, frozen=True):
    """A WebSocket: write `response`, then frames of `codec` follow. `remote`: whom it comes from; `host` let it in."""

    response: bytes
    codec: FrameCodec
    remote: str


class Answered(msgspec.Struct, frozen=True):
    """Anything else: write `response`, then end the connection."""

    response: bytes
    refused: bool


def head_length(received: bytes | bytearray) -> int:
    """Length of the request head at the start of `received`; 0 while it is incomplete.

    A bare LF ends a head here too, so that it is refused at once instead of at the deadline.
    """
    found = _END_OF_HEAD.search(received)
    return found.end() if found else 0


def hopeless(received: bytes | bytearray, limits: TransportLimits) -> Answered | None:
    """The refusal of an incomplete head that can no longer become a request: too long, or no HTTP (a TLS hello,
    noise)."""
    if len(received) > limits.max_head_bytes:
        return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "request head too large")
    if received and not 65 <= received[0] <= 90:
        return _refusal(HTTPStatus.BAD_REQUEST, "not HTTP")
    return None


def answer(head: bytes, peer: str, host: Host, limits: TransportLimits, now: float) -> Upgraded | Answered:
    """What to do about one complete request head that came from the address `peer`."""
    if len(head) > limits.max_head_bytes:
        return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "request head too large")
    library = ServerProtocol(
        extensions=None,
        subprotocols=[Subprotocol(name) for name in FRAME_CODECS],
        select_subprotocol=_select_subprotocol,
        logger=LIBRARY_LOG,
    )
    library.receive_data(head)
    requests = library.events_received()
    if not requests or not isinstance(requests[0], Request):
        written = b"".join(library.data_to_send())
        return Answered(written, True) if written else _refusal(HTTPStatus.BAD_REQUEST, "bad request")
    request = requests[0]
    path, _, query = request.path.partition("?")
    refusal = _refuse_request(request, path, query, limits)
    if refusal is not None:
        return refusal
    if path != WEBSOCKET_PATH:
        return _answer_plain(path, host)
    response = library.accept(request)
    if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
        return Answered(response.serialize(), True)
    remote = limits.proxies.remote(peer, request.headers.get_all("X-Forwarded-For"))
    wait = host.let_in(remote, now)
    if wait > 0.0:
        return _refusal(HTTPStatus.TOO_MANY_REQUESTS, "too many connections", ("Retry-After", str(math.ceil(wait))))
    codec = FRAME_CODECS[library.subprotocol or limits.unasked_subprotocol]
    return Upgraded(response.serialize(), codec, remote)


def _refuse_request(request: Request, path: str, query: str, limits: TransportLimits) -> Answered | None:
    headers = request.headers
    if sum(1 for _ in headers.raw_items()) > limits.max_head_lines:
        return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header lines")
    if request.protocol != "HTTP/1.1":
        return _refusal(HTTPStatus.BAD_REQUEST, "HTTP/1.1 only")
    if request.method != "GET":
        return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET only", ("Allow", "GET"))
    if path != WEBSOCKET_PATH:
        return None
    if "token" in unquote(query).lower():
        # URLs end up in the logs of proxies; a token belongs into the first frame.
        return _refusal(HTTPStatus.BAD_REQUEST, "token_in_url")
    origins = headers.get_all("Origin")
    if len(origins) > 1 or (origins and limits.origins is not None and origins[0] not in limits.origins):
        return _refusal(HTTPStatus.FORBIDDEN, "origin not allowed")
    if not origins and "Cookie" in headers:
        return _refusal(HTTPStatus.FORBIDDEN, "cookie without origin")
    if "Upgrade" in headers and headers.get_all("Sec-WebSocket-Version") != ["13"]:
        return _refusal(HTTPStatus.UPGRADE_REQUIRED, "WebSocket version 13 only", ("Sec-WebSocket-Version", "13"))
    return None


def _answer_plain(path: str, host: Host) -> Answered:
    found = host.answer_http(path)
    if found is None:
        return _refusal(HTTPStatus.NOT_FOUND, "not found")
    return Answered(_response(HTTPStatus(found.status), found.content_type, found.body), False)


def _refusal(status: HTTPStatus, text: str, *more: tuple[str, str]) -> Answered:
    return Answered(_response(status, "text/plain; charset=utf-8", text.encode() + b"\n", *more), True)


def _response(status: HTTPStatus, content_type: str, body: bytes, *more: tuple[str, str]) -> bytes:
    headers = Headers(
        [
            ("Connection", "close"),
            ("Cache-Control", "no-store"),
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            *more,
        ]
    )
    return Response(status.value, status.phrase, headers, body).serialize()


def _select_subprotocol(_library: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """The client's first choice among those we speak; none of them means no subprotocol header."""
    return next((name for name in offered if name in FRAME_CODECS), None)
