"""Both ends a transport talks to: a recording `Host` with its links above it, a raw WebSocket client below it."""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from websockets.speedups import apply_mask

from gateway.arrivals import TrustedProxies
from gateway.transport import NOBODY, Outgoing, Transport, TransportLimits, TransportServer

if TYPE_CHECKING:
    from protocol.codec import FrameCodec

TEXT: Final = 0x1
BINARY: Final = 0x2
CONTINUATION: Final = 0x0
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

NewServer = Callable[["RecordingHost", TransportLimits], TransportServer]


class Answer(msgspec.Struct, frozen=True):
    status: int
    content_type: str
    body: bytes


class RecordingLink:
    """Implements `transport.Link`: records every call, echoes where it is told to."""

    def __init__(self, transport: Transport, codec: FrameCodec, remote: str) -> None:
        self.transport = transport
        self.codec = codec
        self.remote = remote
        self.blocked = False
        self.echo = True
        self.raises: Exception | None = None
        self.received: list[bytes] = []
        self.heard_count = 0
        self.overflows = 0
        self.drains = 0
        self.losses = 0
        self.on_receive: Callable[[bytes], None] | None = None

    def heard(self, now: float) -> None:
        self.heard_count += 1

    def receive(self, payload: bytes | bytearray | memoryview, now: float) -> None:
        assert not self.blocked, "received while blocked"
        assert not self.losses, "received after lost"
        if self.raises is not None:
            raise self.raises
        self.received.append(bytes(payload))
        if self.on_receive is not None:
            self.on_receive(bytes(payload))
        if self.echo:
            self.transport.send_nowait(Outgoing(bytes(payload)))

    def overflowed(self) -> None:
        self.overflows += 1

    def drained(self, now: float) -> None:
        self.drains += 1

    def lost(self) -> None:
        self.losses += 1


class RecordingHost:
    """Implements `transport.Host`."""

    def __init__(self) -> None:
        self.links: list[RecordingLink] = []
        self.prepare: Callable[[RecordingLink], None] | None = None
        self.wait = 0.0
        """What `let_in` answers."""
        self.arrived: list[str] = []
        """Addresses that were let in and have neither connected nor given up."""

    def let_in(self, remote: str, now: float) -> float:
        if not self.wait:
            self.arrived.append(remote)
        return self.wait

    def gave_up(self, remote: str) -> None:
        self.arrived.remove(remote)

    def connected(self, transport: Transport, codec: FrameCodec, remote: str, now: float) -> RecordingLink:
        self.arrived.remove(remote)
        link = RecordingLink(transport, codec, remote)
        self.links.append(link)
        if self.prepare is not None:
            self.prepare(link)
        return link

    def answer_http(self, path: str) -> Answer | None:
        return Answer(200, "application/json", b'{"live":true}') if path == "/health/live" else None


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """One client frame."""
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit = 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        header = bytes((first, bit | size))
    elif size < 65536:
        header = bytes((first, bit | 126)) + struct.pack("!H", size)
    else:
        header = bytes((first, bit | 127)) + struct.pack("!Q", size)
    if not masked:
        return header + payload
    mask = os.urandom(4)
    return header + mask + apply_mask(payload, mask)


def request_head(path: str = "/v1/ws", *, subprotocol: str | None = "trireme.v1.json", **headers: str) -> bytes:
    """A correct handshake request; `headers` (underscores for dashes) replace or add, an empty value removes."""
    fields = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
    }
    if subprotocol is not None:
        fields["Sec-WebSocket-Protocol"] = subprotocol
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Peer:
    """A raw client: sends any bytes, reads server frames. Every read has a deadline of 8 s."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def _fill(self, size: int, seconds: float = 8) -> None:
        with trio.fail_after(seconds):
            while len(self.buffer) < size:
                data = await self.stream.receive_some(65536)
                if not data:
                    raise EOFError(bytes(self.buffer))
                self.buffer += data

    async def head(self) -> bytes:
        """The head of an HTTP response."""
        with trio.fail_after(8):
            while b"\r\n\r\n" not in self.buffer:
                await self._fill(len(self.buffer) + 1)
        end = self.buffer.index(b"\r\n\r\n") + 4
        head = bytes(self.buffer[:end])
        del self.buffer[:end]
        return head

    async def receive(self, seconds: float = 8) -> tuple[int, bytes]:
        """The next server frame: (opcode, payload)."""
        await self._fill(2, seconds)
        assert self.buffer[0] & 0x80, "server frames are whole"
        assert not self.buffer[1] & 0x80, "server frames are not masked"
        size, header = self.buffer[1], 2
        if size >= 126:
            header = 4 if size == 126 else 10
            await self._fill(header)
            size = int.from_bytes(self.buffer[2:header])
        await self._fill(header + size)
        opcode = self.buffer[0] & 15
        payload = bytes(self.buffer[header : header + size])
        del self.buffer[: header + size]
        return opcode, payload

    async def close_code(self, seconds: float = 8) -> int:
        """Skip to the server's Close; its code."""
        while True:
            opcode, payload = await self.receive(seconds)
            if opcode == CLOSE:
                return int.from_bytes(payload[:2])

    async def ended(self) -> bool:
        """True once the server has closed its side; bytes before that are skipped."""
        with trio.fail_after(8):
            try:
                while await self.stream.receive_some(65536):
                    pass
            except trio.BrokenResourceError:
                pass
        return True

    def reset(self) -> None:
        """End the connection with an RST."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()


class Gateway:
    """A transport server on loopback and what it told its host."""

    def __init__(self, server: TransportServer, host: RecordingHost, port: int) -> None:
        self.server = server
        self.host = host
        self.port = port
        self._peers: list[Peer] = []

    async def open_raw(self) -> Peer:
        """A TCP connection, nothing sent."""
        peer = Peer(await trio.open_tcp_stream("127.0.0.1", self.port))
        self._peers.append(peer)
        return peer

    def close_peers(self) -> None:
        """Whatever a test left open."""
        for peer in self._peers:
            peer.stream.socket.close()

    async def open(self, *, subprotocol: str | None = "trireme.v1.json") -> tuple[Peer, RecordingLink]:
        """A WebSocket and its link."""
        before = len(self.host.links)
        peer = await self.open_raw()
        await peer.send(request_head(subprotocol=subprotocol))
        head = await peer.head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        await until(lambda: len(self.host.links) > before)
        return peer, self.host.links[before]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something another task does; 5 s at most."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - what is waited for is a plain attribute
            await trio.sleep(0.005)


@asynccontextmanager
async def open_gateway(new_server: NewServer, **limits: object) -> AsyncIterator[Gateway]:
    """Serve on a free port, swept ten times a second so that short deadlines can be tested."""
    host = RecordingHost()
    proxies = limits.pop("proxies", NOBODY)
    assert isinstance(proxies, TrustedProxies)
    server = new_server(host, msgspec.structs.replace(msgspec.convert(limits, TransportLimits), proxies=proxies))

    async def sweep() -> None:
        while True:
            await trio.sleep(0.1)
            server.sweep(trio.current_time())

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            nursery.start_soon(sweep)
            gateway = Gateway(server, host, listener.getsockname()[1])
            try:
                yield gateway
            finally:
                gateway.close_peers()
            nursery.cancel_scope.cancel()
