"""A TCP relay in front of a server, so that a test can take the server away from one client alone."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.abc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Relay:
    """Passes bytes to `port` until `cut`; afterwards connections are closed as soon as they are made.

    They are still accepted: the driver leaves a socket behind when a refused connection is cancelled.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_cut = False
        self._connections: set[anyio.CancelScope] = set()
        self.port = 0

    def cut(self) -> None:
        self._is_cut = True
        for connection in self._connections:
            connection.cancel()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            self.port = listener.extra(anyio.abc.SocketAttribute.local_port)
            task_status.started()
            await listener.serve(self._pass)

    async def _pass(self, client: anyio.abc.SocketStream) -> None:
        async with client:
            if self._is_cut:
                return
            server = await anyio.connect_tcp("127.0.0.1", self._port)
            async with server, anyio.create_task_group() as group:
                self._connections.add(group.cancel_scope)
                group.start_soon(_copy, client, server, group.cancel_scope)
                group.start_soon(_copy, server, client, group.cancel_scope)
            self._connections.discard(group.cancel_scope)


async def _copy(source: anyio.abc.ByteReceiveStream, sink: anyio.abc.ByteSendStream, both: anyio.CancelScope) -> None:
    try:
        async for data in source:
            await sink.send(data)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass
    both.cancel()


@asynccontextmanager
async def open_relay(port: int) -> AsyncIterator[Relay]:
    relay = Relay(port)
    async with anyio.create_task_group() as group:
        await group.start(relay.run)
        yield relay
        group.cancel_scope.cancel()
