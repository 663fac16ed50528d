"""One suite over both transports: messages, fragments, refusals, closes; real sockets on loopback."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from gateway.transport import Outgoing
from protocol.errors import CloseCode
from tests.gateway.peers import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    frame,
    open_gateway,
    request_head,
    until,
)

if TYPE_CHECKING:
    from tests.gateway.peers import NewServer

pytestmark = pytest.mark.trio
LIMIT = 65536


async def test_messages_of_every_size_come_back(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        for size in (0, 1, 2, 125, 126, 127, 200, 4096, 65535, LIMIT):
            payload = bytes(random.choices(b"abc\n ", k=size))
            await peer.send(frame(TEXT, payload))
            assert await peer.receive() == (TEXT, payload)
        assert link.remote == "127.0.0.1"
        assert link.heard_count >= 10
        assert gateway.server.frames_in == gateway.server.frames_out == 10
        assert gateway.server.bytes_in > 2 * LIMIT
        assert gateway.server.bytes_out > 2 * LIMIT


async def test_the_msgpack_subprotocol_speaks_binary(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open(subprotocol="trireme.v1.msgpack")
        link.echo = False
        await peer.send(frame(BINARY, b"\xff\x00\x81"))
        await until(lambda: link.received == [b"\xff\x00\x81"])
        link.transport.send_nowait(Outgoing(b'{"a":1}'))
        assert await peer.receive() == (BINARY, b"\x81\xa1a\x01")


@pytest.mark.parametrize("subprotocol", [None, "chat, soap"])
async def test_json_is_spoken_when_no_known_subprotocol_is_offered(
    new_server: NewServer, subprotocol: str | None
) -> None:
    async with open_gateway(new_server) as gateway:
        peer = await gateway.open_raw()
        await peer.send(request_head(subprotocol=subprotocol, Sec_WebSocket_Extensions="permessage-deflate"))
        head = await peer.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"sec-websocket-protocol" not in head.lower()
        assert b"extensions" not in head.lower()
        await peer.send(frame(TEXT, b"{}"))
        assert await peer.receive() == (TEXT, b"{}")


async def test_the_clients_first_known_subprotocol_is_chosen(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer = await gateway.open_raw()
        await peer.send(request_head(subprotocol="x, trireme.v1.msgpack, trireme.v1.json"))
        assert b"trireme.v1.msgpack" in await peer.head()


async def test_frames_sent_together_with_the_handshake_are_served(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer = await gateway.open_raw()
        await peer.send(request_head() + frame(TEXT, b"early") + frame(TEXT, b"bird"))
        await peer.head()
        assert await peer.receive() == (TEXT, b"early")
        assert await peer.receive() == (TEXT, b"bird")


async def test_a_message_sent_byte_by_byte(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        for payload in (b"", b"x", "é€".encode(), b"y" * 130):
            for byte in frame(TEXT, payload) + frame(PING, b"p"):
                await peer.send(bytes((byte,)))
            assert {await peer.receive(), await peer.receive()} == {(TEXT, payload), (PONG, b"p")}
        assert len(link.received) == 4


async def test_many_messages_in_one_segment_keep_their_order(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.echo = False
        wanted = [b"%d" % number * (number % 7) for number in range(2000)]
        await peer.send(b"".join(frame(TEXT, payload) for payload in wanted))
        await until(lambda: len(link.received) == 2000)
        assert link.received == wanted


async def test_fragments_are_joined_around_control_frames(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        euro = "€".encode()
        await peer.send(
            frame(TEXT, b"a" + euro[:1], fin=False)
            + frame(PING, b"in between")
            + frame(CONTINUATION, euro[1:2], fin=False)
            + frame(CONTINUATION, euro[2:] + b"z")
            + frame(TEXT, b"next")
        )
        assert await peer.receive() == (PONG, b"in between")
        assert await peer.receive() == (TEXT, b"a" + euro + b"z")
        assert await peer.receive() == (TEXT, b"next")
        assert link.received == [b"a" + euro + b"z", b"next"]


async def test_1024_fragments_pass_and_one_more_does_not(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, _link = await gateway.open()
        first, middle = frame(TEXT, b"a", fin=False), frame(CONTINUATION, b"b", fin=False)
        await peer.send(first + middle * 1022 + frame(CONTINUATION, b"c"))
        assert await peer.receive() == (TEXT, b"a" + b"b" * 1022 + b"c")
        await peer.send(first + middle * 1024)
        assert await peer.close_code() == 1009
        assert await peer.ended()


async def test_a_fragmented_message_may_be_exactly_at_the_limit_with_a_ping_inside(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        await peer.send(frame(TEXT, b"a" * LIMIT, fin=False) + frame(PING, b"p" * 125) + frame(CONTINUATION))
        assert await peer.receive() == (PONG, b"p" * 125)
        assert await peer.receive() == (TEXT, b"a" * LIMIT)
        await peer.send(frame(TEXT, b"a" * LIMIT, fin=False) + frame(CONTINUATION, b"b"))
        assert await peer.close_code() == 1009
        assert len(link.received) == 1


REFUSED = {
    "one byte over the limit": (frame(TEXT, b"a" * (LIMIT + 1)), 1009),
    "announces 2^62 bytes": (b"\x81\xff" + (1 << 62).to_bytes(8), 1009),
    "announces 2^63 bytes": (b"\x81\xff" + (1 << 63).to_bytes(8), 1002),
    "unmasked": (frame(TEXT, b"a", masked=False), 1002),
    "reserved bit": (frame(TEXT, b"abc", rsv=4), 1002),
    "reserved opcode 3": (frame(3, b"abc"), 1002),
    "reserved opcode 11": (frame(11, b"abc"), 1002),
    "fragmented ping": (frame(PING, b"a", fin=False), 1002),
    "ping of 126 bytes": (frame(PING, b"a" * 126), 1002),
    "continuation without start": (frame(CONTINUATION, b"a"), 1002),
    "data frame inside a fragmented message": (frame(TEXT, b"a" * 9, fin=False) + frame(TEXT, b"b" * 9), 1002),
    "invalid UTF-8": (frame(TEXT, b'{"a":"\xff"}'), 1007),
    "surrogate": (frame(TEXT, b"\xed\xa0\x80abcdef"), 1007),
    "overlong": (frame(TEXT, b"\xc0\xafabcdefg"), 1007),
    "UTF-8 cut at the end": (frame(TEXT, b"abcdefg\xe2\x82"), 1007),
    "invalid UTF-8 in a short message": (frame(TEXT, b"\xff"), 1007),
    "invalid UTF-8 in the second fragment": (
        frame(TEXT, b"\xe2", fin=False) + frame(CONTINUATION, b"\x28", fin=False) + frame(CONTINUATION, b"\xa1"),
        1007,
    ),
    "binary on a JSON connection": (frame(BINARY, b"abcdefgh"), 1003),
    "close code 1005": (frame(CLOSE, (1005).to_bytes(2)), 1002),
    "close code 999": (frame(CLOSE, (999).to_bytes(2)), 1002),
    "close of one byte": (frame(CLOSE, b"a"), 1002),
    "21 pings at once": (frame(PING) * 21, 1008),
    "21 pongs at once": (frame(PONG) * 21, 1008),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_with_its_close_code(new_server: NewServer, name: str) -> None:
    attack, code = REFUSED[name]
    async with open_gateway(new_server) as gateway:
        neighbour, _ = await gateway.open()
        peer, link = await gateway.open()
        await peer.send(attack)
        assert await peer.close_code() == code
        assert await peer.ended()
        await peer.stream.aclose()
        await until(lambda: gateway.server.connections == 1)
        assert link.losses == 1
        assert link.received == []
        await neighbour.send(frame(TEXT, b"still here"))
        assert await neighbour.receive() == (TEXT, b"still here")
        assert gateway.server.isolated_errors == 0


async def test_text_on_a_msgpack_connection_is_refused(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, _link = await gateway.open(subprotocol="trireme.v1.msgpack")
        await peer.send(frame(TEXT, b"{}" * 10))
        assert await peer.close_code() == 1003


async def test_oversize_is_refused_from_the_header_before_any_payload(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, _link = await gateway.open()
        await peer.send(frame(TEXT, b"a" * (LIMIT + 1))[:14])
        assert await peer.close_code() == 1009


async def test_messages_before_a_refused_frame_are_delivered(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        await peer.send(frame(TEXT, b"good one") + frame(TEXT, b"bad", rsv=1))
        assert await peer.close_code() == 1002
        assert link.received == [b"good one"]


@pytest.mark.parametrize("inside_message", [False, True])
async def test_a_close_is_echoed(new_server: NewServer, inside_message: bool) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        if inside_message:
            await peer.send(frame(TEXT, b"half", fin=False))
        await peer.send(frame(CLOSE, (1000).to_bytes(2) + b"done"))
        opcode, payload = await peer.receive()
        assert (opcode, payload[:2]) == (CLOSE, (1000).to_bytes(2))
        assert await peer.ended()
        await peer.stream.aclose()
        await until(lambda: link.losses == 1 and gateway.server.connections == 0)


async def test_a_peer_that_does_not_answer_our_close_is_cut_off(new_server: NewServer) -> None:
    async with open_gateway(new_server, close_seconds=0.2) as gateway:
        _peer, link = await gateway.open()
        link.transport.close_nowait(CloseCode.NORMAL)
        await until(lambda: link.losses == 1 and gateway.server.connections == 0)


async def test_a_server_ping_reaches_the_peer(new_server: NewServer) -> None:
    async with open_gateway(new_server) as gateway:
        peer, link = await gateway.open()
        link.transport.ping_nowait()
        opcode, payload = await peer.receive()
        assert opcode == PING
        heard = link.heard_count
        await peer.send(frame(PONG, payload))
        await until(lambda: link.heard_count > heard)
