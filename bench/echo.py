"""The load driver's echo mode: each connection keeps one message in flight against a bare echo server (`peers`).

Called by `driver`. The same process, event loop and WebSocket library load Trireme's gateway, so the two compare.
"""

from __future__ import annotations

import time
from typing import Any

import anyio
import msgspec
import picows

CONNECTING_AT_ONCE = 64
READ_BUFFER_BYTES = 4096


class EchoConnect(msgspec.Struct, tag="echo_connect", tag_field="do"):
    """Open so many more connections."""

    url: str
    connections: int
    timeout_seconds: float = 60.0


class EchoRun(msgspec.Struct, tag="echo", tag_field="do"):
    """`messages` round trips of `payload_bytes`, over the first `connections` connections."""

    connections: int
    messages: int
    payload_bytes: int
    timeout_seconds: float


class EchoConnection(picows.WSListener):
    """Sends its message again whenever the echo comes."""

    def __init__(self, load: EchoLoad) -> None:
        super().__init__()
        self.transport: Any = None
        self._load = load

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport

    def send(self) -> None:
        self.transport.send(picows.WSMsgType.BINARY, self._load.payload)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        load = self._load
        if frame.payload_size != len(load.payload):
            load.wrong += 1
        load.to_come -= 1
        if load.to_send > 0:
            load.to_send -= 1
            transport.send(picows.WSMsgType.BINARY, load.payload)
        elif load.to_come == 0:
            load.over.set()


class EchoLoad:
    """All echo connections of this process."""

    def __init__(self) -> None:
        self.payload = b""
        self.to_send = self.to_come = self.wrong = 0
        self.over = anyio.Event()
        self._connections: list[EchoConnection] = []

    async def connect(self, command: EchoConnect) -> dict[str, Any]:
        """Answers when all are connected."""
        limiter = anyio.CapacityLimiter(CONNECTING_AT_ONCE)
        opened = [EchoConnection(self) for _ in range(command.connections)]

        async def open_one(connection: EchoConnection) -> None:
            async with limiter:
                await picows.ws_connect(lambda: connection, command.url, read_buffer_init_size=READ_BUFFER_BYTES)

        with anyio.fail_after(command.timeout_seconds):
            async with anyio.create_task_group() as tasks:
                for connection in opened:
                    tasks.start_soon(open_one, connection)
        self._connections += opened
        return {"connected": len(self._connections)}

    async def run(self, command: EchoRun) -> dict[str, Any]:
        """Answers when the last echo has come, or at the deadline with what is missing."""
        chosen = self._connections[: command.connections]
        self.payload = bytes(command.payload_bytes)
        self.to_come = command.messages
        self.to_send = command.messages - len(chosen)
        self.wrong = 0
        self.over = anyio.Event()
        began = time.perf_counter()
        for connection in chosen:
            connection.send()
        with anyio.move_on_after(command.timeout_seconds):
            await self.over.wait()
        return {"seconds": time.perf_counter() - began, "missing": self.to_come, "wrong": self.wrong}

    def close(self) -> None:
        for connection in self._connections:
            connection.transport.disconnect(False)
