"""What senders were told about their keys, against each other and against the documents: I1, I4, I5b, I7, I8, I10, I14,
I17. Pure; one `Acks` per conversation.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from protocol import codec
from protocol.errors import ErrorCode
from protocol.models import EventKind
from protocol.watermarks import DIGEST_BYTES, content_hash
from workers.audit.snapshot import author_of

if TYPE_CHECKING:
    from workers.audit import history
    from workers.audit.logs import LogAudit
    from workers.audit.report import Findings
    from workers.audit.snapshot import Entry
    from workers.audit.timeline import Timeline

OUTCOME_SECONDS: Final = 30.0
"""After the last fault, a key has an outcome by then (I14)."""


class Key:
    """One (user, key) of a conversation: what was sent with it, what was said about it, what is stored under it."""

    __slots__ = (
        "acked_at",
        "change",
        "conflicted",
        "conn",
        "device",
        "first_at",
        "floor",
        "late",
        "later_sha",
        "mid",
        "plain",
        "refused",
        "segment",
        "seq",
        "sha",
        "stored",
        "target",
    )

    def __init__(self, event: history.Send, floor: int, segment: int) -> None:
        self.sha = event.payload_sha
        self.later_sha = ""
        """Of another payload sent with this key."""
        self.late = False
        """That one was sent when the first one was acknowledged already: it cannot have come first."""
        self.change = event.change
        self.target = event.target
        self.first_at = event.t
        self.device = event.dev
        self.conn = event.conn
        self.plain = True
        """Sent once only."""
        self.segment = segment
        self.floor = floor
        """The greatest sequence that this user had been told of when it was first sent."""
        self.mid = ""
        self.seq = 0
        self.acked_at = 0.0
        self.refused = ""
        self.conflicted = False
        self.stored = 0
        """Sequence of its document."""

    @property
    def is_needless(self) -> bool:
        """A change that was so already: acknowledged as its target, without an entry of its own."""
        return self.change != "" and self.mid == self.target


class Acks:
    """The keys of one conversation."""

    def __init__(self, conversation_id: str, findings: Findings) -> None:
        self._conversation_id = conversation_id
        self._findings = findings
        self.keys: dict[tuple[str, str], Key] = {}
        self.canaries: set[str] = set()
        self._told: dict[str, int] = {}
        """User → greatest sequence of an ack so far."""
        self._segments: dict[tuple[str, str, int], int] = {}
        """Connection → how many errors it was told: what was sent between two of them stays in order."""
        self._orders: dict[tuple[str, str, int, int], list[Key]] = {}

    def _add(self, invariant: str, statement: str, user: str, key: str, **evidence: object) -> None:
        self._findings.add(invariant, statement, self._conversation_id, user=user, key=key, **evidence)

    # --- events ------------------------------------------------------------------------------------------------------

    def sent(self, event: history.Send) -> None:
        """An attempt."""
        self._findings.counts["sends"] += 1
        if event.canary:
            self.canaries.add(event.canary)
        name = (event.user, event.key)
        known = self.keys.get(name)
        if known is None:
            connection = (event.user, event.dev, event.conn)
            segment = self._segments.setdefault(connection, 0)
            known = self.keys[name] = Key(event, self._told.get(event.user, 0), segment)
            self._orders.setdefault((*connection, segment), []).append(known)
            return
        known.plain = False
        if event.payload_sha != known.sha:
            known.late = known.late or known.seq > 0
            known.later_sha = event.payload_sha

    def acked(self, event: history.Ack) -> None:
        """It is committed, it says."""
        self._findings.counts["acks"] += 1
        known = self.keys.get((event.user, event.key))
        if known is None:
            self._add("I5b", "acknowledged to somebody who never sent it", event.user, event.key, device=event.dev)
            return
        said = (event.mid, event.seq)
        if known.refused:
            self._add(
                "I10", "refused for good, then acknowledged", event.user, event.key, code=known.refused, acked=said
            )
        if known.seq and said != (known.mid, known.seq) and not self._was_needless(known, event):
            before = (known.mid, known.seq)
            self._add("I4", "two acks say different things", event.user, event.key, first=before, then=said)
            return
        if not known.seq or known.is_needless:
            known.mid, known.seq = said
        known.acked_at = known.acked_at or event.t
        if known.is_needless:
            return
        if event.seq <= known.floor:
            self._add(
                "I7",
                "not behind what was acknowledged before it was sent",
                event.user,
                event.key,
                seq=event.seq,
                after=known.floor,
            )
        self._told[event.user] = max(event.seq, self._told.get(event.user, 0))

    @staticmethod
    def _was_needless(known: Key, event: history.Ack) -> bool:
        """A change that was so already leaves no record: later the same key may find something to do."""
        return known.change != "" and known.target in (known.mid, event.mid)

    def refused(self, event: history.Error) -> None:
        """It is not, it says."""
        self._findings.counts["errors"] += 1
        connection = (event.user, event.dev, event.conn)
        self._segments[connection] = self._segments.get(connection, 0) + 1
        if not event.key:
            return
        known = self.keys.get((event.user, event.key))
        if known is None:
            self._add("I5b", "refused to somebody who never sent it", event.user, event.key, device=event.dev)
            return
        if event.retryable:
            return
        if event.code == ErrorCode.IDEMPOTENCY_CONFLICT.value and known.later_sha:
            known.conflicted = True
            return
        if known.seq:
            self._add(
                "I10",
                "acknowledged, then refused for good",
                event.user,
                event.key,
                code=event.code,
                acked=(known.mid, known.seq),
            )
        known.refused = event.code

    # --- documents ---------------------------------------------------------------------------------------------------

    def is_unknown(self, entry: Entry) -> bool:
        """Is this somebody's, and did nobody in this history send it?"""
        author = author_of(entry)
        return author is not None and author not in self.keys

    def match(self, entry: Entry) -> None:
        """A stored entry: whose is it, and is it what was sent?"""
        author = author_of(entry)
        if author is None:
            return
        known = self.keys.get(author)
        if known is None:
            self._add(
                "I8", "stored, and nobody sent it", *author, sequence=entry.sequence_number, message_id=entry.message_id
            )
            return
        if known.stored:
            self._add("I1", "stored twice", *author, sequences=[known.stored, entry.sequence_number])
            return
        known.stored = entry.sequence_number
        if known.seq and not known.is_needless and (entry.message_id, entry.sequence_number) != (known.mid, known.seq):
            stored = (entry.message_id, entry.sequence_number)
            self._add("I1", "stored otherwise than acknowledged", *author, acked=(known.mid, known.seq), stored=stored)
        if known.refused and not known.seq:
            self._add(
                "I10", "refused for good, and stored", *author, code=known.refused, sequence=entry.sequence_number
            )
        self._match_payload(entry, author, known)

    def _match_payload(self, entry: Entry, author: tuple[str, str], known: Key) -> None:
        if known.change:
            if not _is_change(entry, author, known):
                self._add("I8", "the entry of a change is not what was sent", *author, sequence=entry.sequence_number)
            return
        stored = entry.original
        if stored == known.sha:
            return
        if stored == known.later_sha and not known.late:
            return
        if stored == known.later_sha:
            self._add("I17", "the later payload of the key is stored", *author, sequence=entry.sequence_number)
        elif known.seq:
            self._add(
                "I1",
                "stored with another content than was sent",
                *author,
                sequence=entry.sequence_number,
                sent=known.sha,
                stored=stored,
            )
        else:
            self._add("I8", "stored with a content nobody sent", *author, sequence=entry.sequence_number, stored=stored)

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self, log: LogAudit, timeline: Timeline) -> None:
        """What only the whole history and the whole log show."""
        floor = 1 if log.first is None else log.first.sequence_number
        gone = log.last if log.first is None else 0
        for (user, key), known in self.keys.items():
            if known.seq and not known.is_needless and not known.stored and known.seq >= floor and known.seq > gone:
                self._add("I1", "acknowledged, and not stored", user, key, message_id=known.mid, sequence=known.seq)
            if known.later_sha and known.seq and not known.conflicted and not known.refused:
                self._add("I17", "two payloads under one key, and neither was refused", user, key, sequence=known.seq)
            if not known.seq and not known.refused:
                self._findings.counts["keys without an outcome"] += 1
                if timeline.should_know(user, known.device, known.first_at, OUTCOME_SECONDS):
                    self._add("I14", "no outcome long after the last fault", user, key, sent_at=known.first_at)
        for (user, _, connection, _), order in self._orders.items():
            self._check_order(user, connection, order)

    def _check_order(self, user: str, connection: int, order: list[Key]) -> None:
        """I7b: between two errors, what was sent once on one connection keeps its order."""
        last = 0
        for known in order:
            if not known.plain or not known.seq or known.is_needless:
                continue
            if known.seq < last:
                self._findings.add(
                    "I7",
                    "sent later on the same connection, with a smaller sequence",
                    self._conversation_id,
                    user=user,
                    connection=connection,
                    sequence=known.seq,
                    before=last,
                )
            last = max(last, known.seq)


def _is_change(entry: Entry, author: tuple[str, str], known: Key) -> bool:
    """Does the entry say what its author sent? One whose content went with its target said it."""
    if entry.target_message_id != known.target:
        return False
    if not entry.content:
        return known.change == EventKind.EDITED.value
    event = codec.decode_system_event(entry.content)
    if event.event.value != known.change:
        return False
    if event.event is EventKind.HIDDEN:
        secret = f"{author[0]}\0{author[1]}\0{known.target}".encode()
        return event.commitment == blake2b(secret, digest_size=DIGEST_BYTES).hexdigest()
    said = next((text for text in (event.content, event.emoji) if isinstance(text, str)), "")
    return event.actor == author[0] and content_hash(said).hex() == known.sha
