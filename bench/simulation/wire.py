"""`gateway.wire.Wire` on the Valkey twin: the gateway's slots and tombstones are the real ones, the socket is not.

One connection keeps its order in both directions. A lost request or reply breaks it, as a reset would.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import hiredis
import trio

from bench.simulation.keyspace import Refusal
from bench.simulation.network import OWNER
from bench.simulation.valkey import SERVER
from gateway.wire import Wire, WireLost

if TYPE_CHECKING:
    from bench.simulation.network import Network, Process
    from bench.simulation.valkey import Valkey


class TwinWire(Wire):
    """Made inside of a gateway's process, whose name its events carry."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._server = SERVER.get()
        self._net: Network = self._server.network
        self._owner: Process | None = OWNER.get()
        self._peer: _Connection | None = None
        self._ended = trio.Event()

    async def run(self) -> None:
        """See `Wire.run`."""
        delay = 0.05
        while True:
            await trio.sleep(self._net.delay())
            if self._server.down:
                self._lost_because = "connection refused"
                await trio.sleep(delay)
                delay = min(delay * 2, 2.0)
                continue
            delay = 0.05
            peer = self._peer = _Connection(self, self._server, self._owner)
            self._server.peers[peer] = None
            if self._owner is not None:
                self._owner.on_kill.append(peer.hang_up)
            self._ended = trio.Event()
            self.connected = True
            self.connects += 1
            if self._on_connected is not None:
                self._on_connected(self._server.info())
            self._up.set()
            try:
                await self._ended.wait()
            finally:
                peer.hang_up()
                self._fail_slots()

    def _fail_slots(self) -> None:
        """As `Wire._lose`, without a socket."""
        self.connected = False
        self._peer = None
        self._up = trio.Event()
        slots, self._slots = self._slots, type(self._slots)()
        for on_reply, context in slots:
            self.answered += 1
            if on_reply is not None:
                on_reply(context, WireLost(self._lost_because))

    def abort(self, reason: str) -> None:
        """See `Wire.abort`."""
        self._lost_because = reason
        self._ended.set()

    def _send(self, packed: bytes) -> None:
        if self._peer is not None:
            self._peer.send(packed)
            if self._server.stalled_until > self._net.now:
                self._net.at(self._deadline_seconds, self._owner, self._look_overdue, self._peer, self.posted)

    def _look_overdue(self, peer: _Connection, posted: int) -> None:
        if peer is self._peer and self.answered < posted:
            self.abort("no answer in time")

    def take(self, peer: _Connection, reply: Any) -> None:
        """The next reply has come."""
        if peer is not self._peer or not self._slots:
            return
        self.answered += 1
        on_reply, context = self._slots.popleft()
        if on_reply is not None:
            on_reply(context, hiredis.ReplyError(str(reply)) if isinstance(reply, Refusal) else reply)

    def take_push(self, peer: _Connection, channel: bytes, payload: bytes) -> None:
        """Something was published."""
        if peer is self._peer and self._on_push is not None:
            self._on_push([b"message", channel, payload])


class _Connection:
    """One connection, both sides of it. Implements `valkey.Peer`."""

    def __init__(self, wire: TwinWire, server: Valkey, owner: Process | None) -> None:
        self._wire = wire
        self._network = server.network
        self._owner = owner
        self._server = server
        self._sent_until = 0.0
        self._heard_until = 0.0
        self._silent_from = float("inf")
        """The client hung up: its last words arrive until then."""
        self._blocked = False
        self._packet: list[bytes] = []
        self._packed_at = -1.0
        """What was sent in this moment travels together."""
        self._behind: deque[bytes] = deque()
        """Commands behind one that waits."""
        self._telling: list[tuple[Any, Any]] = []
        self._told_at = -1.0
        self.open = True

    # --- the client's side -------------------------------------------------------------------------------------------

    def send(self, packed: bytes) -> None:
        """One command is on its way."""
        if not self.open:
            return
        network = self._network
        if self._packed_at == network.now:
            self._packet.append(packed)
            return
        self._packet, self._packed_at = [packed], network.now
        self._sent_until = max(self._sent_until, network.now + network.delay())
        network.at_time(self._sent_until, None, self._arrive, self._packet)

    def hang_up(self) -> None:
        """The client closes it; what is on its way may still arrive, what comes back is lost."""
        if self.open:
            self.open = False
            self._server.leave(self)
            self._silent_from = self._network.now + self._network.rng.random() * 0.004

    # --- the server's side -------------------------------------------------------------------------------------------

    def _arrive(self, packet: list[bytes]) -> None:
        if not self._is_gone():
            self._behind += packet
            self._go_on()

    def _go_on(self) -> None:
        """One command at a time, in order, also behind one that waits and while the server stands still."""
        while self._behind and not self._blocked and not self._is_gone():
            if self._server.stalled_until > self._network.now:
                self._network.at_time(self._server.stalled_until, None, self._go_on)
                return
            self._serve(self._behind.popleft())

    def _serve(self, packed: bytes) -> None:
        server = self._server
        name, *arguments = unpack(packed)
        chance = server.faults.lost
        if chance and self._network.rng.random() < chance:
            if self._network.rng.random() < 0.5:
                server.execute(_Deaf(), name, arguments)
            self._network.note("wire", self._wire.name, "lost", name.decode())
            self.broken()
            return
        self._blocked = name == b"XREAD"
        server.execute(self, name, arguments)

    def _is_gone(self) -> bool:
        if self._server.down or (self.open and self not in self._server.peers):
            return True
        return self._network.now > self._silent_from

    def answered(self, reply: Any) -> None:
        """See `Peer.answered`."""
        self._blocked = False
        self._back(self._wire.take, self, reply)
        self._go_on()

    def pushed(self, channel: bytes, payload: Any) -> None:
        """See `Peer.pushed`."""
        self._back(self._wire.take_push, self, channel, payload)

    def broken(self) -> None:
        """See `Peer.broken`."""
        self._server.leave(self)
        self._back(self._notice)

    def _notice(self) -> None:
        if self.open:
            self.open = False
            self._wire.abort("closed by Redis")

    def _back(self, call: Any, *arguments: Any) -> None:
        """What is said in one moment comes in one packet."""
        network = self._network
        if self._told_at == network.now:
            self._telling.append((call, arguments))
            return
        self._telling, self._told_at = [(call, arguments)], network.now
        self._heard_until = max(self._heard_until, network.now + network.delay())
        network.at_time(self._heard_until, self._owner, self._hear, self._telling)

    @staticmethod
    def _hear(packet: list[tuple[Any, Any]]) -> None:
        for call, arguments in packet:
            call(*arguments)


class _Deaf:
    """Whoever asked will never hear the answer. Implements `valkey.Peer`."""

    open = False

    def answered(self, reply: Any) -> None:
        pass

    def pushed(self, channel: bytes, payload: Any) -> None:
        pass

    def broken(self) -> None:
        pass


def unpack(packed: bytes) -> list[bytes]:
    """The words of one packed command."""
    at = packed.index(b"\r\n")
    words = []
    for _ in range(int(packed[1:at])):
        start = packed.index(b"\r\n", at + 2)
        size = int(packed[at + 3 : start])
        words.append(packed[start + 2 : start + 2 + size])
        at = start + 2 + size
    return words
