"""Sans-IO state machine of one client connection. All state of a connection's protocol lives in this file.

Frames and answers go in, commands (`commands.py`) come out; both transports of the gateway drive the same session.
`now` is seconds of a monotonic clock, `wall_ms` epoch milliseconds. No method awaits, so each is atomic.

What a session keeps for delivery is one cursor per conversation: the last sequence handed to this connection. A
delivery that continues the cursor is sent; one that does not (a gap, a lagging socket, a backlog under way) is dropped
and the conversation is put into `behind`, from where pages of the log are asked one at a time, round-robin, until the
cursor has caught up. So nothing is buffered here, whatever a client does.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

from protocol import frames, records
from protocol.commands import PING, Acknowledge, Ask, Attach, Close, Command, Publish, Send, SendEncoded, Verify
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.limits import Limits, TokenBucket, check_message

if TYPE_CHECKING:
    from protocol.models import MessagePayload


class State(Enum):
    AWAITING_AUTH = "awaiting_auth"
    OPENING = "opening"
    """Token accepted; waiting for a worker to say where the user's conversations stand."""
    LIVE = "live"
    CLOSED = "closed"


class _Sync:
    """A backlog run from an `OpenQuery` to `sync_complete`; lives only as long."""

    __slots__ = ("answered", "asked", "early", "heads", "is_rewind", "reply_auth", "unread")

    def __init__(self, asked: dict[str, int], is_rewind: bool, reply_auth: bool) -> None:
        self.asked = asked
        self.is_rewind = is_rewind
        """The client named the cursors: they may lie behind what this connection was already given."""
        self.reply_auth = reply_auth
        self.answered = False
        self.early: dict[str, int] = {}
        self.heads: dict[str, frames.Head] = {}
        self.unread = 0


class Session:
    """One connection's protocol state. `connection` and `instance` are its return address in every record."""

    __slots__ = (
        "_asked_at",
        "_asking",
        "_bad_count",
        "_bad_since",
        "_deadline",
        "_expires_at",
        "_handlers",
        "_limits",
        "_lookups",
        "_messages",
        "_ping_at",
        "_rate_count",
        "_rate_since",
        "_resume",
        "_sync",
        "behind",
        "connection",
        "cursors",
        "device_id",
        "heard_at",
        "in_flight",
        "instance",
        "lagging",
        "session_id",
        "state",
        "user_id",
    )

    def __init__(self, instance: str, connection: int, limits: Limits, now: float) -> None:
        self.instance = instance
        self.connection = connection
        self.user_id = ""
        self.device_id = ""
        self.session_id = ""
        self.heard_at = now
        """When the last byte came; the transport writes it."""
        self.lagging = False
        self.in_flight: dict[str, tuple[float, str]] | None = None
        """Idempotency key → (deadline of its outcome, client_message_id)."""
        self.cursors: dict[str, int] | None = None
        """Conversation → last sequence handed to this connection."""
        self.behind: dict[str, int] | None = None
        """Conversation → greatest sequence known to exist behind its cursor; in round-robin order."""
        self._limits = limits
        self._asking: str | None = None
        self._asked_at = 0.0
        self._deadline = now + limits.auth_timeout_seconds
        self._ping_at = now + limits.heartbeat_seconds
        self._expires_at = float("inf")
        self._resume: dict[str, int] = {}
        self._sync: _Sync | None = None
        self._messages: TokenBucket | None = None
        self._lookups: TokenBucket | None = None
        self._bad_count = self._rate_count = 0
        self._bad_since = self._rate_since = now
        self._enter(State.AWAITING_AUTH)

    def _enter(self, state: State) -> None:
        self.state = state
        self._handlers = TRANSITIONS[state]

    # --- frames in ---------------------------------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """True while no further frame may be given to `receive`: the window is full or the session is opening."""
        if self.state is State.OPENING:
            return True
        return self.in_flight is not None and len(self.in_flight) >= self._limits.window

    def receive(self, frame: frames.ClientFrame, now: float, wall_ms: int) -> list[Command]:
        """One frame from the client → what to do about it. Raises LocalProtocolError while opening."""
        handler = self._handlers.get(type(frame))
        if handler is not None:
            return handler(self, frame, now, wall_ms)
        if self.state is State.AWAITING_AUTH:
            return self._shut(AuthErrorCode.AUTH_REQUIRED, CloseCode.AUTH)
        if self.state is State.CLOSED:
            return []
        raise LocalProtocolError(f"{type(frame).__name__} given to a session that is {self.state.value}")

    def receive_refused(self, error: RemoteProtocolError, now: float) -> list[Command]:
        """A frame the codec refused → an `error` frame; before auth, and after too many, a close."""
        if self.state is State.CLOSED:
            return []
        if self.state is State.AWAITING_AUTH:
            is_auth = error.code is ErrorCode.VALIDATION_FAILED
            return self._shut(
                AuthErrorCode.VALIDATION_FAILED if is_auth else AuthErrorCode.AUTH_REQUIRED, CloseCode.AUTH
            )
        if now - self._bad_since > self._limits.error_window_seconds:
            self._bad_since, self._bad_count = now, 0
        self._bad_count += 1
        if self._bad_count > self._limits.protocol_errors:
            return self.close(CloseCode.BAD_FRAME)
        return [
            Send.error(
                error.code,
                error.message,
                client_message_id=error.client_message_id,
                idempotency_key=error.idempotency_key,
            )
        ]

    def _on_auth(self, frame: frames.Auth, now: float, wall_ms: int) -> list[Command]:
        self._resume = {} if frame.payload.resume is msgspec.UNSET else frame.payload.resume
        return [Verify(frame.payload)]

    def _on_message(self, frame: frames.Message, now: float, wall_ms: int) -> list[Command]:
        payload = frame.payload
        key = frame.idempotency_key
        refusal = self._check_message(payload, now)
        if refusal is not None:
            code, reason, retry_after_ms = refusal
            if code is ErrorCode.RATE_LIMITED and self._too_many_rate_errors(now):
                return self.close(CloseCode.RATE)
            return [
                Send.error(
                    code,
                    reason,
                    client_message_id=frame.client_message_id,
                    idempotency_key=key,
                    conversation_id=payload.conversation_id,
                    retry_after_ms=retry_after_ms,
                )
            ]
        client_message_id = frame.client_message_id or ""
        if self.in_flight is None:
            self.in_flight = {}
        self.in_flight[key] = (now + self._limits.ack_timeout_seconds, client_message_id)
        return [
            Publish(
                records.SendMessage(
                    self.instance,
                    self.connection,
                    self.user_id,
                    self.device_id,
                    payload.conversation_id,
                    client_message_id,
                    key,
                    payload.receiver_id,
                    payload.content,
                    payload.message_type,
                    payload.media_url,
                    payload.reply_to_message_id,
                    payload.timestamp,
                )
            )
        ]

    def _check_message(self, payload: MessagePayload, now: float) -> tuple[ErrorCode, str, int | None] | None:
        """Why this message is refused before it goes anywhere, or None. A refused key is not consumed."""
        if self._messages is not None:
            wait = self._messages.take(now)
            if wait > 0.0:
                return ErrorCode.RATE_LIMITED, "too many messages", int(wait * 1000) + 1
        refusal = check_message(payload, self._limits)
        return None if refusal is None else (*refusal, None)

    def _too_many_rate_errors(self, now: float) -> bool:
        if now - self._rate_since > self._limits.error_window_seconds:
            self._rate_since, self._rate_count = now, 0
        self._rate_count += 1
        return self._rate_count > self._limits.rate_errors

    def _on_delivery_ack(self, frame: frames.DeliveryAck, now: float, wall_ms: int) -> list[Command]:
        return [Acknowledge(records.DeliveredMark(self.user_id, self.device_id, frame.message_id))]

    def _on_read_receipt(self, frame: frames.ReadReceipt, now: float, wall_ms: int) -> list[Command]:
        if not frame.message_ids:
            return []
        return [Acknowledge(records.ReadMark(self.user_id, self.device_id, frame.message_ids))]

    def _on_heartbeat(self, frame: frames.Heartbeat, now: float, wall_ms: int) -> list[Command]:
        return [Send(frames.HeartbeatAck(server_time=wall_ms))]

    def _on_retransmit(self, frame: frames.Retransmit, now: float, wall_ms: int) -> list[Command]:
        if frame.to_sequence < frame.from_sequence:
            return [
                Send.error(
                    ErrorCode.VALIDATION_FAILED,
                    "to_sequence is before from_sequence",
                    conversation_id=frame.conversation_id,
                    in_reply_to="retransmit",
                )
            ]
        query = records.RangeQuery(
            self.instance, self.connection, self.user_id, frame.conversation_id, frame.from_sequence, frame.to_sequence
        )
        return self._look_up(query, frame.conversation_id, "retransmit", now)

    def _on_history(self, frame: frames.History, now: float, wall_ms: int) -> list[Command]:
        payload = frame.payload
        query = records.HistoryQuery(
            self.instance,
            self.connection,
            self.user_id,
            payload.conversation_id,
            payload.before_sequence,
            payload.limit,
        )
        return self._look_up(query, payload.conversation_id, "history", now)

    def _on_sync(self, frame: frames.Sync, now: float, wall_ms: int) -> list[Command]:
        cursors = frame.payload.cursors
        commands = self._look_up(self._open_query(cursors), None, "sync", now)
        if isinstance(commands[0], Ask):
            self._start_sync(cursors, is_rewind=True, reply_auth=False, now=now)
        return commands

    def _start_sync(self, asked: dict[str, int], *, is_rewind: bool, reply_auth: bool, now: float) -> None:
        running = self._sync
        if running is not None and not running.answered:
            reply_auth = reply_auth or running.reply_auth
        self._sync = _Sync(asked, is_rewind, reply_auth)
        self._deadline = now + self._limits.open_timeout_seconds
        self._asked_at = now

    def _look_up(self, query: records.Query, conversation_id: str | None, tag: str, now: float) -> list[Command]:
        if self._lookups is None:
            rate = self._limits.lookup_rate
            self._lookups = TokenBucket(rate, max(1.0, rate * 2), now)
        wait = self._lookups.take(now)
        if wait > 0.0:
            if self._too_many_rate_errors(now):
                return self.close(CloseCode.RATE)
            return [
                Send.error(
                    ErrorCode.RATE_LIMITED,
                    f"too many {tag} requests",
                    conversation_id=conversation_id,
                    retry_after_ms=int(wait * 1000) + 1,
                    in_reply_to=tag,
                )
            ]
        return [Ask(query)]

    def _on_goodbye(self, frame: frames.Goodbye, now: float, wall_ms: int) -> list[Command]:
        return self.close(CloseCode.NORMAL)

    # --- admission ---------------------------------------------------------------------------------------------------

    def admit(
        self,
        user_id: str,
        device_id: str,
        session_id: str,
        expires_at: float,
        bucket: TokenBucket | None,
        now: float,
    ) -> list[Command]:
        """The token is good until `expires_at` (monotonic). `bucket`: the user's message rate, for all its devices."""
        if self.state is State.CLOSED or self.state is State.OPENING:
            return []
        self._expires_at = expires_at
        if self.state is State.LIVE:
            if user_id != self.user_id or device_id != self.device_id:
                return [
                    Send.error(ErrorCode.FORBIDDEN, "this connection belongs to another user or device"),
                    *self.close(CloseCode.AUTH),
                ]
            asked = self._resume or dict(self.cursors or {})
            self._start_sync(asked, is_rewind=bool(self._resume), reply_auth=True, now=now)
            return [Ask(self._open_query(asked))]
        self.user_id = user_id
        self.device_id = device_id
        self.session_id = session_id
        self._messages = bucket
        self._start_sync(self._resume, is_rewind=True, reply_auth=True, now=now)
        self._enter(State.OPENING)
        return [Attach(user_id, device_id), Ask(self._open_query(self._resume))]

    def refuse(self, error: AuthErrorCode, retry_after_ms: int | None = None) -> list[Command]:
        """The token is not good (or the server is not ready): `auth_error` and close."""
        code = {
            AuthErrorCode.RATE_LIMITED: CloseCode.RATE,
            AuthErrorCode.DRAINING: CloseCode.RESTART,
            AuthErrorCode.SERVER_BUSY: CloseCode.OVERLOADED,
        }.get(error, CloseCode.AUTH)
        return self._shut(error, code, retry_after_ms)

    def _open_query(self, cursors: dict[str, int]) -> records.OpenQuery:
        return records.OpenQuery(self.instance, self.connection, self.user_id, self.device_id, cursors)

    # --- answers and deliveries in -----------------------------------------------------------------------------------

    def opened(self, answer: records.OpenAnswer, now: float, wall_ms: int) -> list[Command]:
        """Where the user's conversations stand: `auth_success`, then pages of what is behind, then `sync_complete`."""
        sync = self._sync
        if sync is None or sync.answered or self.state is State.CLOSED:
            return []
        commands: list[Command] = []
        if sync.reply_auth:
            commands.append(Send(self._auth_success(answer.unread, wall_ms)))
        self._enter(State.LIVE)
        self._deadline = float("inf")
        sync.answered = True
        sync.unread = answer.unread
        cursors = self.cursors or {}
        behind: dict[str, int] = {}
        missed = sync.early
        if self.behind:
            missed.update(self.behind)
        for head in answer.heads:
            conversation_id = head.conversation_id
            before = cursors.get(conversation_id, 0)
            known = max(head.head, missed.pop(conversation_id, 0), before)
            cursor = cursors[conversation_id] = head.cursor if sync.is_rewind else max(head.cursor, before)
            if known > cursor:
                behind[conversation_id] = known
            sync.heads[conversation_id] = frames.Head(sequence_number=head.head, digest=head.digest.hex())
        behind.update(missed)
        self.cursors = cursors
        self.behind = behind or None
        self._asking = None
        commands.extend(self.pump(now, wall_ms))
        return commands

    def _auth_success(self, unread: int, wall_ms: int) -> frames.AuthSuccess:
        return frames.AuthSuccess(
            payload=frames.AuthSuccessPayload(
                session_id=self.session_id,
                server_time=wall_ms,
                unread_count=unread,
                heartbeat_interval_ms=int(self._limits.heartbeat_seconds * 1000),
                max_frame_bytes=self._limits.max_frame_bytes,
                resumed=bool(self._resume),
            )
        )

    def deliver(self, conversation_id: str, from_sequence: int, to_sequence: int) -> bool:
        """May the live frame that holds from..to be written now?

        False also marks the conversation as behind where it is; the caller then calls `pump`.
        """
        cursors = self.cursors
        if cursors is None:
            if self._sync is not None:
                self._sync.early[conversation_id] = to_sequence
            return False
        cursor = cursors.get(conversation_id, 0)
        if to_sequence <= cursor:
            return False
        behind = self.behind
        if from_sequence == cursor + 1 and not self.lagging and (behind is None or conversation_id not in behind):
            cursors[conversation_id] = to_sequence
            return True
        self._fall_behind(conversation_id, to_sequence)
        return False

    def _fall_behind(self, conversation_id: str, known: int) -> None:
        if self.behind is None:
            self.behind = {}
        if known > self.behind.get(conversation_id, 0):
            self.behind[conversation_id] = known

    def head_seen(self, conversation_id: str, head: int) -> bool:
        """The sweep saw this head. True when the cursor has not reached it: call `note_head` if that stays so."""
        return self.cursors is not None and head > self.cursors.get(conversation_id, 0)

    def note_head(self, conversation_id: str, head: int) -> None:
        """A push vanished: page the log. The caller calls `pump`."""
        if self.head_seen(conversation_id, head):
            self._fall_behind(conversation_id, head)

    def page(self, answer: records.PageAnswer, now: float, wall_ms: int) -> list[Command]:
        """A page of the log arrived: send it, move the cursor, ask for the next."""
        conversation_id = answer.conversation_id
        if self._asking != conversation_id or self.cursors is None or self.behind is None:
            return []
        cursor = self.cursors.get(conversation_id, 0)
        if answer.from_sequence != cursor + 1:
            return []  # a late answer to a question that was asked again from elsewhere
        self._asking = None
        commands: list[Command] = []
        progress = answer.to_sequence > cursor
        if progress:
            if answer.frame:
                commands.append(SendEncoded(answer.frame))
            cursor = self.cursors[conversation_id] = answer.to_sequence
            if self._sync is not None:
                self._sync.heads[conversation_id] = frames.Head(
                    sequence_number=answer.to_sequence, digest=answer.digest.hex()
                )
        known = self.behind.pop(conversation_id, 0)
        if answer.has_more or (progress and known > cursor):
            self.behind[conversation_id] = known
        elif not self.behind:
            self.behind = None
        commands.extend(self.pump(now, wall_ms))
        return commands

    def pump(self, now: float, wall_ms: int) -> list[Command]:
        """Ask for the next page where one is wanted and none is under way; `sync_complete` where nothing is behind.

        The transport calls it whenever its outbox has room again.
        """
        if self.state is not State.LIVE or self._asking is not None or self.lagging:
            return []
        if self.behind:
            conversation_id = next(iter(self.behind))
            self._asking = conversation_id
            self._asked_at = now
            after = 0 if self.cursors is None else self.cursors.get(conversation_id, 0)
            return [
                Ask(
                    records.PageQuery(
                        self.instance, self.connection, self.user_id, conversation_id, after, self._limits.page_limit
                    )
                )
            ]
        sync = self._sync
        if sync is None or not sync.answered:
            return []
        self._sync = None
        return [
            Send(
                frames.SyncComplete(
                    payload=frames.SyncCompletePayload(heads=sync.heads, unread_count=sync.unread, server_time=wall_ms)
                )
            )
        ]

    def outcome(self, idempotency_key: str) -> None:
        """A send was committed or refused: its place in the window is free."""
        if self.in_flight is not None:
            self.in_flight.pop(idempotency_key, None)
            if not self.in_flight:
                self.in_flight = None

    def publish_failed(self, idempotency_key: str, code: ErrorCode, retry_after_ms: int) -> list[Command]:
        """The broker could not take this message: a retryable error for its key."""
        pending = None if self.in_flight is None else self.in_flight.get(idempotency_key)
        if pending is None or self.state is State.CLOSED:
            return []
        self.outcome(idempotency_key)
        return [
            Send.error(
                code,
                "not stored; send the same key again",
                client_message_id=pending[1] or None,
                idempotency_key=idempotency_key,
                retry_after_ms=retry_after_ms,
            )
        ]

    # --- the connection's fate ---------------------------------------------------------------------------------------

    def replaced(self) -> list[Command]:
        """The same user and device connected again: the newest wins."""
        if self.state is State.CLOSED:
            return []
        return [Send.error(ErrorCode.REPLACED, "this device connected again"), *self.close(CloseCode.REPLACED)]

    def closed(self) -> None:
        """The socket is gone."""
        self._enter(State.CLOSED)

    def tick(self, now: float, wall_ms: int) -> list[Command]:
        """Whatever is due by now. Called when `deadline` has passed, or at any time."""
        state = self.state
        if state is State.CLOSED or (state is State.AWAITING_AUTH and now < self._deadline):
            return []
        if state is State.AWAITING_AUTH:
            return self._shut(AuthErrorCode.AUTH_REQUIRED, CloseCode.AUTH_TIMEOUT)
        if now - self.heard_at >= self._limits.dead_seconds:
            return self.close(CloseCode.AUTH_TIMEOUT)
        if now >= self._expires_at:
            return self._shut(AuthErrorCode.EXPIRED_TOKEN, CloseCode.AUTH)
        if state is State.OPENING:
            if now >= self._deadline:
                return self._shut(AuthErrorCode.SERVER_BUSY, CloseCode.OVERLOADED, 2000)
            if self._sync is not None and now - self._asked_at >= self._limits.ask_timeout_seconds:
                self._asked_at = now
                return [Ask(self._open_query(self._sync.asked))]
            return []
        commands: list[Command] = []
        if now - self.heard_at >= self._limits.heartbeat_seconds and now >= self._ping_at:
            self._ping_at = now + self._limits.heartbeat_seconds
            commands.append(PING)
        if self.in_flight:
            for key in [key for key, (deadline, _) in self.in_flight.items() if now >= deadline]:
                commands.extend(self.publish_failed(key, ErrorCode.STORAGE_UNAVAILABLE, 1000))
        if self._asking is not None and now - self._asked_at >= self._limits.ask_timeout_seconds:
            self._asking = None
        if self._sync is not None and not self._sync.answered and now >= self._deadline:
            self._deadline = now + self._limits.open_timeout_seconds
            commands.append(Ask(self._open_query(self._sync.asked)))
        commands.extend(self.pump(now, wall_ms))
        return commands

    def deadline(self, now: float) -> float:
        """When `tick` is next needed, at the latest; may be early, never late by more than the shell's timer step."""
        if self.state is State.AWAITING_AUTH:
            return self._deadline
        if self.state is State.OPENING:
            return min(self._deadline, self._asked_at + self._limits.ask_timeout_seconds)
        if self.in_flight or self._asking is not None or self._sync is not None:
            return now + 1.0
        return min(
            max(self.heard_at + self._limits.heartbeat_seconds, self._ping_at),
            self.heard_at + self._limits.dead_seconds,
            self._expires_at,
        )

    def _shut(self, error: AuthErrorCode, code: CloseCode, retry_after_ms: int | None = None) -> list[Command]:
        if self.state is State.CLOSED:
            return []
        frame = frames.AuthError(
            error=error, retry_after_ms=msgspec.UNSET if retry_after_ms is None else retry_after_ms
        )
        return [Send(frame), *self.close(code)]

    def close(self, code: CloseCode) -> list[Command]:
        """End this connection: the client's fault, or the server's need (drain, slow consumer)."""
        if self.state is State.CLOSED:
            return []
        self._enter(State.CLOSED)
        return [Close(code)]


_Handler = Callable[..., list[Command]]

TRANSITIONS: Final[dict[State, dict[type, _Handler]]] = {
    State.AWAITING_AUTH: {
        frames.Auth: Session._on_auth,
        frames.Goodbye: Session._on_goodbye,
    },
    State.OPENING: {},
    State.LIVE: {
        frames.Auth: Session._on_auth,
        frames.Message: Session._on_message,
        frames.DeliveryAck: Session._on_delivery_ack,
        frames.ReadReceipt: Session._on_read_receipt,
        frames.Heartbeat: Session._on_heartbeat,
        frames.Retransmit: Session._on_retransmit,
        frames.Sync: Session._on_sync,
        frames.History: Session._on_history,
        frames.Goodbye: Session._on_goodbye,
    },
    State.CLOSED: {},
}
"""State → frame type → handler. What the table lacks is a protocol error."""
