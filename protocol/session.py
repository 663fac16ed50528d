"""Sans-IO state machine of one client connection: what it may say when, and what follows from it.

Frames and answers go in, commands (`commands.py`) come out; both transports of the gateway drive the same session.
`now` is seconds of a monotonic clock, `wall_ms` epoch milliseconds. No method awaits, so each is atomic.

What a connection has been given of each conversation, and how it catches up, is the base class: `backlog.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from protocol import frames, records
from protocol.backlog import Backlog, State
from protocol.commands import (
    PING,
    Acknowledge,
    Ask,
    Attach,
    Close,
    Command,
    Publish,
    Send,
    Signal,
    Unwatch,
    Verify,
    Watch,
    message_change,
)
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.limits import Limits, TokenBucket, TypingBudget, check_content, check_message
from protocol.turns import Refused, Turns

_Refusal = tuple[ErrorCode, str, int | None]
"""(code, reason, retry_after_ms)"""


class Session(Backlog):
    """One connection's protocol state. `connection` and `instance` are its return address in every record."""

    __slots__ = (
        "_bad_count",
        "_bad_since",
        "_handlers",
        "_lookups",
        "_messages",
        "_ping_at",
        "_rate_count",
        "_rate_since",
        "_resume",
        "_turns",
        "_typing",
        "_typing_budget",
        "expires_at",
        "heard_at",
        "in_flight",
        "migrating",
        "session_id",
    )

    def __init__(self, instance: str, connection: int, limits: Limits, now: float) -> None:
        super().__init__(instance, connection, limits, now)
        self.session_id = ""
        self.heard_at = now
        """When the last byte came; the transport writes it."""
        self.in_flight: dict[str, tuple[float, str, str]] | None = None
        """Idempotency key → (deadline of its outcome, client_message_id, conversation)."""
        self._turns: Turns | None = None
        """What was not taken and is to be said again before what comes behind it; None while all goes well."""
        self._ping_at = now + limits.heartbeat_seconds
        self.expires_at = float("inf")
        """When the token ends, on the clock of `now`."""
        self.migrating = False
        """The client was told to go on elsewhere."""
        self._resume: dict[str, int] = {}
        self._typing: dict[str, float] | None = None
        """Conversation → when typing there ends by itself."""
        self._typing_budget: TypingBudget | None = None
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
        told = Send.error(
            error.code,
            error.message,
            client_message_id=error.client_message_id,
            idempotency_key=error.idempotency_key,
        )
        return [told, *self.close(CloseCode.BAD_FRAME)] if self._bad_count >= self._limits.protocol_errors else [told]

    def _on_auth(self, frame: frames.Auth, now: float, wall_ms: int) -> list[Command]:
        self._resume = {} if frame.payload.resume is msgspec.UNSET else frame.payload.resume
        return [Verify(frame.payload)]

    def _on_message(self, frame: frames.Message, now: float, wall_ms: int) -> list[Command]:
        payload = frame.payload
        key = frame.idempotency_key
        refusal = self._spend(now)
        if refusal is None and (unfit := check_message(payload, self._limits)) is not None:
            refusal = (*unfit, None)
        if refusal is None and self._turns is not None:
            refusal = self._check_turn(payload.conversation_id, key, now)
        if refusal is not None:
            return self._refuse_send(refusal, frame.client_message_id, key, payload.conversation_id, now)
        client_message_id = frame.client_message_id or ""
        if self._typing and self._typing.pop(payload.conversation_id, None) and self._typing_budget is not None:
            self._typing_budget.forget(payload.conversation_id)
        if self.in_flight is None:
            self.in_flight = {}
        self.in_flight[key] = (now + self._limits.ack_timeout_seconds, client_message_id, payload.conversation_id)
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
                    payload.forwarded,
                )
            )
        ]

    def _on_change(
        self, frame: frames.MessageEdit | frames.MessageDelete | frames.MessageReaction, now: float, wall_ms: int
    ) -> list[Command]:
        payload = frame.payload
        key = payload.idempotency_key
        change = message_change(frame)
        refusal = self._spend(now)
        if refusal is None and isinstance(change, records.Edit):
            too_bad = check_content(change.content, self._limits.max_content_bytes)
            refusal = None if too_bad is None else (*too_bad, None)
        if refusal is None and self._turns is not None:
            refusal = self._check_turn(payload.conversation_id, key, now)
        if refusal is not None:
            return self._refuse_send(refusal, payload.client_message_id, key, payload.conversation_id, now)
        client_message_id = payload.client_message_id or ""
        if self.in_flight is None:
            self.in_flight = {}
        self.in_flight[key] = (now + self._limits.ack_timeout_seconds, client_message_id, payload.conversation_id)
        return [
            Publish(
                records.ChangeMessage(
                    self.instance,
                    self.connection,
                    "",
                    self.user_id,
                    self.device_id,
                    payload.conversation_id,
                    client_message_id,
                    key,
                    payload.message_id,
                    change,
                )
            )
        ]

    def _spend(self, now: float) -> _Refusal | None:
        """Take one message from the user's rate, or say how long to wait."""
        if self._messages is not None:
            wait = self._messages.take(now)
            if wait > 0.0:
                return ErrorCode.RATE_LIMITED, "too many messages", int(wait * 1000) + 1
        return None

    def _check_turn(self, conversation_id: str, key: str, now: float) -> _Refusal | None:
        """Something in front of it was not taken: it would overtake that."""
        refused = None if self._turns is None else self._turns.check(conversation_id, key, now)
        self._turns = self._turns or None
        return (
            None if refused is None else (refused.code, "not stored: what was sent before it comes first", *refused[1:])
        )

    def _refuse_send(
        self, refusal: _Refusal, client_message_id: str | None, key: str, conversation_id: str, now: float
    ) -> list[Command]:
        """Refused before it went anywhere; the key is not consumed."""
        code, reason, retry_after_ms = refusal
        if code is ErrorCode.RATE_LIMITED and self._too_many_rate_errors(now):
            return self.close(CloseCode.RATE)
        return [
            Send.error(
                code,
                reason,
                client_message_id=client_message_id,
                idempotency_key=key,
                conversation_id=conversation_id,
                retry_after_ms=retry_after_ms,
            )
        ]

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

    def _on_typing(self, frame: frames.Typing, now: float, wall_ms: int) -> list[Command]:
        """Pass on a `start` per spacing and the `stop` that ends it; the rest is dropped without a word."""
        conversation_id = frame.payload.conversation_id
        running = self._typing or {}
        if frame.payload.state is frames.TypingState.STOP:
            if running.pop(conversation_id, None) is None:
                return []
            return [Signal(records.Typing(self.user_id, conversation_id, False))]
        if conversation_id not in running and len(running) >= self._limits.typing_conversations:
            return []
        if self._typing_budget is None:
            self._typing_budget = TypingBudget(self._limits)
        if not self._typing_budget.take(conversation_id, now):
            return []
        running[conversation_id] = now + self._limits.typing_seconds
        self._typing = running
        return [Signal(records.Typing(self.user_id, conversation_id, True))]

    def _stop_typing(self, now: float) -> list[Command]:
        """Whoever went silent while writing has stopped."""
        running = self._typing or {}
        over = [name for name, ends in running.items() if now >= ends]
        self._typing = {name: ends for name, ends in running.items() if now < ends} or None
        return [Signal(records.Typing(self.user_id, name, False)) for name in over]

    def leave_typing(self) -> list[records.Typing]:
        """The connection is over: whatever it was typing has stopped."""
        running, self._typing = self._typing or {}, None
        return [records.Typing(self.user_id, name, False) for name in running]

    def _on_presence_subscribe(self, frame: frames.PresenceSubscribe, now: float, wall_ms: int) -> list[Command]:
        user_ids = frame.payload.user_ids
        query = records.PresenceQuery(self.instance, self.connection, self.user_id, user_ids)
        commands = self._look_up(query, None, "presence_subscribe", now)
        if not isinstance(commands[0], Ask) or self._lookups is None:
            return commands
        # Taken however many there are, so that no list is too long for the rate; the next one waits the longer.
        self._lookups.owe(max(0.0, len(user_ids) / self._limits.people_per_lookup - 1.0))
        return [Watch(user_ids), *commands]

    def _on_presence_unsubscribe(self, frame: frames.PresenceUnsubscribe, now: float, wall_ms: int) -> list[Command]:
        return [Unwatch(frame.payload.user_ids)]

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
        issued_ms: int = 0,
        typing: TypingBudget | None = None,
    ) -> list[Command]:
        """The token is good until `expires_at` (monotonic). `bucket` and `typing`: the user's rates, for all its
        devices."""
        if self.state is State.CLOSED or self.state is State.OPENING:
            return []
        self.expires_at = expires_at
        self.issued_ms = issued_ms
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
        self._typing_budget = typing
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

    # --- answers and deliveries in -----------------------------------------------------------------------------------

    def opened(self, answer: records.OpenAnswer, now: float, wall_ms: int) -> list[Command]:
        """Where the user's conversations stand: `auth_success`, then pages of what is behind, then `sync_complete`.

        A refusal ends the session whenever it comes: the gateway may ask only to see whether the token is still good.
        """
        if answer.refusal is not None:
            return self.refuse(answer.refusal)
        sync = self._sync
        if sync is None or sync.answered or self.state is State.CLOSED:
            return []
        commands: list[Command] = []
        if sync.reply_auth:
            commands.append(Send(self._auth_success(answer.unread, wall_ms)))
        self._enter(State.LIVE)
        sync.unread = answer.unread
        self._take_heads(sync, answer.heads)
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

    def outcome(self, idempotency_key: str) -> None:
        """A send was committed or refused: its place in the window is free."""
        self._leave_window(idempotency_key)
        if self._turns is not None:
            self._turns.settle(idempotency_key)
            self._turns = self._turns or None

    def _leave_window(self, idempotency_key: str) -> None:
        if self.in_flight is not None:
            self.in_flight.pop(idempotency_key, None)
            if not self.in_flight:
                self.in_flight = None

    def publish_failed(self, idempotency_key: str, code: ErrorCode, retry_after_ms: int, now: float) -> list[Command]:
        """The broker could not take this message: a retryable error for its key, and for what comes behind it in its
        conversation before it comes again."""
        in_flight = self.in_flight or {}
        pending = in_flight.get(idempotency_key)
        if pending is None or self.state is State.CLOSED:
            return []
        if self._turns is None:
            self._turns = Turns(self._limits)
        on_the_way = [key for key, (_, _, name) in in_flight.items() if name == pending[2]]
        self._turns.fail(pending[2], idempotency_key, on_the_way, Refused(code, retry_after_ms), now)
        self._leave_window(idempotency_key)
        return [
            Send.error(
                code,
                "not stored; send the same key again",
                client_message_id=pending[1] or None,
                idempotency_key=idempotency_key,
                conversation_id=pending[2],
                retry_after_ms=retry_after_ms,
            )
        ]

    # --- the connection's fate ---------------------------------------------------------------------------------------

    def migrate(self, endpoint: str, session_token: str) -> list[Command]:
        """This gateway ends: the client is told where to go. Its connection is served until it has gone."""
        if self.state is not State.LIVE:
            return []
        self.migrating = True
        payload = frames.MigrationPayload(new_endpoint=endpoint, session_token=session_token)
        return [Send(frames.Migration(payload=payload))]

    def replaced(self) -> list[Command]:
        """The same user and device connected again: the newest wins."""
        if self.state is State.CLOSED:
            return []
        if self.migrating:
            return self.close(CloseCode.RESTART)
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
        if now >= self.expires_at:
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
            for key in [key for key, (deadline, *_) in self.in_flight.items() if now >= deadline]:
                commands.extend(self.publish_failed(key, ErrorCode.STORAGE_UNAVAILABLE, 1000, now))
        if self._turns is not None:
            self._turns.forget(now)
            self._turns = self._turns or None
        if self._asking is not None and now - self._asked_at >= self._limits.ask_timeout_seconds:
            self._asking = None
        if self._sync is not None and not self._sync.answered and now >= self._deadline:
            self._deadline = now + self._limits.open_timeout_seconds
            commands.append(Ask(self._open_query(self._sync.asked)))
        if self._typing:
            commands.extend(self._stop_typing(now))
        commands.extend(self.pump(now, wall_ms))
        return commands

    def deadline(self, now: float) -> float:
        """When `tick` is next needed, at the latest; may be early, never late by more than the shell's timer step."""
        if self.state is State.AWAITING_AUTH:
            return self._deadline
        if self.state is State.OPENING:
            return min(self._deadline, self._asked_at + self._limits.ask_timeout_seconds)
        if self.in_flight or self._asking is not None or self._sync is not None or self._typing:
            return now + 1.0
        return min(
            max(self.heard_at + self._limits.heartbeat_seconds, self._ping_at),
            self.heard_at + self._limits.dead_seconds,
            self.expires_at,
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
        frames.MessageEdit: Session._on_change,
        frames.MessageDelete: Session._on_change,
        frames.MessageReaction: Session._on_change,
        frames.Typing: Session._on_typing,
        frames.PresenceSubscribe: Session._on_presence_subscribe,
        frames.PresenceUnsubscribe: Session._on_presence_unsubscribe,
        frames.Goodbye: Session._on_goodbye,
    },
    State.CLOSED: {},
}
"""State → frame type → handler. What the table lacks is a protocol error."""
