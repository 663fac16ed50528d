"""Where the clients of a draining gateway go: to the least loaded neighbour, one after the other, with a ticket each.

Called by `server.py` at the beginning of a drain. `Neighbours` is what is known of the other gateways, `Migration`
decides who is told when. It closes nothing: a client that does not go is served until the drain ends.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import structlog
import trio

from gateway.wire import WireError
from protocol import keys
from protocol.backlog import State
from protocol.records import MigrationTicket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gateway.connection import Connection
    from gateway.hub import Hub
    from protocol.records import InstanceInfo

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.5
"""Between two looks at the neighbours' leases and at who has come in meanwhile."""
_FIRST_LOOK_SECONDS: Final = 0.1
"""Before the first look, at most: gateways that are stopped together have said so in their leases by then."""
_STEP_SECONDS: Final = 0.02
_TOKEN_BYTES: Final = 32
_NEVER_MS: Final = 2**53
"""The greatest epoch time a ticket can say: an original token without a real end."""


class Neighbour(msgspec.Struct):
    """Another gateway. `sent`: how many of our clients were told to go there."""

    endpoint: str
    load: int
    first_load: int
    sent: int = 0

    @property
    def expected(self) -> int:
        """Its connections once ours have come; its lease follows within seconds."""
        return max(self.load, self.first_load + self.sent)


class Neighbours:
    """The other gateways that live and do not drain, as of the last look."""

    def __init__(self) -> None:
        self._known: dict[str, Neighbour] = {}
        self._present: list[Neighbour] = []

    def __bool__(self) -> bool:
        return bool(self._present)

    def look(self, leases: Mapping[str, InstanceInfo]) -> None:
        """What their leases say now; what was sent there is remembered."""
        for instance_id, info in leases.items():
            neighbour = self._known.get(instance_id)
            if neighbour is None:
                self._known[instance_id] = Neighbour(info.endpoint, info.load, info.load)
            else:
                neighbour.load = info.load
        self._present = [self._known[instance_id] for instance_id in leases]

    def least_loaded(self) -> Neighbour | None:
        """Where the next client should go."""
        return min(self._present, key=lambda neighbour: neighbour.expected, default=None)


class Tickets(Protocol):
    """What the broker does for a migration."""

    async def neighbours(self) -> dict[str, InstanceInfo]:
        """The other gateways that live and do not drain. Raises WireError."""

    def keep_ticket(self, session_token: str, ticket: MigrationTicket, kept: Callable[[bool], None]) -> None:
        """Store what a session token stands for; `kept(False)`, at once or later, where Redis did not take it."""


class Migration:
    """One drain's migration."""

    def __init__(self, hub: Hub, tickets: Tickets, wall_ms: Callable[[], int]) -> None:
        self.told = 0
        """Clients that got their `migration` frame."""
        self._hub = hub
        self._tickets = tickets
        self._wall_ms = wall_ms
        self._neighbours = Neighbours()
        self._handled: set[int] = set()
        """Connections that were told, or are about to be."""
        self._waiting: deque[Connection] = deque()

    async def run(self, seconds: float) -> None:
        """Tell everybody, evenly over `seconds`; returns earlier when nobody is left or there is nowhere to go.

        *Cancellation*: whoever was not told yet stays.
        """
        ends = trio.current_time() + seconds
        await trio.sleep(min(_FIRST_LOOK_SECONDS, seconds / 20))
        next_at = trio.current_time()
        look_at = next_at
        while (now := trio.current_time()) < ends and self._hub.users:
            self._hub.retire(now)
            if now >= look_at:
                look_at = now + _LOOK_SECONDS
                await self._look()
                if not self._neighbours and not self._hub.migrating:
                    return
            while self._waiting and self._neighbours and next_at <= now:
                next_at += max(0.0, ends - next_at) / len(self._waiting)
                self._tell(self._waiting.popleft(), now)
            if not self._waiting or not self._neighbours:
                next_at = now
            await trio.sleep(_STEP_SECONDS)

    async def see_off(self, seconds: float) -> None:
        """Serve those who were told where to go until they are there; returns earlier when nobody is left.

        *Cancellation*: safe anywhere.
        """
        ends = trio.current_time() + seconds
        while self._hub.migrating and (now := trio.current_time()) < ends:
            self._hub.retire(now)
            await trio.sleep(_STEP_SECONDS)

    async def _look(self) -> None:
        """Who is there to go to, and who is there to go."""
        try:
            self._neighbours.look(await self._tickets.neighbours())
        except WireError as error:
            _log.warning("neighbours_unknown", reason=str(error))
        self._waiting = deque(self._untold())

    def _untold(self) -> Iterator[Connection]:
        for connections in self._hub.users.values():
            for connection in connections:
                session = connection.session
                if session.state is State.LIVE and session.connection not in self._handled:
                    yield connection

    def _tell(self, connection: Connection, now: float) -> None:
        """Have a ticket stored, then say where it is good. Atomic."""
        neighbour = self._neighbours.least_loaded()
        session = connection.session
        if neighbour is None or session.state is not State.LIVE:
            return
        session_token = keys.MIGRATION_PREFIX + os.urandom(_TOKEN_BYTES).hex()
        expires_ms = int(min(self._wall_ms() + (session.expires_at - now) * 1000, _NEVER_MS))
        ticket = MigrationTicket(session.user_id, session.device_id, expires_ms, session.issued_ms)
        self._handled.add(session.connection)
        neighbour.sent += 1

        def kept(is_kept: bool) -> None:
            if is_kept:
                self.told += 1
                self._hub.migrate(connection, neighbour.endpoint, session_token)
            else:
                self._handled.discard(session.connection)
                neighbour.sent -= 1

        self._tickets.keep_ticket(session_token, ticket, kept)
