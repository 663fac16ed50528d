"""Both transports, for the tests that must hold for either."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.epoll import EpollServer
from gateway.trio_ws import TrioWebSocketServer

if TYPE_CHECKING:
    from tests.gateway.peers import NewServer


@pytest.fixture(params=[EpollServer, TrioWebSocketServer], ids=["epoll", "trio_ws"])
def new_server(request: pytest.FixtureRequest) -> NewServer:
    """The class of a transport."""
    server: NewServer = request.param
    return server
