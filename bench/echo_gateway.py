"""The gateway's own transport with a host that echoes: `python -m bench.echo_gateway epoll|trio-websocket text|binary`.

What the Autobahn cases are played against (`autobahn`): the very transport class of production, framing, limits and
closes included, under a host that sends every message back. A connection of ours speaks either text or binary, so there
is a server for each kind. Prints `ready PORT` when it listens.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from bench.services import HOST
from gateway.server import open_transport
from gateway.timers import Job, TimerRole, TimerWheel
from gateway.tls import load_context
from gateway.transport import Outgoing, Transport, TransportLimits, framed
from protocol.codec import SUBPROTOCOL_JSON, SUBPROTOCOL_MSGPACK

if TYPE_CHECKING:
    import ssl

    from gateway.transport import HttpAnswer
    from protocol.codec import FrameCodec

SUBPROTOCOLS: Final = {"text": SUBPROTOCOL_JSON, "binary": SUBPROTOCOL_MSGPACK}
_SUITE_BYTES: Final = 16 * 1024 * 1024
LIMITS: Final = {
    "production": TransportLimits(),
    "suite": TransportLimits(
        max_message_bytes=_SUITE_BYTES,
        max_fragments=1_000_000,
        outbox_bytes=2 * _SUITE_BYTES,
        outbox_frames=10_000,
    ),
}
"""`suite`: room for the longest message of the Autobahn cases, 16 MiB, in as many fragments as they like."""


class Echoed(Outgoing):
    """A message that goes back as it came."""

    def payload(self, codec: FrameCodec) -> bytes:
        return self.json

    def framed(self, codec: FrameCodec) -> bytes:
        return framed(codec, self.json)


class EchoLink:
    """Implements `transport.Link`."""

    blocked = False

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def heard(self, now: float) -> None: ...

    def receive(self, payload: bytes | bytearray | memoryview, now: float) -> None:
        self._transport.send_nowait(Echoed(bytes(payload)))

    def overflowed(self) -> None: ...

    def drained(self, now: float) -> None: ...

    def lost(self) -> None: ...


class EchoHost:
    """Implements `transport.Host`: everybody may come in, as often as they like."""

    def let_in(self, remote: str, now: float) -> float:
        return 0.0

    def gave_up(self, remote: str) -> None: ...

    def connected(self, transport: Transport, codec: FrameCodec, remote: str, now: float) -> EchoLink:
        return EchoLink(transport)

    def answer_http(self, path: str) -> HttpAnswer | None:
        return None


async def serve(kind: str, limits: TransportLimits, tls: ssl.SSLContext | None) -> None:
    """Until cancelled, with the timer role that ends what is past its deadline."""
    server = open_transport(kind, EchoHost(), limits, tls)
    timers = TimerRole(TimerWheel(), [Job("transport_sweep", server.sweep)])
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            nursery.start_soon(timers.run)
            sys.stdout.write(f"ready {listener.getsockname()[1]}\n")
            sys.stdout.flush()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.echo_gateway", description=__doc__)
    parser.add_argument("transport", choices=("epoll", "trio-websocket"))
    parser.add_argument("kind", choices=SUBPROTOCOLS)
    parser.add_argument("limits", choices=LIMITS)
    parser.add_argument("--tls", nargs=2, metavar="FILE", help="certificate chain and key")
    args = parser.parse_args(arguments)
    limits = msgspec.structs.replace(LIMITS[args.limits], unasked_subprotocol=SUBPROTOCOLS[args.kind])
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(serve, args.transport, limits, load_context(*args.tls) if args.tls else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
