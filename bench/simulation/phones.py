"""The clients: `bench.client.Client`, the careful app, on lines that break.

Driven by the network's events alone; it owns no task. What it does and sees goes into the run's journal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.client import Client, Habits, State
from bench.simulation.lines import LOST, Line
from protocol.codec import JSON
from protocol.errors import AuthErrorCode, CloseCode
from protocol.frames import Auth, AuthSuccess, Sync, SyncComplete
from workers.audit.history import Unread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.journal import Journal
    from bench.simulation.lines import TwinTransport
    from bench.simulation.network import Network
    from protocol.frames import ClientFrame

HABITS: Final = Habits(retry_seconds=2.0, ask_seconds=1.0)
"""A shorter patience than an app's, so that a run is shorter."""
OPEN_SECONDS: Final = 2.5
"""Without `auth_success` by then the phone dials elsewhere."""
PATIENCE_SECONDS: Final = 5.0
"""What was said so long ago on a line that answers nothing is said on another."""
_RETRIED: Final = frozenset((AuthErrorCode.DRAINING, AuthErrorCode.SERVER_BUSY, AuthErrorCode.RATE_LIMITED))


class Phone:
    """One device of one user. Implements `lines.Caller`."""

    def __init__(
        self,
        network: Network,
        user_id: str,
        device_id: str,
        token: str,
        record: Journal,
        doors: Callable[[], Sequence[TwinTransport]],
    ) -> None:
        """`doors`: where somebody answers now."""
        self.client = Client(user_id, device_id, token, record, HABITS)
        self.line: Line | None = None
        self.wanted = True
        self.counts: list[Unread] = []
        """The unread counts it was told."""
        self.complaint = ""
        """The server will not have this phone."""
        self._network = network
        self._doors = doors
        self._asked_at = 0.0
        self._tick_at = float("inf")
        self._waiting_since: float | None = None

    @property
    def online(self) -> bool:
        return self.client.state is State.LIVE

    # --- the line ----------------------------------------------------------------------------------------------------

    def dial(self) -> None:
        """Connect to any gateway that answers; where none does, soon again."""
        if not self.wanted or self.line is not None:
            return
        doors = self._doors()
        if not doors:
            self._dial_later()
            return
        network = self._network
        self.line = Line(doors[network.rng.randrange(len(doors))], self)
        network.note("phone", self.client.device_id, "dials")
        self._write(self.client.opened(network.now))
        network.at(OPEN_SECONDS, None, self._look_open, self.line)

    def _dial_later(self) -> None:
        self._network.at(0.05 + self._network.rng.random() * 0.6, None, self.dial)

    def _look_open(self, line: Line) -> None:
        if self.line is line and not self.online:
            self._leave()

    def switch_off(self) -> None:
        """The user closes the app."""
        self.wanted = False
        self._leave()

    def switch_on(self) -> None:
        """And opens it."""
        self.wanted = True
        self.dial()

    def _leave(self) -> None:
        if self.line is not None:
            self.line.hang_up()
            self.ended(self.line, LOST)

    def ended(self, line: Line, code: int) -> None:
        """See `Caller.ended`."""
        if line is not self.line:
            return
        self._network.note("phone", self.client.device_id, "lost its line", code)
        self.line = None
        self.client.closed(code, self._network.now)
        refusal = self.client.auth_error
        if (refusal is not None and refusal.error not in _RETRIED) or code in (
            CloseCode.PROTOCOL_ERROR,
            CloseCode.BAD_FRAME,
            CloseCode.INTERNAL,
        ):
            self.complaint = f"{self.client.device_id}: refused with {code} {refusal and refusal.error.value}"
        self._dial_later()

    def heard(self, line: Line, payload: bytes) -> None:
        """See `Caller.heard`."""
        if line is self.line:
            frame = JSON.decode_server(payload)
            self._network.note("phone", self.client.device_id, "<", payload.decode())
            if isinstance(frame, AuthSuccess | SyncComplete):
                self._note_count(frame.payload.unread_count)
            self._write(self.client.receive(frame, self._network.now, self._network.wall_ms()))

    def _note_count(self, value: int) -> None:
        client = self.client
        # As of when it was asked for: the backlog comes before the answer.
        at = self._asked_at
        self.counts.append(Unread(t=at, user=client.user_id, dev=client.device_id, conn=client.connection, value=value))

    def _write(self, frames: Sequence[ClientFrame]) -> None:
        for frame in frames:
            if isinstance(frame, Auth | Sync):
                self._asked_at = self._network.now
            payload = JSON.encode(frame)
            self._network.note("phone", self.client.device_id, ">", payload.decode())
            if self.line is not None:
                self.line.write(payload)
        due = self.client.deadline()
        if due < self._tick_at:
            self._tick_at = due
            self._network.at_time(max(due, self._network.now), None, self._tick, due)

    def _tick(self, planned: float) -> None:
        if planned != self._tick_at:
            return
        self._tick_at = float("inf")
        now = self._network.now
        self._notice_silence(now)
        self._write(self.client.tick(now, self._network.wall_ms()))

    def _notice_silence(self, now: float) -> None:
        """Nothing of what was said has an answer for long: this gateway may be a corpse."""
        if not any(pending.attempts > 1 for pending in self.client.pending.values()):
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > PATIENCE_SECONDS:
            self._waiting_since = None
            self._leave()

    # --- what its user does ------------------------------------------------------------------------------------------

    def say(self, conversation_id: str, content: str) -> None:
        """Send a message, now or when there is a line."""
        _, frames = self.client.send(conversation_id, content, now=self._network.now, wall_ms=self._network.wall_ms())
        self._write(frames)

    def read(self, conversation_id: str) -> None:
        """Look at what is there."""
        self._write(self.client.read(conversation_id, self._network.now, self._network.wall_ms()))

    def sync(self) -> None:
        """Ask for everything once more."""
        self._write(self.client.sync(self._network.now))
