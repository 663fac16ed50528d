"""The door of the workers: `python -m workers <role>…` or a command; settings, logs, signals, one task group of roles.

Each process opens one store and one broker and shares them between its roles. A role is a module with
`async def run(settings, store, broker, stopping)`; it returns soon after `stopping` is set, having finished what it
holds. What is still running `drain_seconds` later is cancelled. Exit status: 0 after a clean stop, 1 when a role
failed, 2 for settings or servers that need the operator.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeVar

import anyio
import anyio.abc
import structlog

from workers import inspection, metrics
from workers.breaker import probe
from workers.broker import Broker, BrokerUnavailable, open_broker
from workers.fitness import Finding, Level, judge_mongodb, judge_redis
from workers.readiness import Readiness
from workers.settings import SettingError, Settings, load_settings
from workers.store import Store, StoreUnfit, open_store
from workers.store.errors import StoreUnavailable

Role = Callable[[Settings, Store, Broker, anyio.Event], Coroutine[Any, Any, None]]

ROLES: Final = {
    "ingest": "workers.ingest",
    "query": "workers.query",
    "events": "workers.events",
    "agents": "workers.agents.role",
    "push": "workers.push.role",
    "retry": "workers.retry",
    "rest": "workers.rest.app",
}
"""Role → module. Imported only where the role is carried: the HTTP stack alone costs a second of start-up."""

COMMANDS: Final = {
    "audit": "workers.audit.command",
    "dlq": "workers.dlq",
    "doctor": "workers.doctor",
    "keygen": "workers.keygen",
    "trace": "workers.trace",
}
"""In place of a role: command → module with `main(arguments, environ) -> exit status`. Imported only when asked for."""
_FIRST_RETRY_SECONDS: Final = 0.1
_LONGEST_RETRY_SECONDS: Final = 5.0
_SAY_AGAIN_SECONDS: Final = 30.0

log = structlog.get_logger(__name__)
Opened = TypeVar("Opened")


def parse_roles(arguments: Sequence[str]) -> list[str]:
    """The roles of this process, each once. Raises SettingError with the list of those there are."""
    known = ", ".join(ROLES)
    if not arguments:
        raise SettingError(f"name at least one role: {known}")
    for name in arguments:
        if name not in ROLES:
            raise SettingError(f"unknown role {name!r}; there are: {known}")
    return list(dict.fromkeys(arguments))


def configure_logs(level: str) -> None:
    """One JSON object a line on standard error: event name and fields."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@asynccontextmanager
async def open_when_ready(
    service: str, open_service: Callable[[], AbstractAsyncContextManager[Opened]]
) -> AsyncIterator[Opened]:
    """Open a service, waiting with backoff while it is away; one log line says what it waits for, each 30 s again."""
    delay = _FIRST_RETRY_SECONDS
    said_at = -_SAY_AGAIN_SECONDS
    async with AsyncExitStack() as stack:
        while True:
            try:
                opened = await stack.enter_async_context(open_service())
                break
            except (StoreUnavailable, BrokerUnavailable) as error:
                if anyio.current_time() - said_at >= _SAY_AGAIN_SECONDS:
                    said_at = anyio.current_time()
                    log.warning("waiting_for_service", service=service, reason=str(error))
            await anyio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(delay * 2, _LONGEST_RETRY_SECONDS)
        yield opened


@asynccontextmanager
async def open_fit_broker(url: str, shards: int) -> AsyncIterator[Broker]:
    """The broker, once Redis answers and has agreed to the shard count. Raises BrokerUnavailable, SettingError."""
    async with open_broker(url) as broker:
        await broker.ping()
        await broker.agree_shards(shards)
        _heed(judge_redis(await inspection.condition(broker), shards))
        yield broker


@asynccontextmanager
async def open_fit_store(url: str, retention_days: int) -> AsyncIterator[Store]:
    """The store, once MongoDB answers and is fit for it. Raises StoreUnavailable, StoreUnfit, SettingError."""
    async with open_store(url, retention_days) as store:
        _heed(judge_mongodb(await store.condition()))
        yield store


def _heed(findings: Sequence[Finding]) -> None:
    """Say what is doubtful. Raises SettingError for what must not be: one line."""
    for finding in findings:
        if finding.level is Level.BAD:
            raise SettingError(finding.line)
        if finding.level is Level.DOUBTFUL:
            log.warning("server_doubtful", subject=finding.subject, what=finding.what, advice=finding.advice)


async def _watch_signals(
    started: anyio.Event, stopping: anyio.Event, drain_seconds: float, roles: anyio.CancelScope
) -> None:
    """First signal: ask the roles to stop; at the end of the drain the rest is cancelled. Second: cancel at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name, drain_seconds=drain_seconds)
            if stopping.is_set() or not started.is_set():
                roles.cancel()
                return
            stopping.set()
            roles.deadline = anyio.current_time() + drain_seconds


async def _run_roles(
    settings: Settings, names: Sequence[str], store: Store, broker: Broker, stopping: anyio.Event
) -> None:
    async with anyio.create_task_group() as group:
        for name in names:
            role: Role = importlib.import_module(ROLES[name]).run
            group.start_soon(role, settings, store, broker, stopping, name=f"role {name}")


async def _run_process(settings: Settings, names: Sequence[str], readiness: Readiness) -> None:
    started, stopping = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as roles:
            group.start_soon(_watch_signals, started, stopping, settings.drain_seconds, roles, name="signals")
            async with (
                open_when_ready(
                    "mongodb", lambda: open_fit_store(settings.mongodb_url, settings.message_retention_days)
                ) as store,
                open_when_ready("redis", lambda: open_fit_broker(settings.redis_url, settings.shards)) as broker,
            ):
                started.set()
                group.start_soon(readiness.watch, store, broker, name="readiness")
                group.start_soon(probe, store.breaker, store.ping, StoreUnavailable, name="mongodb probe")
                group.start_soon(probe, broker.breaker, broker.ping, BrokerUnavailable, name="redis probe")
                log.info("worker_started", roles=list(names), pid=os.getpid())
                await _run_roles(settings, names, store, broker, stopping)
        if roles.cancelled_caught and started.is_set():
            log.warning("drain_cut_short", drain_seconds=settings.drain_seconds)
        log.info("worker_stopped", roles=list(names))
        group.cancel_scope.cancel()


def main(arguments: Sequence[str]) -> int:
    """Run the named roles until a signal, or a command. Returns the exit status."""
    if arguments and arguments[0] in COMMANDS:
        command: Callable[[Sequence[str], Mapping[str, str]], int]
        command = importlib.import_module(COMMANDS[arguments[0]]).main
        return command(arguments[1:], os.environ)
    readiness = Readiness()
    try:
        names = parse_roles(arguments)
        settings = load_settings(os.environ, names)
        if settings.worker_metrics_port is not None:
            metrics.serve(settings.worker_metrics_port, lambda: readiness.missing)
    except (SettingError, metrics.PortTaken) as error:
        _say(error)
        return 2
    configure_logs(settings.log_level)
    _quieten_collector()
    status = 0
    try:
        anyio.run(_run_process, settings, names, readiness, backend_options={"use_uvloop": True})
    except* (StoreUnfit, SettingError) as group:
        for unfit in _leaves(group):
            _say(unfit)
        status = 2
    except* Exception as group:
        log.error("worker_failed", exc_info=group)
        status = status or 1
    return status


def _quieten_collector() -> None:
    """What is imported is garbage never, and batches make thousands of short-lived objects that reference counting
    frees: by default the collector would walk all of them every 700 allocations, and everything remembered every few
    seconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _say(error: BaseException) -> None:
    print(f"workers: {error}", file=sys.stderr)  # noqa: T201 - the one line of an operator's error


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
