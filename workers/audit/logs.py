"""One conversation's log, entry by entry: gap-free, chained, counted, in time, and said by who was in it. Pure.

Memory per conversation is a few bytes per message: a log of any length is read as a stream.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from protocol import codec
from protocol.models import SYSTEM_SENDER, ConversationType, MessageStatus, SystemEvent
from protocol.watermarks import NO_DIGEST, chain_digest, content_hash
from workers.audit import projection
from workers.audit.effects import Effects
from workers.audit.rosters import Roster
from workers.audit.snapshot import ConversationState, Counter, Document, Entry, Head, Member, Setting, author_of

if TYPE_CHECKING:
    from datetime import datetime

    from workers.audit.evidence import ConversationEvidence
    from workers.audit.report import Findings

Shape = TypeVar("Shape")
_END: Final = 2**53
"""Greater than any sequence."""


class LogAudit:
    """`take` every document of one conversation, ascending by sequence number, then `finish`."""

    def __init__(
        self, head: Head, setting: Setting, findings: Findings, evidence: ConversationEvidence | None = None
    ) -> None:
        self.conversation_id = head.conversation_id
        self.setting = setting
        self.findings = findings
        self.state = self._convert(head.conversation, ConversationState)
        self.counter = self._convert(head.counter, Counter)
        members = [self._convert(document, Member) for document in head.memberships]
        self.members = {member.user_id: member for member in members if member is not None}
        self.roster = Roster(complete=True)
        self.first: Entry | None = None
        self.last = 0
        self.digest = NO_DIGEST
        self.gaps: list[tuple[int, int]] = []
        self.last_system = 0
        """The last system message."""
        self.countables = array("q")
        """How many countable entries there are up to each, from the first one that is still there on; -1 in a hole."""
        self.digest_at_counter: bytes | None = None
        self.own: dict[str, int] = {}
        """User → sequence of the last message of their own."""
        self.received: list[tuple[int, str, MessageStatus]] = []
        """(sequence, sender, status) of the entries that are stored as more than sent."""
        self._evidence = evidence
        self._effects = Effects(head.conversation_id, findings)
        self._created_at: datetime | None = None
        self._countable = 0
        self._keys: set[int] = set()
        """Hashes of (sender, key): a unique index could be missing."""

    def _convert(self, document: Document | None, shape: type[Shape]) -> Shape | None:
        if document is None:
            return None
        try:
            return msgspec.convert(document, shape)
        except msgspec.ValidationError as error:
            name = document.get("_id")
            self.findings.add("shape", f"a document cannot be read: {error}", self.conversation_id, document=name)
            return None

    def add(self, invariant: str, statement: str, **evidence: object) -> None:
        """A violation in this conversation."""
        self.findings.add(invariant, statement, self.conversation_id, **evidence)

    @property
    def is_group(self) -> bool:
        return self.state is None or self.state.conversation_type is ConversationType.GROUP

    def countable_at(self, sequence: int) -> int | None:
        """Countable entries up to a sequence; None where that part of the log is gone, or not there."""
        if self.first is None:
            return 0 if sequence == 0 and self.last == 0 else None
        at = sequence - self.first.sequence_number
        if at == -1:
            return self.first.countable - (not self.first.is_system)
        return self.countables[at] if 0 <= at < len(self.countables) and self.countables[at] >= 0 else None

    # --- entries -----------------------------------------------------------------------------------------------------

    def take(self, document: Document) -> None:
        """One more document."""
        self.findings.counts["messages"] += 1
        entry = self._convert(document, Entry)
        if entry is None:
            self.last = max(self.last, document["sequence_number"]) if _has_sequence(document) else self.last
            return
        if self.first is None:
            self._begin(entry)
        elif not self._check_sequence(entry):
            return
        self._check_chain(entry)
        self._check_count(entry)
        if self._created_at is not None and entry.created_at < self._created_at:
            self.add("I20", "committed before the entry it follows", **_name(entry), created_at=str(entry.created_at))
        self._created_at = entry.created_at
        self.last = entry.sequence_number
        scoped = hash((entry.sender_id, entry.idempotency_key))
        if scoped in self._keys:
            self.add("I1", "a second document with this key", **_name(entry), key=entry.idempotency_key)
        self._keys.add(scoped)
        if entry.status is not MessageStatus.SENT:
            self.received.append((entry.sequence_number, entry.sender_id, entry.status))
        self._check_author(entry)
        if entry.is_system:
            self._take_system(entry)
        else:
            self.own[entry.sender_id] = entry.sequence_number
        if (
            entry.changed_seq is not None
            or entry.deleted_at is not None
            or entry.edited_seq is not None
            or entry.hidden_by
            or entry.reactions
        ):
            self._effects.note(entry)
        if self._evidence is not None:
            self._evidence.match(entry, self)

    def _begin(self, entry: Entry) -> None:
        self.first = entry
        floor = entry.sequence_number
        if floor > 1 and not self._may_have_expired():
            self.add("I2", f"the log begins with {floor}, and nothing of it is old enough to be removed", floor=floor)
        self.roster = Roster(complete=floor == 1)
        if floor > 1 or not self.is_group:
            # Everybody in a 1:1 conversation was in it from the start.
            self.roster.adopt(self.members.values(), floor if self.is_group else _END)

    def _may_have_expired(self) -> bool:
        if self.state is None:
            return True
        age = (self.setting.taken_at - self.state.created_at).total_seconds()
        return age >= self.setting.retention_seconds

    def _check_sequence(self, entry: Entry) -> bool:
        """False: this document is none that the log goes on with."""
        sequence = entry.sequence_number
        if sequence == self.last + 1:
            return True
        if sequence == self.last:
            self.add("I2", "two documents have one sequence", **_name(entry))
            return False
        self.gaps.append((self.last + 1, sequence - 1))
        self.add("I2", f"{self.last + 1}..{sequence - 1} are missing", before=self.last, then=sequence)
        # What counts on from here is what is stored: one hole is one violation.
        self.countables.extend([-1] * (sequence - self.last - 1))
        self.digest, self._countable = b"", -1
        return True

    def _check_chain(self, entry: Entry) -> None:
        sequence = entry.sequence_number
        hashed = entry.original
        is_as_sent = entry.content_hash is not None and entry.content != "" and entry.edited_seq is None
        if is_as_sent and content_hash(entry.content).hex() != hashed:
            self.add("digest", "the content is not the one that was committed", **_name(entry))
        known = sequence == 1 or (self.first is not entry and self.digest != b"")
        if known:
            chained = chain_digest(self.digest, entry.message_id, entry.sender_id, sequence, bytes.fromhex(hashed))
            if chained != entry.digest:
                self.add(
                    "digest",
                    "the stored digest is not the chain over this entry: it, or its digest, was altered",
                    **_name(entry),
                    stored=entry.digest.hex(),
                    chained=chained.hex(),
                )
        self.digest = entry.digest
        if self.counter is not None and sequence == self.counter.last_sequence_number:
            self.digest_at_counter = entry.digest

    def _check_count(self, entry: Entry) -> None:
        known = entry.sequence_number == 1 or (self.first is not entry and self._countable >= 0)
        if known and entry.countable != self._countable + (not entry.is_system):
            counted = self._countable + (not entry.is_system)
            self.add(
                "countable", "counts otherwise than its log", **_name(entry), stored=entry.countable, counted=counted
            )
        self._countable = entry.countable
        self.countables.append(entry.countable)

    def _check_author(self, entry: Entry) -> None:
        """Who said it was in it; the server itself always is."""
        author = author_of(entry)
        if author is None or self.roster.is_in(author[0]):
            return
        if self.roster.complete or not self.is_group:
            self.add("I8", "said by somebody who was not in the conversation", **_name(entry), user=author[0])

    def _take_system(self, entry: Entry) -> None:
        self.last_system = entry.sequence_number
        if entry.sender_id != SYSTEM_SENDER:
            self.add("I8", "a system message that the server did not send", **_name(entry), user=entry.sender_id)
            return
        event = self._event(entry)
        if entry.target_message_id is not None:
            self._effects.take(entry, event)
        elif event is not None:
            self.roster.take(event, entry.sequence_number)

    def _event(self, entry: Entry) -> SystemEvent | None:
        if not entry.content:
            if entry.target_message_id is None:
                self.add("shape", "a system message that says nothing", **_name(entry))
            return None
        try:
            return codec.decode_system_event(entry.content)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            self.add("shape", f"a system message cannot be read: {error}", **_name(entry))
            return None

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """What only the whole log shows."""
        self.findings.counts["conversations"] += 1
        if self.first is None:
            self._finish_empty()
        self._check_head()
        written_through = self._check_written()
        self._effects.finish(self.first, written_through)
        projection.check_members(self, written_through)
        if self.state is not None and written_through is None:
            projection.check_state(self, self.state)
        projection.check_statuses(self)
        if self._evidence is not None:
            self._evidence.finish(self)

    def _finish_empty(self) -> None:
        self.roster = Roster(complete=False)
        self.roster.adopt(self.members.values(), _END)
        counted = 0 if self.counter is None else self.counter.last_sequence_number
        if counted and not self._may_have_expired():
            self.add("I2", f"1..{counted} are missing, and nothing of it is old enough to be removed", counted=counted)
        self.last = counted
        self.digest_at_counter = None

    def _check_head(self) -> None:
        if self.state is None and self.first is not None:
            self.add("projection", "messages of a conversation that is not there", last=self.last)
        counter = self.counter
        if counter is None:
            if self.last:
                self.add("I2", "there is no `sequence_numbers` document", last=self.last)
            return
        counted = counter.last_sequence_number
        if counted > self.last:
            self.add("I2", "`sequence_numbers` counts more than the log has", counted=counted, last=self.last)
        elif counted < self.last and self.setting.settled:
            self.add("I2", "`sequence_numbers` has not come to the end of the log", counted=counted, last=self.last)
        if self.digest_at_counter is not None and counter.digest != self.digest_at_counter:
            self.add("counters", "`sequence_numbers` states another digest than the log", at=counted)
        countable = self.countable_at(counted)
        if countable is not None and counter.countable != countable:
            self.add(
                "counters",
                "`sequence_numbers` counts otherwise",
                at=counted,
                stored=counter.countable,
                counted=countable,
            )
        if self.state is not None:
            self._check_last(self.state.last_sequence_number)

    def _check_last(self, shown: int) -> None:
        if shown > self.last or (self.setting.settled and shown < self.last):
            self.add("counters", "`conversations.last_sequence_number` is not the log's", stored=shown, last=self.last)

    def _check_written(self) -> int | None:
        """Through which entry effects and projection are written; None: all are."""
        written = 0 if self.state is None else self.state.membership_seq
        if written >= self.last_system:
            return None
        if self.setting.settled and self.state is not None:
            self.add("projection", "system messages are not projected", through=written, last_system=self.last_system)
        return written


def _name(entry: Entry) -> dict[str, object]:
    return {"sequence": entry.sequence_number, "message_id": entry.message_id}


def _has_sequence(document: Document) -> bool:
    return isinstance(document.get("sequence_number"), int)
