"""From a batch of log entries to a plan: authorise, dedupe, sequence. All in memory, atomic; `commit.py` carries it
out.

A plan moves the owner's state forward as if it were committed. Whoever cannot commit it drops the touched
conversations and plans again.
"""

from __future__ import annotations

import secrets
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

import msgspec

from protocol import codec, frames, keys, records
from protocol.errors import ErrorCode
from protocol.models import (
    SYSTEM_SENDER,
    Conversation,
    Membership,
    MessageStatus,
    MessageType,
    StoredMessage,
    SystemEvent,
)
from protocol.watermarks import chain_digest, content_hash, message_status
from workers import groups, metrics
from workers.conversations import Conversations, Owned, Projection
from workers.delivery import Committed
from workers.store.messages import Found, Key, from_ms

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from workers.receipts import Place

RECENT_KEYS = 50_000
"""Keys remembered per generation, two generations (about 300 bytes each); the unique index catches the rest."""

LogRecord = records.SendMessage | records.GroupCommand


class Entry:
    """One log entry of a batch, with the message id it keeps through every attempt."""

    __slots__ = ("entry_id", "message_id", "record", "redelivered", "shard")

    def __init__(self, shard: int, entry_id: bytes, record: LogRecord, redelivered: bool) -> None:
        self.shard = shard
        self.entry_id = entry_id
        self.record = record
        self.redelivered = redelivered
        self.message_id = ""

    @property
    def conversation_id(self) -> str:
        return self.record.conversation_id

    @property
    def key(self) -> Key:
        """What makes two entries the same one."""
        record = self.record
        if isinstance(record, records.SendMessage):
            return record.conversation_id, record.sender_id, record.idempotency_key
        return record.conversation_id, SYSTEM_SENDER, record.command_id


class Draft(NamedTuple):
    """A message that may be written, without its place. `key`: of its sender, or the id of a group command."""

    sender_id: str
    receiver_id: str
    message_type: MessageType
    content: str
    key: str
    timestamp_ms: int
    media_url: str | None = None
    reply_to: str | None = None


class Known(msgspec.Struct, frozen=True, gc=False):
    """A message that has a place: committed, or planned in this batch. Unseen by the collector: there are 100,000."""

    message_id: str
    sequence_number: int
    countable: int
    created_ms: int
    fingerprint: int


class Plan:
    """What one attempt at a batch will do once its documents are committed."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.committed: list[Committed] = []
        self.known: dict[Key, Known] = {}
        """Keys that have a place, looked up or planned here."""
        self.keys: list[tuple[Key, str, datetime]] = []
        """(key, message id, commit time) of the clients' messages committed here, for `idempotency_keys`."""
        self.fresh: set[str] = set()
        """Ids of the messages this plan commits."""
        self.again: list[Committed] = []
        """Duplicates of earlier messages: delivered again, since their first delivery may have been lost with a
        worker.
        """
        self.outcomes: list[tuple[str, records.DownItem]] = []
        self.projections: dict[str, tuple[Owned, Projection]] = {}
        self.created: list[tuple[Conversation, list[Membership]]] = []
        """Conversations that must exist before the documents: the log of an unknown one could not be loaded."""


class Planner:
    """Plans batches of one lane against the owner's memory: authorise, dedupe, take the next sequence. Never awaits."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations
        self._recent_keys: dict[Key, Known] = {}
        self._older_keys: dict[Key, Known] = {}
        self._entropy = count(secrets.randbits(47))

    def plan(self, batch: Sequence[Entry], found: dict[Key, Found], replies: dict[str, Place], now_ms: int) -> Plan:
        """What these entries become. `found`: committed messages looked up by key; `replies`: where reply targets
        lie.
        """
        plan = Plan()
        for key, hit in found.items():
            created_ms = int(hit.created_at.timestamp() * 1000)
            plan.known[key] = Known(
                hit.message_id, hit.sequence_number, hit.countable, created_ms, hash(hit.fingerprint)
            )
        for entry in batch:
            if isinstance(entry.record, records.SendMessage):
                self._plan_message(entry, entry.record, plan, replies, now_ms)
            else:
                self._plan_command(entry, entry.record, plan, now_ms)
        return plan

    def remember(self, plan: Plan) -> None:
        """The plan is durable: its keys answer their own repeats."""
        self._recent_keys.update(plan.known)
        if len(self._recent_keys) >= RECENT_KEYS:
            self._older_keys, self._recent_keys = self._recent_keys, {}

    def _known(self, key: Key, plan: Plan) -> Known | None:
        return plan.known.get(key) or self._recent_keys.get(key) or self._older_keys.get(key)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _plan_message(
        self,
        entry: Entry,
        record: records.SendMessage,
        plan: Plan,
        replies: dict[str, Place],
        now_ms: int,
    ) -> None:
        owned = self._conversations.get(record.conversation_id)
        member = None if owned is None else owned.members.get(record.sender_id)
        key = entry.key
        known = self._known(key, plan)
        if owned is not None and known is not None:
            self._plan_duplicate(entry, record, owned, known, plan)
            return
        if owned is None or member is None:
            self._reject(record, plan, ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation")
            return
        if (reason := _check_addressing(record, owned, member.join_seq, replies)) is not None:
            self._reject(record, plan, ErrorCode.VALIDATION_FAILED, reason)
            return
        draft = Draft(
            record.sender_id,
            record.receiver_id or owned.default_receiver(record.sender_id),
            record.message_type,
            record.content,
            record.idempotency_key,
            record.timestamp,
            record.media_url,
            record.reply_to_message_id,
        )
        message = self._append(entry, owned, plan, draft, now_ms)
        known = Known(entry.message_id, owned.last, owned.countable, owned.created_ms, _fingerprint(record))
        plan.known[key] = known
        plan.keys.append((key, entry.message_id, message.created_at))
        plan.committed.append(Committed(message, owned.roster, record.instance, record.connection))
        plan.outcomes.append((record.instance, _ack(record, known, MessageStatus.SENT, duplicate=False)))

    def _append(self, entry: Entry, owned: Owned, plan: Plan, draft: Draft, now_ms: int) -> StoredMessage:
        """Take the next place of the log: the document, and the message as the others see it."""
        if not entry.message_id:
            entry.message_id = keys.new_message_id(now_ms, next(self._entropy), entry.shard)
        message_id = entry.message_id
        sequence = owned.last + 1
        owned.last = sequence
        owned.digest = chain_digest(owned.digest, message_id, draft.sender_id, sequence, content_hash(draft.content))
        if draft.message_type is not MessageType.SYSTEM:
            owned.countable += 1
        # Never before its predecessor, so that retention removes a prefix of the log only.
        owned.created_ms = max(now_ms, owned.created_ms)
        message = StoredMessage(
            message_id=message_id,
            conversation_id=owned.conversation_id,
            sequence_number=sequence,
            sender_id=draft.sender_id,
            receiver_id=draft.receiver_id,
            message_type=draft.message_type,
            content=draft.content,
            media_url=msgspec.UNSET if draft.media_url is None else draft.media_url,
            reply_to_message_id=msgspec.UNSET if draft.reply_to is None else draft.reply_to,
            timestamp=from_ms(draft.timestamp_ms),
            status=MessageStatus.SENT,
            created_at=from_ms(owned.created_ms),
        )
        plan.documents.append(_document(message, draft, owned))
        plan.fresh.add(message_id)
        return message

    def _plan_duplicate(
        self, entry: Entry, record: records.SendMessage, owned: Owned, known: Known, plan: Plan
    ) -> None:
        if known.fingerprint != _fingerprint(record):
            self._reject(
                record,
                plan,
                ErrorCode.IDEMPOTENCY_CONFLICT,
                "this key was used for another message",
                record.conversation_id,
            )
            return
        # An entry that met its own document was committed by an earlier attempt: nobody has heard of it yet.
        is_first = known.message_id == entry.message_id or entry.redelivered
        marks = [(m.delivered, m.read) for m in owned.members.values() if m.user_id != record.sender_id]
        status = message_status(known.sequence_number, marks)
        plan.outcomes.append((record.instance, _ack(record, known, status, duplicate=not is_first)))
        if known.message_id not in plan.fresh and record.sender_id in owned.members:
            plan.again.append(self._repeat(record, owned, known))
        metrics.INGESTED.labels("duplicate").inc()

    @staticmethod
    def _repeat(record: records.SendMessage, owned: Owned, known: Known) -> Committed:
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
        )
        return Committed(message, owned.roster, record.instance, record.connection)

    @staticmethod
    def _reject(
        record: records.SendMessage, plan: Plan, code: ErrorCode, reason: str, conversation_id: str | None = None
    ) -> None:
        metrics.INGESTED.labels("rejected").inc()
        frame = frames.error_frame(
            code,
            reason,
            client_message_id=record.client_message_id or None,
            idempotency_key=record.idempotency_key,
            conversation_id=conversation_id or record.conversation_id,
        )
        plan.outcomes.append(
            (
                record.instance,
                records.Outcome(record.connection, record.idempotency_key, codec.JSON.encode(frame)),
            )
        )

    # --- group commands ----------------------------------------------------------------------------------------------

    def _plan_command(self, entry: Entry, record: records.GroupCommand, plan: Plan, now_ms: int) -> None:
        owned = self._conversations.get(record.conversation_id)
        known = self._known(entry.key, plan)
        if known is not None and owned is not None:
            # Loading has folded its event already; who waits is told that it is so.
            self._answer(record, plan, owned)
            return
        match record:
            case records.CreateConversation():
                self._plan_create(entry, record, plan, owned, now_ms)
            case records.AddParticipants() | records.RemoveParticipant():
                if owned is None:
                    self._refuse(record, plan, groups.Refused(ErrorCode.CONVERSATION_NOT_FOUND, "no such conversation"))
                    return
                verdict = groups.decide(record, owned)
                match verdict:
                    case groups.Refused():
                        self._refuse(record, plan, verdict)
                    case groups.NoChange():
                        self._answer(record, plan, owned)
                    case groups.Change(event):
                        self._append_event(entry, record, owned, event, plan, now_ms)
                    case _:
                        assert_never(verdict)
            case records.ChangeConversation():
                self._refuse(record, plan, groups.Refused(ErrorCode.FORBIDDEN, "not allowed here"))
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
            self._answer(record, plan, owned)
        else:
            plan.created.append((conversation, []))
            self._append_event(entry, record, owned, groups.created_event(record), plan, now_ms)
        self._conversations.put(owned)

    def _append_event(
        self,
        entry: Entry,
        record: records.GroupCommand,
        owned: Owned,
        event: SystemEvent,
        plan: Plan,
        now_ms: int,
    ) -> None:
        """A membership change takes its place in the log, and the members change with it."""
        content = codec.encode_value(event).decode()
        before = owned.roster
        draft = Draft(
            SYSTEM_SENDER, owned.conversation_id, MessageType.SYSTEM, content, record.command_id, timestamp_ms=now_ms
        )
        message = self._append(entry, owned, plan, draft, now_ms)
        _, projection = plan.projections.setdefault(owned.conversation_id, (owned, Projection()))
        projection.add(event, owned.fold_event(event, owned.last), owned.last)
        known = Known(entry.message_id, owned.last, owned.countable, owned.created_ms, 0)
        plan.known[entry.key] = known
        # Who was removed sees that it happened; who was added sees it as the first message.
        roster = before if event.event in ("removed", "left") else owned.roster
        plan.committed.append(Committed(message, roster, "", 0))
        self._answer(record, plan, owned)

    @staticmethod
    def _answer(record: records.GroupCommand, plan: Plan, owned: Owned) -> None:
        conversation = msgspec.structs.replace(
            owned.conversation, participants=list(owned.roster), last_sequence_number=owned.last
        )
        plan.outcomes.append(
            (record.instance, records.CommandOutcome(record.request, None, "", codec.encode_value(conversation)))
        )

    @staticmethod
    def _refuse(record: records.GroupCommand, plan: Plan, refused: groups.Refused) -> None:
        metrics.INGESTED.labels("rejected").inc()
        plan.outcomes.append(
            (record.instance, records.CommandOutcome(record.request, refused.code, refused.message, b""))
        )


def _document(message: StoredMessage, draft: Draft, owned: Owned) -> dict[str, Any]:
    """The `messages` document of a message that has just taken its place (see `models.MessageDocument`)."""
    document = {
        "_id": message.message_id,
        "idempotency_key": draft.key,
        "conversation_id": message.conversation_id,
        "sequence_number": message.sequence_number,
        "sender_id": draft.sender_id,
        "receiver_id": draft.receiver_id,
        "type": draft.message_type.value,
        "content": draft.content,
        "timestamp": message.timestamp,
        "status": "sent",
        "created_at": message.created_at,
        "digest": owned.digest,
        "countable": owned.countable,
    }
    if draft.media_url is not None:
        document["media_url"] = draft.media_url
    if draft.reply_to is not None:
        document["reply_to_message_id"] = draft.reply_to
    return document


def _fingerprint(record: records.SendMessage) -> int:
    """Hash of what makes two payloads under one key the same (see `store.messages.fingerprint`)."""
    return hash((record.content, record.message_type.value, record.media_url, record.reply_to_message_id))


def _check_addressing(
    record: records.SendMessage, owned: Owned, join_seq: int, replies: dict[str, Place]
) -> str | None:
    """Does receiver_id fit the conversation, and is the reply target a visible message of it? A reason, or None."""
    receiver = record.receiver_id
    if receiver:
        if owned.is_group:
            if receiver != owned.conversation_id:
                return "receiver_id of a group message is empty or the conversation"
        elif receiver == record.sender_id or receiver not in owned.members:
            return "receiver_id is not the other participant"
    if record.reply_to_message_id is not None:
        target = replies.get(record.reply_to_message_id)
        if target is None or target.conversation_id != owned.conversation_id or target.sequence_number < join_seq:
            return "reply_to_message_id is not a message of this conversation"
    return None


def _ack(record: records.SendMessage, known: Known, status: MessageStatus, duplicate: bool) -> records.Outcome:
    frame = frames.MessageAck(
        client_message_id=record.client_message_id,
        payload=frames.MessageAckPayload(
            message_id=known.message_id,
            sequence_number=known.sequence_number,
            status=status,
            timestamp=known.created_ms,
            conversation_id=record.conversation_id,
            idempotency_key=record.idempotency_key,
            duplicate=True if duplicate else msgspec.UNSET,
        ),
    )
    return records.Outcome(record.connection, record.idempotency_key, codec.JSON.encode(frame))
