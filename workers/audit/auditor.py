"""The audit itself: what clients saw and what is stored in, violations out. Pure; the composition of all checks.

`Auditor` takes conversation by conversation, so nobody needs all of them at once; `audit` is the same over a snapshot
that is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.audit import queues
from workers.audit.evidence import ConversationEvidence, conversation_of
from workers.audit.logs import LogAudit
from workers.audit.projection import unread_of
from workers.audit.receipts import SETTLE_SECONDS
from workers.audit.report import Findings, Violation
from workers.audit.snapshot import Head
from workers.audit.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.audit.history import AnyEvent
    from workers.audit.snapshot import DeadLetter, Document, KeyRecord, Queues, Setting, Snapshot

BY_LOG = ("I2", "I8", "I9", "I6", "I20", "digest", "countable", "projection", "effects", "counters", "shape")
BY_HISTORY = ("I1", "I2b", "I3", "I4", "I5", "I5b", "I7", "I10", "I11", "I14", "I15", "I17", "I18")
_FROM_CLIENTS = "only a history of what clients saw shows it (--history)"


class Auditor:
    """`begin` and finish every conversation, give the rest to `take_*`, then `finish`.

    `timeline`: all of a history has been taken in by it; None: there is no history.
    """

    def __init__(self, setting: Setting, timeline: Timeline | None = None) -> None:
        self.setting = setting
        self.timeline = timeline
        self.findings = Findings()
        self.judged = {*BY_LOG, *(BY_HISTORY if timeline is not None else ())}
        self._unread: dict[str, int] = {}
        self._uncounted: set[str] = set()
        """Users of one of whose conversations the unread part of the log is gone."""
        self._active_at: dict[str, float] = {}

    def evidence(self, conversation_id: str) -> ConversationEvidence | None:
        """An empty one, for a conversation of which the history has nothing; None without a history."""
        if self.timeline is None:
            return None
        return ConversationEvidence(conversation_id, self.findings, self.timeline)

    def gather(self, events: Iterable[AnyEvent]) -> dict[str, ConversationEvidence]:
        """What these events, in order, say about conversations; those of the timeline are passed over."""
        assert self.timeline is not None
        found: dict[str, ConversationEvidence] = {}
        for event in events:
            self.findings.counts["events"] += 1
            name = conversation_of(event)
            if name:
                evidence = found.get(name)
                if evidence is None:
                    evidence = found[name] = ConversationEvidence(name, self.findings, self.timeline)
                evidence.take(event)
        return found

    def begin(self, head: Head, evidence: ConversationEvidence | None = None) -> LogAudit:
        """A conversation: its log wants every entry, then `end`."""
        return LogAudit(head, self.setting, self.findings, evidence)

    def end(self, log: LogAudit, evidence: ConversationEvidence | None = None) -> None:
        """All its entries were taken."""
        log.finish()
        if self.timeline is None or not self.timeline.unread:
            return
        for user, member in log.members.items():
            if member.leave_seq is None:
                count = unread_of(log, member)
                if count is None:
                    self._uncounted.add(user)
                self._unread[user] = self._unread.get(user, 0) + (count or 0)
                active_at = 0.0 if evidence is None else evidence.confirmed.active_at
                self._active_at[user] = max(self._active_at.get(user, 0.0), active_at)

    def take_key(self, pair: KeyRecord) -> None:
        """An idempotency record."""
        self.judged.add("keys")
        queues.check_key(pair, self.setting, self.findings)

    def take_dead_letter(self, letter: DeadLetter) -> None:
        """A dead letter."""
        queues.check_dead_letter(letter, self.setting, self.findings)

    def take_indexes(self, indexes: dict[str, list[Document]]) -> None:
        """All indexes there are."""
        self.judged.add("indexes")
        queues.check_indexes(indexes, self.findings)

    def take_queues(self, found: Queues) -> None:
        """What Redis holds."""
        self.judged |= {"I16"}
        if self.setting.settled:
            self.judged.add("I12")
        if found.ghosts is not None:
            self.judged.add("I19")
        queues.check_queues(found, self.setting, self.findings)

    def finish(self) -> Findings:
        """What only the whole shows."""
        self.judged.add("I13")
        timeline = self.timeline
        if timeline is None:
            self.findings.unjudged.update(dict.fromkeys(sorted(set(BY_HISTORY) - self.judged), _FROM_CLIENTS))
        else:
            timeline.judge(self.findings)
            self._judge_unread(timeline)
            self._name_unjudged(timeline)
        if not self.setting.settled:
            self.findings.unjudged["I12"] = "messages are on their way (live)"
        return self.findings

    def _judge_unread(self, timeline: Timeline) -> None:
        last = {event.user: event for event in timeline.unread if not event.conv}
        for event in timeline.unread:
            if event.value < 0:
                self.findings.add("I6", "an unread count below nothing", user=event.user, value=event.value)
        for user, event in last.items():
            if user not in self._unread or user in self._uncounted or not self.setting.settled:
                continue
            counted = self._unread[user]
            if event.t > self._active_at.get(user, 0.0) + SETTLE_SECONDS and event.value != counted:
                self.findings.add(
                    "I6", "an unread count that is not the logs'", user=user, told=event.value, counted=counted
                )

    def _name_unjudged(self, timeline: Timeline) -> None:
        """Parts for which this history has nothing."""
        told = self.findings.unjudged
        if not timeline.has_moves:
            told["I15"] = "the history has no drain"
            self.judged.discard("I15")
        if not timeline.has_revocations:
            told["I18"] = "the history has no revocation"
            self.judged.discard("I18")
        if not self.findings.counts["retransmits"]:
            told["I11"] = "the history has no retransmit"
            self.judged.discard("I11")
        if not timeline.has_presence and "I19" not in self.judged:
            told["I19"] = "the history has no presence, and no worker lives"
        if timeline.has_presence:
            self.judged.add("I19")


def audit(history: Iterable[AnyEvent] | None, snapshot: Snapshot) -> list[Violation]:
    """All violations of a snapshot in memory and, where there is one, a history in memory; none: it is clean."""
    return examine(history, snapshot).violations


def examine(history: Iterable[AnyEvent] | None, snapshot: Snapshot) -> Findings:
    """The same with the counts."""
    events = None if history is None else list(history)
    timeline = None
    if events is not None:
        timeline = Timeline()
        for event in events:
            timeline.take(event)
    auditor = Auditor(snapshot.setting, timeline)
    found = {} if events is None else auditor.gather(events)
    logs = {log.head.conversation_id: log for log in snapshot.logs}
    for conversation_id in {**logs, **found}:
        kept = logs.get(conversation_id)
        evidence = found.get(conversation_id) or auditor.evidence(conversation_id)
        log = auditor.begin(Head(conversation_id=conversation_id) if kept is None else kept.head, evidence)
        for document in kept.messages if kept is not None else ():
            log.take(document)
        auditor.end(log, evidence)
    for pair in snapshot.keys:
        auditor.take_key(pair)
    for letter in snapshot.dead_letters:
        auditor.take_dead_letter(letter)
    if snapshot.indexes is not None:
        auditor.take_indexes(snapshot.indexes)
    if snapshot.queues is not None:
        auditor.take_queues(snapshot.queues)
    return auditor.finish()
