"""What was confirmed, what was said about it, and where the marks stand: I9 and the told counts of I6. Pure; one
`Confirmed` per conversation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.audit.projection import unread_of

if TYPE_CHECKING:
    from workers.audit import history
    from workers.audit.logs import LogAudit
    from workers.audit.report import Findings

SETTLE_SECONDS = 2.0
"""A mark is taken in and flushed by then."""


class Confirmed:
    """The receipts of one conversation."""

    def __init__(self, conversation_id: str, findings: Findings) -> None:
        self._conversation_id = conversation_id
        self._findings = findings
        self._delivered: dict[str, int] = {}
        """User → greatest sequence that a device of theirs has confirmed, or that they sent or read."""
        self._read: dict[str, int] = {}
        self._devices: dict[tuple[str, str], int] = {}
        self._told: dict[tuple[str, str, int, str], tuple[int, int]] = {}
        """(author, device, connection, whose) → the (delivered, read) told there last."""
        self._claims: dict[str, tuple[int, int]] = {}
        """1:1: user → the greatest (delivered, read) anybody was told of them."""
        self._unread: dict[str, history.Unread] = {}
        """User → the last count told."""
        self.active_at = 0.0
        """When the last thing happened that changes a count."""

    def _add(self, statement: str, invariant: str = "I9", **evidence: object) -> None:
        self._findings.add(invariant, statement, self._conversation_id, **evidence)

    @staticmethod
    def _raise(marks: dict[str, int], user: str, sequence: int) -> None:
        marks[user] = max(sequence, marks.get(user, 0))

    def confirmed(self, event: history.Dack) -> None:
        self._active(event.t)
        self._raise(self._delivered, event.user, event.seq)
        name = (event.user, event.dev)
        self._devices[name] = max(event.seq, self._devices.get(name, 0))

    def read(self, event: history.Rack) -> None:
        self._active(event.t)
        self._raise(self._delivered, event.user, event.seq)
        self._raise(self._read, event.user, event.seq)
        name = (event.user, event.dev)
        self._devices[name] = max(event.seq, self._devices.get(name, 0))

    def sent(self, user: str, sequence: int, at: float) -> None:
        """An own message at this place: its sender has read everything up to there."""
        self._active(at)
        self._raise(self._delivered, user, sequence)
        self._raise(self._read, user, sequence)

    def _active(self, at: float) -> None:
        self.active_at = max(self.active_at, at)

    def told(self, event: history.Receipt) -> None:
        """A `receipt_update`. In a group the mark is of all members, and its bearer changes: one line of marks."""
        self._findings.counts["receipts"] += 1
        name = (event.user, event.dev, event.conn, "" if event.group else event.of)
        delivered, read = self._told.get(name, (0, 0))
        now = (event.delivered or delivered, event.read or read)
        if now[0] < delivered or now[1] < read:
            self._add("marks went back", to=event.user, of=event.of, before=(delivered, read), then=now)
        self._told[name] = (max(delivered, now[0]), max(read, now[1]))
        if not event.group:
            claimed = self._claims.get(event.of, (0, 0))
            self._claims[event.of] = (max(claimed[0], event.delivered), max(claimed[1], event.read))

    def counted(self, event: history.Unread) -> None:
        """An unread count of this conversation."""
        if event.value < 0:
            self._add("an unread count below nothing", "I6", user=event.user, value=event.value)
        self._unread[event.user] = event

    def finish(self, log: LogAudit) -> None:
        """Against the stored marks."""
        for user, member in log.members.items():
            if member.leave_seq is not None:
                continue
            delivered = max(self._delivered.get(user, 0), log.own.get(user, 0), member.join_seq - 1)
            read = max(self._read.get(user, 0), log.own.get(user, 0), member.join_seq - 1)
            if member.delivered_seq > delivered:
                self._add(
                    "delivered without a confirmation", user=user, stored=member.delivered_seq, confirmed=delivered
                )
            if member.read_seq > read:
                self._add("read by nobody", user=user, stored=member.read_seq, confirmed=read)
        for user, (told_delivered, told_read) in self._claims.items():
            most = max(self._delivered.get(user, 0), log.own.get(user, 0))
            if max(told_delivered, told_read) > most:
                self._add(
                    "told of more than was confirmed", user=user, told=(told_delivered, told_read), confirmed=most
                )
            if log.setting.settled and not log.is_group:
                self._check_kept(log, user, (told_delivered, told_read))
        for user, event in self._unread.items():
            self._check_count(log, user, event)

    def _check_kept(self, log: LogAudit, user: str, told: tuple[int, int]) -> None:
        member = log.members.get(user)
        if member is not None and (told[0] > member.delivered_seq or told[1] > member.read_seq):
            stored = (member.delivered_seq, member.read_seq)
            self._add("marks went back: what was told is not stored", user=user, told=told, stored=stored)

    def _check_count(self, log: LogAudit, user: str, event: history.Unread) -> None:
        """Told when nothing moved any more: it is what the log says."""
        member = log.members.get(user)
        if member is None or member.leave_seq is not None or not log.setting.settled:
            return
        counted = unread_of(log, member)
        if counted is not None and event.t > self.active_at + SETTLE_SECONDS and event.value != counted:
            self._add("an unread count that is not the log's", "I6", user=user, told=event.value, counted=counted)
