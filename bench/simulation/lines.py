"""The WebSockets between phones and gateways, without sockets: frames in order, each way with its delay, until one end
goes or the line is cut.

`TwinTransport` is what a gateway gets for its transport; a phone opens a `Line` to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from bench.simulation.network import OWNER
from gateway.transport import Buffered, TransportServer
from protocol.codec import JSON

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from bench.simulation.network import Network, Process
    from gateway.transport import Host, Link, Outgoing, TransportLimits
    from protocol.errors import CloseCode

LOST: Final = 1006
"""The close code of a line that ended without one."""

_REMOTE: Final = "10.0.0.1"


class Caller(Protocol):
    """The phone's side of a line."""

    def heard(self, line: Line, payload: bytes) -> None:
        """A frame has come."""

    def ended(self, line: Line, code: int) -> None:
        """The line is gone."""


class TwinTransport(TransportServer):
    """Implements `transport.TransportServer`: who dials gets a line."""

    def __init__(self, host: Host, limits: TransportLimits) -> None:
        super().__init__(host, limits)
        owner = OWNER.get()
        assert owner is not None, "a transport is made inside of its process"
        self.owner = owner
        self.lines: dict[Line, None] = {}
        self.accepting = False
        owner.on_kill.append(self._die)

    @property
    def connections(self) -> int:
        """See `TransportServer.connections`."""
        return len(self.lines)

    @property
    def buffered(self) -> Buffered:
        """See `TransportServer.buffered`: lines take everything."""
        return Buffered()

    async def serve(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See `TransportServer.serve`."""
        self.accepting = True
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self._die()

    def _die(self) -> None:
        self.accepting = False
        for line in list(self.lines):
            line.cut()

    def stop_accepting(self) -> None:
        """See `TransportServer.stop_accepting`."""
        self.accepting = False

    def sweep(self, now: float) -> None:
        """See `TransportServer.sweep`: no line is stuck here."""

    def close_all(self, code: CloseCode) -> None:
        """See `TransportServer.close_all`."""
        for line in list(self.lines):
            line.close_nowait(code)


class Line:
    """One WebSocket. The gateway's side implements `transport.Transport`."""

    def __init__(self, transport: TwinTransport, caller: Caller) -> None:
        self._network: Network = transport.owner.network
        self._transport = transport
        self._owner: Process = transport.owner
        self._caller = caller
        self._link: Link | None = None
        self._held: list[bytes] = []
        self._up_until = 0.0
        self._down_until = 0.0
        self.open = True
        """On the phone's side."""
        self._serving = False
        """On the gateway's side."""
        self._resuming = False
        self._to_gateway(self._accept)

    # --- the phone's side --------------------------------------------------------------------------------------------

    def write(self, payload: bytes) -> None:
        """Send a frame."""
        if self.open:
            self._to_gateway(self._arrive, payload)

    def hang_up(self) -> None:
        """The phone ends it; nothing more is heard there."""
        if self.open:
            self.open = False
            self._to_gateway(self._lose)

    def _to_gateway(self, call: Callable[..., None], *arguments: Any) -> None:
        network = self._network
        self._up_until = max(self._up_until, network.now + network.delay())
        network.at_time(self._up_until, self._owner, call, *arguments)

    # --- the gateway's side ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        host = self._transport.host
        if not self._transport.accepting or host.let_in(_REMOTE, self._network.now) > 0.0:
            self._to_phone(self._end, LOST)
            return
        self._serving = True
        self._transport.lines[self] = None
        self._link = host.connected(self, JSON, _REMOTE, self._network.now)

    def _arrive(self, payload: bytes) -> None:
        link = self._link
        if link is None or not self._serving:
            return
        link.heard(self._network.now)
        if link.blocked or self._held:
            self._held.append(payload)
        else:
            link.receive(payload, self._network.now)

    def _lose(self) -> None:
        """The socket is gone."""
        link, self._link = self._link, None
        self._serving = False
        self._transport.lines.pop(self, None)
        if link is not None:
            link.lost()

    def send_nowait(self, outgoing: Outgoing) -> None:
        """See `Transport.send_nowait`."""
        if self._serving:
            self._to_phone(self._hear, outgoing.payload(JSON))

    def ping_nowait(self) -> None:
        """See `Transport.ping_nowait`: the phone's library answers."""
        if self._serving:
            self._to_phone(self._pong)

    def close_nowait(self, code: CloseCode) -> None:
        """See `Transport.close_nowait`."""
        if self._serving:
            self._serving = False
            self._to_phone(self._end, int(code))
            self._network.at(self._network.delay(), self._owner, self._lose)

    def resume_nowait(self) -> None:
        """See `Transport.resume_nowait`."""
        if not self._resuming:
            self._resuming = True
            self._network.at(0.0, self._owner, self._resume)

    def _resume(self) -> None:
        self._resuming = False
        while self._held and self._link is not None and self._serving and not self._link.blocked:
            self._link.receive(self._held.pop(0), self._network.now)

    def _to_phone(self, call: Callable[..., None], *arguments: Any) -> None:
        network = self._network
        self._down_until = max(self._down_until, network.now + network.delay())
        network.at_time(self._down_until, None, call, *arguments)

    def _hear(self, payload: bytes) -> None:
        if self.open:
            self._caller.heard(self, payload)

    def _pong(self) -> None:
        if self.open:
            self._to_gateway(self._heard)

    def _heard(self) -> None:
        if self._link is not None and self._serving:
            self._link.heard(self._network.now)

    def _end(self, code: int) -> None:
        if self.open:
            self.open = False
            self._caller.ended(self, code)

    # --- what happens to it ------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """It breaks: what is on its way may be lost, and both sides notice sooner or later."""
        network = self._network
        self._serving = False
        network.at(network.rng.random() * 0.01, None, self._end, LOST)
        network.at(network.delay(), self._owner, self._lose)
