"""Sans-IO client of the protocol: what a careful app does. Server frames in, client frames out, `now` as an argument.

Driven by `phone.Phone` (trio-websocket). It keeps one position per conversation and what it has not yet been told the
fate of; it sends the same key again until it knows, drops what it has seen, asks for holes, confirms what it holds, and
folds the digest chain to prove to itself that its log is the server's.
"""

from __future__ import annotations

from enum import Enum
from hashlib import blake2b
from typing import TypedDict

import msgspec
from msgspec import UNSET

from bench import journal
from bench.conversation_log import ConversationLog, Held, held_message
from bench.sends import Pending, Sends
from protocol import frames
from protocol.errors import ErrorCode
from protocol.models import MessagePayload, MessageType
from protocol.watermarks import content_hash


class _Stamp(TypedDict):
    at: float
    user_id: str
    device_id: str
    connection: int


class State(Enum):
    OFFLINE = "offline"
    OPENING = "opening"
    LIVE = "live"


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a client; the defaults are those protocol.md tells clients to use."""

    retry_seconds: float = 10.0
    """Without an ack, the same key again after this."""
    window: int = 32
    """Most unacknowledged messages on the way; past it the gateway would stop reading, and acks would wait too."""
    confirm_every: int = 20
    confirm_seconds: float = 0.2
    ask_seconds: float = 5.0
    """A `retransmit` without an answer is asked again after this."""
    own_gap_seconds: float = 1.0
    """A hole may be one's own message whose ack is still on the way: patience before asking."""
    doubt_seconds: float = 5.0
    """A confirmation said so shortly before a connection ended is said again on the next."""
    digests_kept: int = 512


class Client:
    """One device of one user. Every method is atomic; those that return frames want them written in this order."""

    def __init__(
        self, user_id: str, device_id: str, token: str, record: journal.Journal, habits: Habits | None = None
    ) -> None:
        self.user_id = user_id
        self.device_id = device_id
        self.token = token
        self.state = State.OFFLINE
        self.connection = 0
        self.logs: dict[str, ConversationLog] = {}
        self.synced = False
        """The backlog of this connection has arrived (`sync_complete`)."""
        self.auth_error: frames.AuthError | None = None
        self.proven: set[str] = set()
        """Conversations whose folded digest was equal to the server's at least once."""
        self._record = record
        self._habits = habits or Habits()
        self._sends = Sends(device_id, self._habits)
        self._sync_again_at: float | None = None
        self._unconfirmed: set[str] = set()
        self._confirmed_at: dict[str, float] = {}
        self._holes: set[str] = set()
        self._resumed: dict[str, int] = {}
        self._opened_at = 0.0
        self._next: tuple[float, dict[str, int], str] = (0.0, {}, "")
        """When the second WebSocket was opened, what was held then, and with which ticket."""
        self._heard_on = 0
        """The connection a late frame came on; 0 while none is looked at."""
        self._beat_seconds = float("inf")
        self._beat_at = float("inf")

    # --- the connection ----------------------------------------------------------------------------------------------

    def opened(self, now: float) -> list[frames.ClientFrame]:
        """The WebSocket is open: authenticate, and say what is held already."""
        self.connection += 1
        self._opened_at = now
        self.state = State.OPENING
        self.synced = False
        self.auth_error = None
        self._resumed = self._held()
        return [self._auth(self.token, self._resumed)]

    def _held(self) -> dict[str, int]:
        return {name: log.cursor for name, log in self.logs.items() if log.cursor is not None}

    def _auth(self, token: str, resumed: dict[str, int]) -> frames.Auth:
        payload = frames.AuthPayload(
            user_id=self.user_id,
            auth_token=token,
            device_id=self.device_id,
            platform="bench",
            app_version="1.0",
            resume=dict(list(resumed.items())[:500]) if resumed else UNSET,
            protocol_version=1,
        )
        return frames.Auth(payload=payload)

    def migrating(self, session_token: str, now: float) -> list[frames.ClientFrame]:
        """A second WebSocket is open, to where a `migration` frame said: what to say there.

        Nothing changes on the first one until `migrated`.
        """
        ticket = blake2b(session_token.encode(), digest_size=16).hexdigest()
        self._next = (now, self._held(), ticket)
        self._record(journal.Moving(ticket=ticket, **self._stamp(now)))
        return [self._auth(session_token, self._next[1])]

    def migrated(self, success: frames.AuthSuccess, now: float) -> list[frames.ClientFrame]:
        """The second WebSocket is in: from now on everything is said there, and what has no answer is said again."""
        self.connection += 1
        self._opened_at, self._resumed, ticket = self._next
        self.state = State.OPENING
        self._start_over(now)
        return self._on_auth_success(success, now, ticket)

    def _start_over(self, now: float) -> None:
        """What was asked on the connection before will not be answered on this one, and what was said last may not have
        been heard."""
        self.synced = False
        doubtful = {name for name, at in self._confirmed_at.items() if now - at < self._habits.doubt_seconds}
        self._unconfirmed |= doubtful
        self._confirmed_at.clear()
        self._sync_again_at = None
        for log in self.logs.values():
            log.asked_at = log.confirm_at = None

    def closed(self, code: int, now: float) -> None:
        """The WebSocket is gone: everything whose fate is unknown will be sent again."""
        if self.state is State.OFFLINE:
            return
        self.state = State.OFFLINE
        self._start_over(now)
        self._record(journal.Closed(code=code, **self._stamp(now)))

    # --- sending -----------------------------------------------------------------------------------------------------

    def send(
        self,
        conversation_id: str,
        content: str,
        *,
        now: float,
        wall_ms: int,
        receiver_id: str = "",
        reply_to_message_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[str, list[frames.ClientFrame]]:
        """Queue a text message. Returns its idempotency key and what may be written now (nothing while offline)."""
        payload = MessagePayload(
            conversation_id=conversation_id,
            receiver_id=receiver_id,
            content=content,
            message_type=MessageType.TEXT,
            reply_to_message_id=reply_to_message_id,
            timestamp=wall_ms,
        )
        return self._sends.message(payload, idempotency_key), self._flush(now)

    def edit(
        self, conversation_id: str, message_id: str, content: str, now: float
    ) -> tuple[str, list[frames.ClientFrame]]:
        """Queue a new content for one's own message; returns as `send` does."""
        return self._sends.edit(conversation_id, message_id, content), self._flush(now)

    def delete(
        self, conversation_id: str, message_id: str, scope: frames.DeleteScope, now: float
    ) -> tuple[str, list[frames.ClientFrame]]:
        """Queue a deletion, for everybody or for oneself; returns as `send` does."""
        return self._sends.delete(conversation_id, message_id, scope), self._flush(now)

    def react(
        self, conversation_id: str, message_id: str, emoji: str, op: frames.ReactionOp, now: float
    ) -> tuple[str, list[frames.ClientFrame]]:
        """Queue a reaction, or taking it back; returns as `send` does."""
        return self._sends.react(conversation_id, message_id, emoji, op), self._flush(now)

    @property
    def pending(self) -> dict[str, Pending]:
        """By key, everything said whose fate is not known."""
        return self._sends.pending

    def _flush(self, now: float) -> list[frames.ClientFrame]:
        """Whatever the window and the learned pace let through."""
        if self.state is not State.LIVE:
            return []
        written: list[frames.ClientFrame] = []
        for pending in self._sends.take(now):
            self._record(
                journal.Sent(
                    conversation_id=pending.conversation_id,
                    idempotency_key=pending.idempotency_key,
                    content=pending.content,
                    change=pending.change,
                    target=pending.target,
                    attempt=pending.attempts,
                    **self._stamp(now),
                )
            )
            written.append(pending.frame)
        return written

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, conversation_id: str, now: float, wall_ms: int) -> list[frames.ClientFrame]:
        """The user looked: everything held is read. Nothing to say where nothing is held."""
        log = self.logs.get(conversation_id)
        if log is None or log.cursor is None or not log.last_id or self.state is not State.LIVE:
            return []
        self._record(journal.Read(conversation_id=conversation_id, sequence_number=log.cursor, **self._stamp(now)))
        return [frames.ReadReceipt(message_ids=[log.last_id], timestamp=wall_ms)]

    def report(self, conversation_id: str, now: float) -> None:
        """Put into the journal what this device shows of the messages that were changed."""
        log = self.logs.get(conversation_id)
        if log is not None and log.cursor is not None:
            views = {message_id: msgspec.structs.replace(view) for message_id, view in log.views.items()}
            self._record(
                journal.Viewed(conversation_id=conversation_id, through=log.cursor, views=views, **self._stamp(now))
            )

    def sync(self, now: float) -> list[frames.ClientFrame]:
        """Ask for whatever is missing and for the heads with their digests; `synced` turns true when they came.

        Nothing where that is under way already.
        """
        if self.state is not State.LIVE or not self.synced:
            return []
        self.synced = False
        for log in self.logs.values():
            log.wants_anchor = False
        self._record(journal.Rewound(**self._stamp(now)))
        cursors = {name: log.cursor for name, log in self.logs.items() if log.cursor is not None}
        return [frames.Sync(payload=frames.SyncPayload(cursors=cursors))]

    # --- frames in ---------------------------------------------------------------------------------------------------

    def receive(self, frame: frames.ServerFrame, now: float, wall_ms: int) -> list[frames.ClientFrame]:
        """One frame from the server → what to answer."""
        match frame:
            case frames.Messages():
                return self._on_messages(frame.payload, now, wall_ms)
            case frames.MessageAck():
                return self._on_ack(frame.payload, now)
            case frames.Error():
                return self._on_error(frame.payload, now)
            case frames.ReceiptUpdate():
                self._record(journal.Receipt(payload=frame.payload, **self._stamp(now)))
            case frames.AuthSuccess():
                return self._on_auth_success(frame, now)
            case frames.AuthError():
                self.auth_error = frame
            case frames.SyncComplete():
                return self._on_sync_complete(frame.payload, now)
            case _:
                pass  # heartbeat_ack, migration (the phone's affair), conversation_update: nothing to answer
        return []

    def receive_late(
        self, frame: frames.ServerFrame, connection: int, now: float, wall_ms: int
    ) -> list[frames.ClientFrame]:
        """What still comes on the connection before the one that is spoken on: messages and answers are good."""
        if not isinstance(frame, frames.Messages | frames.MessageAck | frames.Error | frames.ReceiptUpdate):
            return []
        if isinstance(frame, frames.Error) and frame.payload.idempotency_key is UNSET:
            return []
        self._heard_on = connection
        try:
            return self.receive(frame, now, wall_ms)
        finally:
            self._heard_on = 0

    def _on_auth_success(self, success: frames.AuthSuccess, now: float, ticket: str = "") -> list[frames.ClientFrame]:
        if self.state is State.LIVE:
            return []
        self.state = State.LIVE
        interval_ms = success.payload.heartbeat_interval_ms
        self._beat_seconds = interval_ms / 1000 if isinstance(interval_ms, int) else float("inf")
        self._beat_at = now + self._beat_seconds
        self._record(
            journal.Connected(
                resumed=self._resumed,
                opened_at=self._opened_at,
                migrated=ticket != "",
                ticket=ticket,
                unread=success.payload.unread_count,
                **self._stamp(now),
            )
        )
        self._sends.requeue()
        return self._flush(now)

    def _on_ack(self, payload: frames.MessageAckPayload, now: float) -> list[frames.ClientFrame]:
        key = payload.idempotency_key
        if isinstance(key, str):
            pending = self._sends.settle(key)
            conversation_id = payload.conversation_id
            if not isinstance(conversation_id, str):
                conversation_id = pending.conversation_id if pending else ""
            self._record(
                journal.Acked(
                    conversation_id=conversation_id,
                    idempotency_key=key,
                    message_id=payload.message_id,
                    sequence_number=payload.sequence_number,
                    duplicate=payload.duplicate is True,
                    change=pending.change if pending else None,
                    **self._stamp(now),
                )
            )
            if pending is not None and pending.change is None:  # the entry of a change comes as all entries do
                held = Held(payload.message_id, self.user_id, content_hash(pending.content))
                self._hold_own(conversation_id, payload.sequence_number, held, now)
        return self._flush(now)

    def _hold_own(self, conversation_id: str, sequence: int, held: Held, now: float) -> None:
        """An ack puts one's own message into the log: the server sends no copy to the connection it came from."""
        log = self.logs.setdefault(conversation_id, ConversationLog())
        if log.cursor is None and sequence == 1:
            log.begin(1)
        if log.cursor is None or sequence > log.cursor:
            log.ahead[sequence] = held
            moved = log.advance(0, self._habits.digests_kept)
            if moved > 1:  # it closed a hole in front of messages of others
                self._note_news(conversation_id, log, moved - 1, now)
            self._note_hole(conversation_id, log, now)

    def _on_error(self, payload: frames.ErrorPayload, now: float) -> list[frames.ClientFrame]:
        key = payload.idempotency_key if isinstance(payload.idempotency_key, str) else None
        conversation_id = payload.conversation_id if isinstance(payload.conversation_id, str) else None
        pending = self.pending.get(key) if key is not None else None
        if conversation_id is None and pending is not None:
            conversation_id = pending.conversation_id
        self._record(
            journal.Refused(
                code=payload.code,
                retryable=payload.retryable,
                conversation_id=conversation_id,
                idempotency_key=key,
                change=pending.change if pending else None,
                **self._stamp(now),
            )
        )
        wait = payload.retry_after_ms / 1000 if isinstance(payload.retry_after_ms, int) else 1.0
        if key is not None and key in self.pending:
            if payload.retryable:
                self._sends.postpone(key, wait, now, slow_down=payload.code is ErrorCode.RATE_LIMITED)
            else:
                self._sends.settle(key)
        elif payload.in_reply_to == "sync":
            self._sync_again_at = now + wait
        elif conversation_id is not None and conversation_id in self.logs:
            self.logs[conversation_id].asked_at = now + wait - self._habits.ask_seconds
        return self._flush(now)

    def _on_messages(self, payload: frames.MessagesPayload, now: float, wall_ms: int) -> list[frames.ClientFrame]:
        self._record(journal.Pushed(payload=payload, **self._stamp(now)))
        if payload.origin not in ("live", "backlog", "retransmit", UNSET):
            return []  # history: looked at, not part of the log this device keeps
        conversation_id = payload.conversation_id
        log = self.logs.setdefault(conversation_id, ConversationLog())
        bounds = _range(payload)
        if bounds is None:
            return []
        first, last = bounds
        if log.cursor is None:
            log.begin(first)
        assert log.cursor is not None
        if isinstance(payload.expired_through, int) and payload.expired_through > log.cursor:
            log.begin(payload.expired_through + 1)
        for message in payload.messages:
            if message.sequence_number > log.cursor:
                log.ahead[message.sequence_number] = held_message(message)
        moved = log.advance(last if first <= log.cursor + 1 else 0, self._habits.digests_kept)
        self._note_hole(conversation_id, log, now)
        if moved:
            log.asked_at = None  # an answer may be a part: ask for the rest at once
            self._note_news(conversation_id, log, moved, now)
        anchor = self.sync(now) if log.wants_anchor else []
        return [*self._confirm(now, wall_ms), *self._ask(now), *anchor]

    def _note_news(self, conversation_id: str, log: ConversationLog, count: int, now: float) -> None:
        log.unconfirmed += count
        self._unconfirmed.add(conversation_id)
        if log.unconfirmed >= self._habits.confirm_every:
            log.confirm_at = now
        elif log.confirm_at is None:
            log.confirm_at = now + self._habits.confirm_seconds

    def _note_hole(self, conversation_id: str, log: ConversationLog, now: float) -> None:
        if log.hole() is None:
            self._holes.discard(conversation_id)
        else:
            self._holes.add(conversation_id)
            if log.hole_since is None:
                log.hole_since = now

    def _on_sync_complete(self, payload: frames.SyncCompletePayload, now: float) -> list[frames.ClientFrame]:
        self.synced = True
        self._record(journal.Synced(**self._stamp(now)))
        for conversation_id, head in payload.heads.items():
            log = self.logs.get(conversation_id)
            if log is None or log.cursor is None:
                continue
            folded = log.digests.get(head.sequence_number)
            if folded is None:
                # Who joined later cannot fold from the start, but from a head on.
                log.anchor(head.sequence_number, bytes.fromhex(head.digest), self._habits.digests_kept)
                continue
            if folded.hex() == head.digest:
                self.proven.add(conversation_id)
            else:
                self._record(
                    journal.Contradicted(
                        conversation_id=conversation_id,
                        sequence_number=head.sequence_number,
                        folded=folded.hex(),
                        stated=head.digest,
                        **self._stamp(now),
                    )
                )
        # A group that came while this ran has no head in it.
        unknown = any(log.wants_anchor and log.digest is None for log in self.logs.values())
        return self.sync(now) if unknown else []

    # --- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float, wall_ms: int) -> list[frames.ClientFrame]:
        """Whatever is due by now: retries, confirmations, holes, a sign of life."""
        if self.state is not State.LIVE:
            return []
        self._sends.requeue_due(now)
        again: list[frames.ClientFrame] = []
        if now >= self._beat_at:
            self._beat_at = now + self._beat_seconds
            again.append(frames.Heartbeat(timestamp=wall_ms))
        if self._sync_again_at is not None and now >= self._sync_again_at:
            self._sync_again_at = None
            self.synced = True  # the refused one is over
            again += self.sync(now)
        return [*self._confirm(now, wall_ms), *self._ask(now), *self._flush(now), *again]

    def deadline(self) -> float:
        """When `tick` is needed next; infinity while nothing is open."""
        if self.state is not State.LIVE:
            return float("inf")
        times = [self._sends.deadline(), self._beat_at]
        for conversation_id in self._unconfirmed:
            confirm_at = self.logs[conversation_id].confirm_at
            if confirm_at is not None:
                times.append(confirm_at)
        if self._sync_again_at is not None:
            times.append(self._sync_again_at)
        times.extend(self._ask_at(conversation_id) for conversation_id in self._holes)
        return min(times)

    def _confirm(self, now: float, wall_ms: int) -> list[frames.ClientFrame]:
        written: list[frames.ClientFrame] = []
        for conversation_id in list(self._unconfirmed):
            log = self.logs[conversation_id]
            if log.confirm_at is None:  # the connection broke before it was said
                log.confirm_at = now
            if now < log.confirm_at or log.cursor is None:
                continue
            self._unconfirmed.discard(conversation_id)
            log.unconfirmed = 0
            log.confirm_at = None
            self._confirmed_at[conversation_id] = now
            self._record(
                journal.Confirmed(
                    conversation_id=conversation_id,
                    message_id=log.last_id,
                    sequence_number=log.cursor,
                    **self._stamp(now),
                )
            )
            written.append(frames.DeliveryAck(message_id=log.last_id, timestamp=wall_ms))
        return written

    def _ask_at(self, conversation_id: str) -> float:
        log = self.logs[conversation_id]
        if log.asked_at is not None:
            return log.asked_at + self._habits.ask_seconds
        since = log.hole_since or 0.0
        return since + self._habits.own_gap_seconds if self._sends.has_any(conversation_id) else since

    def _ask(self, now: float) -> list[frames.ClientFrame]:
        written: list[frames.ClientFrame] = []
        for conversation_id in list(self._holes):
            log = self.logs[conversation_id]
            hole = log.hole()
            if hole is None:
                self._holes.discard(conversation_id)
                continue
            if now < self._ask_at(conversation_id):
                continue
            log.asked_at = now
            first, last = hole
            self._record(
                journal.Asked(
                    conversation_id=conversation_id, from_sequence=first, to_sequence=last, **self._stamp(now)
                )
            )
            written.append(frames.Retransmit(conversation_id=conversation_id, from_sequence=first, to_sequence=last))
        return written

    def _stamp(self, now: float) -> _Stamp:
        connection = self._heard_on or self.connection
        return {"at": now, "user_id": self.user_id, "device_id": self.device_id, "connection": connection}


def _range(payload: frames.MessagesPayload) -> tuple[int, int] | None:
    """The range a frame accounts for; of its messages where it does not say."""
    first, last = payload.from_sequence, payload.to_sequence
    if payload.messages:
        first = first if isinstance(first, int) else payload.messages[0].sequence_number
        last = last if isinstance(last, int) else payload.messages[-1].sequence_number
    if isinstance(first, int) and isinstance(last, int):
        return first, last
    return None
