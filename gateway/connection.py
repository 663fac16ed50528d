"""One client of the gateway: its session, its transport, and the commands that go from the one to the other.

The transport calls the `Link` methods, the timer role `expired`, the hub the rest. Nothing here awaits, so each call is
atomic. A transport is never called again after it said `lost` or was told to close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.transport import Outgoing
from protocol import commands
from protocol.codec import JSON
from protocol.errors import CloseCode, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.hub import Hub
    from gateway.registry import Attachment
    from gateway.transport import Transport
    from protocol import records
    from protocol.codec import FrameCodec
    from protocol.frames import AuthPayload
    from protocol.session import Session

_log = structlog.get_logger(__name__)


class Connection:
    """One client: its session, its transport, its place in the hub. Implements `transport.Link` and `timers.Timed`."""

    __slots__ = (
        "attachment",
        "close_code",
        "codec",
        "due",
        "hub",
        "opened_at",
        "redeeming",
        "remote",
        "session",
        "transport",
    )

    def __init__(self, hub: Hub, session: Session, transport: Transport, codec: FrameCodec, remote: str) -> None:
        self.hub = hub
        self.session = session
        self.transport: Transport | None = transport
        """None as soon as nothing may be written any more."""
        self.codec = codec
        self.remote = remote
        self.attachment: Attachment | None = None
        self.opened_at = session.heard_at
        self.close_code: CloseCode | None = None
        self.redeeming: AuthPayload | None = None
        """The session token of this frame is being looked up; nothing else is taken meanwhile."""
        self.due = 0

    # --- Link --------------------------------------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """See `Link.blocked`. At the end of a drain nothing new is taken, so that the windows run empty."""
        return self.session.blocked or self.hub.holding or self.redeeming is not None

    def heard(self, now: float) -> None:
        """See `Link.heard`."""
        self.session.heard_at = now

    def receive(self, payload: bytes | bytearray | memoryview, now: float) -> None:
        """See `Link.receive`."""
        session = self.session
        try:
            frame = self.codec.decode(payload)
        except RemoteProtocolError as error:
            self.run(session.receive_refused(error, now), now)
        else:
            self.run(session.receive(frame, now, self.hub.wall_ms()), now)
        if self.due > now + 3.0:
            deadline = session.deadline(now)
            if deadline < self.due - 2.0:
                self.hub.wheel.arm(self, deadline, now)

    def overflowed(self) -> None:
        """See `Link.overflowed`."""
        self.session.lagging = True

    def drained(self, now: float) -> None:
        """See `Link.drained`."""
        self.session.lagging = False
        self.run(self.session.pump(now, self.hub.wall_ms()), now)
        self.hub.presence.drained(self)

    def lost(self) -> None:
        """See `Link.lost`."""
        self.session.closed()
        self.leave()
        self.hub.forget(self)

    # --- Timed -------------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> None:
        """A deadline of the session may have passed."""
        try:
            was_blocked = self.blocked
            self.run(self.session.tick(now, self.hub.wall_ms()), now)
            if self.transport is not None:
                self.hub.wheel.arm(self, self.session.deadline(now), now)
                self._resume_after(was_blocked)
        except Exception:  # noqa: BLE001 -- boundary "connection": one bad connection must not disturb another
            self.isolate()

    # --- what the session asks ---------------------------------------------------------------------------------------

    def run(self, todo: Sequence[commands.Command], now: float) -> None:
        """Carry out commands, in order."""
        hub = self.hub
        for command in todo:
            if isinstance(command, commands.Publish):
                hub.publish(self, command.record, now)
            elif isinstance(command, commands.Signal):
                hub.broker.signal(command.record)
            elif isinstance(command, commands.Acknowledge):
                hub.broker.acknowledge(command.mark)
            elif isinstance(command, commands.Ask):
                hub.ask(self, command.query, now)
            elif isinstance(command, commands.Send):
                self.send(Outgoing(JSON.encode(command.frame)))
            elif isinstance(command, commands.SendEncoded):
                self.send(Outgoing(command.frame))
            elif isinstance(command, commands.Ping):
                if self.transport is not None:
                    self.transport.ping_nowait()
            elif isinstance(command, commands.Watch):
                hub.presence.watch(self, command.user_ids)
            elif isinstance(command, commands.Unwatch):
                hub.presence.unwatch(self, command.user_ids)
            elif isinstance(command, commands.Verify):
                hub.verify(self, command.payload, now)
            elif isinstance(command, commands.Attach):
                hub.attach(self)
            elif isinstance(command, commands.Close):
                self.close(command.code)

    def send(self, outgoing: Outgoing) -> None:
        """Write one frame, unless the connection is ending."""
        if self.transport is not None:
            self.transport.send_nowait(outgoing)

    def close(self, code: CloseCode) -> None:
        """Start the close; nothing is routed here any more."""
        transport = self.transport
        self.close_code = code
        self.leave()
        if transport is not None:
            transport.close_nowait(code)

    def leave(self) -> None:
        """Out of the hub's routing, once."""
        if self.transport is not None:
            self.transport = None
            self.hub.wheel.disarm(self)
            self.hub.remove(self)

    def isolate(self) -> None:
        """A bug showed on this connection: it ends, the others go on."""
        self.hub.counts.isolated_errors += 1
        _log.exception("connection_failed", connection=self.session.connection)
        self.session.closed()
        self.close(CloseCode.INTERNAL)

    def _resume_after(self, was_blocked: bool) -> None:
        if was_blocked and self.transport is not None and not self.blocked:
            self.transport.resume_nowait()

    # --- what workers answer -----------------------------------------------------------------------------------------

    def settle(self, item: records.Outcome) -> None:
        """A send was committed or refused."""
        was_blocked = self.blocked
        self.session.outcome(item.idempotency_key)
        self.send(Outgoing(item.frame))
        self._resume_after(was_blocked)

    def react(self, step: Callable[[float, int], list[commands.Command]], now: float, wall_ms: int) -> None:
        """Let the session take a step that may open its window."""
        was_blocked = self.blocked
        self.run(step(now, wall_ms), now)
        self._resume_after(was_blocked)
