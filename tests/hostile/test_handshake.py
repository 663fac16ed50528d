"""W-01 to W-18: what comes before a WebSocket is one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest

from gateway.transport import TransportLimits
from tests.gateway.peers import request_head
from tests.hostile.rows import BOTH, Row, by_row, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio


def status_of(received: bytes) -> int:
    """Of the one HTTP answer in what came; 0 where none came. A second answer would mean a smuggled request."""
    found = re.findall(rb"HTTP/1\.1 (\d{3}) ", received)
    assert len(found) <= 1, received
    return int(found[0]) if found else 0


def answered(request: bytes, header: str = "") -> Play:
    """(Status, value of `header`, was it closed) after one request. Closed by the server within a second: True."""

    async def play(scene: Scene) -> tuple[int, str, bool]:
        received, seconds = await scene.exchange(request, scene.port)
        lines = received.split(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        values = [line.split(": ", 1)[1] for line in lines if line.lower().startswith(f"{header}:")] if header else []
        return status_of(received), ", ".join(values), seconds < 1.0

    return play


def lines(*head: str, body: bytes = b"") -> bytes:
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def refusal(row_id: str, sent: str, status: int, request: bytes) -> Row:
    """Refused with this status and closed."""
    return Row(row_id, sent, (status, "", True), answered(request), BOTH)


SMUGGLED: Final = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKS: Final = b"5;\x00\r\nhello\r\n0\r\n\r\n"


def cut_off_after(data: bytes, pause_seconds: float) -> Play:
    """(What was answered, is the deadline of the running gateway kept, the default deadline)."""

    async def play(scene: Scene) -> tuple[int, bool, float]:
        limit = float(scene.house.stack.environment["TRIREME_HANDSHAKE_SECONDS"])
        received, seconds = await scene.exchange(data, scene.port, pause_seconds)
        return status_of(received), limit - 0.1 < seconds < limit + 1.6, TransportLimits().handshake_seconds

    return play


ROWS: Final = [
    Row(
        "W-04",
        "version 8",
        (426, "13", True),
        answered(request_head(Sec_WebSocket_Version="8"), "sec-websocket-version"),
        BOTH,
    ),
    Row(
        "W-04",
        "no version",
        (426, "13", True),
        answered(request_head(Sec_WebSocket_Version=""), "sec-websocket-version"),
        BOTH,
    ),
    refusal("W-05", "no key", 400, request_head(Sec_WebSocket_Key="")),
    refusal("W-05", "a key of 3 bytes", 400, request_head(Sec_WebSocket_Key="YWJj")),
    refusal("W-05", "a key that is no Base64", 400, request_head(Sec_WebSocket_Key="????????????????????????")),
    refusal("W-06", "POST", 405, request_head().replace(b"GET", b"POST", 1)),
    refusal("W-06", "HTTP/1.0", 400, request_head().replace(b"HTTP/1.1", b"HTTP/1.0", 1)),
    refusal("W-07", "Content-Length and a body that is a request", 400, request_head(Content_Length="40") + SMUGGLED),
    refusal(
        "W-07",
        "chunked, and a request behind it",
        400,
        request_head(Transfer_Encoding="chunked") + b"0\r\n\r\n" + SMUGGLED,
    ),
    refusal(
        "W-08",
        "Content-Length and Transfer-Encoding",
        400,
        request_head(Content_Length="5", Transfer_Encoding="chunked") + CHUNKS,
    ),
    refusal("W-08", "two Content-Length", 400, request_head(Content_Length="3\r\nContent-Length: 4") + b"abcd"),
    refusal("W-08", "Transfer-Encoding: xchunked", 400, request_head(Transfer_Encoding="xchunked") + SMUGGLED),
    refusal("W-08", "bare LF", 400, request_head().replace(b"\r\n", b"\n")),
    refusal("W-08", "garbage in a chunk extension", 400, request_head(Transfer_Encoding="chunked") + CHUNKS),
    refusal(
        "W-09",
        "a head of 16 KiB and a byte",
        431,
        lines("GET /v1/ws HTTP/1.1", *(f"X-{n:03}: {'a' * 176}" for n in range(90))),
    ),
    refusal("W-09", "101 header lines", 431, lines("GET /v1/ws HTTP/1.1", *(f"X-{n}: a" for n in range(101)))),
    refusal("W-09", "a URL of 8 KiB and a byte", 414, request_head("/v1/ws?" + "a" * (8193 - 7))),
    Row("W-10", "a header byte every 50 ms", (0, True, 5.0), cut_off_after(request_head() * 10, 0.05), BOTH),
    Row("W-11", "nothing", (0, True, 5.0), cut_off_after(b"", 0.0), BOTH),
    refusal("W-13", "/ws/../admin", 404, request_head("/ws/../admin")),
    refusal("W-13", "/ws%00", 404, request_head("/ws%00")),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
