"""W-01 to W-18: what comes before a WebSocket is one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest

from gateway.transport import TransportLimits
from protocol import codec
from tests.gateway.peers import TEXT, frame, request_head
from tests.hostile.rows import BOTH, PATIENT, Row, by_row, judge
from tests.system.crowd import auth, eventually

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


def upgraded(request: bytes) -> Play:
    """The status of one request that is to become a WebSocket."""

    async def play(scene: Scene) -> int:
        peer = await scene.open_raw()
        await peer.send(request)
        return int((await peer.head()).split()[1])

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


async def enormous(scene: Scene) -> tuple[bool, bool]:
    """(Cut off in time, is no memory left behind)."""
    memory = scene.house.resident_kib(scene.transport)
    _, seconds = await scene.exchange(b"GET /v1/ws HTTP/1.1\r\nX: " + b"a" * 10_000_000, scene.port)
    return seconds < 5, scene.house.resident_kib(scene.transport) - memory < 5_000


async def health(scene: Scene) -> list[int]:
    """The pages of the same port, for whoever runs it: they may name what is behind."""
    requests = [f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for path in PAGES]
    return [status_of((await scene.exchange(data, scene.port, judged=False))[0]) for data in requests]


async def vanishing(scene: Scene) -> tuple[bool, bool]:
    """500 ended with RST and 500 with FIN: (are no files left after the deadline, is the gateway as quick as ever)."""
    files = scene.house.open_files(scene.transport)
    for number in range(1000):
        peer = await scene.open_raw()
        if number % 3:
            await peer.send(b"GET /v1/ws HT")
        if number % 2:
            peer.reset()
        else:
            peer.stream.socket.close()
    await eventually(lambda: scene.house.open_files(scene.transport) <= files, "closed", 6.0)
    (status, _, quick) = await answered(SMUGGLED)(scene)
    return True, quick and status == 200


async def offers(scene: Scene) -> tuple[bool, bool, bool]:
    """(Is it a WebSocket, is an extension agreed, a subprotocol)."""
    peer = await scene.open_raw()
    many = ", ".join(f"chat.{number}" for number in range(20))
    deflate = "permessage-deflate; client_max_window_bits"
    await peer.send(request_head(subprotocol=many, Sec_WebSocket_Extensions=deflate))
    head = (await peer.head()).lower()
    return head.startswith(b"http/1.1 101 "), b"extensions" in head, b"sec-websocket-protocol" in head


FORGED: Final = "203.0.113.99"


async def forged_address(scene: Scene) -> tuple[list[int], bool, bool]:
    """(Status of 51 requests in a second that say they come from elsewhere, by turns; does the log know better)."""
    statuses = []
    for number in range(51):
        peer = await scene.open_raw()
        await peer.send(request_head(X_Forwarded_For=f"203.0.113.{number}"))
        statuses.append(int((await peer.head()).split()[1]))
    scene.move()
    user_id = await scene.people.user()
    peer = await scene.open_raw()
    await peer.send(request_head(X_Forwarded_For=FORGED))
    assert (await peer.head()).startswith(b"HTTP/1.1 101 ")
    await peer.send(frame(TEXT, codec.JSON.encode(auth(user_id, scene.people.tokens[user_id]))))
    while b'"sync_complete"' not in (await peer.receive())[1]:
        pass
    log = scene.house.log(scene.log_name).read_text()
    return sorted(set(statuses)), scene.address in log, FORGED in log


async def token_in_url(scene: Scene) -> tuple[int, bool, bool]:
    """(Status, is it said why, is the token in the log)."""
    secret = f"secret{scene.address}"
    received, _ = await scene.exchange(request_head(f"/v1/ws?access_token={secret}"), scene.port)
    return status_of(received), b"token_in_url" in received, secret in scene.house.log(scene.log_name).read_text()


def crowded(count: int) -> Play:
    """So many WebSockets at once that say nothing: (status of all but the last, of the last, is it told how long)."""

    async def play(scene: Scene) -> tuple[set[int], int, bool]:
        heads = []
        for _ in range(count):
            peer = await scene.open_raw()
            await peer.send(request_head())
            heads.append(await peer.head())
        *others, last = (int(head.split()[1]) for head in heads)
        return set(others), last, b"retry-after: " in heads[-1].lower()

    return play


OURS: Final = "https://app.example.com"
PAGES: Final = ("/health/live", "/health/ready", "/metrics")
EVIL: Final = "https://evil.example"
ROWS: Final = [
    refusal("W-01", "another origin", 403, request_head(Origin=EVIL)),
    *(
        refusal("W-02", f"the origin {origin}", 403, request_head(Origin=origin))
        for origin in (
            "https://app.example.com.evil.com",
            "https://evilapp.example.com",
            "null",
            "http://app.example.com",
        )
    ),
    refusal("W-03", "no origin but a cookie", 403, request_head(Cookie="session=1")),
    Row("W-03", "no origin", 101, upgraded(request_head()), BOTH),
    Row(
        "W-03",
        "our origin and a cookie",
        101,
        upgraded(request_head(Origin=OURS, Cookie="a=b")),
        BOTH,
    ),
    Row("W-12", "a thousand connects that vanish", (True, True), vanishing, BOTH),
    Row("W-14", "permessage-deflate and 20 subprotocols", (True, False, False), offers, BOTH),
    Row("W-15", "X-Forwarded-For from anybody", ([101, 429], True, False), forged_address, BOTH),
    Row("W-16", "a token in the URL", (400, True, False), token_in_url, BOTH),
    Row("W-17", "51 new connections in a second", ({101}, 429, True), crowded(51), BOTH),
    Row("W-17", "201 that have not said who they are", ({101}, 429, True), crowded(201), (PATIENT,)),
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
    Row("W-09", "a head of 10 MB", (True, True), enormous, BOTH),
    refusal("W-09", "101 header lines", 431, lines("GET /v1/ws HTTP/1.1", *(f"X-{n}: a" for n in range(101)))),
    refusal("W-09", "a URL of 8 KiB and a byte", 414, request_head("/v1/ws?" + "a" * (8193 - 7))),
    Row("W-10", "a header byte every 50 ms", (0, True, 5.0), cut_off_after(request_head() * 10, 0.05), BOTH),
    Row("W-11", "nothing", (0, True, 5.0), cut_off_after(b"", 0.0), BOTH),
    refusal("W-13", "/ws/../admin", 404, request_head("/ws/../admin")),
    Row("W-13", "health and metrics", [200, 200, 200], health, BOTH),
    refusal("W-13", "/ws%00", 404, request_head("/ws%00")),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
