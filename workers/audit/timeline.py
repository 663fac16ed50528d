"""What of a history is about no conversation: connections, faults, drains, revocations, presence. Pure.

The whole of it is known before the first conversation is judged. I15, I18 (of sessions) and I19 are judged here.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from workers.audit import history

if TYPE_CHECKING:
    from workers.audit.report import Findings

REVOKED_SECONDS: Final = 5.0
OFFLINE_SECONDS: Final = 20.0
RECOVERY_SECONDS: Final = 15.0
"""The longest that any fault may be felt after it (reliability.md section 6, F-M1)."""
MOVED_SHARE: Final = 0.99
_NEVER: Final = float("inf")


class Device:
    """One device's connections. Lists of times are ascending."""

    __slots__ = ("closes", "opens", "revoked", "synced", "syncs")

    def __init__(self) -> None:
        self.opens: list[tuple[int, float, float]] = []
        """(connection, asked to be let in at, let in at)."""
        self.closes: dict[int, float] = {}
        self.synced: list[tuple[float, float]] = []
        """(the connection was opened at, its backlog had come at)."""
        self.syncs: list[float] = []
        self.revoked: list[tuple[float, int]] = []
        """(at, connection of that moment)."""

    def open_since(self) -> float:
        """Since when it is connected, to the end; infinity where it is not."""
        if not self.opens or self.opens[-1][0] in self.closes:
            return _NEVER
        return self.opens[-1][2]

    def closed_at(self, conn: int) -> float:
        """When this connection ended, at the latest with the next one; infinity where it has not."""
        ended = self.closes.get(conn, _NEVER)
        return min([ended, *(let_in for other, _, let_in in self.opens if other > conn)])


class Timeline:
    """`take` every event of a history in order; then ask."""

    def __init__(self) -> None:
        self.devices: dict[tuple[str, str], Device] = {}
        self.last_fault = 0.0
        self.faults: list[tuple[float, float]] = []
        self.end = 0.0
        self.ended = False
        """Its last event says that the clients had listened to the end, with nothing left to say."""
        self.unread: list[history.Unread] = []
        self.samples: list[history.Sample] = []
        self.has_revocations = False
        self._tickets: dict[str, list[float]] = {}
        self._moves: list[history.Migrate] = []
        self._presence: dict[tuple[str, str, int, str], list[history.Presence]] = {}

    def device(self, user: str, dev: str) -> Device:
        """The connections of a device, made where it is new."""
        return self.devices.setdefault((user, dev), Device())

    def take(self, event: history.AnyEvent) -> None:
        """One more event; those of conversations only move the end."""
        self.end = max(self.end, event.t)
        self.ended = isinstance(event, history.End)
        match event:
            case history.Connect():
                self._on_connect(event)
            case history.Close():
                self.device(event.user, event.dev).closes[event.conn] = event.t
            case history.Synced():
                self._on_synced(event)
            case history.Sync():
                self.device(event.user, event.dev).syncs.append(event.t)
            case history.Revoked():
                self.has_revocations = True
                if not event.conv:
                    self._on_revoked(event)
            case history.Migrate():
                self._moves.append(event)
            case history.Presence():
                self._presence.setdefault((event.user, event.dev, event.conn, event.of), []).append(event)
            case history.Fault():
                self.faults.append((event.since or event.t, max(event.t, event.until)))
                self.last_fault = max(self.last_fault, event.t, event.until)
            case history.Sample():
                self.samples.append(event)
            case history.Unread():
                self.unread.append(event)
            case _:
                pass

    def _on_connect(self, event: history.Connect) -> None:
        device = self.device(event.user, event.dev)
        if event.ticket:
            self._tickets.setdefault(event.ticket, []).append(event.t)
        device.opens.append((event.conn, event.opened or event.t, event.t))

    def _on_synced(self, event: history.Synced) -> None:
        device = self.device(event.user, event.dev)
        opened = next((opened for conn, opened, _ in reversed(device.opens) if conn == event.conn), event.t)
        device.synced.append((opened, event.t))

    def _on_revoked(self, event: history.Revoked) -> None:
        names = [(event.user, event.dev)] if event.dev else [name for name in self.devices if name[0] == event.user]
        for name in names:
            device = self.device(*name)
            connection = device.opens[-1][0] if device.opens else 0
            device.revoked.append((event.t, connection))

    @property
    def has_moves(self) -> bool:
        return bool(self._moves or self._tickets)

    @property
    def has_presence(self) -> bool:
        return bool(self._presence)

    # --- questions ---------------------------------------------------------------------------------------------------

    def rewinds(self, event: history.ClientEvent) -> int:
        """How many `sync` this device had sent by then."""
        device = self.devices.get((event.user, event.dev))
        return 0 if device is None else bisect_right(device.syncs, event.t)

    def should_know(self, user: str, dev: str, since: float, seconds: float) -> bool:
        """Had this device, at the end, been connected without a fault for so long since then?"""
        device = self.devices.get((user, dev))
        if device is None:
            return False
        quiet = max(since, self.last_fault, device.open_since())
        return self.end - quiet >= seconds

    def is_disturbed(self, since: float, until: float) -> bool:
        """Was something broken then, or just mended?"""
        return any(low <= until and high + RECOVERY_SECONDS >= since for low, high in self.faults)

    def is_revoked(self, event: history.ClientEvent) -> bool:
        """Did this come to a session that had ended more than 5 s before?"""
        device = self.devices.get((event.user, event.dev))
        if device is None or not event.conn:
            return False
        return any(event.conn <= conn and event.t > at + REVOKED_SECONDS for at, conn in device.revoked)

    # --- the end -----------------------------------------------------------------------------------------------------

    def judge(self, findings: Findings) -> None:
        """I15, I19 and the bounds that were sampled."""
        for ticket, times in self._tickets.items():
            if len(times) > 1:
                findings.add("I15", "a session token let in more than once", ticket=ticket, at=times)
        self._judge_moves(findings)
        self._judge_presence(findings)
        for sample in self.samples:
            if sample.value > sample.limit:
                findings.add(
                    "I16", f"{sample.what} is over its bound", value=sample.value, limit=sample.limit, at=sample.t
                )

    def _judge_moves(self, findings: Findings) -> None:
        late = []
        for move in self._moves:
            device = self.device(move.user, move.dev)
            came = next((let_in for conn, _, let_in in device.opens if conn > move.conn and let_in >= move.t), _NEVER)
            # Who leaves by itself is not moved.
            left = device.closes.get(move.conn, _NEVER)
            if came > move.t + move.seconds and left > move.t + move.seconds:
                late.append(f"{move.user}/{move.dev}")
        if late and len(late) > len(self._moves) * (1 - MOVED_SHARE):
            findings.add(
                "I15", "a drain left clients behind", late=len(late), moved=len(self._moves) - len(late), first=late[:5]
            )

    def _judge_presence(self, findings: Findings) -> None:
        for (user, dev, conn, of), told in self._presence.items():
            device = self.device(user, dev)
            until = min(device.closed_at(conn), self.end)
            for event, then in zip(told, [*(later.t for later in told[1:]), until], strict=True):
                if not event.online:
                    continue
                for low, high in self._absences(of):
                    shown = min(then, high) - max(event.t, low)
                    if shown > OFFLINE_SECONDS:
                        findings.add(
                            "I19",
                            "shown online without a connection",
                            user=of,
                            to=user,
                            seconds=round(shown, 1),
                            since=low,
                        )

    def _absences(self, user: str) -> list[tuple[float, float]]:
        """When this user had no connection, as far as its devices are in the history at all."""
        spans = sorted(
            (let_in, device.closed_at(conn))
            for (name, _), device in self.devices.items()
            if name == user
            for conn, _, let_in in device.opens
        )
        if not spans:
            return []
        absences, until = [], spans[0][1]
        for low, high in spans[1:]:
            if low > until:
                absences.append((until, low))
            until = max(until, high)
        if until < _NEVER:
            absences.append((until, _NEVER))
        return absences
