"""A job on its way to one token: the tries of the retry matrix, behind a breaker for each provider.

What no try within a few seconds brought there is the caller's to try again later. *Cancellation*: it may have been
told.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol.webhooks import FAILURES_TO_OPEN, JITTER, OPEN_SECONDS, TRIES, quick_retry_seconds
from workers import metrics
from workers.breaker import Breaker, BreakerOpen
from workers.push.adapters import TRY_SECONDS, Delivered, Gone, Outcome, Refused, Retry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.records import PushJob
    from workers.push.adapters import Adapter
    from workers.store.push_tokens import PushToken

SENDS_AT_ONCE: Final = 64
"""Requests under way in one process: with one that hangs for its 3 s they still end 20 a second."""
PROVIDERS: Final = 1000
"""Providers whose failures are remembered, a kilobyte each: anybody can name a Web Push server. Past it the one that
was used longest ago is forgotten."""

log = structlog.get_logger(__name__)


class Dispatch:
    """The adapters of one process, and how their providers do."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters
        self._room = anyio.CapacityLimiter(SENDS_AT_ONCE)
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """Until it is decided, or has failed as often as it may at once."""
        adapter = self._adapters.get(token.kind)
        outcome = (
            Refused("this process has no adapter of this kind")
            if adapter is None
            else await self._try(adapter, token, job, ttl_seconds)
        )
        match outcome:
            case Delivered():
                name = "delivered"
            case Gone():
                name = "gone"
            case Retry(reason=reason):
                name = "again"
                log.info("push_waits", kind=token.kind, user_id=token.user_id, reason=reason)
            case Refused(reason=reason):
                name = "refused"
                log.warning("push_refused", kind=token.kind, user_id=token.user_id, reason=reason)
        metrics.PUSH_SENDS.labels(token.kind, name).inc()
        return outcome

    async def _try(self, adapter: Adapter, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        breaker = self._breaker(adapter, token)
        try:
            breaker.admit()
        except BreakerOpen:
            return Retry("the provider failed lately", breaker.wait_seconds)
        outcome: Outcome = Retry("not tried")
        for number in range(TRIES):
            if number:
                await anyio.sleep(quick_retry_seconds(number) * random.uniform(1 - JITTER, 1 + JITTER))
            outcome = await self._once(adapter, token, job, ttl_seconds)
            if not isinstance(outcome, Retry):
                breaker.succeeded()
                return outcome
            if outcome.after_seconds > 0:
                break
        breaker.failed()
        return outcome

    async def _once(self, adapter: Adapter, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        async with self._room:
            with anyio.move_on_after(TRY_SECONDS):
                return await adapter.send(token, job, ttl_seconds)
        return Retry("no answer")

    def _breaker(self, adapter: Adapter, token: PushToken) -> Breaker:
        provider = adapter.provider(token)
        breaker = self._breakers.get(provider)
        if breaker is None:
            breaker = Breaker(f"push {adapter.kind}", FAILURES_TO_OPEN, OPEN_SECONDS, host=provider)
            self._breakers[provider] = breaker
            if len(self._breakers) > PROVIDERS:
                self._breakers.popitem(last=False)
        self._breakers.move_to_end(provider)
        return breaker
