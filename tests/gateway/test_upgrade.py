"""The HTTP side of the port, over both transports: who gets a WebSocket, what others are told, how long it may take."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import pytest
import trio
import trio_websocket

from gateway.arrivals import TrustedProxies
from tests.gateway.peers import TEXT, frame, open_gateway, request_head, until

if TYPE_CHECKING:
    from tests.gateway.peers import NewServer

pytestmark = pytest.mark.trio


def _raw(*lines: str) -> bytes:
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


REQUESTS = {
    "health": (_raw("GET /health/live HTTP/1.1", "Host: a"), 200),
    "health with a query": (_raw("GET /health/live?probe=1 HTTP/1.1", "Host: a"), 200),
    "unknown path": (_raw("GET /nothing HTTP/1.1", "Host: a"), 404),
    "upgrade on another path": (request_head("/ws/../admin"), 404),
    "percent zero": (request_head("/ws%00"), 404),
    "no upgrade on the WebSocket path": (_raw("GET /v1/ws HTTP/1.1", "Host: a"), 426),
    "version 8": (request_head(Sec_WebSocket_Version="8"), 426),
    "no version": (request_head(Sec_WebSocket_Version=""), 426),
    "no key": (request_head(Sec_WebSocket_Key=""), 400),
    "key of 3 bytes": (request_head(Sec_WebSocket_Key="YWJj"), 400),
    "POST": (request_head().replace(b"GET", b"POST", 1), 405),
    "HTTP/1.0": (request_head().replace(b"HTTP/1.1", b"HTTP/1.0", 1), 400),
    "a body": (request_head(Content_Length="10") + b"0123456789", 400),
    "two lengths": (request_head(Content_Length="3\r\nContent-Length: 4") + b"abcd", 400),
    "chunked": (request_head(Transfer_Encoding="chunked") + b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n", 400),
    "xchunked": (request_head(Transfer_Encoding="xchunked"), 400),
    "bare LF": (request_head().replace(b"\r\n", b"\n"), 400),
    "no HTTP at all": (b"\x16\x03\x01\x02\x00\x01", 400),
    "one word": (b"HELLO\r\n\r\n", 400),
    "header without a colon": (_raw("GET /v1/ws HTTP/1.1", "nonsense"), 400),
    "a header line over 8 KiB": (request_head(X_Long="a" * 9000), 431),
    "a head over 16 KiB": (_raw("GET /v1/ws HTTP/1.1", *(f"X-{n}: {'a' * 200}" for n in range(90))), 431),
    "101 header lines": (_raw("GET /v1/ws HTTP/1.1", *(f"X-{n}: a" for n in range(101))), 431),
    "a URL over 8 KiB": (request_head("/v1/ws?" + "a" * 8200), 414),
    "a token in the URL": (request_head("/v1/ws?access_token=secret"), 400),
    "a cookie without an origin": (request_head(Cookie="a=b"), 403),
    "another origin": (request_head(Origin="https://evil.example"), 403),
    "an origin that only looks alike": (request_head(Origin="https://app.example.com.evil.com"), 403),
    "the origin null": (request_head(Origin="null"), 403),
    "two origins": (request_head(Origin="https://app.example.com\r\nOrigin: https://evil.example"), 403),
    "our origin": (request_head(Origin="https://app.example.com", Cookie="a=b"), 101),
    "no origin": (request_head(), 101),
    "a token in the URL, disguised": (request_head("/v1/ws?%74oken=secret"), 400),
    "an unused query": (request_head("/v1/ws?client=3"), 101),
    "lower case": (request_head(Upgrade="WEBSOCKET", Connection="keep-alive, upgrade"), 101),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_each_request_gets_its_answer(new_server: NewServer, name: str) -> None:
    request, status = REQUESTS[name]
    origins = ["https://app.example.com"]
    async with open_gateway(new_server, origins=origins, close_seconds=0.3) as gateway:
        peer = await gateway.open_raw()
        await peer.send(request)
        head = await peer.head()
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        assert b"secret" not in head
        if status != 101:
            assert await peer.ended()
            await peer.stream.aclose()
            await until(lambda: gateway.server.connections == 0)
            assert gateway.host.links == []
            assert gateway.server.handshakes_refused == (status != 200)
        if status == 426 and "version" in name:
            assert b"sec-websocket-version: 13" in head.lower()


async def test_w16_a_token_in_the_url_is_named_as_the_reason_and_written_nowhere(
    new_server: NewServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with open_gateway(new_server, close_seconds=0.3) as gateway:
            peer = await gateway.open_raw()
            await peer.send(request_head("/v1/ws?session_token=eyJsecret"))
            head = await peer.head()
            assert head.startswith(b"HTTP/1.1 400 ")
            body = bytes(peer.buffer) or await peer.stream.receive_some(1000)
            assert body == b"token_in_url\n"
    assert "eyJsecret" not in caplog.text
    assert "eyJsecret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("proxies", "forwarded", "remote"),
    [
        ("", "203.0.113.9", "127.0.0.1"),
        ("10.0.0.1", "203.0.113.9", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("127.0.0.0/8", "198.51.100.7, 203.0.113.9", "203.0.113.9"),
        ("127.0.0.0/8, 10.0.0.0/8", "198.51.100.7, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        ("127.0.0.1", "198.51.100.7\r\nX-Forwarded-For: 203.0.113.9:4711", "203.0.113.9"),
        ("127.0.0.1", "[2001:db8::9]:4711", "2001:db8::9"),
        ("127.0.0.1", "203.0.113.9, unknown", "127.0.0.1"),
        ("127.0.0.1, 10.0.0.0/8", "203.0.113.9, unknown, 10.1.2.3", "10.1.2.3"),
        ("127.0.0.1, 10.0.0.0/8", "10.1.1.1, 10.2.2.2", "10.1.1.1"),
        ("*", "198.51.100.7, 203.0.113.9", "198.51.100.7"),
    ],
)
async def test_w15_whom_a_request_comes_from_is_said_by_trusted_proxies_only(
    new_server: NewServer, proxies: str, forwarded: str, remote: str
) -> None:
    async with open_gateway(new_server, proxies=TrustedProxies(proxies)) as gateway:
        peer = await gateway.open_raw()
        await peer.send(request_head(X_Forwarded_For=forwarded))
        assert (await peer.head()).startswith(b"HTTP/1.1 101 ")
        await until(lambda: len(gateway.host.links) == 1)
        assert gateway.host.links[0].remote == remote


async def test_an_address_that_opens_too_many_is_told_when_to_come_again(new_server: NewServer) -> None:
    async with open_gateway(new_server, close_seconds=0.3) as gateway:
        gateway.host.wait = 0.4
        peer = await gateway.open_raw()
        await peer.send(request_head())
        head = await peer.head()
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nRetry-After: 1\r\n" in head
        assert await peer.ended()
        health = await gateway.open_raw()
        await health.send(_raw("GET /health/live HTTP/1.1", "Host: a"))
        assert (await health.head()).startswith(b"HTTP/1.1 200 ")
        assert gateway.server.handshakes_refused == 1
        assert gateway.host.links == []


async def test_whoever_was_let_in_is_counted_out_however_it_ends(new_server: NewServer) -> None:
    async with open_gateway(new_server, close_seconds=0.3) as gateway:
        for number in range(20):
            peer = await gateway.open_raw()
            await peer.send(request_head())
            if number % 2:
                await peer.head()
            peer.reset()
        await until(lambda: gateway.server.accepted == 20 and gateway.server.connections == 0)
        assert gateway.host.arrived == []


async def test_any_origin_may_connect_where_none_is_configured(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer = await gateway.open_raw()
        await peer.send(request_head(Origin="https://anyone.example"))
        assert (await peer.head()).startswith(b"HTTP/1.1 101 ")


async def test_the_health_answer_is_complete(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer = await gateway.open_raw()
        await peer.send(_raw("GET /health/live HTTP/1.1", "Host: a"))
        head = await peer.head()
        assert b"Content-Type: application/json\r\n" in head
        assert b"Content-Length: 13\r\n" in head
        await until(lambda: gateway.server.connections == 1)
        with trio.fail_after(5):
            body = bytes(peer.buffer)
            while data := await peer.stream.receive_some():
                body += data
        assert body == b'{"live":true}'


async def test_a_head_sent_byte_by_byte(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer = await gateway.open_raw()
        for byte in request_head():
            await peer.send(bytes((byte,)))
        assert (await peer.head()).startswith(b"HTTP/1.1 101 ")
        await peer.send(frame(TEXT, b"hello"))
        assert await peer.receive() == (TEXT, b"hello")


@pytest.mark.parametrize("sent", [b"", b"GET /v1/ws HTTP/1.1\r\nHost: a\r\n", request_head()[:-2]])
async def test_a_slow_handshake_is_cut_off(new_server: NewServer, sent: bytes) -> None:
    async with open_gateway(new_server, handshake_seconds=0.3) as gateway:
        served, _link = await gateway.open()
        peer = await gateway.open_raw()
        if sent:
            await peer.send(sent)
        assert await peer.ended()
        await until(lambda: gateway.server.connections == 1)
        assert gateway.server.handshakes_refused == 1
        await trio.sleep(0.4)
        await served.send(frame(TEXT, b"past the handshake"))
        assert await served.receive() == (TEXT, b"past the handshake")


async def test_a_drip_does_not_prolong_the_handshake(new_server: NewServer) -> None:
    async with open_gateway(new_server, handshake_seconds=0.5) as gateway:
        peer = await gateway.open_raw()
        began = trio.current_time()

        async def drip() -> None:
            for byte in request_head("/v1/ws?" + "a" * 2000):
                await peer.send(bytes((byte,)))
                await trio.sleep(0.02)

        with pytest.raises(trio.BrokenResourceError):
            await drip()
        assert trio.current_time() - began < 2
        await until(lambda: gateway.server.connections == 0)


async def test_a_handshake_of_10_mb_is_refused_early(new_server: NewServer) -> None:
    async with open_gateway(new_server, close_seconds=0.3) as gateway:
        peer = await gateway.open_raw()
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.send(b"GET /v1/ws HTTP/1.1\r\nX: " + b"a" * 10_000_000)
        await until(lambda: gateway.server.connections == 0)
        assert gateway.server.handshakes_refused == 1
        assert gateway.host.links == []


async def test_a_stock_client_talks_to_it(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        url = f"ws://127.0.0.1:{gateway.port}/v1/ws"
        async with trio_websocket.open_websocket_url(url, subprotocols=["trireme.v1.json"]) as websocket:
            assert websocket.subprotocol == "trireme.v1.json"
            for size in (0, 5, 300, 65536):
                await websocket.send_message("x" * size)
                assert await websocket.get_message() == "x" * size
            with trio.fail_after(2):
                await websocket.ping()
        await until(lambda: gateway.server.connections == 0)
        assert gateway.host.links[0].losses == 1
