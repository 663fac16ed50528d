"""Waiting, as cheap as a world can have it: Trio's and anyio's own means with the same meaning and less around them.

A world waits some two thousand times, and most of its cost was in how: a cancel scope for each sleep, two generators
for each scope, and anyio's search for the library that runs. Who sleeps is woken by an event of the network instead.
`seams` puts this in; it lasts for one run.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from math import inf
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import anyio
import trio
from trio._core import _run as trio_run  # the only way to its scheduler

from bench.simulation.network import Answer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from bench.simulation.network import Network


class _Changing:
    """`CancelScope._might_change_registered_deadline` without a generator."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        scope = self._scope
        old = scope._registered_deadline
        new = inf if scope._cancel_status is None or scope._cancel_called else scope._deadline
        if old != new:
            scope._registered_deadline = new
            deadlines = trio_run.GLOBAL_RUN_CONTEXT.runner.deadlines
            if old != inf:
                deadlines.remove(old, scope)
            if new != inf:
                deadlines.add(new, scope)


class _FailAfter:
    """`anyio.fail_after`."""

    __slots__ = ("_network", "_scope")

    def __init__(self, network: Network, delay: float | None, shield: bool) -> None:
        self._network = network
        self._scope = trio.CancelScope(deadline=inf if delay is None else network.now + delay, shield=shield)

    def __enter__(self) -> trio.CancelScope:
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        swallowed = self._scope.__exit__(kind, error, trace)
        if self._scope.cancelled_caught and self._network.now >= self._scope.deadline:
            raise TimeoutError
        return swallowed


@contextmanager
def cheap_waiting(network: Network) -> Iterator[None]:
    """Until it ends, Trio and anyio wait on this network."""

    async def sleep(seconds: float) -> None:
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
            return
        alarm = Answer()
        network.at(seconds, None, alarm.give)
        await alarm.wait()

    async def sleep_until(deadline: float) -> None:
        await sleep(deadline - network.now)

    def move_on_after(delay: float | None, shield: bool = False) -> trio.CancelScope:
        return trio.CancelScope(deadline=inf if delay is None else network.now + delay, shield=shield)

    def fail_after(delay: float | None, shield: bool = False) -> _FailAfter:
        return _FailAfter(network, delay, shield)

    def now() -> float:
        return network.now

    with ExitStack() as stack:
        for module, name, twin in (
            (trio, "sleep", sleep),
            (trio, "sleep_until", sleep_until),
            (trio, "move_on_after", move_on_after),
            (trio, "current_time", now),
            (trio.CancelScope, "_might_change_registered_deadline", _changing),
            (anyio, "sleep", sleep),
            (anyio, "sleep_until", sleep_until),
            (anyio, "move_on_after", move_on_after),
            (anyio, "fail_after", fail_after),
            (anyio, "current_time", now),
            (anyio, "CancelScope", trio.CancelScope),
            (anyio, "Event", trio.Event),
        ):
            stack.enter_context(patch.object(module, name, twin))
        yield


def _changing(scope: trio.CancelScope) -> _Changing:
    return _Changing(scope)
