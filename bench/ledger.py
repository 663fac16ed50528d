"""The judge: every event of every simulated device in, a verdict out. It believes nobody, least of all the server.

Called with `record` by the clients while a run goes on, and with `verdict` when all devices have been given time to
catch up. What it demands is the contract of the protocol (C1, C3-C6 and visibility); each violation carries its
evidence. Who may see what is folded from the system messages in the log itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec
from msgspec import UNSET

from bench import journal
from bench.runs import Runs
from protocol import codec
from protocol.models import SYSTEM_SENDER, MessageType, StoredMessage, SystemEvent

LEAVE_GRACE_SECONDS: Final = 2.0
"""A connection that breaks this soon after its user left may miss the end of the stay: nobody owes it a backlog."""
EVIDENCE_LIMIT: Final = 1000
"""Violations kept with their evidence; the rest are counted."""


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """`kind`: lost, doubled, order, ack, altered, foreign, hole, receipt, unanswered, invented, digest, leak."""

    kind: str
    conversation_id: str
    user_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} (conversation {self.conversation_id}, user {self.user_id})"


class _Seen:
    """What one device saw of one conversation. `high`: the pushed sequence behind which the next one has to come;
    `restarted`: the `sync` that has already brought the line back once.
    """

    __slots__ = ("connection", "high", "restarted", "runs")

    def __init__(self) -> None:
        self.connection = 0
        self.high = 0
        self.restarted = 0
        self.runs = Runs()


class _Stay:
    """A user's visible range. `watching`: devices that were connected when the end of it became known."""

    __slots__ = ("first", "last", "left_at", "watching")

    def __init__(self, first: int) -> None:
        self.first = first
        self.last: int | None = None
        self.left_at = 0.0
        self.watching: set[str] = set()


class _Conversation:
    __slots__ = ("acked", "direct", "entries", "message_ids", "seen", "stays")

    def __init__(self) -> None:
        self.entries: dict[int, StoredMessage] = {}
        self.message_ids: dict[str, int] = {}
        self.acked: dict[int, tuple[str, str]] = {}
        """Sequence → (sender, idempotency key) of the send that was acked with it."""
        self.seen: dict[tuple[str, str], _Seen] = {}
        self.stays: dict[str, list[_Stay]] = {}
        self.direct = False


class _Send:
    __slots__ = ("ack", "content", "refused")

    def __init__(self, content: str) -> None:
        self.content = content
        self.ack: tuple[str, int] | None = None
        self.refused = False


class Ledger:
    """Collects events (`record`) and judges them (`verdict`). One ledger per run, in the process of the clients."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """sent, retried, acked, duplicate_acks, refused, pushed, repeated, connections, closed, asked, receipts."""
        self._conversations: dict[str, _Conversation] = {}
        self._sends: dict[tuple[str, str, str], _Send] = {}
        self._connected: dict[str, set[str]] = {}
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
            journal.Asked: self._on_asked,
            journal.Rewound: self._on_rewound,
            journal.Synced: self._on_synced,
            journal.Contradicted: self._on_contradicted,
        }

    def record(self, event: journal.Event) -> None:
        """One event, in the order in which they happened on this clock."""
        self._handlers[type(event)](event)  # type: ignore[operator]  # the table pairs each type with its handler

    def declare_direct(self, conversation_id: str, user_ids: tuple[str, str]) -> None:
        """A 1:1 conversation has no system messages: its two participants see it from its first message on."""
        conversation = self._conversation(conversation_id)
        conversation.direct = True
        for user_id in user_ids:
            conversation.stays.setdefault(user_id, [_Stay(1)])

    def head(self, conversation_id: str) -> int:
        """The greatest sequence anybody was told of; 0 where there is none."""
        conversation = self._conversations.get(conversation_id)
        return 0 if conversation is None else _head(conversation)

    def _conversation(self, conversation_id: str) -> _Conversation:
        conversation = self._conversations.get(conversation_id)
        if conversation is None:
            conversation = self._conversations[conversation_id] = _Conversation()
        return conversation

    def _violation(self, kind: str, conversation_id: str, user_id: str, detail: str) -> None:
        self.counts["violations"] += 1
        if len(self._found) < EVIDENCE_LIMIT:
            self._found.append(Violation(kind=kind, conversation_id=conversation_id, user_id=user_id, detail=detail))

    # --- events ------------------------------------------------------------------------------------------------------

    def _on_sent(self, event: journal.Sent) -> None:
        self.counts["sent" if event.attempt == 1 else "retried"] += 1
        self._sends.setdefault((event.conversation_id, event.user_id, event.idempotency_key), _Send(event.content))

    def _on_acked(self, event: journal.Acked) -> None:
        self.counts["duplicate_acks" if event.duplicate else "acked"] += 1
        name = (event.conversation_id, event.user_id, event.idempotency_key)
        conversation = self._conversation(event.conversation_id)
        send = self._sends.get(name)
        said = (event.message_id, event.sequence_number)
        if send is None:
            self._violation("ack", name[0], name[1], f"key {name[2]} was acked and never sent")
            return
        if send.refused:
            self._violation("ack", name[0], name[1], f"key {name[2]} was refused and then acked as {said}")
        if send.ack is not None and send.ack != said:
            self._violation("ack", name[0], name[1], f"key {name[2]} was acked as {send.ack} and as {said} (C1)")
        send.ack = said
        other = conversation.acked.setdefault(event.sequence_number, name[1:])
        if other != name[1:]:
            self._violation("ack", name[0], name[1], f"sequence {said[1]} was given to {other} and to {name[1:]} (C3)")
        seen = conversation.seen.setdefault((event.user_id, event.device_id), _Seen())
        seen.runs.add(event.sequence_number)
        self._raise_mark(event.conversation_id, event.user_id, event.sequence_number)

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
        send.refused = True

    def _on_pushed(self, event: journal.Pushed) -> None:
        payload = event.payload
        conversation = self._conversation(payload.conversation_id)
        device = (event.user_id, event.device_id)
        seen = conversation.seen.get(device)
        if seen is None:
            seen = conversation.seen[device] = _Seen()
        self._check_order(event, device, seen)
        self.counts["pushed"] += len(payload.messages)
        for message in payload.messages:
            sequence = message.sequence_number
            known = conversation.entries.get(sequence)
            if known is None:
                self._on_new_entry(payload.conversation_id, conversation, message, event.at)
            elif known is not message:
                self._check_same(payload.conversation_id, event.user_id, known, message)
            if message.idempotency_key is not UNSET and message.sender_id != event.user_id:
                detail = f"sequence {sequence} shows the sender's idempotency key"
                self._violation("leak", payload.conversation_id, event.user_id, detail)
            seen.runs.add(sequence)

    def _check_order(self, event: journal.Pushed, device: tuple[str, str], seen: _Seen) -> None:
        """C4: on one connection the messages of one conversation come in sequence order.

        A `sync` takes the line back, once, to the cursor it named: pages already on their way come before that.
        """
        payload = event.payload
        if payload.origin not in ("live", "backlog", UNSET) or not payload.messages:
            return
        if seen.connection != event.connection:
            seen.connection = event.connection
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

    def _on_rewound(self, event: journal.Rewound) -> None:
        self.counts["rewound"] += 1
        self._rewinds[(event.user_id, event.device_id)] = self.counts["rewound"]

    def _on_synced(self, event: journal.Synced) -> None:
        self._rewinds.pop((event.user_id, event.device_id), None)

    def _on_new_entry(
        self, conversation_id: str, conversation: _Conversation, message: StoredMessage, at: float
    ) -> None:
        sequence = message.sequence_number
        conversation.entries[sequence] = message
        message_id = message.message_id if isinstance(message.message_id, str) else ""
        first = conversation.message_ids.setdefault(message_id, sequence)
        if first != sequence:
            detail = f"message {message_id} has the sequences {first} and {sequence}"
            self._violation("doubled", conversation_id, message.sender_id, detail)
        if message.message_type is MessageType.SYSTEM and message.sender_id == SYSTEM_SENDER:
            event = codec.decode_system_event(message.content)
            if event.event in ("left", "removed"):
                self._note_leave(conversation, event, sequence, at)

    def _note_leave(self, conversation: _Conversation, event: SystemEvent, sequence: int, at: float) -> None:
        for user_id in event.targets:
            stay = _Stay(0)  # its first sequence is folded at the end, when the whole log is known
            stay.last = sequence
            stay.left_at = at
            stay.watching = set(self._connected.get(user_id, ()))
            conversation.stays.setdefault(user_id, []).append(stay)

    def _check_same(self, conversation_id: str, user_id: str, known: StoredMessage, message: StoredMessage) -> None:
        if (known.message_id, known.sender_id, known.content) != (
            message.message_id,
            message.sender_id,
            message.content,
        ):
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
        if now_delivered < delivered or now_read < read:
            detail = f"marks of {payload.user_id} went from {(delivered, read)} to {(now_delivered, now_read)} (C6)"
            self._violation("receipt", payload.conversation_id, event.user_id, detail)
        self._receipts[name] = (max(delivered, now_delivered), max(read, now_read))
        if conversation.direct:
            claim = (payload.conversation_id, payload.user_id)
            self._claims[claim] = max(self._claims.get(claim, 0), now_delivered, now_read)

    def _on_connected(self, event: journal.Connected) -> None:
        self.counts["connections"] += 1
        self._connected.setdefault(event.user_id, set()).add(event.device_id)

    def _on_closed(self, event: journal.Closed) -> None:
        self.counts["closed"] += 1
        self._rewinds.pop((event.user_id, event.device_id), None)
        self._connected.get(event.user_id, set()).discard(event.device_id)
        for conversation in self._conversations.values():
            for stay in conversation.stays.get(event.user_id, ()):
                if event.at - stay.left_at < LEAVE_GRACE_SECONDS:
                    stay.watching.discard(event.device_id)

    def _on_asked(self, event: journal.Asked) -> None:
        self.counts["asked"] += 1

    def _on_contradicted(self, event: journal.Contradicted) -> None:
        detail = f"digest at {event.sequence_number}: folded {event.folded}, stated {event.stated}"
        self._violation("digest", event.conversation_id, event.user_id, detail)

    # --- judgement ---------------------------------------------------------------------------------------------------

    def verdict(self) -> list[Violation]:
        """All violations so far and those only the end shows. Empty: ok. Does not change the ledger."""
        found = list(self._found)
        for (conversation_id, user_id), claimed in self._claims.items():
            confirmed = self._marks.get((conversation_id, user_id), 0)
            if claimed > confirmed:
                detail = f"{user_id} is said to have {claimed} and confirmed only {confirmed}"
                found.append(Violation(kind="receipt", conversation_id=conversation_id, user_id=user_id, detail=detail))
        return _Judge(self._conversations, self._sends, found).judge()


class _Judge:
    """The end of a run: what should have been seen, against what was."""

    def __init__(
        self,
        conversations: dict[str, _Conversation],
        sends: dict[tuple[str, str, str], _Send],
        found: list[Violation],
    ) -> None:
        self._conversations = conversations
        self._sends = sends
        self._found = found

    def judge(self) -> list[Violation]:
        for (conversation_id, sender_id, key), send in self._sends.items():
            if send.ack is None and not send.refused:
                self._add("unanswered", conversation_id, sender_id, f"key {key} was sent and never acked nor refused")
        for conversation_id, conversation in self._conversations.items():
            self._judge_log(conversation_id, conversation)
            self._judge_views(conversation_id, conversation)
        return self._found

    def _add(self, kind: str, conversation_id: str, user_id: str, detail: str) -> None:
        self._found.append(Violation(kind=kind, conversation_id=conversation_id, user_id=user_id, detail=detail))

    def _judge_log(self, conversation_id: str, conversation: _Conversation) -> None:
        """The log itself: without holes, and each of its messages is one that somebody sent, once, unaltered."""
        everything = Runs()
        for sequence in sorted({*conversation.entries, *conversation.acked}):
            everything.add(sequence)
        for first, last in everything.missing(1, _head(conversation)):
            self._add("hole", conversation_id, "-", f"nobody was told of the sequences {first}..{last} (C3)")
        for sequence, message in conversation.entries.items():
            if message.message_type is MessageType.SYSTEM and message.sender_id == SYSTEM_SENDER:
                continue
            author = conversation.acked.get(sequence)
            if author is None or author[0] != message.sender_id:
                detail = f"sequence {sequence}, {message.message_id} of {message.sender_id}, belongs to no acked send"
                self._add("invented", conversation_id, message.sender_id, detail)
                continue
            send = self._sends[(conversation_id, *author)]
            if send.ack != (message.message_id, sequence) or send.content != message.content:
                detail = f"sequence {sequence} is {message.message_id}; its send: acked as {send.ack}, or other content"
                self._add("altered", conversation_id, message.sender_id, detail)

    def _judge_views(self, conversation_id: str, conversation: _Conversation) -> None:
        head = _head(conversation)
        stays = _fold_stays(conversation)
        for (user_id, device_id), seen in conversation.seen.items():
            mine = stays.get(user_id, [])
            allowed = [(stay.first, head if stay.last is None else stay.last) for stay in mine]
            for first, last in seen.runs.outside(allowed):
                detail = f"{device_id} saw {first}..{last}; allowed: {allowed}"
                self._add("foreign", conversation_id, user_id, detail)
        devices: dict[str, set[str]] = {}
        for user_id, device_id in [*conversation.seen, *self._devices()]:
            devices.setdefault(user_id, set()).add(device_id)
        for user_id, mine in stays.items():
            for device_id in devices.get(user_id, ()):
                self._judge_device(conversation_id, conversation, user_id, device_id, mine)

    def _devices(self) -> set[tuple[str, str]]:
        return {device for conversation in self._conversations.values() for device in conversation.seen}

    def _judge_device(
        self, conversation_id: str, conversation: _Conversation, user_id: str, device_id: str, stays: list[_Stay]
    ) -> None:
        seen = conversation.seen.get((user_id, device_id))
        runs = Runs() if seen is None else seen.runs
        for stay in stays:
            last = _head(conversation) if stay.last is None else stay.last
            holes = runs.missing(stay.first, last)
            if stay.last is not None and device_id not in stay.watching and holes and holes[-1][1] == last:
                holes.pop()  # it was away when its user left: what it did not get by then it may not get any more
            for low, high in holes:
                entry = conversation.entries.get(low)
                name = entry.message_id if entry is not None else conversation.acked.get(low, "?")
                detail = (
                    f"{device_id} never got {low}..{high} (first: {name}), visible from {stay.first} to {last} (C5)"
                )
                self._add("lost", conversation_id, user_id, detail)


def _head(conversation: _Conversation) -> int:
    return max(max(conversation.entries, default=0), max(conversation.acked, default=0))


def _fold_stays(conversation: _Conversation) -> dict[str, list[_Stay]]:
    """Everybody's visible ranges, from the system messages in log order; for a 1:1 conversation as declared."""
    if conversation.direct:
        return conversation.stays
    ends = {(user_id, stay.last): stay for user_id, stays in conversation.stays.items() for stay in stays}
    folded: dict[str, list[_Stay]] = {}
    for sequence in sorted(conversation.entries):
        message = conversation.entries[sequence]
        if message.message_type is not MessageType.SYSTEM or message.sender_id != SYSTEM_SENDER:
            continue
        event = codec.decode_system_event(message.content)
        for user_id in event.targets:
            stays = folded.setdefault(user_id, [])
            if event.event in ("created", "added"):
                stays.append(_Stay(sequence))
            elif stays and stays[-1].last is None:
                end = ends[(user_id, sequence)]
                stays[-1].last = sequence
                stays[-1].watching = end.watching
    return folded
