"""Sends to one webhook what is queued for it: in order within a conversation, several conversations at once.

Three tasks. The first tries: the head of the queue, at most `WINDOW` deliveries, a line for each conversation, at most
`AT_ONCE` requests; of a line the next one starts when the one before has arrived or become a dead letter. Second
chances: dead letters whose time has come, one at a time. Replays: a span of the log is put into the queue page by page.

What is sent and not yet written down when this process dies is sent again by the next, under the same id.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import structlog

from protocol import codec, webhooks
from protocol.webhooks import DeliveryStatus, Reason
from workers import metrics
from workers.breaker import State
from workers.store.errors import StoreUnavailable
from workers.webhooks.call import Outcome, Verdict, call
from workers.webhooks.sink import delivery_of, place_at

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime, timedelta

    from protocol import events
    from protocol.webhooks import Delivery, Webhook
    from workers.breaker import Breaker
    from workers.egress import Egress
    from workers.store import Store
    from workers.store.webhooks import Registered

WINDOW: Final = 32
"""Deliveries of one webhook in memory, each with its event of up to 48 KiB."""
AT_ONCE: Final = 8
"""Requests to one webhook at once: one that hangs holds no more, and nobody else's."""
REPLAY_AHEAD: Final = 1000
"""Deliveries in a queue past which a replay waits, so that new events are not hours behind old ones."""
SECOND_CHANCES: Final = 8
REPLAY_PAGE: Final = 200
FAILURES_TO_DISABLE: Final = 10
"""A webhook that fails now and then, because hardly anything happens, has not failed for days."""
_IDLE_SECONDS: Final = 1.0
"""How soon a delivery is seen that another process has queued."""
_PAUSE_SECONDS: Final = 1.0
_LONGEST_WAIT_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)
Result = TypeVar("Result")


class Courier:
    """`registered` is replaced when the webhook changes; `news` is set when there is something to send."""

    def __init__(
        self,
        store: Store,
        egress: Egress,
        registered: Registered,
        breaker: Breaker,
        disable_after: timedelta,
        now: Callable[[], datetime],
    ) -> None:
        self.registered = registered
        self.breaker = breaker
        self.scope = anyio.CancelScope()
        self.news = anyio.Event()
        self._store = store
        self._egress = egress
        self._disable_after = disable_after
        self._now = now
        self._room = anyio.CapacityLimiter(AT_ONCE)
        self._has_failed = False
        """Since the webhook was read last."""

    @property
    def webhook(self) -> Webhook:
        return self.registered.webhook

    @property
    def _webhook_id(self) -> str:
        return self.registered.webhook.webhook_id

    async def run(self) -> None:
        """Until `scope` is cancelled. *Cancellation*: what is under way is sent again by whoever comes next."""
        with self.scope:
            async with anyio.create_task_group() as group:
                group.start_soon(self._repeat, self._send_head)
                group.start_soon(self._repeat, self._give_second_chances)
                group.start_soon(self._repeat, self._replay)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except StoreUnavailable as error:
                log.warning("courier_waits", webhook=self._webhook_id, error=str(error)[:200])
                await anyio.sleep(_PAUSE_SECONDS)

    # --- the queue ---------------------------------------------------------------------------------------------------

    async def _send_head(self) -> None:
        self.news = anyio.Event()
        waiting = await self._store.deliveries.waiting(self._webhook_id, WINDOW)
        if not waiting:
            with anyio.move_on_after(_IDLE_SECONDS):
                await self.news.wait()
            return
        said = await self._events(waiting)
        lines: dict[str, list[Delivery]] = {}
        for delivery in waiting:
            lines.setdefault(delivery.conversation_id, []).append(delivery)
        async with anyio.create_task_group() as group:
            for line in lines.values():
                group.start_soon(self._send_line, line, said)

    async def _events(self, deliveries: Sequence[Delivery]) -> dict[str, events.Event]:
        """Event id → event, as its message is now."""
        own = {item.event_id: codec.decode_event(item.event) for item in deliveries if isinstance(item.event, bytes)}
        names = [item.event_id for item in deliveries if item.event_id not in own]
        return own | (await self._store.events.of_messages(names) if names else {})

    async def _send_line(self, line: Sequence[Delivery], said: dict[str, events.Event]) -> None:
        for delivery in line:
            async with self._room:
                event = said.get(delivery.event_id)
                if event is None:
                    await self._bury_empty(delivery)
                else:
                    await self._deliver(delivery, event)

    async def _deliver(self, delivery: Delivery, event: events.Event) -> None:
        for number in range(1, webhooks.TRIES + 1):
            await self._admitted()
            outcome = await self._try(event)
            if outcome.verdict is not Verdict.TRANSIENT or number == webhooks.TRIES:
                break
            delay = webhooks.quick_retry_seconds(number)
            await anyio.sleep(delay * random.uniform(1 - webhooks.JITTER, 1 + webhooks.JITTER))
        await self._settle(delivery, event, outcome, delivery.tries + number)

    async def _admitted(self) -> None:
        """Wait for as long as the host is spared; then this try may be made."""
        while wait := self.breaker.wait_seconds:  # noqa: ASYNC110 - a time passes, and a probe may end it sooner
            await anyio.sleep(min(wait, _PAUSE_SECONDS))
        self.breaker.admit()

    async def _try(self, event: events.Event) -> Outcome:
        outcome = await call(self._egress, self.registered, event, self._now())
        if outcome.verdict in (Verdict.TRANSIENT, Verdict.BLOCKED):
            self.breaker.failed()
        else:
            if self.breaker.state is not State.CLOSED:
                await self._insist(lambda: self._store.deliveries.hasten(self._webhook_id, self._now()))
            self.breaker.succeeded()
        return outcome

    # --- what becomes of a delivery ----------------------------------------------------------------------------------

    async def _settle(self, delivery: Delivery, event: events.Event, outcome: Outcome, tries: int) -> None:
        now = self._now()
        store = self._store
        if outcome.verdict is Verdict.DELIVERED:
            metrics.WEBHOOK_DELAY_SECONDS.observe(max((now - event.time).total_seconds(), 0.0))
            await self._insist(lambda: store.deliveries.delivered(delivery, tries, outcome.status, now))
            if self._has_failed or self.webhook.failing_since is not None:
                self._has_failed = False
                await self._insist(lambda: store.webhooks.succeeded(self._webhook_id))
            return
        again = webhooks.slow_retry_at(delivery, tries, now) if outcome.verdict is Verdict.TRANSIENT else None
        log.warning(
            "webhook_delivery_failed",
            webhook=self._webhook_id,
            event_id=delivery.event_id,
            reason=outcome.reason,
            tries=tries,
            next_try_at=None if again is None else again.isoformat(),
        )
        await self._insist(lambda: store.deliveries.failed(delivery, tries, outcome.status, outcome.reason, now, again))
        self._has_failed = True
        webhook = await self._insist(lambda: store.webhooks.failed(self._webhook_id, now))
        if webhook is not None:
            await self._judge(webhook, outcome, now)

    async def _judge(self, webhook: Webhook, outcome: Outcome, now: datetime) -> None:
        """Has it failed for so long that nothing more is to be sent?"""
        if outcome.verdict is Verdict.GONE:
            await self.disable(Reason.GONE)
        elif (
            webhook.failures >= FAILURES_TO_DISABLE
            and webhook.failing_since is not None
            and now - webhook.failing_since >= self._disable_after
        ):
            await self.disable(Reason.FAILED)

    async def disable(self, reason: Reason) -> None:
        """Nothing more is sent; the events role tells of it."""
        disabled = await self._insist(lambda: self._store.webhooks.disable(self._webhook_id, reason, self._now()))
        if disabled is not None:
            metrics.WEBHOOKS_DISABLED.labels(reason.value).inc()
            log.warning("webhook_disabled", webhook=self._webhook_id, app=self.webhook.app, reason=reason.value)
        self.scope.cancel()

    async def _bury_empty(self, delivery: Delivery) -> None:
        reason = "its message is no more"
        await self._insist(
            lambda: self._store.deliveries.failed(delivery, delivery.tries, None, reason, self._now(), None)
        )

    async def _insist(self, ask: Callable[[], Awaitable[Result]]) -> Result:
        """What has happened is written down, however long that takes: otherwise it would happen again."""
        seconds = 0.1
        while True:
            try:
                return await ask()
            except StoreUnavailable as error:
                log.warning("courier_waits", webhook=self._webhook_id, error=str(error)[:200])
                await anyio.sleep(seconds)
                seconds = min(seconds * 2, _LONGEST_WAIT_SECONDS)

    # --- later -------------------------------------------------------------------------------------------------------

    async def _give_second_chances(self) -> None:
        await anyio.sleep(_IDLE_SECONDS)
        if self.breaker.wait_seconds:
            return
        due = await self._store.deliveries.overdue(self._webhook_id, self._now(), SECOND_CHANCES)
        said = await self._events(due) if due else {}
        for delivery in due:
            event = said.get(delivery.event_id)
            if event is None:
                await self._bury_empty(delivery)
            elif self.breaker.wait_seconds:
                return
            else:
                self.breaker.admit()
                await self._settle(delivery, event, await self._try(event), delivery.tries + 1)

    async def _replay(self) -> None:
        span = self.webhook.replay
        if span is not None:
            current = await self._store.webhooks.get(self._webhook_id)
            span = None if current is None else current.replay
        if span is None or await self._is_ahead():
            await anyio.sleep(_PAUSE_SECONDS)
            return
        page, after = await self._store.events.between(span.since, span.until, span.after, REPLAY_PAGE)
        now = self._now()
        deliveries = [
            delivery_of(self.webhook, event, now) for event, agent_id in page if self.webhook.wants(event, agent_id)
        ]
        if deliveries:
            await self._store.deliveries.queue_again(deliveries, place_at(now))
            self.news.set()
        await self._store.webhooks.replayed(self._webhook_id, span, after)
        log.info("webhook_replayed", webhook=self._webhook_id, deliveries=len(deliveries), is_done=after is None)

    async def _is_ahead(self) -> bool:
        count = self._store.deliveries.count
        return await count(self._webhook_id, DeliveryStatus.PENDING, REPLAY_AHEAD) >= REPLAY_AHEAD
