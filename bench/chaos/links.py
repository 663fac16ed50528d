"""Links that can be made slow, cut or silent: TCP proxies on loopback, all in one process of their own.

`python -m bench.chaos.links NAME=PORT…` prints one JSON line with the port of every link, then takes one command per
line (`Weather` of a link) and answers each with a line. It ends with its standard input. Stands between gateways or
workers and Valkey, between everybody and the members of the replica set, and between some phones and the gateways.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from bench.services import HOST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CHUNK_BYTES: Final = 65536
CHUNKS_ON_THE_WAY: Final = 256
"""Per direction of one connection, while they are delayed; past it the sender's own buffers fill."""
RESET_STEP_SECONDS: Final = 0.25
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: on, 0 s. Closing then sends a reset, as a peer that has forgotten the connection would."""


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How a link is from now on. The default is a good one."""

    link: str
    delay_ms: float = 0.0
    """Each way."""
    jitter_ms: float = 0.0
    up: bool = True
    """Bytes from the client to the server pass. Where they do not, they wait, as TCP retransmits after a partition."""
    down: bool = True
    refuses: bool = False
    """Cut: all connections are reset, new ones too."""
    resets_per_second: float = 0.0
    """Chance per connection and second that it is reset."""
    port: int = 0
    """Where new connections lead from now on; 0: where they led."""
    only: str = ""
    """Applies only to connections that begin with bytes containing this (the driver's handshake names its program)."""


class Link:
    """One proxy: its weather and its connections."""

    def __init__(self, name: str, target: int) -> None:
        self.name = name
        self.weather = Weather(link=name)
        self.changed = trio.Event()
        self.wires: set[Wire] = set()
        self._target = target
        self._random = random.Random(name)

    async def serve(self, *, task_status: trio.TaskStatus[int]) -> None:
        """Until cancelled; reports its port."""
        listeners = await trio.open_tcp_listeners(0, host=HOST)
        serve: Callable[..., Awaitable[object]] = trio.serve_listeners
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reset_some)
            task_status.started(listeners[0].socket.getsockname()[1])
            await serve(self._serve, listeners)

    def set(self, weather: Weather) -> None:
        """Takes effect at once, also for the connections that are there."""
        self.weather = weather
        self._target = weather.port or self._target
        self.changed.set()
        self.changed = trio.Event()
        if weather.refuses:
            for wire in list(self.wires):
                wire.reset()

    async def _reset_some(self) -> None:
        while True:
            await trio.sleep(RESET_STEP_SECONDS)
            chance = self.weather.resets_per_second * RESET_STEP_SECONDS
            if chance:
                for wire in list(self.wires):
                    if self._random.random() < chance:
                        wire.reset()

    async def _serve(self, client: trio.SocketStream) -> None:
        if self.weather.refuses:
            _reset(client)
            return
        try:
            server = await trio.open_tcp_stream(HOST, self._target)
        except OSError:
            _reset(client)
            return
        wire = Wire(self, client, server, self._random)
        self.wires.add(wire)
        try:
            await wire.run()
        finally:
            self.wires.discard(wire)


class Wire:
    """One connection through a link."""

    def __init__(self, link: Link, client: trio.SocketStream, server: trio.SocketStream, rng: random.Random) -> None:
        self._link = link
        self._client = client
        self._server = server
        self._random = rng
        self._first = b""
        self._late = {True: 0, False: 0}
        """Chunks per direction (up?) that are delayed; nothing may overtake them."""
        self._scope = trio.CancelScope()

    def reset(self) -> None:
        """Both ends see a connection reset."""
        for stream in (self._client, self._server):
            if stream.socket.fileno() >= 0:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._scope.cancel()

    async def run(self) -> None:
        """Until either side ends it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for source, sink, is_up in (
                        (self._client, self._server, True),
                        (self._server, self._client, False),
                    ):
                        send, receive = trio.open_memory_channel[tuple[float, bytes]](CHUNKS_ON_THE_WAY)
                        nursery.start_soon(self._read, source, sink, is_up, send)
                        nursery.start_soon(self._write, sink, is_up, receive)
        finally:
            for stream in (self._client, self._server):
                stream.socket.close()  # not aclose: a cancelled one would leave the second open

    def _weather(self) -> Weather | None:
        """None: it is good, for this connection."""
        weather = self._link.weather
        if weather.only and weather.only.encode() not in self._first:
            return None
        return weather

    async def _read(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        is_up: bool,
        late: trio.MemorySendChannel[tuple[float, bytes]],
    ) -> None:
        try:
            while chunk := await source.receive_some(CHUNK_BYTES):
                if is_up and not self._first:
                    self._first = chunk
                weather = self._weather()
                delay = 0.0
                if weather is not None:
                    await self._pass(is_up)
                    delay = (weather.delay_ms + self._random.uniform(-1, 1) * weather.jitter_ms) / 1000
                if delay > 0 or self._late[is_up]:
                    self._late[is_up] += 1
                    await late.send((trio.current_time() + delay, chunk))
                else:
                    await sink.send_all(chunk)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await late.aclose()

    async def _write(
        self, sink: trio.SocketStream, is_up: bool, late: trio.MemoryReceiveChannel[tuple[float, bytes]]
    ) -> None:
        """What was delayed, in order; then the end."""
        try:
            async for due, chunk in late:
                await trio.sleep_until(due)
                await self._pass(is_up)
                await sink.send_all(chunk)
                self._late[is_up] -= 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await self._pass(is_up)
        self._scope.cancel()

    async def _pass(self, is_up: bool) -> None:
        """Wait while this direction is closed."""
        while (weather := self._weather()) is not None and not (weather.up if is_up else weather.down):
            await self._link.changed.wait()


def _reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    stream.socket.close()


async def main(arguments: list[str]) -> None:
    """Serve until the input ends."""
    links = [Link(name, int(port)) for name, port in (argument.split("=") for argument in arguments)]
    decode = msgspec.json.Decoder(Weather).decode
    async with trio.open_nursery() as nursery:
        ports = {link.name: await nursery.start(link.serve) for link in links}
        await _say(ports)
        by_name = {link.name: link for link in links}
        async for line in trio.wrap_file(sys.stdin):
            weather = decode(line.encode())
            by_name[weather.link].set(weather)
            await _say({"wires": len(by_name[weather.link].wires)})
        nursery.cancel_scope.cancel()


async def _say(answer: dict[str, int]) -> None:
    await trio.to_thread.run_sync(sys.stdout.write, msgspec.json.encode(answer).decode() + "\n")
    await trio.to_thread.run_sync(sys.stdout.flush)


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
