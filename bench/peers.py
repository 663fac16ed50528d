"""Bare WebSocket echo servers to measure against: `python -m bench.peers trio-websocket|websockets|picows`.

Each runs alone in its own process, does nothing but echo, and prints `ready PORT` when it listens. Called by
`gateway_cost`; the configuration is what a careful user of each library would choose: no compression, no pings.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING

import anyio
import picows
import trio
import trio_websocket
import websockets
from websockets.asyncio.server import ServerConnection, serve

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = "127.0.0.1"
BACKLOG = 4096
"""Room for a thousand connections that arrive at once."""


def _listener() -> socket.socket:
    return socket.create_server((HOST, 0), backlog=BACKLOG)


def _ready(listener: socket.socket) -> None:
    sys.stdout.write(f"ready {listener.getsockname()[1]}\n")
    sys.stdout.flush()


# --- trio-websocket --------------------------------------------------------------------------------------------------


async def _echo_trio(request: trio_websocket.WebSocketRequest) -> None:
    connection = await request.accept()
    try:
        while True:
            await connection.send_message(await connection.get_message())
    except trio_websocket.ConnectionClosed:
        return


async def _serve_trio() -> None:
    listener = _listener()
    stream = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    server = trio_websocket.WebSocketServer(_echo_trio, [stream])
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        _ready(listener)


# --- websockets on asyncio with uvloop -------------------------------------------------------------------------------


async def _echo_websockets(connection: ServerConnection) -> None:
    try:
        while True:
            await connection.send(await connection.recv())
    except websockets.ConnectionClosed:
        return


async def _serve_websockets() -> None:
    listener = _listener()
    async with serve(_echo_websockets, sock=listener, compression=None, ping_interval=None) as server:
        _ready(listener)
        await server.serve_forever()


# --- picows on uvloop ------------------------------------------------------------------------------------------------


class _EchoPicows(picows.WSListener):
    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            transport.disconnect()
        else:
            transport.send(frame.msg_type, frame.get_payload_as_memoryview())


async def _serve_picows() -> None:
    listener = _listener()
    server = await picows.ws_create_server(lambda request: _EchoPicows(), sock=listener)
    _ready(listener)
    await server.serve_forever()


_run_uvloop = partial(anyio.run, backend_options={"use_uvloop": True})

PEERS: dict[str, Callable[[], object]] = {
    "trio-websocket": partial(trio.run, _serve_trio),
    "websockets": partial(_run_uvloop, _serve_websockets),
    "picows": partial(_run_uvloop, _serve_picows),
}
"""Name → what serves until the process is ended."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    with contextlib.suppress(KeyboardInterrupt):
        PEERS[parser.parse_args(arguments).peer]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
