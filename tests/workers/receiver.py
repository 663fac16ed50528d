"""A webhook's other end, as well-behaved or as hostile as a test wants it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.abc
from anyio.streams.tls import TLSListener

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

HANG = b""
"""Read the request and say nothing."""


class Request(NamedTuple):
    """Header names are in small letters."""

    target: str
    headers: dict[str, str]
    body: bytes


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP answer; `_` in a header's name is `-`."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Receiver:
    """Answers with these bytes in turn, the last for ever; or with what `decide` says about a request."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers) or [answer(204)]
        self.decide: Callable[[Request], Awaitable[bytes]] | None = None
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, tls: ssl.SSLContext | None = None, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self.port)
        async with listener:
            self.port = listener.extra(anyio.abc.SocketAttribute.local_port)
            task_status.started()
            served: anyio.abc.Listener[anyio.abc.ByteStream] = listener
            await (served if tls is None else TLSListener(listener, tls)).serve(self._converse)

    async def _converse(self, client: anyio.abc.ByteStream) -> None:
        self.connections += 1
        async with client:
            try:
                await self._answer_all(client)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return

    async def _answer_all(self, client: anyio.abc.ByteStream) -> None:
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                data += await client.receive()
            head, _, data = data.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            size = int(headers.get("content-length", "0"))
            while len(data) < size:
                data += await client.receive()
            request = Request(first.split()[1], headers, data[:size])
            data = data[size:]
            self.requests.append(request)
            if self.decide is not None:
                said = await self.decide(request)
            else:
                said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if said == HANG:
                await anyio.sleep_forever()
            await client.send(said)
            if not said.startswith(b"HTTP/1.1 "):
                return


@asynccontextmanager
async def receiving(*answers: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver on a free port of the loopback interface."""
    receiver = Receiver(*answers)
    async with anyio.create_task_group() as group:
        await group.start(receiver.serve, tls)
        yield receiver
        group.cancel_scope.cancel()
