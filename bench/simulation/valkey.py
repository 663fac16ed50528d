"""The Valkey twin as a server: connections, blocking reads, pub/sub, tracking, and what can happen to it.

The gateways reach it through `wire.TwinWire`, the workers through `redis_client.TwinRedis`. It can be emptied,
restarted empty or with what it had a moment ago, refuse writes for want of memory, stand still, and lose a request or
its answer.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol

from bench.simulation.gaps import NotTwinned
from bench.simulation.keyspace import OK, Keyspace, Refusal
from bench.simulation.scripts import SCRIPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.simulation.network import Network

SERVER: ContextVar[Valkey] = ContextVar("valkey")
"""The one Valkey of this world."""
INVALIDATE: Final = b"__redis__:invalidate"
_BLOCKING: Final = frozenset((b"XREAD", b"XREADGROUP"))
_WRITES: Final = frozenset((b"XADD", b"SET", b"SADD", b"RPUSH", b"HSET", b"ZADD"))
OUT_OF_MEMORY: Final = "OOM command not allowed when used memory > 'maxmemory'."

Reply = Any
"""A value as RESP3 carries it, or a Refusal."""


class Peer(Protocol):
    """One client's connection, as the server sees it."""

    def answered(self, reply: Reply) -> None:
        """The reply to the oldest command without one has left the server."""

    def pushed(self, channel: bytes, payload: Any) -> None:
        """Something was published where this connection listens."""

    def broken(self) -> None:
        """The server's side of the connection is gone."""

    @property
    def open(self) -> bool:
        """Does the client still hold its side?"""


class _Blocked:
    """A read that waits for entries."""

    __slots__ = ("keys", "peer", "read")

    def __init__(self, peer: Peer, keys: frozenset[bytes], read: Callable[[], Any]) -> None:
        self.peer = peer
        self.keys = keys
        self.read = read


class Faults:
    """What may go wrong with single commands; all off until somebody turns it on."""

    def __init__(self) -> None:
        self.lost = 0.0
        """Part of the commands whose request or reply is lost, and the connection with it."""
        self.refused_down = 0.0
        """Part of the appends to down streams that are refused for want of memory: pushes and acks vanish."""
        self.refused = 0.0
        """Part of all writes that are refused so."""
        self.repeated = 0.0
        """Part of the ingest entries that come a second time, seconds later."""


class Valkey:
    """The server. `execute` carries out one command of a connection; what it answers may come later."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.keyspace = Keyspace(network.wall_ms, self._touched)
        self.keyspace.refusal = Refusal  # type: ignore[method-assign,assignment]  # the mixin's error is the keyspace's
        self.faults = Faults()
        self.down = False
        self.stalled_until = 0.0
        self.run_id = "run0"
        self.peers: dict[Peer, None] = {}
        self.listeners = 0
        """Connections that ever listened; their ids."""
        self._channels: dict[bytes, dict[Peer, None]] = {}
        self._trackers: dict[Peer, tuple[Peer, bytes]] = {}
        """Connection that tracks → (the one that is told, prefix of the keys)."""
        self._blocked: list[_Blocked] = []
        self._changed: set[bytes] = set()
        self._peer: Peer

    # --- what can happen to it ---------------------------------------------------------------------------------------

    def wipe(self) -> None:
        """FLUSHALL by somebody."""
        self.network.note("valkey", "wiped")
        changed = set(self.keyspace.values)
        self.keyspace.flush()
        for listener, _ in self._trackers.values():
            listener.pushed(INVALIDATE, None)
        self._wake(changed)
        self._changed.clear()

    def stop(self) -> None:
        """Down: connections break, nobody gets in."""
        self.network.note("valkey", "down")
        self.down = True
        peers, self.peers = self.peers, {}
        for peer in peers:
            peer.broken()
        self._channels.clear()
        self._trackers.clear()
        self._blocked.clear()

    def start(self, run_id: str, copy: tuple[dict[bytes, Any], dict[bytes, int]] | None) -> None:
        """Up again: empty, or with what it had when `copy` was made."""
        self.network.note("valkey", "up", "empty" if copy is None else "with a copy")
        self.run_id = run_id
        self.keyspace.flush()
        if copy is not None:
            self.keyspace.restore(copy)
        self._changed.clear()
        self.down = False

    # --- commands ----------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, str]:
        """INFO server and memory, as far as anybody looks."""
        return {"run_id": self.run_id, "maxmemory_policy": "noeviction"}

    def execute(self, peer: Peer, name: bytes, arguments: list[bytes]) -> None:
        """Carry out one command; `peer.answered` gets the reply, now or when there is something to read."""
        try:
            reply = self._execute(peer, name, arguments)
        except Refusal as refusal:
            reply = refusal
        if reply is not _LATER:
            peer.answered(reply)
        if self._changed:
            changed, self._changed = self._changed, set()
            self._tell_trackers(changed)
            self._wake(changed)

    def _execute(self, peer: Peer, name: bytes, arguments: list[bytes]) -> Any:
        if name in _BLOCKING:
            return self._read(peer, name, arguments)
        self._refuse_sometimes(name, arguments)
        match name:
            case b"EVAL":
                return self.evaluate(arguments[0], arguments[1:])
            case b"PUBLISH":
                return self._publish(arguments)
            case b"FLUSHALL":
                self.wipe()
                return OK
            case b"SUBSCRIBE":
                for channel in arguments:
                    self._channels.setdefault(channel, {})[peer] = None
                return _LATER
            case b"UNSUBSCRIBE":
                for channel in arguments:
                    self._channels.get(channel, {}).pop(peer, None)
                return _LATER
        reply = self.keyspace.execute(name, arguments)
        chance = self.faults.repeated
        if chance and name == b"XADD" and arguments[0].startswith(b"ingest:") and self.network.rng.random() < chance:
            self.network.at(self.network.rng.random() * 6.0, None, self._repeat, arguments)
        return reply

    def _refuse_sometimes(self, name: bytes, arguments: list[bytes]) -> None:
        faults = self.faults
        if name == b"XADD" and arguments[0].startswith(b"down:"):
            chance = faults.refused_down
        else:
            chance = faults.refused if name in _WRITES else 0.0
        if chance and self.network.rng.random() < chance:
            self.network.note("valkey", "refused", name.decode(), arguments[0].decode())
            raise Refusal(OUT_OF_MEMORY)

    def _repeat(self, arguments: list[bytes]) -> None:
        """An entry that somebody's network has kept, or sent twice."""
        if not self.down:
            self.network.note("valkey", "repeated", arguments[0].decode())
            self.keyspace.execute(b"XADD", arguments)
            self._wake({arguments[0]})
            self._changed.clear()

    def evaluate(self, script: bytes, rest: list[bytes]) -> Any:
        """EVAL: the twin of a script of ours."""
        count = int(rest[0])
        return SCRIPTS[script](self._call, rest[1 : 1 + count], rest[1 + count :])

    def _call(self, name: bytes, *arguments: bytes) -> Any:
        if name == b"PUBLISH":
            return self._publish(list(arguments))
        return self.keyspace.execute(name, list(arguments))

    # --- reads that wait ---------------------------------------------------------------------------------------------

    def _read(self, peer: Peer, name: bytes, arguments: list[bytes]) -> Any:
        count, block_ms, group, keeps = 2**31, -1, (b"", b""), True
        at = 0
        while arguments[at] != b"STREAMS":
            match arguments[at]:
                case b"COUNT":
                    count = int(arguments[at + 1])
                    at += 2
                case b"BLOCK":
                    block_ms = int(arguments[at + 1])
                    at += 2
                case b"GROUP":
                    group = (arguments[at + 1], arguments[at + 2])
                    at += 3
                case b"NOACK":
                    keeps = False
                    at += 1
                case _:
                    raise NotTwinned(f"{name!r} {arguments[at]!r}")
        names = arguments[at + 1 :]
        half = len(names) // 2
        streams = list(zip(names[:half], names[half:], strict=True))

        def read() -> Any:
            if name == b"XREAD":
                return self.keyspace.read(streams, count)
            return self.keyspace.read_group(*group, streams, count, keeps=keeps)

        found = read()
        if found is not None or block_ms < 0:
            return found
        blocked = _Blocked(peer, frozenset(names[:half]), read)
        self._blocked.append(blocked)
        self.network.at(block_ms / 1000, None, self._give_up, blocked)
        return _LATER

    def _give_up(self, blocked: _Blocked) -> None:
        if blocked in self._blocked:
            self._blocked.remove(blocked)
            blocked.peer.answered(None)

    def _wake(self, changed: Iterable[bytes]) -> None:
        changed = frozenset(changed)
        for blocked in [blocked for blocked in self._blocked if not changed.isdisjoint(blocked.keys)]:
            if not blocked.peer.open and self.network.rng.random() < 0.7:
                self._blocked.remove(blocked)
                continue  # the server has noticed that its client has gone
            try:
                found = blocked.read()
            except Refusal as refusal:
                found = refusal
            if found is not None:
                self._blocked.remove(blocked)
                blocked.peer.answered(found)

    def leave(self, peer: Peer) -> None:
        """The client has closed its connection."""
        self.peers.pop(peer, None)
        self._trackers.pop(peer, None)
        for listeners in self._channels.values():
            listeners.pop(peer, None)

    # --- channels ----------------------------------------------------------------------------------------------------

    def track(self, tracker: Peer, listener: Peer, prefix: bytes) -> None:
        """CLIENT TRACKING ON BCAST REDIRECT: `listener` hears of every key with this prefix that changes."""
        self._trackers[tracker] = (listener, prefix)

    def _touched(self, key: bytes) -> None:
        self._changed.add(key)

    def _tell_trackers(self, changed: Iterable[bytes]) -> None:
        for listener, prefix in self._trackers.values():
            keys = sorted(key for key in changed if key.startswith(prefix))
            if keys:
                listener.pushed(INVALIDATE, keys)

    def _publish(self, arguments: list[bytes]) -> int:
        channel, payload = arguments
        listeners = self._channels.get(channel, {})
        for peer in list(listeners):
            peer.pushed(channel, payload)
        return len(listeners)


_LATER: Final = object()
"""No reply yet, or none at all."""
