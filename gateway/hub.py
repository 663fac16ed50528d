"""Users and their connections in this process: sessions are driven here, their commands carried out, down items routed.

The transports call `Hub.connected` and the `Link` methods of a `Connection`, the broker calls `Hub.route` and tells
what it could not hand over, the timer role calls `Connection.expired`. Nothing here awaits, so each call is atomic. The
hub knows no socket and no Redis key; a transport is never called again after it said `lost` or was told to close.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import suppress
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Final, assert_never

import msgspec
import structlog

from gateway.admission import Admission, Admitted, Refused
from gateway.connection import Connection
from gateway.presence import Presence
from gateway.registry import Attachment
from gateway.sweep import HeadSweep, RegistrySweep, TokenSweep
from gateway.timers import TimerWheel
from gateway.transport import HttpAnswer, Outgoing, Transport
from protocol import frames, keys, records
from protocol.backlog import State
from protocol.codec import JSON, FrameCodec
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode
from protocol.limits import Limits, TokenBucket, TypingBudget
from protocol.models import AGENT_PREFIX
from protocol.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from gateway.arrivals import Arrivals
    from gateway.broker import Broker
    from protocol.commands import Command

_log = structlog.get_logger(__name__)

_RETRY_MS: Final = 1000
"""What a client is told to wait when Redis did not take its message: a reconnect is tried within 2 s."""
_RETIRE_SECONDS: Final = 2.0
"""How long the old connection of a client stays that has shown its ticket elsewhere: its acks arrive, and where the
workers are busy the new one waits for its `auth_success` (0.5 s were too short for most at load average 8 on 2 cores).
"""


class Counts(msgspec.Struct):
    """What the hub did since the start; read by `metrics.py`."""

    published: int = 0
    publish_failures: int = 0
    outcomes: int = 0
    deliveries: int = 0
    """Live frames written, one per recipient connection."""
    catch_ups: int = 0
    """Live frames not written because the connection was behind: it pages the log instead."""
    pages: int = 0
    repairs: int = 0
    """Lost pushes found by the sweep (contract C8)."""
    replaced: int = 0
    migrated: int = 0
    """Clients let in by the session token of a `migration` frame."""
    turned_away: int = 0
    """WebSockets refused because their address opens too many."""
    signals: int = 0
    """Things said on the channels of users who are here."""
    isolated_errors: int = 0
    """Bugs that ended one connection instead of the process; must stay 0."""


class Hub:
    """The registry of this process. Implements `transport.Host` and `broker.Receiver`."""

    def __init__(
        self,
        instance_id: str,
        broker: Broker,
        admission: Admission,
        limits: Limits,
        devices_per_user: int,
        arrivals: Arrivals,
        *,
        opening_sessions: int,
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
        pages: Callable[[str], HttpAnswer | None],
    ) -> None:
        """`clock`: seconds, monotonic, the one the transports use. `pages` answers plain HTTP."""
        self.instance_id = instance_id
        self.broker = broker
        self.wheel = TimerWheel()
        self.counts = Counts()
        self.refusals: dict[AuthErrorCode, int] = dict.fromkeys(AuthErrorCode, 0)
        self.draining = False
        """Nobody new is let in."""
        self.holding = False
        """The end of a drain: nobody's frames are taken any more."""
        self.users: dict[str, tuple[Connection, ...]] = {}
        """Authenticated connections by user."""
        self.wall_ms = wall_ms
        self.answer_http = pages
        self.heads = HeadSweep(self.users, instance_id)
        self.registry = RegistrySweep(self.users)
        self.tokens = TokenSweep(self.users, instance_id)
        self.presence = Presence(instance_id, broker, limits.watched_people)
        self._admission = admission
        self._limits = limits
        self._devices_per_user = devices_per_user
        self._arrivals = arrivals
        self._opening_sessions = opening_sessions
        self.opening: set[int] = set()
        """Connections whose user was let in and that wait for a worker."""
        self._clock = clock
        self._is_traced = _log.is_enabled_for(logging.DEBUG)
        self._numbers = count(1)
        self._connections: dict[int, Connection] = {}
        self._budgets: dict[str, tuple[TokenBucket, TypingBudget]] = {}
        self._budgets_dropped_at = clock()
        self._retiring: deque[tuple[float, Connection]] = deque()
        """Connections whose client has migrated, and when they end."""

    # --- Host --------------------------------------------------------------------------------------------------------

    def let_in(self, remote: str, now: float) -> float:
        """See `Host.let_in`."""
        wait = self._arrivals.enter(remote, now)
        self.counts.turned_away += wait > 0.0
        return wait

    def gave_up(self, remote: str) -> None:
        """See `Host.gave_up`."""
        self._arrivals.leave(remote)

    def connected(self, transport: Transport, codec: FrameCodec, remote: str, now: float) -> Connection:
        """See `Host.connected`."""
        session = Session(self.instance_id, next(self._numbers), self._limits, now)
        connection = Connection(self, session, transport, codec, remote)
        self._connections[session.connection] = connection
        self.wheel.arm(connection, session.deadline(now), now)
        return connection

    @property
    def load(self) -> int:
        """Connections in hand."""
        return len(self._connections)

    @property
    def outcomes(self) -> int:
        """See `Receiver.outcomes`."""
        return self.counts.outcomes

    @property
    def in_flight(self) -> int:
        """Messages without an outcome, over all connections."""
        return sum(len(c.session.in_flight) for c in self._connections.values() if c.session.in_flight)

    @property
    def greatest_in_flight(self) -> int:
        """The fullest window."""
        return max((len(c.session.in_flight) for c in self._connections.values() if c.session.in_flight), default=0)

    @property
    def budgets(self) -> int:
        """Users whose rate is kept."""
        return len(self._budgets)

    @property
    def retiring(self) -> int:
        """Connections whose client has gone on elsewhere."""
        return len(self._retiring)

    @property
    def remembered(self) -> tuple[int, int, int]:
        """(verified tokens, addresses with failures, addresses with connections that have shown no token)."""
        return *self._admission.remembered, self._arrivals.unknown

    def attachments(self) -> Iterator[Attachment]:
        """Every authenticated connection."""
        for connections in self.users.values():
            for connection in connections:
                if connection.attachment is not None:
                    yield connection.attachment

    def remove(self, connection: Connection) -> None:
        """Route nothing here any more and take the registration back."""
        self._connections.pop(connection.session.connection, None)
        self.opening.discard(connection.session.connection)
        attachment = connection.attachment
        if attachment is None:
            self._arrivals.leave(connection.remote)
            return
        for record in connection.session.leave_typing():
            self.broker.signal(record)
        self.presence.forget(connection)
        rest = tuple(other for other in self.users.get(attachment.user_id, ()) if other is not connection)
        if rest:
            self.users[attachment.user_id] = rest
        else:
            self.users.pop(attachment.user_id, None)
        self.broker.detach(attachment)

    def forget(self, connection: Connection) -> None:
        """The socket is gone."""
        session = connection.session
        _log.info(
            "disconnected",
            connection=session.connection,
            user=session.user_id,
            device=session.device_id,
            code=connection.close_code,
            seconds=round(self._clock() - connection.opened_at, 3),
        )

    # --- commands of a session ---------------------------------------------------------------------------------------

    def verify(self, connection: Connection, payload: frames.AuthPayload, now: float) -> None:
        """Check a token and let the session know; for a session token as soon as Redis has answered."""
        outcome: Admitted | Refused | None = self._refuse_early(connection, payload)
        if outcome is None and payload.auth_token.startswith(keys.MIGRATION_PREFIX):
            outcome = self._redeem(connection, payload, now)
            if outcome is None:
                return
        elif outcome is None:
            outcome = self._admission.check(payload, connection.remote, now, self.wall_ms())
            if isinstance(outcome, Refused) and outcome.code is AuthErrorCode.USER_MISMATCH:
                # A genuine token in other hands: whoever keeps watch wants to know.
                _log.warning("auth_refused", code=outcome.code.value, user=payload.user_id, remote=connection.remote)
        connection.run(self._decide(connection, outcome, now), now)

    def _decide(self, connection: Connection, outcome: Admitted | Refused, now: float) -> list[Command]:
        """What the session does about a token that was judged."""
        session = connection.session
        match outcome:
            case Refused():
                self.refusals[outcome.code] += 1
                return session.refuse(outcome.code, outcome.retry_after_ms)
            case Admitted():
                session_id = keys.new_id("sess", self.wall_ms(), int.from_bytes(os.urandom(8)))
                bucket, typing = self._budget(outcome.user_id, now)
                return session.admit(
                    outcome.user_id,
                    outcome.device_id,
                    session_id,
                    outcome.expires_at,
                    bucket,
                    now,
                    issued_ms=outcome.issued_ms,
                    typing=typing,
                )
            case _:
                assert_never(outcome)

    def _redeem(self, connection: Connection, payload: frames.AuthPayload, now: float) -> Refused | None:
        """Ask what a session token stands for; `redeemed` goes on."""
        refused = self._admission.check_address(connection.remote, now)
        if refused is None and self.broker.redeem(connection.session.connection, payload.auth_token) is not None:
            refused = Refused(AuthErrorCode.SERVER_BUSY, _RETRY_MS)
        if refused is None:
            connection.redeeming = payload
        return refused

    def _refuse_early(self, connection: Connection, payload: frames.AuthPayload) -> Refused | None:
        if connection.session.state is State.LIVE:
            return None  # it is in: a fresh token asks for nothing that this process may not have to give
        if self.draining:
            return Refused(AuthErrorCode.DRAINING)
        is_full = connection.attachment is None and len(self.opening) >= self._opening_sessions
        if is_full or self.broker.missing():
            return Refused(AuthErrorCode.SERVER_BUSY, _RETRY_MS)
        devices = {other.session.device_id for other in self.users.get(payload.user_id, ())}
        if payload.device_id not in devices and len(devices) >= self._devices_per_user:
            return Refused(AuthErrorCode.DEVICE_LIMIT)
        return None

    def _budget(self, user_id: str, now: float) -> tuple[TokenBucket, TypingBudget]:
        """What a user may send and how often they may be typing, over all their connections here."""
        budget = self._budgets.get(user_id)
        if budget is None:
            is_bot = user_id.startswith(AGENT_PREFIX)
            rate = self._limits.bot_message_rate if is_bot else self._limits.message_rate
            bucket = TokenBucket(rate, self._limits.bot_message_burst if is_bot else self._limits.message_burst, now)
            budget = self._budgets[user_id] = bucket, TypingBudget(self._limits)
        return budget

    def drop_idle_budgets(self, now: float) -> None:
        """Forget the budgets of users who have gone. Once a minute: by then they would be full again."""
        refill_seconds = self._limits.message_burst / self._limits.message_rate
        if now - self._budgets_dropped_at >= max(60.0, refill_seconds):
            self._budgets_dropped_at = now
            for user_id in [user_id for user_id in self._budgets if user_id not in self.users]:
                del self._budgets[user_id]

    def attach(self, connection: Connection) -> None:
        """The session knows its user: route to it, and let the newest connection of the device win."""
        session = connection.session
        attachment = Attachment(session.user_id, session.device_id, session.connection, self.wall_ms())
        connection.attachment = attachment
        self._arrivals.leave(connection.remote)
        self.opening.add(session.connection)
        before = self.users.get(session.user_id, ())
        self.users[session.user_id] = (*before, connection)
        self.broker.attach(attachment)
        for other in before:
            if other.session.device_id == session.device_id:
                self._replace(other)
        _log.info(
            "connected",
            connection=session.connection,
            user=session.user_id,
            device=session.device_id,
            remote=connection.remote,
            codec=connection.codec.subprotocol,
        )

    def _replace(self, connection: Connection) -> None:
        self.counts.replaced += 1
        self._guard(connection, lambda: connection.run(connection.session.replaced(), self._clock()))

    def publish(self, connection: Connection, record: records.SendMessage | records.ChangeMessage, now: float) -> None:
        """Hand a message to its shard, or answer at once."""
        self.counts.published += 1
        if self._is_traced:
            _log.debug("< message", trace=records.trace_of(record), connection=record.connection)
        code = self.broker.publish(record)
        if code is not None:
            self.counts.publish_failures += 1
            connection.run(connection.session.publish_failed(record.idempotency_key, code, _RETRY_MS, now), now)

    def ask(self, connection: Connection, query: records.Query, now: float) -> None:
        """Hand a query to the workers, or answer at once."""
        if isinstance(query, records.PresenceQuery):
            self.presence.ask(query, now)
        elif (code := self.broker.ask(query)) is not None:
            self._answer_lost_query(connection, query, code, now)

    def _answer_lost_query(self, connection: Connection, query: records.Query, code: ErrorCode, now: float) -> None:
        """The session repeats pages and its opening by itself; a client's own question needs an answer."""
        is_opening = connection.session.state is State.OPENING
        if isinstance(query, records.OpenQuery) and is_opening and not query.is_check:
            connection.run(connection.session.refuse(AuthErrorCode.SERVER_BUSY, _RETRY_MS), now)
        elif isinstance(query, records.RangeQuery | records.HistoryQuery):
            frame = frames.error_frame(
                code,
                "not answered; ask again",
                conversation_id=query.conversation_id,
                retry_after_ms=_RETRY_MS,
                in_reply_to="retransmit" if isinstance(query, records.RangeQuery) else "history",
            )
            connection.send(Outgoing(JSON.encode(frame)))

    # --- Receiver ----------------------------------------------------------------------------------------------------

    def publish_failed(self, connection: int, idempotency_key: str, code: ErrorCode) -> None:
        """See `Receiver.publish_failed`."""
        self.counts.publish_failures += 1
        target = self._connections.get(connection)
        if target is not None:
            step = lambda now, wall_ms: target.session.publish_failed(idempotency_key, code, _RETRY_MS, now)  # noqa: E731
            self._guard(target, lambda: target.react(step, self._clock(), self.wall_ms()))

    def redeemed(self, connection: int, found: records.MigrationTicket | ErrorCode | None) -> None:
        """See `Receiver.redeemed`. A client that has gone meanwhile has to show its own token."""
        target = self._connections.get(connection)
        if target is not None and target.redeeming is not None:
            payload = target.redeeming

            def step(now: float, wall_ms: int) -> list[Command]:
                target.redeeming = None
                outcome: Admitted | Refused | None = self._refuse_early(target, payload)
                if outcome is not None:
                    pass
                elif isinstance(found, ErrorCode):
                    outcome = Refused(AuthErrorCode.SERVER_BUSY, _RETRY_MS)
                else:
                    outcome = self._admission.check_ticket(found, payload, target.remote, now, wall_ms)
                    self.counts.migrated += isinstance(outcome, Admitted)
                return self._decide(target, outcome, now)

            now = self._clock()
            self._guard(target, lambda: target.react(step, now, self.wall_ms()))
            if target.transport is not None:
                self.wheel.arm(target, target.session.deadline(now), now)

    def query_failed(self, query: records.Query, code: ErrorCode) -> None:
        """See `Receiver.query_failed`."""
        if isinstance(query, records.HeadsQuery | records.PresenceQuery):
            return
        target = self._connections.get(query.connection)
        if target is not None:
            self._guard(target, lambda: self._answer_lost_query(target, query, code, self._clock()))

    def recovered(self, forgotten: bool) -> None:
        """See `Receiver.recovered`. Where Redis forgot, every message on its way is lost, or its ack is."""
        if forgotten:
            self.registry.hurry()
            for number, connection in list(self._connections.items()):
                for key in list(connection.session.in_flight or ()):
                    self.publish_failed(number, key, ErrorCode.STORAGE_UNAVAILABLE)
        self.heads.hurry()

    @property
    def watched(self) -> Collection[str]:
        """See `Listener.watched`."""
        return self.presence.people

    def signalled(self, user_id: str, signal: records.UserSignal) -> None:
        """See `Listener.signalled`."""
        self.counts.signals += 1
        frame = Outgoing(bytes(signal.frame)) if isinstance(signal, records.Tell) else None
        for connection in self.users.get(user_id, ()):
            session = connection.session
            if signal.device_id not in ("", session.device_id):
                continue
            if frame is not None:
                self._guard(connection, partial(connection.send, frame))
            elif isinstance(signal, records.Revoked) and session.issued_ms < signal.before_ms:
                self._guard(connection, partial(self._revoke, connection))

    def _revoke(self, connection: Connection) -> None:
        self.refusals[AuthErrorCode.REVOKED] += 1
        connection.run(connection.session.refuse(AuthErrorCode.REVOKED), self._clock())

    def presence_changed(self, user_id: str, change: records.PresenceChange) -> None:
        """See `Listener.presence_changed`."""
        self.presence.changed(user_id, change, self._clock())

    def heard_again(self) -> None:
        """See `Listener.heard_again`."""
        self.presence.hurry()
        self.tokens.hurry()

    def _guard(self, connection: Connection, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001 -- boundary "connection": one bad connection must not disturb another
            connection.isolate()

    def route(self, items: Sequence[records.DownItem]) -> None:
        """See `Receiver.route`. In order; what is for a connection that has gone is dropped."""
        now = self._clock()
        wall_ms = self.wall_ms()
        for item in items:
            if isinstance(item, records.Delivery):
                self._route_delivery(item, now, wall_ms)
            elif isinstance(item, records.Outcome):
                self.counts.outcomes += 1
                target = self._connections.get(item.connection)
                if self._is_traced:
                    _trace_outcome(item, target)
                if target is not None:
                    try:
                        target.settle(item)
                    except Exception:  # noqa: BLE001 -- boundary "connection"
                        target.isolate()
            elif isinstance(item, records.Notice):
                self._route_notice(item)
            elif isinstance(item, records.HeadsAnswer):
                self.heads.answered(item, now)
            elif isinstance(item, records.PresenceAnswer):
                self.presence.answered(item, now)
            elif isinstance(item, records.TokenGood):
                self.tokens.answered(item.connection)
            elif not isinstance(item, records.CommandOutcome):
                self._route_answer(item, now, wall_ms)

    def _route_delivery(self, item: records.Delivery, now: float, wall_ms: int) -> None:
        """The fan-out: one encoded frame, written to everybody who continues with it."""
        outgoing = Outgoing(item.frame)
        conversation_id, first, last, skip = item.conversation_id, item.from_sequence, item.to_sequence, item.skip
        users = self.users
        written = 0
        for user_id in item.users:
            for connection in users.get(user_id, ()):
                session = connection.session
                try:
                    if session.deliver(conversation_id, first, last):
                        transport = connection.transport
                        if session.connection != skip and transport is not None:
                            transport.send_nowait(outgoing)
                            written += 1
                    else:
                        self.counts.catch_ups += 1
                        self.pump(connection, now, wall_ms)
                except Exception:  # noqa: BLE001 -- boundary "connection"
                    connection.isolate()
        self.counts.deliveries += written
        if self._is_traced:
            _log.debug("> messages", conversation=conversation_id, first=first, last=last, written=written)

    def pump(self, connection: Connection, now: float, wall_ms: int) -> None:
        """Let a connection that is behind ask for its next page."""
        todo = connection.session.pump(now, wall_ms)
        if todo:
            connection.run(todo, now)
            if connection.due > now + 3.0:
                self.wheel.arm(connection, now + 1.0, now)

    def _route_notice(self, item: records.Notice) -> None:
        outgoing = Outgoing(item.frame)
        for user_id in item.users:
            for connection in self.users.get(user_id, ()):
                try:
                    connection.send(outgoing)
                except Exception:  # noqa: BLE001 -- boundary "connection"
                    connection.isolate()

    def _route_answer(
        self,
        item: records.OpenAnswer | records.PageAnswer | records.Reply | records.Replaced,
        now: float,
        wall_ms: int,
    ) -> None:
        target = self._connections.get(item.connection)
        if target is None:
            return
        session = target.session
        try:
            if isinstance(item, records.OpenAnswer):
                self.opening.discard(item.connection)
                target.react(lambda now, wall_ms: session.opened(item, now, wall_ms), now, wall_ms)
                if target.transport is not None:
                    self.wheel.arm(target, session.deadline(now), now)
            elif isinstance(item, records.PageAnswer):
                self.counts.pages += 1
                target.run(session.page(item, now, wall_ms), now)
            elif isinstance(item, records.Reply):
                target.send(Outgoing(item.frame))
            elif session.migrating:
                self._retiring.append((now + _RETIRE_SECONDS, target))
            else:
                self._replace(target)
        except Exception:  # noqa: BLE001 -- boundary "connection"
            target.isolate()

    # --- sweeps and drain --------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once a second: ask for heads, repair what stayed behind, keep the registry alive."""
        wall_ms = self.wall_ms()
        queries: Iterator[records.Query] = chain(self.heads.due_queries(now), self.tokens.due(now))
        for query in queries:
            self.broker.ask(query)
        for connection, conversation_id, head in self.heads.due_suspects(now):
            if connection.transport is not None and connection.session.head_seen(conversation_id, head):
                self.counts.repairs += 1
                connection.session.note_head(conversation_id, head)
                self._guard(connection, lambda target=connection: self.pump(target, now, wall_ms))  # type: ignore[misc]
        for attachments in self.registry.due():
            self.broker.refresh(attachments)
        self.presence.step(now)
        self.drop_idle_budgets(now)

    @property
    def migrating(self) -> int:
        """Clients that were told to go and have not gone."""
        return sum(connection.session.migrating for connection in self._connections.values())

    def migrate(self, connection: Connection, endpoint: str, session_token: str) -> None:
        """Tell a client where to go on."""
        session = connection.session
        self._guard(connection, lambda: connection.run(session.migrate(endpoint, session_token), self._clock()))

    def retire(self, now: float) -> None:
        """End the connections whose clients have been elsewhere for a moment."""
        while self._retiring and self._retiring[0][0] <= now:
            _, connection = self._retiring.popleft()
            self._replace(connection)

    def close_all(self, code: CloseCode) -> None:
        """End every session: error-free close, registration taken back."""
        for connection in list(self._connections.values()):
            self._guard(connection, lambda target=connection: target.run(target.session.close(code), self._clock()))  # type: ignore[misc]


def _trace_outcome(item: records.Outcome, target: Connection | None) -> None:
    """Name the message that an ack or error is about, for who follows it through the logs (level debug only)."""
    frame = None
    with suppress(msgspec.DecodeError):
        frame = JSON.decode_server(item.frame)
    if target is not None and isinstance(frame, frames.MessageAck | frames.Error):
        conversation_id = frame.payload.conversation_id
        if isinstance(conversation_id, str):
            trace = keys.trace_id(conversation_id, target.session.user_id, item.idempotency_key)
            _log.debug("> outcome", trace=trace, connection=item.connection, frame=type(frame).__struct_config__.tag)
