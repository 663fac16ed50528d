"""TLS of the gateway's port, where it is ended in this process: the trio-websocket transport only.

Called by `settings.py` (is the certificate good?) and `trio_ws.py` (one `SecureStream` per connection). TLS 1.2 at
least; the rest is what Python's `ssl` thinks right for servers.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio.socket import SocketType


def load_context(certificate: str, key: str) -> ssl.SSLContext:
    """From two PEM files, the chain and its key. Raises ValueError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"no certificate chain with its key: {error.strerror or type(error).__name__}") from None
    return context


class SecureStream(trio.abc.HalfCloseableStream):
    """A TLS connection that can be half-closed as a plain one can.

    WebSocket says with a Close frame that it is over, so nobody waits for TLS to say it too: the end is that of TCP.
    """

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext) -> None:
        """The handshake is part of the first read. Its failure is a BrokenResourceError."""
        self.socket: SocketType = stream.socket
        self._stream = stream
        self._secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._secure.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._secure.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._secure.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._secure.aclose()
