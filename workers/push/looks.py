"""Entries that are due → who is to be told of which message. Reads the store, changes nothing.

Raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import anyio

from protocol import records
from workers import metrics
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from workers.push_queue import Due
    from workers.store import Store
    from workers.store.pushes import Pair, Standing, Unheard

READS_AT_ONCE: Final = 8
"""Of one batch: the query role has the same server."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
Item = TypeVar("Item")


class Ready(NamedTuple):
    """Somebody is to be told. `said_ms`: when the message was committed."""

    due: Due
    job: records.PushJob
    said_ms: int


class Looked(NamedTuple):
    """`ready`: to be told. `early`: to be looked at again, then (epoch ms). All others are done with."""

    ready: list[Ready]
    early: dict[Due, int]


class Looks:
    """`after_ms`: from a message to its push; `ttl_ms`: to the end of its worth."""

    def __init__(self, store: Store, after_ms: int, ttl_ms: int) -> None:
        self._store = store
        self._after_ms = after_ms
        self._ttl_ms = ttl_ms

    async def look(self, dues: Sequence[Due], now_ms: int) -> Looked:
        """At each of these members and at what they have not confirmed."""
        standings = await self._store.pushes.standings({(due.user_id, due.conversation_id) for due in dues})
        found = Looked([], {})
        unheard: list[tuple[Due, Unheard]] = []

        async def read(due: Due) -> None:
            standing = standings[due.user_id, due.conversation_id]
            # Who is told again hears of the newest, whatever was told before.
            after = standing.heard if due.device_id else max(standing.heard, standing.pushed)
            pair = (due.user_id, due.conversation_id)
            message = await self._store.pushes.unheard(pair, after, moment(now_ms))
            if message is None:
                _count("heard")
            elif self._is_worth_it(due, message, now_ms, found):
                unheard.append((due, message))

        await _each(read, [due for due in dues if self._wants(standings, due, now_ms)])
        badges = await self._badges({due.user_id for due, _ in unheard})
        for due, message in unheard:
            name, sequence = message.message_id, message.sequence_number
            job = records.PushJob(due.conversation_id, name, sequence, badges[due.user_id])
            found.ready.append(Ready(due, job, epoch_ms(message.said_at)))
        return found

    @staticmethod
    def _wants(standings: Mapping[Pair, Standing], due: Due, now_ms: int) -> bool:
        standing = standings.get((due.user_id, due.conversation_id))
        if standing is None:
            _count("gone")
        elif standing.muted_until is not None and standing.muted_until > moment(now_ms):
            _count("muted")
        else:
            return True
        return False

    def _is_worth_it(self, due: Due, message: Unheard, now_ms: int, found: Looked) -> bool:
        due_ms = epoch_ms(message.since) + self._after_ms
        if due_ms > now_ms:
            # What the entry was made for is confirmed, and this was said behind it.
            found.early[due] = due_ms
            _count("early")
        elif epoch_ms(message.said_at) + self._ttl_ms <= now_ms:
            _count("stale")
        else:
            return True
        return False

    async def _badges(self, user_ids: set[str]) -> dict[str, int]:
        """User → unread messages of all conversations, as `auth_success` would say it."""
        badges: dict[str, int] = {}

        async def count(user_id: str) -> None:
            badges[user_id] = sum(standing.unread for standing in await self._store.heads.standings(user_id))

        await _each(count, user_ids)
        return badges


async def _each(read: Callable[[Item], Awaitable[None]], items: Iterable[Item]) -> None:
    """Some at a time. Raises StoreUnavailable, the first of them."""
    at_once = anyio.Semaphore(READS_AT_ONCE)
    failures: list[StoreUnavailable] = []

    async def one(item: Item) -> None:
        async with at_once:
            try:
                await read(item)
            except StoreUnavailable as error:
                failures.append(error)

    async with anyio.create_task_group() as group:
        for item in items:
            group.start_soon(one, item)
    if failures:
        raise failures[0]


def _count(outcome: str) -> None:
    metrics.PUSH_LOOKS.labels(outcome).inc()


def moment(now_ms: int) -> datetime:
    """Epoch milliseconds as a date."""
    return _EPOCH + now_ms * _MILLISECOND


def epoch_ms(at: datetime) -> int:
    """A date as epoch milliseconds."""
    return (at - _EPOCH) // _MILLISECOND
