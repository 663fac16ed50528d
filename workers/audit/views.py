"""What devices were shown of one conversation, against each other, the log and who may see it: I2b, I3, I5, I5b, I11,
I14, I18. Pure; one `Views` per conversation.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from workers.audit.runs import Runs

if TYPE_CHECKING:
    from workers.audit import history
    from workers.audit.logs import LogAudit
    from workers.audit.report import Findings
    from workers.audit.rosters import Stay
    from workers.audit.snapshot import Entry
    from workers.audit.timeline import Device, Timeline

ANSWER_SECONDS: Final = 2.0
"""A retransmit is answered by then (I11)."""
REACH_SECONDS: Final = 10.0
"""An online device has what was committed so long ago (I14)."""
REVOKED_SECONDS: Final = 5.0
SPAN: Final = 500
"""Most sequences one retransmit answers."""
_DEVICE_ORIGINS: Final = frozenset(("live", "backlog", "retransmit"))
"""Pages of these belong to the log that a device keeps; the others are looked at."""
_NEVER: Final = float("inf")


class _Seen:
    """What one device saw. `high`: the pushed sequence behind which the next one has to come."""

    __slots__ = ("answered", "asked", "conn", "high", "late_high", "restarted", "runs")

    def __init__(self) -> None:
        self.conn = 0
        self.high = 0
        self.late_high = 0
        """The same for what still comes on the connection before."""
        self.restarted = 0
        """The `sync` that has already brought the line back once."""
        self.runs = Runs()
        self.asked: list[history.Ask] = []
        """Retransmits without an answer yet."""
        self.answered: list[history.Ask] = []


class Views:
    """The pages of one conversation."""

    def __init__(self, conversation_id: str, findings: Findings, timeline: Timeline) -> None:
        self._conversation_id = conversation_id
        self._findings = findings
        self._timeline = timeline
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._looked: dict[str, Runs] = {}
        """User → what pages of the API showed."""
        self._entries: dict[int, tuple[str, str]] = {}
        """Sequence → (message id, sha) as the first one was told."""
        self._known_at = array("d")
        """When the first of all was told of each sequence; infinity: nobody was."""
        self._latest_known: list[float] = []
        """By sequence: when it, or a later one, was told first; ascending."""
        self._strange: list[tuple[str, str, int, str]] = []
        """(user, device, sequence, canary) of canaries nobody had sent by then."""
        self._revoked: dict[str, list[float]] = {}
        self._after: dict[str, list[tuple[float, int]]] = {}
        """User → (at, sequence) of what came live more than 5 s after a removal was confirmed."""

    @property
    def last_known(self) -> int:
        """The greatest sequence anybody was told of."""
        return len(self._known_at) - 1

    def _add(self, invariant: str, statement: str, **evidence: object) -> None:
        self._findings.add(invariant, statement, self._conversation_id, **evidence)

    def _device(self, user: str, dev: str) -> _Seen:
        return self._seen.setdefault((user, dev), _Seen())

    # --- events ------------------------------------------------------------------------------------------------------

    def acked(self, event: history.Ack, sha: str, *, is_change: bool) -> None:
        """An ack shows the sender the place of their own message; the entry of a change comes as all entries do."""
        self._identify(event.seq, event.mid, "" if is_change else sha, event.user, event.t)
        if not is_change:
            self._device(event.user, event.dev).runs.add(event.seq)

    def _identify(self, sequence: int, message_id: str, sha: str, user: str, at: float) -> None:
        times = self._known_at
        if not 0 <= sequence < 2**53:
            self._add("I2b", "a sequence that cannot be", sequence=sequence, user=user)
            return
        if sequence >= len(times):
            times.extend([_NEVER] * (sequence + 1 - len(times)))
        times[sequence] = min(times[sequence], at)
        known = self._entries.get(sequence)
        if known is None or (known[0] == message_id and not known[1]):
            self._entries[sequence] = (message_id, sha)
        elif known[0] != message_id or (sha and known[1] != sha):
            self._add(
                "I2b", "shown differently to two", sequence=sequence, first=known, then=(message_id, sha), user=user
            )

    def pushed(self, event: history.Push, canaries: set[str]) -> None:
        """A page."""
        self._findings.counts["pushes"] += len(event.rows)
        if self._timeline.is_revoked(event):
            self._add("I18", "a page on a session that had ended", user=event.user, device=event.dev, at=event.t)
        belongs = event.origin in _DEVICE_ORIGINS and event.conn > 0
        seen = self._device(event.user, event.dev) if belongs else None
        if seen is not None and event.origin == "retransmit":
            self._check_answer(event, seen)
        elif seen is not None:
            self._check_order(event, seen)
        runs = self._looked.setdefault(event.user, Runs()) if seen is None else seen.runs
        for row in event.rows:
            self._identify(row.seq, row.mid, row.sha, event.user, event.t)
            runs.add(row.seq)
            if row.canary and row.canary not in canaries:
                self._strange.append((event.user, event.dev, row.seq, row.canary))
        if event.origin == "live":
            self._note_after(event)

    def _note_after(self, event: history.Push) -> None:
        late = [at for at in self._revoked.get(event.user, ()) if event.t > at + REVOKED_SECONDS]
        if late:
            self._after.setdefault(event.user, []).extend((event.t, row.seq) for row in event.rows)

    def removed(self, event: history.Revoked) -> None:
        """The server confirmed that this user is in it no more."""
        self._revoked.setdefault(event.user, []).append(event.t)

    def _check_order(self, event: history.Push, seen: _Seen) -> None:
        """On one connection the messages come in order. A `sync` takes the line back, once, to the cursor it named."""
        if not event.rows:
            return
        if event.conn < seen.conn:
            for row in event.rows:
                if event.origin == "live" and row.seq <= seen.late_high:
                    self._add_order(event, row.seq, seen.late_high)
                seen.late_high = max(seen.late_high, row.seq)
            return
        if event.conn != seen.conn:
            seen.conn, seen.late_high, seen.high = event.conn, seen.high, 0
        rewinds = self._timeline.rewinds(event)
        first = event.rows[0].seq
        if first <= seen.high and event.origin == "backlog" and seen.restarted < rewinds:
            seen.restarted = rewinds
            seen.high = first - 1
        for row in event.rows:
            if row.seq <= seen.high:
                self._add_order(event, row.seq, seen.high)
            seen.high = max(seen.high, row.seq)

    def _add_order(self, event: history.Push, sequence: int, after: int) -> None:
        self._add(
            "I3",
            "out of order on one connection",
            user=event.user,
            device=event.dev,
            connection=event.conn,
            sequence=sequence,
            after=after,
        )

    def asked(self, event: history.Ask) -> None:
        """A retransmit."""
        self._findings.counts["retransmits"] += 1
        self._device(event.user, event.dev).asked.append(event)

    def _check_answer(self, event: history.Push, seen: _Seen) -> None:
        numbers = [row.seq for row in event.rows]
        ask = _question(seen.asked, event)
        if ask is not None:
            seen.asked.remove(ask)
            seen.answered.append(ask)
        elif (again := _question(seen.answered, event)) and self._timeline.is_disturbed(again.t, event.t):
            ask = again  # a question that was read twice is answered twice
        if ask is None:
            self._add(
                "I5b",
                "the answer to a retransmit that was not asked for",
                user=event.user,
                device=event.dev,
                first=event.first,
            )
            return
        evidence = {"user": event.user, "device": event.dev, "asked": f"{ask.first}..{ask.last}"}
        if event.t > ask.t + ANSWER_SECONDS and not self._timeline.is_disturbed(ask.t, event.t):
            self._add("I11", "a retransmit was answered late", **evidence, seconds=round(event.t - ask.t, 1))
        if numbers != sorted(set(numbers)):
            self._add("I11", "the answer to a retransmit is not ascending, once each", **evidence, numbers=numbers[:20])
        expected = list(range(max(event.first, event.expired + 1, numbers[0] if numbers else 1), event.last + 1))
        if numbers and numbers != expected:
            missing = sorted(set(expected) - set(numbers))
            self._add(
                "I11", "the answer to a retransmit leaves out what it accounts for", **evidence, missing=missing[:20]
            )

    # --- documents ---------------------------------------------------------------------------------------------------

    def match(self, entry: Entry) -> None:
        """A stored entry: is it what was shown?"""
        shown = self._entries.pop(entry.sequence_number, None)
        if shown is None:
            return
        message_id, sha = shown
        if message_id != entry.message_id or (sha and sha != entry.original):
            stored = (entry.message_id, entry.original)
            self._add(
                "I2b", "stored otherwise than it was shown", sequence=entry.sequence_number, shown=shown, stored=stored
            )

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self, log: LogAudit, acked: set[int], canaries: set[str]) -> None:
        """What only the whole log shows. `acked`: sequences that an ack names, whose absence is judged there."""
        floor = log.last + 1 if log.first is None else log.first.sequence_number
        self._latest_known = list(accumulate(reversed(self._known_at), min))[::-1]
        for sequence, shown in self._entries.items():
            if sequence >= floor and sequence not in acked:
                self._add("I2b", "shown, and not stored", sequence=sequence, shown=shown)
        self._check_visibility(log, floor)
        for user, dev, sequence, canary in self._strange:
            if canary not in canaries:
                self._add(
                    "I5", "a canary of another conversation", user=user, device=dev, sequence=sequence, canary=canary
                )
        for (user, dev), seen in self._seen.items():
            for ask in seen.asked:
                self._check_silence(ask)
            self._check_reach(log, user, dev, seen.runs, floor)
        self._check_absent_devices(log, floor)
        for user, late in self._after.items():
            stays = log.roster.stays.get(user, [])
            for at, sequence in late:
                if not any(stay.holds(sequence) and stay.last is None for stay in stays):
                    self._add("I18", "a live page long after the removal", user=user, sequence=sequence, at=at)

    def _check_visibility(self, log: LogAudit, floor: int) -> None:
        """Below the floor nothing says any more who was in it when."""
        if log.first is None and not log.members:
            return
        shown = [(user, dev, seen.runs) for (user, dev), seen in self._seen.items()]
        shown += [(user, "api", runs) for user, runs in self._looked.items()]
        for user, dev, runs in shown:
            stays = log.roster.stays.get(user, [])
            allowed = [(0, floor - 1), *((stay.first, 2**53 if stay.last is None else stay.last) for stay in stays)]
            for first, last in runs.outside(allowed):
                self._add(
                    "I5",
                    "shown to somebody who may not see it",
                    user=user,
                    device=dev,
                    sequences=f"{first}..{last}",
                    stays=str(stays),
                )

    def _check_silence(self, ask: history.Ask) -> None:
        device = self._timeline.device(ask.user, ask.dev)
        until = min(device.closed_at(ask.conn), self._timeline.end)
        if until - ask.t > ANSWER_SECONDS and not self._timeline.is_disturbed(ask.t, until):
            self._add(
                "I11",
                "a retransmit was never answered",
                user=ask.user,
                device=ask.dev,
                asked=f"{ask.first}..{ask.last}",
            )

    def _check_absent_devices(self, log: LogAudit, floor: int) -> None:
        """Members' devices that were online and never saw anything of it."""
        for user, dev in self._timeline.devices:
            if (user, dev) not in self._seen and user in log.roster.stays:
                self._check_reach(log, user, dev, Runs(), floor)

    def _check_reach(self, log: LogAudit, user: str, dev: str, runs: Runs, floor: int) -> None:
        device = self._timeline.devices.get((user, dev))
        if device is None:
            return
        for stay in log.roster.stays.get(user, ()):
            first = max(stay.first, floor)
            if stay.last is not None:
                self._check_ended(log, user, dev, runs, stay)
                continue
            backlog = self._known_before(device.synced[-1][0]) if device.synced else 0
            holes = _stored(runs.missing(first, min(backlog, log.last)), log)
            for low, high in holes:
                self._add(
                    "I3", "not there after the backlog had come", user=user, device=dev, sequences=f"{low}..{high}"
                )
            if not holes:
                self._check_liveness(log, user, dev, device, runs, max(first, backlog + 1))

    def _check_liveness(self, log: LogAudit, user: str, dev: str, device: Device, runs: Runs, first: int) -> None:
        end, patience = self._timeline.end, 0.0 if self._timeline.ended else REACH_SECONDS
        quiet_seconds = end - max(device.open_since(), self._timeline.last_fault)
        if quiet_seconds < patience or quiet_seconds < 0:
            return
        for low, high in _stored(runs.missing(first, min(self._known_before(end - patience), log.last)), log):
            self._add("I14", "an online device never got it", user=user, device=dev, sequences=f"{low}..{high}")

    def _check_ended(self, log: LogAudit, user: str, dev: str, runs: Runs, stay: Stay) -> None:
        """Who has left is owed nothing more, but has no hole in front of what came last."""
        assert stay.last is not None
        first = stay.first if log.first is None else max(stay.first, log.first.sequence_number)
        holes = _stored(runs.missing(first, stay.last), log)
        if holes and holes[-1][1] == stay.last:
            holes.pop()
        for low, high in holes:
            self._add("I3", "a hole in front of what came later", user=user, device=dev, sequences=f"{low}..{high}")

    def _known_before(self, at: float) -> int:
        """The greatest sequence that somebody had been told of before `at`: what lies before it was committed too."""
        return max(bisect_left(self._latest_known, at) - 1, 0)


def _stored(holes: list[tuple[int, int]], log: LogAudit) -> list[tuple[int, int]]:
    """Without those that the log itself has: nobody can be shown what is not there."""
    return [hole for hole in holes if not any(low <= hole[0] and hole[1] <= high for low, high in log.gaps)]


def _question(asked: list[history.Ask], answer: history.Push) -> history.Ask | None:
    return next((ask for ask in asked if ask.conn == answer.conn and ask.first == answer.first), None)
