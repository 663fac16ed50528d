"""A TCP proxy in front of Redis, to make it slow, silent or unreachable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from gateway.wire import Address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Proxy:
    """`delay_seconds` per chunk towards the client; `cut` drops every connection."""

    def __init__(self, target: Address) -> None:
        self.delay_seconds = 0.0
        self.silent = False
        """Swallow what Redis answers: it looks as if it had been stopped."""
        self.refusing = False
        self._target = target
        self._streams: set[trio.SocketStream] = set()
        self.port = 0

    @property
    def address(self) -> Address:
        """Where the proxy listens."""
        return Address("127.0.0.1", self.port, "", "", self._target.database)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        serve: Callable[..., Awaitable[object]] = trio.serve_listeners
        task_status.started()
        await serve(self._serve, listeners)

    def cut(self) -> None:
        """Drop every connection."""
        for stream in list(self._streams):
            stream.socket.close()

    async def _serve(self, client: trio.SocketStream) -> None:
        if self.refusing:
            await trio.aclose_forcefully(client)
            return
        server = await trio.open_tcp_stream(self._target.host, self._target.port)
        both = {client, server}
        self._streams |= both
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, client, server, False, nursery)
                nursery.start_soon(self._pump, server, client, True, nursery)
        finally:
            self._streams -= both
            for stream in both:
                stream.socket.close()  # not aclose: a cancelled one would leave the second open

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, answers: bool, nursery: trio.Nursery
    ) -> None:
        try:
            async for chunk in source:
                if answers:
                    await trio.sleep(self.delay_seconds)
                    if self.silent:
                        continue
                await sink.send_all(chunk)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        nursery.cancel_scope.cancel()
