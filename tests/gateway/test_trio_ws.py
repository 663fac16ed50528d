"""What only the trio-websocket transport has: tasks that must end, pings that must not pile up."""

from __future__ import annotations

import pytest
import trio

from gateway.transport import Outgoing
from gateway.trio_ws import TrioWebSocketServer
from protocol.errors import CloseCode
from tests.gateway.peers import PING, PONG, TEXT, frame, open_gateway, until

pytestmark = pytest.mark.trio


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_every_ending_leaves_no_task() -> None:
    async with open_gateway(TrioWebSocketServer, close_seconds=0.3) as gateway:
        before = tasks()
        closed, closed_link = await gateway.open()
        reset, _ = await gateway.open()
        refused, _ = await gateway.open()
        silent, _ = await gateway.open()
        gone, _ = await gateway.open()
        closed_link.transport.ping_nowait()
        closed_link.transport.close_nowait(CloseCode.NORMAL)
        await closed.close_code()
        await closed.stream.aclose()
        reset.reset()
        await refused.send(frame(TEXT, b"abc", rsv=1))
        assert await refused.close_code() == 1002
        await refused.stream.aclose()
        gateway.host.links[3].transport.close_nowait(CloseCode.NORMAL)
        await gone.stream.aclose()
        await until(lambda: gateway.server.connections == 0 and tasks() == before)
        assert await silent.ended()


async def test_a_silent_peer_gets_one_ping_at_a_time() -> None:
    """The library keeps every ping until its pong comes."""
    async with open_gateway(TrioWebSocketServer) as gateway:
        peer, link = await gateway.open()
        for _ in range(10):
            link.transport.ping_nowait()
            await trio.lowlevel.checkpoint()
        link.transport.send_nowait(Outgoing(b"marker"))
        opcode, payload = await peer.receive()
        assert opcode == PING
        assert await peer.receive() == (TEXT, b"marker")
        await peer.send(frame(PONG, payload))
        await trio.sleep(0.05)
        link.transport.ping_nowait()
        assert (await peer.receive())[0] == PING


async def test_a_listener_stays_its_owners() -> None:
    async with open_gateway(TrioWebSocketServer) as gateway:
        gateway.server.stop_accepting()
        await trio.sleep(0.05)
        waiting = await gateway.open_raw()
        await waiting.send(b"the kernel still takes connections: the listener is open")
