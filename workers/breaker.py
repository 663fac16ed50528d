"""Circuit breakers: whoever can be told "not now" is told so at once, instead of waiting for a server that is away.

MongoDB and Redis have one for the requests of REST and the queries of gateways; so have the webhook of codes and every
host of apps' webhooks. The commit path asks none of them: an entry stays pending until it is committed, so its owner
tries again however often that failed. Neither do leases and instances, which must be the first to notice that a server
is back.

A request is *guarded* where it begins (`guarding`); the seams report to its breakers, and refuse while one is open
(`passing`). Open, one call is let through after `open_seconds`, or earlier one of `probe`: the half-open probe. What it
meets decides. So a server that is back is used again within a second, though nobody has waited for it meanwhile.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
import structlog

from workers import metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

PROBE_SECONDS: Final = 1.0
"""Between two probes of our own (reliability.md section 10.5: half-open 1 s)."""
PROBE_DEADLINE_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)


class State(IntEnum):
    """As the gauge shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class BreakerOpen(Exception):
    """It failed lately: not asked."""


class Breaker:
    """Counts failures in a row. Every method is atomic."""

    def __init__(self, name: str, failures: int, open_seconds: float, *, host: str = "") -> None:
        """`host`: of one of many with this name; whoever has them shows how many are open."""
        self.name = name
        self.host = host
        self.opened = anyio.Event()
        """Set while it is not closed."""
        self._limit = failures
        self._open_seconds = open_seconds
        self._failures = 0
        self._state = State.CLOSED
        self._until = 0.0
        if not host:
            metrics.BREAKERS.labels(name).set(State.CLOSED)

    @property
    def state(self) -> State:
        return self._state

    @property
    def wait_seconds(self) -> float:
        """Until the next call may be made, as far as is known; 0 for now."""
        return 0.0 if self._state is State.CLOSED else max(self._until - anyio.current_time(), 0.0)

    def admit(self) -> None:
        """May this call be made? Raises BreakerOpen. Who was admitted says how it went."""
        if self._state is State.CLOSED:
            return
        if anyio.current_time() < self._until:
            metrics.BREAKER_REFUSALS.labels(self.name).inc()
            raise BreakerOpen(self.name)
        self.begin_probe()

    def begin_probe(self) -> None:
        """One call is made although it is open; for as long as another wait nobody else is let through."""
        self._until = anyio.current_time() + self._open_seconds
        self._turn(State.HALF_OPEN)

    def succeeded(self) -> None:
        """It answered."""
        self._failures = 0
        if self._state is not State.CLOSED:
            self._turn(State.CLOSED)
            self.opened = anyio.Event()

    def failed(self) -> None:
        """It is away: nobody answered, or not in time."""
        self._failures += 1
        if self._state is State.HALF_OPEN or (self._state is State.CLOSED and self._failures >= self._limit):
            self._until = anyio.current_time() + self._open_seconds
            self._turn(State.OPEN)
            self.opened.set()

    def _turn(self, state: State) -> None:
        if state is self._state:
            return
        before, self._state = self._state, state
        if not self.host:
            metrics.BREAKERS.labels(self.name).set(state)
        log.warning(
            "breaker_turned",
            service=self.name,
            host=self.host,
            before=before.name.lower(),
            now=state.name.lower(),
            failures=self._failures,
        )


class Breakers(NamedTuple):
    """Those of the two servers that a request needs."""

    mongodb: Breaker
    redis: Breaker


_guarding: ContextVar[Breakers | None] = ContextVar("breakers", default=None)


@contextmanager
def guarding(breakers: Breakers) -> Iterator[None]:
    """What is asked of the seams in this block is a request: it may be refused."""
    token = _guarding.set(breakers)
    try:
        yield
    finally:
        _guarding.reset(token)


def guarded() -> Breakers | None:
    """The breakers of the request that is being served; None on the commit path and for whoever must not be refused."""
    return _guarding.get()


async def probe(breaker: Breaker, ask: Callable[[], Awaitable[None]], away: type[Exception]) -> None:
    """While a breaker is open, ask its server ourselves. Until cancelled."""
    while True:
        await breaker.opened.wait()
        await anyio.sleep(PROBE_SECONDS)
        if breaker.state is State.CLOSED:
            continue
        breaker.begin_probe()
        try:
            with anyio.fail_after(PROBE_DEADLINE_SECONDS):
                await ask()
        except (away, TimeoutError):
            breaker.failed()
        else:
            breaker.succeeded()
