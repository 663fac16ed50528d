"""Where a row is played: real gateways and REST, people to talk about, and connections from an address of its own.

Every scene has its own loopback address, since failures are counted per address and rows must not count against each
other.
"""

from __future__ import annotations

import contextlib
import socket
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import httpx2
import trio

from bench.phone import open_websocket
from bench.services import HOST
from protocol import codec
from tests.gateway.peers import TEXT, Peer, frame, request_head
from tests.system.crowd import Crowd, Talker, auth, crowd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from protocol.codec import FrameCodec
    from tests.system.house import House

_addresses = count(1)
HANDED_OUT: set[str] = set()
"""Every token of every scene of this run: none of them may be in a log when all is over."""

TELLTALES: Final = (b"Traceback", b'File "', b".py", b"pymongo", b"mongo", b"E11000", b"redis", b"hiredis", b"msgspec")
"""What no answer may hold: traces of the code and of the databases behind it."""


class Scene:
    """`people` makes users, tokens, conversations and phones; the rest are ways to speak to the system."""

    def __init__(self, house: House, people: Crowd, transport: str) -> None:
        self.house = house
        self.people = people
        self.transport = transport
        self.address = ""
        """Where this scene's connections come from."""
        self.move()
        self.indiscretions: list[str] = []
        """Answers that held something of `TELLTALES`."""
        self._peers: list[Peer] = []

    def move(self) -> None:
        """Come from another address from now on."""
        number = next(_addresses)
        self.address = f"127.1.{number // 250}.{number % 250 + 1}"

    @property
    def log_name(self) -> str:
        """What the log of this scene's gateway is called."""
        return "gateway-1" if self.transport == "epoll" else self.transport

    @property
    def url(self) -> str:
        """The WebSocket address of the gateway of this scene."""
        return self.house.urls[self.transport]

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    async def stream(self, port: int | None = None, *, receive_bytes: int = 0) -> trio.SocketStream:
        """A TCP connection to the gateway, or to another `port`, from this scene's address."""
        connection = trio.socket.socket()
        try:
            if receive_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            await connection.bind((self.address, 0))
            await connection.connect((HOST, port or self.port))
        except BaseException:
            connection.close()
            raise
        return trio.SocketStream(connection)

    async def open_raw(self, receive_bytes: int = 0) -> Peer:
        """A TCP connection to the gateway, nothing sent."""
        peer = Peer(await self.stream(receive_bytes=receive_bytes))
        self._peers.append(peer)
        return peer

    async def open(self, *, subprotocol: str | None = codec.SUBPROTOCOL_JSON, receive_bytes: int = 0) -> Peer:
        """A WebSocket that has said nothing yet, frame by frame."""
        peer = await self.open_raw(receive_bytes)
        await peer.send(request_head(subprotocol=subprotocol))
        head = await peer.head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        return peer

    async def enter(self, user_id: str = "", *, receive_bytes: int = 0) -> Peer:
        """A live session of this user, or of a new one, frame by frame; its `sync_complete` has come.

        `receive_bytes`: how much its kernel takes before anybody reads.
        """
        name = user_id or await self.people.user()
        peer = await self.open(receive_bytes=receive_bytes)
        await peer.send(frame(TEXT, codec.JSON.encode(auth(name, self.people.tokens[name]))))
        while b'"sync_complete"' not in (await peer.receive())[1]:
            pass
        return peer

    @asynccontextmanager
    async def talk(self, frame_codec: FrameCodec = codec.JSON, transport: str | None = None) -> AsyncIterator[Talker]:
        """A WebSocket that has said nothing yet, message by message."""
        url = self.house.urls[transport or self.transport]
        stream = await self.stream(int(url.split(":")[2].split("/")[0]))
        async with stream, trio.open_nursery() as nursery:
            with trio.fail_after(10):
                websocket = await open_websocket(nursery, stream, url, frame_codec.subprotocol)
            yield Talker(websocket, frame_codec)
            with trio.move_on_after(3):
                await websocket.aclose()
            nursery.cancel_scope.cancel()

    async def ask(
        self, method: str, path: str, token: str = "", body: Any = None, headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        """One request to the HTTP API. `body`: bytes as they are, anything else as JSON."""
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        content: dict[str, Any] = (
            {"content": body} if isinstance(body, bytes) else {} if body is None else {"json": body}
        )
        transport = httpx2.AsyncHTTPTransport(local_address=self.address)
        async with httpx2.AsyncClient(transport=transport, base_url=self.house.rest_url, timeout=20) as client:
            answer = await client.request(method, path, headers=sent, **content)
        self.saw(answer.content)
        return answer

    async def metric(self, name: str) -> int:
        """A figure of this scene's gateway, as it shows it itself."""
        received, _ = await self.exchange(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", self.port, judged=False)
        line = next(line for line in received.decode().splitlines() if line.startswith(f"{name} "))
        return int(float(line.split()[1]))

    async def exchange(
        self, data: bytes, port: int, pause_seconds: float = 0.0, *, judged: bool = True
    ) -> tuple[bytes, float]:
        """Raw bytes to a port: all that comes back until the server closes, and how many seconds that took.

        With a pause they go one by one.
        """
        began = trio.current_time()
        received = b""
        step = 1 if pause_seconds else len(data) or 1
        with trio.fail_after(20):
            async with await self.stream(port) as stream, trio.open_nursery() as nursery:

                async def write() -> None:
                    with contextlib.suppress(trio.BrokenResourceError):
                        for start in range(0, len(data), step):
                            await stream.send_all(data[start : start + step])
                            await trio.sleep(pause_seconds)

                nursery.start_soon(write)
                with contextlib.suppress(trio.BrokenResourceError):
                    while chunk := await stream.receive_some(65_536):
                        received += chunk
                nursery.cancel_scope.cancel()
        if judged:
            self.saw(received)
        return received, trio.current_time() - began

    def saw(self, answer: bytes | str) -> None:
        """Hold an answer against the rule that nothing of ours shows through."""
        data = answer.encode() if isinstance(answer, str) else answer
        self.indiscretions += [telltale.decode() for telltale in TELLTALES if telltale in data]

    def close(self) -> None:
        for peer in self._peers:
            peer.stream.socket.close()


@asynccontextmanager
async def open_scene(house: House, transport: str) -> AsyncIterator[Scene]:
    """One row's stage; everything opened on it is closed with it."""
    async with crowd(house, judged=False) as people:
        scene = Scene(house, people, transport)
        try:
            yield scene
        finally:
            HANDED_OUT.update(people.tokens.values())
            scene.close()
