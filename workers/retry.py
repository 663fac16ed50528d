"""Role `retry`: dead letters that time may have mended are tried again, 100 ms × 2^n apart, five times.

Any number of processes may carry it: a letter is claimed before it is touched. What the owner of its shard makes of it
is not waited for here; see `replay.py`.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol.models import DLQStatus
from workers import metrics, replay
from workers.broker import BrokerUnavailable
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

IDLE_SECONDS: Final = 1.0
"""How soon a letter is seen that somebody else has written: one indexed read."""
SOONEST_SECONDS: Final = 0.02
COUNT_SECONDS: Final = 10.0
_LONGEST_BACKOFF_SECONDS: Final = 5.0

log = structlog.get_logger(__name__)


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Try letters again as they fall due, until `stopping`."""
    backoff = IDLE_SECONDS
    counted_at = float("-inf")
    while not stopping.is_set():
        try:
            wait = await _round(store, broker)
            if anyio.current_time() - counted_at >= COUNT_SECONDS:
                await _count(store)
                counted_at = anyio.current_time()
            backoff = IDLE_SECONDS
        except (StoreUnavailable, BrokerUnavailable) as error:
            log.warning("retry_waits", error=str(error)[:200])
            wait = backoff
            backoff = min(backoff * 2, _LONGEST_BACKOFF_SECONDS)
        with anyio.move_on_after(wait):
            await stopping.wait()


async def _round(store: Store, broker: Broker) -> float:
    """Bring back all that is due; returns the seconds until there is more."""
    while True:
        now = _now()
        lease_until = now + timedelta(seconds=replay.LEASE_SECONDS)
        before = await store.dead_letters.claim_due(now, lease_until)
        if before is None:
            break
        outcome = await replay.append(store, broker, before, now, lease_until)
        log.info(
            "dead_letter_tried_again",
            letter=before.id,
            retry=min(before.retry_count + 1, before.max_retries),
            outcome=type(outcome).__name__.lower(),
        )
    due_at = await store.dead_letters.next_due()
    if due_at is None:
        return IDLE_SECONDS
    return min(max((due_at - _now()).total_seconds(), SOONEST_SECONDS), IDLE_SECONDS)


async def _count(store: Store) -> None:
    """How many letters there are of each status, for the metrics."""
    letters = dict.fromkeys(DLQStatus, 0)
    for count in await store.dead_letters.counts():
        letters[count.status] += count.letters
    for status, number in letters.items():
        metrics.DEAD_LETTERS.labels(status.value).set(number)


def _now() -> datetime:
    """The one place where this role reads the clock."""
    return datetime.fromtimestamp(time.time_ns() // 1_000_000 / 1000, UTC)
