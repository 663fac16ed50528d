"""The judge: every event of every simulated device in, a verdict out. It believes nobody, least of all the server.

Called with `record` by the clients while a run goes on, and with `verdict` when all devices have been given time to
catch up. What it demands is the contract of the protocol (C1, C3-C6, visibility, and what changes of messages and of
groups mean); each violation carries its evidence. What only the end shows is found by `judge`.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from msgspec import UNSET

from bench import journal
from bench.evidence import Conversation, Seen, Send, Showing, Stay, Violation
from bench.folds import GroupState, committed_hash, group_state, is_changed, system_event, target_of
from bench.judge import Judge
from protocol.models import LEAVING, MESSAGE_EVENTS, EventKind, MessageType, StoredMessage, SystemEvent

LEAVE_GRACE_SECONDS: Final = 2.0
"""A connection that breaks this soon after its user left may miss the end of the stay: nobody owes it a backlog."""
EVIDENCE_LIMIT: Final = 1000
"""Violations kept with their evidence; the rest are counted."""


class Ledger:
    """Collects events (`record`) and judges them (`verdict`). One ledger per run, in the process of the clients."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """sent, retried, acked, duplicate_acks, refused, pushed, connections, migrated, closed, asked, receipts; acked
        changes by their kind: edited, deleted, hidden, reacted, unreacted."""
        self._conversations: dict[str, Conversation] = {}
        self._sends: dict[tuple[str, str, str], Send] = {}
        self._connected: dict[str, set[str]] = {}
        self._opened: dict[tuple[str, str, int], float] = {}
        """(user, device, connection) → when it was opened."""
        self._newest: dict[tuple[str, str], int] = {}
        """(user, device) → the connection it speaks on, or spoke on last."""
        self._rewinds: dict[tuple[str, str], int] = {}
        """Devices with a `sync` under way, and which one of the run it is."""
        self._marks: dict[tuple[str, str], int] = {}
        """(conversation, user) → greatest sequence the user confirmed, read or sent."""
        self._claims: dict[tuple[str, str], int] = {}
        """(conversation, user) → greatest sequence a receipt ascribed to the user. Judged at the end: whoever sends has
        read up to there, and others may learn it before the sender's ack has come."""
        self._receipts: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        self._found: list[Violation] = []
        self._handlers = {
            journal.Sent: self._on_sent,
            journal.Acked: self._on_acked,
            journal.Refused: self._on_refused,
            journal.Pushed: self._on_pushed,
            journal.Confirmed: self._on_mark,
            journal.Read: self._on_mark,
            journal.Receipt: self._on_receipt,
            journal.Connected: self._on_connected,
            journal.Closed: self._on_closed,
            journal.Moving: self._on_moving,
            journal.Asked: self._on_asked,
            journal.Rewound: self._on_rewound,
            journal.Synced: self._on_synced,
            journal.Contradicted: self._on_contradicted,
            journal.Viewed: self._on_viewed,
            journal.Looked: self._on_looked,
        }

    def record(self, event: journal.Event) -> None:
        """One event, in the order in which they happened on this clock."""
        self._handlers[type(event)](event)  # type: ignore[operator]  # the table pairs each type with its handler

    def declare_direct(self, conversation_id: str, user_ids: tuple[str, str]) -> None:
        """A 1:1 conversation has no system messages: its two participants see it from its first message on."""
        conversation = self._conversation(conversation_id)
        conversation.direct = True
        for user_id in user_ids:
            conversation.stays.setdefault(user_id, [Stay(1)])

    def head(self, conversation_id: str) -> int:
        """The greatest sequence anybody was told of; 0 where there is none."""
        conversation = self._conversations.get(conversation_id)
        return 0 if conversation is None else conversation.head

    def group(self, conversation_id: str) -> GroupState:
        """What this group's log amounts to, as far as anybody was told of it."""
        return group_state(self._conversation(conversation_id).entries)

    def message(self, conversation_id: str, sequence: int) -> StoredMessage | None:
        """The entry with this sequence as it was sent, where anybody was shown it."""
        return self._conversation(conversation_id).entries.get(sequence)

    def _conversation(self, conversation_id: str) -> Conversation:
        conversation = self._conversations.get(conversation_id)
        if conversation is None:
            conversation = self._conversations[conversation_id] = Conversation()
        return conversation

    def _violation(self, kind: str, conversation_id: str, user_id: str, detail: str) -> None:
        self.counts["violations"] += 1
        if len(self._found) < EVIDENCE_LIMIT:
            self._found.append(Violation(kind=kind, conversation_id=conversation_id, user_id=user_id, detail=detail))

    # --- events ------------------------------------------------------------------------------------------------------

    def _on_sent(self, event: journal.Sent) -> None:
        self.counts["sent" if event.attempt == 1 else "retried"] += 1
        name = (event.conversation_id, event.user_id, event.idempotency_key)
        self._sends.setdefault(name, Send(event.content, event.change, event.target))
        if event.target:
            self._conversation(event.conversation_id).touched.add(event.target)

    def _on_acked(self, event: journal.Acked) -> None:
        name = (event.conversation_id, event.user_id, event.idempotency_key)
        conversation = self._conversation(event.conversation_id)
        send = self._sends.get(name)
        said = (event.message_id, event.sequence_number)
        if send is None:
            self._violation("ack", name[0], name[1], f"key {name[2]} was acked and never sent")
            return
        if send.refusal is not None:
            self._violation("ack", name[0], name[1], f"key {name[2]} was refused and then acked as {said}")
        if send.ack is not None and send.ack != said:
            self._violation("ack", name[0], name[1], f"key {name[2]} was acked as {send.ack} and as {said} (C1)")
        self._count_ack(event, send)
        send.ack = said
        if send.change is not None and event.message_id == send.target:
            return  # it was so already: acked as its target, and no entry of the log
        other = conversation.acked.setdefault(event.sequence_number, name[1:])
        if other != name[1:]:
            self._violation("ack", name[0], name[1], f"sequence {said[1]} was given to {other} and to {name[1:]} (C3)")
        if send.change is None:
            conversation.seen.setdefault((event.user_id, event.device_id), Seen()).runs.add(event.sequence_number)
        else:  # its entry has to come as all entries do
            conversation.known_at.setdefault(event.sequence_number, event.at)
        self._raise_mark(event.conversation_id, event.user_id, event.sequence_number)

    def _count_ack(self, event: journal.Acked, send: Send) -> None:
        if send.change is None:
            self.counts["duplicate_acks" if event.duplicate else "acked"] += 1
        elif send.ack is None:
            self.counts[send.change.value] += 1

    def _on_refused(self, event: journal.Refused) -> None:
        self.counts["refused" if not event.retryable else "deferred"] += 1
        if event.idempotency_key is None or event.retryable:
            return
        send = self._sends.get((event.conversation_id or "", event.user_id, event.idempotency_key))
        if send is None:
            return
        if send.ack is not None:
            detail = f"key {event.idempotency_key} was acked as {send.ack} and then refused: {event.code.value}"
            self._violation("ack", event.conversation_id or "", event.user_id, detail)
        send.refusal = event.code

    def _on_pushed(self, event: journal.Pushed) -> None:
        payload = event.payload
        conversation = self._conversation(payload.conversation_id)
        device = (event.user_id, event.device_id)
        seen = conversation.seen.get(device)
        if seen is None:
            seen = conversation.seen[device] = Seen()
        self._check_order(event, device, seen)
        self.counts["pushed"] += len(payload.messages)
        for message in payload.messages:
            sequence = message.sequence_number
            known = conversation.entries.get(sequence)
            if known is None:
                self._on_new_entry(payload.conversation_id, conversation, message, event.at)
            elif known is not message:
                self._check_same(payload.conversation_id, event.user_id, known, message)
                if is_changed(known) and not is_changed(message):
                    conversation.entries[sequence] = message
            self._note_showing(event, conversation, message)
            if message.idempotency_key is not UNSET and message.sender_id != event.user_id:
                detail = f"sequence {sequence} shows the sender's idempotency key"
                self._violation("leak", payload.conversation_id, event.user_id, detail)
            seen.runs.add(sequence)

    def _note_showing(self, event: journal.Pushed, conversation: Conversation, message: StoredMessage) -> None:
        live = event.payload.origin == "live"
        opened_at = self._opened.get((event.user_id, event.device_id, event.connection), 0.0)
        showing = Showing(message, event.user_id, 0.0 if live else event.at, 0.0 if live else opened_at)
        self._keep_showing(conversation, showing)

    @staticmethod
    def _keep_showing(conversation: Conversation, showing: Showing) -> None:
        """Remember what only the end can judge: a message somebody has begun to change, as this page shows it."""
        message = showing.message
        target = message.message_id
        if message.message_type is MessageType.SYSTEM:
            change = system_event(message)
            if change is not None and change.event is EventKind.HIDDEN:
                is_told = bool(change.actor) or target_of(message, change) != ""
                conversation.told.setdefault(message.sequence_number, set()).add((showing.user_id, is_told))
            if change is not None and change.event is EventKind.EDITED:
                target = target_of(message, change)
        if target in conversation.touched or is_changed(message):
            conversation.showings.append(showing)

    def _on_looked(self, event: journal.Looked) -> None:
        conversation = self._conversation(event.conversation_id)
        for message in event.messages:
            known = conversation.entries.get(message.sequence_number)
            if known is None and message.sequence_number in conversation.acked:  # sent when nobody else was there
                self._on_new_entry(event.conversation_id, conversation, message, event.at)
            elif known is None:
                detail = f"sequence {message.sequence_number} is in a page of the API and in nobody's log"
                self._violation("foreign", event.conversation_id, event.user_id, detail)
            else:
                self._check_same(event.conversation_id, event.user_id, known, message)
            self._keep_showing(conversation, Showing(message, event.user_id, event.at, event.asked_at))

    def _check_order(self, event: journal.Pushed, device: tuple[str, str], seen: Seen) -> None:
        """C4: on one connection the messages of one conversation come in sequence order.

        A `sync` takes the line back, once, to the cursor it named: pages already on their way come before that.
        """
        payload = event.payload
        if payload.origin not in ("live", "backlog", UNSET) or not payload.messages:
            return
        if event.connection < seen.connection:
            self._check_late_order(event, seen)
            return
        if seen.connection != event.connection:
            seen.connection = event.connection
            seen.late_high = seen.high
            seen.high = 0
        rewind = self._rewinds.get(device, 0)
        first = payload.messages[0].sequence_number
        if first <= seen.high and payload.origin == "backlog" and seen.restarted < rewind:
            seen.restarted = rewind
            seen.high = first - 1
        for message in payload.messages:
            sequence = message.sequence_number
            if sequence <= seen.high:
                when = "within a sync" if rewind else "outside of any sync"
                detail = f"sequence {sequence} ({payload.origin}) came after {seen.high} {when} (C4)"
                self._violation("order", payload.conversation_id, event.user_id, detail)
            seen.high = max(seen.high, sequence)

    def _check_late_order(self, event: journal.Pushed, seen: Seen) -> None:
        """C4 on the connection that a migrated device has left."""
        for message in event.payload.messages:
            sequence = message.sequence_number
            if event.payload.origin == "live" and sequence <= seen.late_high:
                detail = f"sequence {sequence} came after {seen.late_high} on a connection left behind (C4)"
                self._violation("order", event.payload.conversation_id, event.user_id, detail)
            seen.late_high = max(seen.late_high, sequence)

    def _on_rewound(self, event: journal.Rewound) -> None:
        self.counts["rewound"] += 1
        self._rewinds[(event.user_id, event.device_id)] = self.counts["rewound"]

    def _on_synced(self, event: journal.Synced) -> None:
        self._rewinds.pop((event.user_id, event.device_id), None)

    def _on_new_entry(
        self, conversation_id: str, conversation: Conversation, message: StoredMessage, at: float
    ) -> None:
        sequence = message.sequence_number
        conversation.entries[sequence] = message
        message_id = message.message_id if isinstance(message.message_id, str) else ""
        first = conversation.message_ids.setdefault(message_id, sequence)
        if first != sequence:
            detail = f"message {message_id} has the sequences {first} and {sequence}"
            self._violation("doubled", conversation_id, message.sender_id, detail)
        event = system_event(message)
        if event is None:
            return
        if event.event in LEAVING:
            self._note_leave(conversation, event, sequence, at)
        elif event.event in MESSAGE_EVENTS:
            conversation.known_at.setdefault(sequence, at)
            if target := target_of(message, event):
                conversation.touched.add(target)

    def _note_leave(self, conversation: Conversation, event: SystemEvent, sequence: int, at: float) -> None:
        for user_id in event.targets:
            stay = Stay(0)  # its first sequence is folded at the end, when the whole log is known
            stay.last = sequence
            stay.left_at = at
            stay.watching = set(self._connected.get(user_id, ()))
            conversation.stays.setdefault(user_id, []).append(stay)

    def _check_same(self, conversation_id: str, user_id: str, known: StoredMessage, message: StoredMessage) -> None:
        if known.content == message.content and known.content_hash == message.content_hash:
            same = known.message_id == message.message_id and known.sender_id == message.sender_id
        else:
            same = _identity(known) == _identity(message)
        if not same:
            detail = (
                f"sequence {known.sequence_number} is {known.message_id} of {known.sender_id} to one and "
                f"{message.message_id} of {message.sender_id} to another"
            )
            self._violation("altered", conversation_id, user_id, detail)

    def _on_mark(self, event: journal.Confirmed | journal.Read) -> None:
        self.counts["confirmed" if isinstance(event, journal.Confirmed) else "read"] += 1
        self._raise_mark(event.conversation_id, event.user_id, event.sequence_number)

    def _raise_mark(self, conversation_id: str, user_id: str, sequence: int) -> None:
        name = (conversation_id, user_id)
        if sequence > self._marks.get(name, 0):
            self._marks[name] = sequence

    def _on_receipt(self, event: journal.Receipt) -> None:
        self.counts["receipts"] += 1
        payload = event.payload
        conversation = self._conversation(payload.conversation_id)
        # In a group the mark is of all members, and its bearer changes: one line of marks per conversation.
        bearer = payload.user_id if conversation.direct else ""
        name = (payload.conversation_id, event.user_id, event.device_id, bearer)
        delivered, read = self._receipts.get(name, (0, 0))
        now_delivered = payload.delivered_through if isinstance(payload.delivered_through, int) else delivered
        now_read = payload.read_through if isinstance(payload.read_through, int) else read
        is_late = event.connection < self._newest.get((event.user_id, event.device_id), 0)
        if (now_delivered < delivered or now_read < read) and not is_late:
            detail = f"marks of {payload.user_id} went from {(delivered, read)} to {(now_delivered, now_read)} (C6)"
            self._violation("receipt", payload.conversation_id, event.user_id, detail)
        self._receipts[name] = (max(delivered, now_delivered), max(read, now_read))
        if conversation.direct:
            claim = (payload.conversation_id, payload.user_id)
            self._claims[claim] = max(self._claims.get(claim, 0), now_delivered, now_read)

    def _on_connected(self, event: journal.Connected) -> None:
        self.counts["connections"] += 1
        self.counts["migrated"] += event.migrated
        self._newest[(event.user_id, event.device_id)] = event.connection
        if event.migrated:
            self._note_break(event)
        self._connected.setdefault(event.user_id, set()).add(event.device_id)
        self._opened[(event.user_id, event.device_id, event.connection)] = event.opened_at

    def _on_closed(self, event: journal.Closed) -> None:
        self.counts["closed"] += 1
        self._rewinds.pop((event.user_id, event.device_id), None)
        self._connected.get(event.user_id, set()).discard(event.device_id)
        self._note_break(event)

    def _on_moving(self, event: journal.Moving) -> None:
        self.counts["moving"] += 1

    def _note_break(self, event: journal.Closed | journal.Connected) -> None:
        """A connection ended: what was on its way to it may be lost."""
        for conversation in self._conversations.values():
            for stay in conversation.stays.get(event.user_id, ()):
                if event.at - stay.left_at < LEAVE_GRACE_SECONDS:
                    stay.watching.discard(event.device_id)

    def _on_asked(self, event: journal.Asked) -> None:
        self.counts["asked"] += 1

    def _on_contradicted(self, event: journal.Contradicted) -> None:
        detail = f"digest at {event.sequence_number}: folded {event.folded}, stated {event.stated}"
        self._violation("digest", event.conversation_id, event.user_id, detail)

    def _on_viewed(self, event: journal.Viewed) -> None:
        self._conversation(event.conversation_id).viewed[(event.user_id, event.device_id)] = event

    # --- judgement ---------------------------------------------------------------------------------------------------

    def verdict(self) -> list[Violation]:
        """All violations so far and those only the end shows. Empty: ok. Does not change the ledger."""
        found = list(self._found)
        for (conversation_id, user_id), claimed in self._claims.items():
            confirmed = self._marks.get((conversation_id, user_id), 0)
            if claimed > confirmed:
                detail = f"{user_id} is said to have {claimed} and confirmed only {confirmed}"
                found.append(Violation(kind="receipt", conversation_id=conversation_id, user_id=user_id, detail=detail))
        return Judge(self._conversations, self._sends, found).judge()


def _identity(message: StoredMessage) -> tuple[object, str, str]:
    """What stays the same whatever is done to a message."""
    return message.message_id, message.sender_id, committed_hash(message)
