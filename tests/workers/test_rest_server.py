"""What the HTTP server takes before a request is one: sizes, deadlines, connections; and what every answer carries."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from tests.workers.conftest import serving
from workers.rest import server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.abc import SocketStream

    from tests.workers.seeding import Rest
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio


@pytest.fixture
async def port(settings: Settings, store: Store, broker: Broker) -> AsyncIterator[int]:
    """Of an API that lets three connections in and waits 0.4 s for a head."""
    small = msgspec.structs.replace(settings, rest_connections=3, head_seconds=0.4)
    async with serving(small, store, broker, owner=False) as rest:
        await rest.client.aclose()
        await anyio.sleep(0.05)
        yield small.rest_port


async def connect(port: int) -> SocketStream:
    return await anyio.connect_tcp("127.0.0.1", port)


async def all_of(stream: SocketStream, seconds: float = 5.0) -> bytes:
    """What comes until the other side closes."""
    received = b""
    with anyio.fail_after(seconds):
        try:
            while True:
                received += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return received


@asynccontextmanager
async def speaking(port: int, data: bytes) -> AsyncIterator[SocketStream]:
    async with await connect(port) as stream:
        await stream.send(data)
        yield stream


def head(target: str = "/health/live", *lines: str) -> bytes:
    return "\r\n".join((f"GET {target} HTTP/1.1", "Host: x", *lines, "Connection: close", "", "")).encode()


async def status(port: int, data: bytes) -> int:
    async with speaking(port, data) as stream:
        answer = await all_of(stream)
    if answer:
        assert b"content-type: application/json" in answer.lower(), answer
    return int(answer.split(b" ")[1]) if answer else 0


async def test_a_head_has_a_size_a_number_of_lines_and_a_target_within_bounds(port: int) -> None:
    own = len("host") + len("x") + 4 + len("connection") + len("close") + 4
    room = server.MAX_HEAD_BYTES - own - len("x-a") - 4
    assert await status(port, head("/health/live", "X-A: " + "a" * room)) == 200
    assert await status(port, head("/health/live", "X-A: " + "a" * (room + 1))) == 431
    lines = [f"X-{number}: 1" for number in range(server.MAX_HEAD_LINES - 2)]
    assert await status(port, head("/health/live", *lines)) == 200
    assert await status(port, head("/health/live", *lines, "X-More: 1")) == 431
    query = "/health/live?a=" + "b" * (server.MAX_TARGET_BYTES - len("/health/live?a="))
    assert await status(port, head(query)) == 200
    assert await status(port, head(query + "b")) == 414


async def test_a_head_without_end_is_cut_off_by_its_size_not_by_its_deadline(port: int) -> None:
    async with await connect(port) as stream:
        began = anyio.current_time()
        with suppress(anyio.BrokenResourceError):
            await stream.send(b"GET / HTTP/1.1\r\nX-A: " + b"a" * 200_000)
        assert b" 431 " in await all_of(stream)
        assert anyio.current_time() - began < 0.3


async def test_who_connects_and_sends_nothing_or_slowly_is_answered_408_in_time(port: int) -> None:
    """Enough connections that said nothing kept everybody else out, for ever."""
    for data in (b"", b"GET /health/live HTTP/1.1\r\nX"):
        async with await connect(port) as stream:
            if data:
                await stream.send(data)
            began = anyio.current_time()
            assert b" 408 " in await all_of(stream)
            assert 0.2 < anyio.current_time() - began < 1.5


async def test_the_fourth_of_three_connections_is_told_to_come_back(port: int) -> None:
    streams = [await connect(port) for _ in range(3)]
    async with await connect(port) as one_more:
        answer = await all_of(one_more)
    assert b" 503 " in answer
    assert b"Retry-After: 1" in answer
    assert b'"overloaded"' in answer
    for stream in streams:
        await stream.aclose()
    await anyio.sleep(0.1)
    assert await status(port, head()) == 200


async def test_what_is_no_http_is_a_400_of_our_shape(port: int) -> None:
    assert await status(port, b"\0" * 100) == 400
    assert (
        await status(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n")
        == 400
    )


async def test_two_requests_on_one_connection_have_a_deadline_each(port: int) -> None:
    async with await connect(port) as stream:
        for _ in range(3):
            await anyio.sleep(0.25)
            await stream.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            with anyio.fail_after(2):
                assert b" 200 " in await stream.receive()


async def test_every_answer_says_that_it_is_data_and_has_a_name(rest: Rest) -> None:
    answers = [await rest.client.get(path) for path in ("/health/live", "/nowhere", "/v1/conversations")]
    for answer in answers:
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "strict-transport-security" not in answer.headers
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


async def test_behind_tls_browsers_are_told_to_stay_there(settings: Settings, store: Store, broker: Broker) -> None:
    public = msgspec.structs.replace(settings, rest_url="https://api.example.org")
    async with serving(public, store, broker, owner=False) as rest:
        assert "max-age=" in (await rest.client.get("/health/live")).headers["strict-transport-security"]


async def test_metrics_are_for_this_machine_and_the_administrator(rest: Rest) -> None:
    outside = {"X-Forwarded-For": "203.0.113.9"}
    _, token = await rest.user("Ann")
    nowhere = await rest.client.get("/nowhere", headers=outside)
    for bearer in ({}, {"Authorization": f"Bearer {token}"}):
        refused = await rest.client.get("/metrics", headers=outside | bearer)
        assert (refused.status_code, refused.content) == (404, nowhere.content)
    admin = {"Authorization": f"Bearer {rest.admin_token}"}
    assert (await rest.client.get("/metrics", headers=outside | admin)).status_code == 200
    assert "trireme_rest_connections 1.0" in (await rest.client.get("/metrics")).text
