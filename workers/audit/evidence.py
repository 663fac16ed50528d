"""What a history holds about one conversation: fed event by event, then asked by its log. Pure.

Events are folded into what the checks need, so a long history costs one record per key and message, none per page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.audit import history
from workers.audit.acks import Acks
from workers.audit.receipts import Confirmed
from workers.audit.views import Views

if TYPE_CHECKING:
    from workers.audit.logs import LogAudit
    from workers.audit.report import Findings
    from workers.audit.snapshot import Entry
    from workers.audit.timeline import Timeline


class ConversationEvidence:
    """`take` all events of one conversation in order; then `match` its entries and `finish`."""

    def __init__(self, conversation_id: str, findings: Findings, timeline: Timeline) -> None:
        self.acks = Acks(conversation_id, findings)
        self.views = Views(conversation_id, findings, timeline)
        self.confirmed = Confirmed(conversation_id, findings)
        self._timeline = timeline
        self._is_covered = False

    def take(self, event: history.AnyEvent) -> None:
        """One more event."""
        match event:
            case history.Send():
                self._is_covered = True
                self.acks.sent(event)
            case history.Ack():
                self._on_ack(event)
            case history.Error():
                self.acks.refused(event)
            case history.Push():
                self.views.pushed(event, self.acks.canaries)
            case history.Dack():
                self.confirmed.confirmed(event)
            case history.Rack():
                self.confirmed.read(event)
            case history.Receipt():
                self.confirmed.told(event)
            case history.Ask():
                self.views.asked(event)
            case history.Unread():
                self.confirmed.counted(event)
            case history.Revoked():
                self.views.removed(event)
            case _:
                pass

    def _on_ack(self, event: history.Ack) -> None:
        self.acks.acked(event)
        known = self.acks.keys.get((event.user, event.key))
        if known is None or known.is_needless or (known.mid, known.seq) != (event.mid, event.seq):
            return
        self.views.acked(event, known.sha, is_change=known.change != "")
        self.confirmed.sent(event.user, event.seq, event.t)

    def match(self, entry: Entry, log: LogAudit) -> None:
        """A stored entry. Who sent it is asked only where the history has senders of this conversation at all; in a
        running system the log goes on behind the history's end."""
        is_later = not log.setting.settled and entry.sequence_number > self.views.last_known
        if self._is_covered and not (is_later and self.acks.is_unknown(entry)):
            self.acks.match(entry)
        self.views.match(entry)

    def finish(self, log: LogAudit) -> None:
        """All that only the whole of both shows."""
        acked = {known.seq for known in self.acks.keys.values() if known.seq and not known.is_needless}
        self.acks.finish(log, self._timeline)
        self.views.finish(log, acked, self.acks.canaries)
        if self._is_covered and log.setting.settled:
            self.confirmed.finish(log)


def conversation_of(event: history.AnyEvent) -> str:
    """The conversation an event is about; "" for one that is about none."""
    conversation_id: str = getattr(event, "conv", "")
    return conversation_id
