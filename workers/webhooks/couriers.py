"""Which webhooks this process sends to: those whose lease it holds in MongoDB, a courier for each.

Any number of processes may carry the events role. A lease organises, it does not fence: a process that was paused may
send once more what another has sent, under the same id.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import anyio
import structlog

from protocol import webhooks
from protocol.webhooks import DeliveryStatus, Reason
from workers import metrics
from workers.breaker import Breaker, State
from workers.store.errors import StoreUnavailable
from workers.webhooks.courier import Courier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from anyio.abc import TaskGroup

    from workers.egress import Egress
    from workers.settings import Settings
    from workers.store import Store
    from workers.store.webhooks import Registered

LEASE_SECONDS: Final = 10.0
"""A dead process' webhooks are another's after so long."""
ROUND_SECONDS: Final = 1.0
"""Between two looks at the webhooks: how soon a change is heeded."""
_COUNT_SECONDS: Final = 5.0
_GOODBYE_SECONDS: Final = 1.0

log = structlog.get_logger(__name__)


class Couriers:
    """All couriers of this process."""

    def __init__(self, store: Store, egress: Egress, settings: Settings, now: Callable[[], datetime]) -> None:
        self._store = store
        self._egress = egress
        self._disable_after = timedelta(seconds=settings.webhook_disable_seconds)
        self._backlog = settings.webhook_backlog
        self._now = now
        self._owner = f"events-{secrets.token_hex(6)}"
        self._couriers: dict[str, Courier] = {}
        self._breakers: dict[str, Breaker] = {}
        """Host and port → its breaker, whichever webhooks are there."""

    def news(self, webhook_ids: Iterable[str]) -> None:
        """These have something to send. Atomic."""
        for webhook_id in webhook_ids:
            courier = self._couriers.get(webhook_id)
            if courier is not None:
                courier.news.set()

    async def run(self) -> None:
        """Until cancelled; then the leases are given back."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._count, name="webhook counts")
                await self._look_after(group)
        finally:
            with anyio.move_on_after(_GOODBYE_SECONDS, shield=True):
                try:
                    await self._store.webhooks.release(self._owner)
                except StoreUnavailable as error:
                    log.warning("webhooks_not_released", error=str(error)[:200])

    async def _look_after(self, group: TaskGroup) -> None:
        held_until = anyio.current_time()
        while True:
            asked_at = anyio.current_time()
            try:
                mine = await self._store.webhooks.claim(self._owner, LEASE_SECONDS, self._now())
            except StoreUnavailable as error:
                log.warning("couriers_wait", error=str(error)[:200])
                if anyio.current_time() >= held_until:
                    self._match(group, [])
            else:
                held_until = asked_at + LEASE_SECONDS
                self._match(group, mine)
            await anyio.sleep(ROUND_SECONDS)

    def _match(self, group: TaskGroup, mine: Sequence[Registered]) -> None:
        """A courier for each of these, and for no other. Atomic."""
        wanted = {registered.webhook.webhook_id: registered for registered in mine}
        for webhook_id in self._couriers.keys() - wanted.keys():
            self._couriers.pop(webhook_id).scope.cancel()
        hosts = {host_of(registered.webhook.url) for registered in mine}
        self._breakers = {host: breaker for host, breaker in self._breakers.items() if host in hosts}
        for webhook_id, registered in wanted.items():
            breaker = self._breaker(host_of(registered.webhook.url))
            courier = self._couriers.get(webhook_id)
            if courier is None or courier.scope.cancel_called:
                courier = Courier(self._store, self._egress, registered, breaker, self._disable_after, self._now)
                self._couriers[webhook_id] = courier
                group.start_soon(courier.run, name=f"courier {webhook_id}")
            courier.registered, courier.breaker = registered, breaker
        metrics.WEBHOOKS_CARRIED.set(len(self._couriers))
        metrics.WEBHOOKS_SPARED.set(sum(item.state is not State.CLOSED for item in self._breakers.values()))

    def _breaker(self, host: str) -> Breaker:
        if host not in self._breakers:
            self._breakers[host] = Breaker("webhooks", webhooks.FAILURES_TO_OPEN, webhooks.OPEN_SECONDS, host=host)
        return self._breakers[host]

    async def _count(self) -> None:
        """How much waits; a webhook for which too much does is disabled."""
        while True:
            await anyio.sleep(_COUNT_SECONDS)
            try:
                await self.count()
            except StoreUnavailable as error:
                log.warning("couriers_wait", error=str(error)[:200])

    async def count(self) -> None:
        """Raises StoreUnavailable."""
        waiting = [0]
        for webhook_id, courier in list(self._couriers.items()):
            found = await self._store.deliveries.count(webhook_id, DeliveryStatus.PENDING, self._backlog + 1)
            waiting.append(found)
            if found > self._backlog:
                await courier.disable(Reason.BACKLOG)
        metrics.WEBHOOK_WAITING.set(sum(waiting))
        metrics.WEBHOOK_LONGEST.set(max(waiting))


def host_of(url: str) -> str:
    """What a breaker is for: host and port."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (80 if parts.scheme == 'http' else 443)}"
