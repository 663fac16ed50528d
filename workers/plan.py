"""From a batch of log entries to a plan: authorise, dedupe, sequence. All in memory, atomic; `commit.py` carries it
out.

A plan moves the owner's state forward as if it were committed. Whoever cannot commit it drops the touched
conversations and plans again. What is allowed: `groups.py` (conversations) and `changes.py` (messages).
"""

from __future__ import annotations

import secrets
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

import msgspec

from protocol import codec, keys, records
from protocol.errors import ErrorCode
from protocol.events import Outgoing
from protocol.models import (
    SYSTEM_SENDER,
    Conversation,
    EventKind,
    Membership,
    MessageStatus,
    MessageType,
    StoredMessage,
    SystemEvent,
)
from protocol.watermarks import chain_digest, content_hash, message_status
from workers import changes, drafts, groups, metrics, notices
from workers.addressing import check_addressing, check_media
from workers.conversations import Conversations, Owned
from workers.delivery import Committed
from workers.drafts import Draft
from workers.interest import Interest, event_of
from workers.outcomes import Asked, acknowledged, refused
from workers.projection import Folded, Projection, effect_of
from workers.store.messages import Found, Key, from_ms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from protocol.media import MediaKind
    from workers.receipts import Place
    from workers.store.changes import Target
    from workers.store.media import Use

RECENT_KEYS = 50_000
"""Keys remembered per generation, two generations (about 300 bytes each); the unique index catches the rest."""


class Entry:
    """One log entry of a batch, with the message id it keeps through every attempt. `letter_id`: the dead letter that
    this entry is a replay of."""

    __slots__ = ("entry_id", "letter_id", "message_id", "record", "redelivered", "shard")

    def __init__(
        self, shard: int, entry_id: bytes, record: records.LogRecord, redelivered: bool, letter_id: str = ""
    ) -> None:
        self.shard = shard
        self.entry_id = entry_id
        self.record = record
        self.redelivered = redelivered
        self.letter_id = letter_id
        self.message_id = ""

    @property
    def conversation_id(self) -> str:
        return self.record.conversation_id

    @property
    def may_end_a_stay(self) -> bool:
        """Is somebody no member any more behind it?"""
        record = self.record
        return isinstance(record, records.RemoveParticipant) or (
            isinstance(record, records.ChangeConversation) and isinstance(record.change, records.Ban)
        )

    @property
    def key(self) -> Key:
        """What makes two entries the same one."""
        record = self.record
        if isinstance(record, records.SendMessage):
            return record.conversation_id, record.sender_id, record.idempotency_key
        if isinstance(record, records.ChangeMessage):
            # With its sender in front, so that the keys of different users never meet.
            return record.conversation_id, SYSTEM_SENDER, f"{record.sender_id}:{record.idempotency_key}"
        if isinstance(record, records.LookAtAccount):
            return record.conversation_id, SYSTEM_SENDER, f"member:{record.user_id}"
        return record.conversation_id, SYSTEM_SENDER, record.command_id


class Read(NamedTuple):
    """What was read for a batch before it is planned: committed messages by key, where reply targets lie, the targets
    of changes, the media that may be sent."""

    found: dict[Key, Found]
    replies: dict[str, Place]
    targets: dict[str, Target]
    media: Mapping[Use, MediaKind]


class Known(msgspec.Struct, frozen=True, gc=False):
    """A message that has a place: committed, or planned in this batch. Unseen by the collector: there are 100,000.

    `as_sent`: it still says what it said. `has_media`: the fingerprint knows its media (a deleted message has none).
    """

    message_id: str
    sequence_number: int
    created_ms: int
    fingerprint: int
    as_sent: bool = True
    has_media: bool = True


class Doubt(NamedTuple):
    """A message that its sender may not send now, unless it is the repeat of one that had its ack."""

    entry: Entry
    record: records.SendMessage
    refusal: groups.Refused
    place: int
    """Where among the plan's outcomes its own belongs."""


class Plan:
    """What one attempt at a batch will do once its documents are committed."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.committed: list[Committed] = []
        self.known: dict[Key, Known] = {}
        """Keys that have a place, looked up or planned here."""
        self.keys: list[tuple[Key, str, datetime]] = []
        """(key, message id, commit time) of the clients' messages committed here, for `idempotency_keys`."""
        self.owned: dict[str, Owned] = {}
        """The states that the documents were planned from: they may be forgotten before the commit has come through."""
        self.fresh: set[str] = set()
        """Ids of the messages this plan commits."""
        self.again: list[Committed] = []
        """Duplicates of earlier messages: delivered again, since their first delivery may have been lost with a
        worker.
        """
        self.outcomes: list[tuple[str, records.DownItem]] = []
        self.unwritten: list[Entry] = []
        """Entries without a document: refused, or asking for what is so. Nothing would tell the next owner how they
        were decided, so they are acknowledged before anybody hears of it, and decided once."""
        self.has_unwritten = False
        self.rejected: list[tuple[records.LogRecord, groups.Refused]] = []
        """What is not to be, and why: a replay among them has had its chance."""
        self.projections: dict[str, tuple[Owned, Projection]] = {}
        self.found: dict[str, bool] = {}
        """Conversations of entries that had their place already → is one of them no change of a message? Nobody may
        have heard of those entries, so their logs' heads are flushed again and the gateways' sweep finds them."""
        self.joined: list[tuple[Owned, list[str]]] = []
        """Whose stays begin here: what their accounts say is looked at once these are written."""
        self.deleted: set[str] = set()
        """Ids of messages that changes of this plan delete for all."""
        self.events: list[Outgoing] = []
        """Events of the messages committed here, where somebody listens."""
        self.notices: list[notices.Notice] = []
        """`conversation_update` frames, each for its users."""
        self.doubts: list[Doubt] = []
        """Messages that would be refused, and whose keys nobody has looked up."""
        self.created: list[tuple[Conversation, list[Membership]]] = []
        """Conversations that must exist before the documents: the log of an unknown one could not be loaded."""

    def note_known(self, found: Mapping[Key, Found]) -> None:
        """These keys were looked up, and have their place."""
        for key, hit in found.items():
            created_ms = int(hit.created_at.timestamp() * 1000)
            self.known[key] = Known(
                hit.message_id,
                hit.sequence_number,
                created_ms,
                hash(hit.fingerprint),
                as_sent=hit.as_sent,
                has_media=not hit.deleted,
            )

    def note_found(self, owned: Owned, *, is_activity: bool) -> None:
        """An entry of this conversation had its place already."""
        self.found[owned.conversation_id] = is_activity or self.found.get(owned.conversation_id, False)


class Planner:
    """Plans batches of one lane against the owner's memory: authorise, dedupe, take the next sequence. Never awaits."""

    def __init__(self, conversations: Conversations, edit_seconds: int, interest: Interest) -> None:
        self._conversations = conversations
        self._interest = interest
        self._edit_seconds = edit_seconds
        self._recent_keys: dict[Key, Known] = {}
        self._older_keys: dict[Key, Known] = {}
        self._entropy = count(secrets.randbits(47))

    def plan(self, batch: Sequence[Entry], read: Read, now_ms: int) -> Plan:
        """What these entries become."""
        plan = Plan()
        plan.note_known(read.found)
        for entry in batch:
            record = entry.record
            if isinstance(record, records.SendMessage):
                self._plan_message(entry, record, plan, read, now_ms)
            elif isinstance(record, records.ChangeMessage):
                self._plan_change(entry, record, plan, read.targets, now_ms)
            elif isinstance(record, records.LookAtAccount):
                plan.outcomes.append((record.instance, records.CommandOutcome(record.request, None, "", b"")))
            else:
                self._plan_command(entry, record, plan, now_ms)
        return plan

    def settle_doubts(self, plan: Plan, found: Mapping[Key, Found]) -> None:
        """Refuse what is doubtful, but for what has its place: among the keys looked up since, or in this very batch,
        where its sender was allowed to send it a moment later."""
        plan.note_known(found)
        others, plan.outcomes, through = plan.outcomes, [], 0
        for entry, record, refusal, place in plan.doubts:
            plan.outcomes += others[through:place]
            through = place
            owned = self._conversations.get(record.conversation_id)
            known = self._known(entry.key, plan)
            if owned is None or known is None:
                self._reject(record, plan, refusal)
            else:
                self._plan_repeat(entry, record, owned, known, plan)
        plan.outcomes += others[through:]

    def knows(self, entry: Entry) -> bool:
        """Is this entry's key remembered, so that nobody has to be asked whether it is a repeat?"""
        return entry.key in self._recent_keys or entry.key in self._older_keys

    def remember(self, batch: Sequence[Entry], plan: Plan) -> None:
        """The plan is durable: its keys answer their own repeats."""
        self._recent_keys.update(plan.known)
        if len(self._recent_keys) >= RECENT_KEYS:
            self._older_keys, self._recent_keys = self._recent_keys, {}
        if plan.has_unwritten:
            plan.unwritten = [entry for entry in batch if not self.knows(entry)]

    def _known(self, key: Key, plan: Plan) -> Known | None:
        return plan.known.get(key) or self._recent_keys.get(key) or self._older_keys.get(key)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _plan_message(
        self,
        entry: Entry,
        record: records.SendMessage,
        plan: Plan,
        read: Read,
        now_ms: int,
    ) -> None:
        owned = self._conversations.get(record.conversation_id)
        if owned is None:
            self._reject(record, plan, _NO_CONVERSATION)
            return
        key = entry.key
        known = self._known(key, plan)
        if known is not None:
            self._plan_repeat(entry, record, owned, known, plan)
            return
        member = owned.members.get(record.sender_id)
        refusal: groups.Refused | None = _NO_CONVERSATION
        if member is not None:
            refusal = (
                groups.check_speech(owned, member, now_ms)
                or check_addressing(record, owned, member.join_seq, read.replies, plan.deleted)
                or (None if record.media_url is None else check_media(record, record.media_url, read.media))
            )
        if refusal is not None:
            plan.doubts.append(Doubt(entry, record, refusal, len(plan.outcomes)))
            return
        has_event = self._interest.wants(owned.conversation, record.receiver_id)
        draft = drafts.of_message(record, owned, now_ms, has_event=has_event)
        message = self._append(entry, owned, plan, draft, now_ms)
        if draft.has_event:
            event = event_of(draft, owned.conversation, entry.message_id, owned.last)
            plan.events.append(Outgoing(entry.message_id, event))
        fingerprint = _fingerprint(record, draft.hashed)
        known = Known(entry.message_id, owned.last, owned.created_ms, fingerprint, as_sent=not draft.keeps_hash)
        plan.known[key] = known
        plan.keys.append((key, entry.message_id, message.created_at))
        plan.committed.append(Committed(message, owned.roster, record.instance, record.connection))
        self._acknowledge(record, known, MessageStatus.SENT, plan)

    def _append(self, entry: Entry, owned: Owned, plan: Plan, draft: Draft, now_ms: int) -> StoredMessage:
        """Take the next place of the log: the document, and the message as the others see it."""
        if not entry.message_id:
            entry.message_id = keys.new_message_id(now_ms, next(self._entropy), entry.shard)
        message_id = entry.message_id
        sequence = owned.last + 1
        owned.last = sequence
        owned.digest = chain_digest(owned.digest, message_id, draft.sender_id, sequence, draft.hashed)
        if draft.message_type is not MessageType.SYSTEM:
            owned.countable += 1
        # Never before its predecessor, so that retention removes a prefix of the log only.
        owned.created_ms = max(now_ms, owned.created_ms)
        message = drafts.place(draft, message_id, owned)
        plan.documents.append(drafts.document(message, draft, owned))
        plan.fresh.add(message_id)
        plan.owned[owned.conversation_id] = owned
        return message

    def _plan_repeat(self, entry: Entry, record: records.SendMessage, owned: Owned, known: Known, plan: Plan) -> None:
        """Answer a message whose key has its place."""
        fingerprint = _fingerprint(record, content_hash(record.content), known.has_media)
        if self._plan_duplicate(entry, record, owned, known, plan, fingerprint):
            self._tell_again(record, owned, known, plan)

    def _plan_duplicate(
        self, entry: Entry, record: Asked, owned: Owned, known: Known, plan: Plan, fingerprint: int
    ) -> bool:
        """Acknowledge what has its place already; False where the key was used for something else."""
        if known.fingerprint != fingerprint:
            self._reject(record, plan, _OTHER_PAYLOAD)
            return False
        # An entry that met its own document was committed by an earlier attempt: nobody has heard of it yet.
        is_first = known.message_id == entry.message_id or entry.redelivered
        plan.note_found(owned, is_activity=isinstance(record, records.SendMessage))
        status = _status(owned, record.sender_id, known.sequence_number)
        self._acknowledge(record, known, status, plan, duplicate=not is_first)
        metrics.INGESTED.labels("duplicate").inc()
        return True

    @staticmethod
    def _tell_again(record: records.SendMessage, owned: Owned, known: Known, plan: Plan) -> None:
        if known.message_id in plan.fresh or not known.as_sent or record.sender_id not in owned.members:
            return
        message = StoredMessage(
            message_id=known.message_id,
            conversation_id=owned.conversation_id,
            sequence_number=known.sequence_number,
            sender_id=record.sender_id,
            receiver_id=record.receiver_id or owned.default_receiver(record.sender_id),
            message_type=record.message_type,
            content=record.content,
            media_url=msgspec.UNSET if record.media_url is None else record.media_url,
            reply_to_message_id=msgspec.UNSET if record.reply_to_message_id is None else record.reply_to_message_id,
            timestamp=from_ms(record.timestamp),
            status=MessageStatus.SENT,
            created_at=from_ms(known.created_ms),
            forwarded=True if record.forwarded else msgspec.UNSET,
        )
        # Who came later, or has come back since, does not see it.
        roster = tuple(name for name, member in owned.members.items() if member.join_seq <= known.sequence_number)
        plan.again.append(Committed(message, roster, record.instance, record.connection))

    @staticmethod
    def _acknowledge(
        record: Asked, known: Known, status: MessageStatus, plan: Plan, *, duplicate: bool = False
    ) -> None:
        plan.outcomes.append(
            acknowledged(record, known.message_id, known.sequence_number, known.created_ms, status, duplicate=duplicate)
        )

    @staticmethod
    def _reject(record: Asked, plan: Plan, why: groups.Refused) -> None:
        plan.has_unwritten = True
        metrics.INGESTED.labels("rejected").inc()
        plan.rejected.append((record, why))
        plan.outcomes.append(refused(record, why.code, why.message))

    # --- changes of messages -----------------------------------------------------------------------------------------

    def _plan_change(
        self, entry: Entry, record: records.ChangeMessage, plan: Plan, targets: dict[str, Target], now_ms: int
    ) -> None:
        owned = self._conversations.get(record.conversation_id)
        if owned is None:
            self._reject(record, plan, _NO_CONVERSATION)
            return
        known = self._known(entry.key, plan)
        if known is not None:
            content = codec.encode_value(changes.event_of(record)).decode()
            fingerprint = _event_fingerprint(content_hash(content))
            self._plan_duplicate(entry, record, owned, known, plan, fingerprint)
            return
        target = targets.get(record.message_id)
        verdict = changes.decide(record, owned, target, now_ms, self._edit_seconds)
        match verdict:
            case groups.Refused():
                self._reject(record, plan, verdict)
            case groups.NoChange():
                assert target is not None
                plan.has_unwritten = True
                place = Known(target.message_id, target.sequence_number, target.created_ms, 0)
                self._acknowledge(record, place, _status(owned, record.sender_id, place.sequence_number), plan)
            case groups.Change(event):
                assert target is not None
                self._append_change(entry, record, owned, target, event, plan, now_ms)
            case _:
                assert_never(verdict)

    def _append_change(
        self,
        entry: Entry,
        record: records.ChangeMessage,
        owned: Owned,
        target: Target,
        event: SystemEvent,
        plan: Plan,
        now_ms: int,
    ) -> None:
        """A change takes its place in the log, and its target changes with it."""
        is_edit = event.event is EventKind.EDITED
        hidden_for = record.sender_id if event.event is EventKind.HIDDEN else ""
        draft = _event_draft(event, owned, entry.key[2], now_ms)._replace(
            target_id=target.message_id,
            hidden_for=hidden_for,
            keeps_hash=is_edit,
            expires_ms=target.expires_ms if is_edit else 0,
            hidden_by=frozenset(target.hidden_by if is_edit else ()),
        )
        message, _ = self._append_event(entry, owned, event, draft, plan, now_ms)
        effect = effect_of(event, owned.last, message.created_at, target.message_id, hidden_for, target.content_hash)
        if effect is not None:
            plan.projections[owned.conversation_id][1].add_effect(effect)
        changes.move_on(target, record)
        if event.event in (EventKind.EDITED, EventKind.DELETED):
            key = (owned.conversation_id, target.sender_id, target.key)
            if (known := self._known(key, plan)) is not None:
                plan.known[key] = msgspec.structs.replace(known, as_sent=False)
        if target.deleted:
            plan.deleted.add(target.message_id)
        plan.committed.append(Committed(message, owned.roster, "", 0, hidden_for))
        self._acknowledge(record, plan.known[entry.key], MessageStatus.SENT, plan)

    def _append_event(
        self,
        entry: Entry,
        owned: Owned,
        event: SystemEvent,
        draft: Draft,
        plan: Plan,
        now_ms: int,
    ) -> tuple[StoredMessage, Folded]:
        """Any system message: its place, and what it makes of the conversation."""
        message = self._append(entry, owned, plan, draft, now_ms)
        _, projection = plan.projections.setdefault(owned.conversation_id, (owned, Projection()))
        folded = owned.fold_event(event, owned.last)
        projection.add(event, folded, owned.last, from_ms(owned.created_ms))
        fingerprint = _event_fingerprint(draft.request_hash or draft.hashed)
        plan.known[entry.key] = Known(entry.message_id, owned.last, owned.created_ms, fingerprint)
        return message, folded

    # --- commands about conversations --------------------------------------------------------------------------------

    def _plan_command(self, entry: Entry, record: records.GroupCommand, plan: Plan, now_ms: int) -> None:
        owned = self._conversations.get(record.conversation_id)
        known = self._known(entry.key, plan)
        if known is not None and owned is not None:
            if known.fingerprint != _event_fingerprint(groups.request_hash(record)):
                self._refuse(record, plan, _OTHER_PAYLOAD)
                return
            # Loading has folded its event already; who waits is told that it is so.
            plan.note_found(owned, is_activity=True)
            self._answer(record, plan, owned)
            return
        match record:
            case records.CreateConversation():
                self._plan_create(entry, record, plan, owned, now_ms)
            case records.AddParticipants() | records.RemoveParticipant() | records.ChangeConversation():
                if owned is None:
                    self._refuse(record, plan, _NO_CONVERSATION)
                    return
                verdict = groups.decide(record, owned)
                match verdict:
                    case groups.Refused():
                        self._refuse(record, plan, verdict)
                    case groups.NoChange():
                        plan.has_unwritten = True
                        self._answer(record, plan, owned)
                    case groups.Change(event):
                        self._append_step(entry, record, owned, event, plan, now_ms)
                    case _:
                        assert_never(verdict)
            case _:
                assert_never(record)

    def _plan_create(
        self,
        entry: Entry,
        record: records.CreateConversation,
        plan: Plan,
        owned: Owned | None,
        now_ms: int,
    ) -> None:
        if owned is not None and (owned.last > 0 or not owned.is_group):
            self._answer(record, plan, owned)
            return
        refusal = groups.check_create(record)
        if refusal is not None:
            self._refuse(record, plan, refusal)
            return
        conversation = groups.new_conversation(record, from_ms(now_ms))
        owned = Owned(entry.shard, conversation)
        if not owned.is_group:
            members = groups.first_members(record)
            owned.adopt(members)
            plan.created.append((conversation, members))
            plan.joined.append((owned, list(owned.roster)))
            plan.notices.append(notices.created(owned, owned.roster))
            self._answer(record, plan, owned)
        else:
            plan.created.append((conversation, []))
            self._append_step(entry, record, owned, groups.created_event(record), plan, now_ms)
        self._conversations.put(owned)

    def _append_step(
        self,
        entry: Entry,
        record: records.GroupCommand,
        owned: Owned,
        event: SystemEvent,
        plan: Plan,
        now_ms: int,
    ) -> None:
        """A step of the conversation's state takes its place in the log, and the state goes along."""
        before = owned.roster
        draft = _event_draft(event, owned, record.command_id, now_ms)
        draft = draft._replace(request_hash=groups.request_hash(record))
        message, folded = self._append_event(entry, owned, event, draft, plan, now_ms)
        if folded.joined:
            plan.joined.append((owned, [membership.user_id for membership in folded.joined]))
        # Who was removed sees that it happened; who was added sees it as the first message.
        plan.committed.append(Committed(message, before if folded.left else owned.roster, "", 0))
        plan.notices += notices.of_event(owned, event.event, folded)
        self._answer(record, plan, owned)

    @staticmethod
    def _answer(record: records.GroupCommand, plan: Plan, owned: Owned) -> None:
        body = codec.encode_value(owned.shown())
        plan.outcomes.append((record.instance, records.CommandOutcome(record.request, None, "", body)))

    @staticmethod
    def _refuse(record: records.GroupCommand, plan: Plan, refused: groups.Refused) -> None:
        metrics.INGESTED.labels("rejected").inc()
        plan.has_unwritten = True
        plan.rejected.append((record, refused))
        plan.outcomes.append(
            (record.instance, records.CommandOutcome(record.request, refused.code, refused.message, b""))
        )


_NO_CONVERSATION = groups.Refused(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
_OTHER_PAYLOAD = groups.Refused(ErrorCode.IDEMPOTENCY_CONFLICT, "this key was used for something else")


def _event_draft(event: SystemEvent, owned: Owned, key: str, now_ms: int) -> Draft:
    content = codec.encode_value(event).decode()
    return Draft(
        SYSTEM_SENDER,
        owned.conversation_id,
        MessageType.SYSTEM,
        content,
        content_hash(content),
        key,
        now_ms,
    )


def _status(owned: Owned, sender_id: str, sequence: int) -> MessageStatus:
    """How far the others are, as a sender may know it."""
    return message_status(
        sequence, [member.shown_marks() for member in owned.members.values() if member.user_id != sender_id]
    )


def _fingerprint(record: records.SendMessage, hashed: bytes, has_media: bool = True) -> int:
    """Hash of what makes two payloads under one key the same (see `store.messages.fingerprint`)."""
    media = record.media_url if has_media else None
    return hash((hashed, record.message_type.value, media, record.reply_to_message_id))


def _event_fingerprint(hashed: bytes) -> int:
    """The same for an entry that somebody asked for: `hashed` is what they asked, or what it says."""
    return hash((hashed, MessageType.SYSTEM.value, None, None))
