"""W-18: the port of a gateway that ends TLS itself."""

from __future__ import annotations

import ssl
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trustme

from bench.services import HOST, free_port, spawn, stop
from bench.stack import PROJECT
from protocol import codec
from protocol.errors import CloseCode
from tests.gateway.peers import CLOSE, TEXT, Peer, frame, request_head
from tests.hostile.rows import Row, by_row, judge
from tests.system.crowd import auth

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")]

AUTHORITY: Final = trustme.CA()
READY_SECONDS: Final = 30.0


class Secure:
    """A gateway process on the trio-websocket transport with a certificate of its own."""

    def __init__(self, scene: Scene, port: int) -> None:
        self.scene = scene
        self.port = port

    async def open(self, version: ssl.TLSVersion) -> trio.SSLStream[trio.SocketStream]:
        """A TLS connection of exactly this version. Raises BrokenResourceError."""
        context = ssl.create_default_context()
        AUTHORITY.configure_trust(context)
        context.minimum_version = context.maximum_version = version
        if version < ssl.TLSVersion.TLSv1_2:
            context.set_ciphers("ALL:@SECLEVEL=0")
        stream = await self.scene.stream(self.port)
        secure = trio.SSLStream(stream, context, server_hostname=HOST, https_compatible=True)
        try:
            await secure.do_handshake()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(secure)
            raise
        return secure


@asynccontextmanager
async def secure_gateway(scene: Scene, directory: Path) -> AsyncIterator[Secure]:
    issued = AUTHORITY.issue_cert(HOST)
    certificate, key = directory / "chain.pem", directory / "key.pem"
    issued.private_key_pem.write_to_path(str(key))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    port = free_port()
    own = {
        "TRIREME_GATEWAY_PORT": str(port),
        "TRIREME_GATEWAY_TRANSPORT": "trio-websocket",
        "TRIREME_TLS_CERTIFICATE": str(certificate),
        "TRIREME_TLS_KEY": str(key),
    }
    environment = {**scene.house.stack.environment, **own}
    process = spawn([sys.executable, "-m", "gateway"], scene.house.log("tls"), environment, PROJECT)
    try:
        secure = Secure(scene, port)
        with trio.fail_after(READY_SECONDS):
            while not await is_ready(secure):  # noqa: ASYNC110 - it happens in another process
                await trio.sleep(0.1)
        yield secure
    finally:
        stop(process, 5.0)


async def is_ready(secure: Secure) -> bool:
    try:
        async with await secure.open(ssl.TLSVersion.TLSv1_3) as stream:
            await stream.send_all(b"GET /health/ready HTTP/1.1\r\nHost: a\r\n\r\n")
            return b" 200 " in await stream.receive_some(1000)
    except (OSError, trio.BrokenResourceError):
        return False


async def plain(secure: Secure) -> str:
    """A WebSocket handshake without TLS."""
    received, seconds = await secure.scene.exchange(request_head(), secure.port)
    return "closed" if b"HTTP" not in received and seconds < 5 else repr(received)


def speaking(version: ssl.TLSVersion) -> Callable[[Secure], Awaitable[str]]:
    async def play(secure: Secure) -> str:
        try:
            stream = await secure.open(version)
        except trio.BrokenResourceError:
            return "refused"
        user_id = await secure.scene.people.user()
        async with stream:
            peer = Peer(stream)  # type: ignore[arg-type]  # all it needs of a stream is to send and to receive
            first = auth(user_id, secure.scene.people.tokens[user_id])
            await peer.send(request_head() + frame(TEXT, codec.JSON.encode(first)))
            assert (await peer.head()).startswith(b"HTTP/1.1 101 ")
            while b'"sync_complete"' not in (await peer.receive())[1]:
                pass
            await peer.send(frame(CLOSE, int(CloseCode.NORMAL).to_bytes(2)))
            with trio.fail_after(1):
                assert await peer.close_code() == CloseCode.NORMAL
                assert await peer.ended()
        return "served"

    return play


SENT: Final[dict[str, tuple[Callable[[Secure], Awaitable[str]], str]]] = {
    "plain WebSocket": (plain, "closed"),
    "TLS 1.1": (speaking(ssl.TLSVersion.TLSv1_1), "refused"),
    "TLS 1.2": (speaking(ssl.TLSVersion.TLSv1_2), "served"),
    "TLS 1.3": (speaking(ssl.TLSVersion.TLSv1_3), "served"),
}


async def all_sent(scene: Scene) -> dict[str, str]:
    """One gateway for all of them."""
    with tempfile.TemporaryDirectory(prefix="trireme-tls-") as directory:
        async with secure_gateway(scene, Path(directory)) as secure:
            return {sent: await play(secure) for sent, (play, _) in SENT.items()}


WANTED: Final = {sent: wanted for sent, (_, wanted) in SENT.items()}
ROWS: Final = [
    Row("W-18", "plain WebSocket and TLS 1.1 to 1.3", WANTED, all_sent, ("trio-websocket",)),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
