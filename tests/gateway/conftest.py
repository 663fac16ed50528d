"""What the gateway's tests share: both transports where a test must hold for either, and a Redis behind a proxy."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from gateway.epoll import EpollServer
from gateway.trio_ws import TrioWebSocketServer
from gateway.wire import Address
from tests.gateway.proxy import Proxy

if TYPE_CHECKING:
    import trio

    from tests.gateway.peers import NewServer


@pytest.fixture(params=[EpollServer, TrioWebSocketServer], ids=["epoll", "trio_ws"])
def new_server(request: pytest.FixtureRequest) -> NewServer:
    """The class of a transport."""
    server: NewServer = request.param
    return server


@pytest.fixture
def address(redis_url: str) -> Address:
    """An empty Valkey."""
    return Address.parse(redis_url)


@pytest.fixture
async def proxy(address: Address, nursery: trio.Nursery) -> Proxy:
    """A proxy in front of it."""
    running = Proxy(address)
    await nursery.start(running.run)
    return running


@pytest.fixture
def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
