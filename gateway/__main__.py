"""The door of the gateway: `python -m gateway`. Settings, logs, signals, then one Trio run.

Exit status: 0 after a drain, 1 after a failure, 2 for settings, an address or a Redis that needs the operator.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import structlog
import trio

from gateway.broker import BrokerRefused
from gateway.server import Gateway, open_listener
from gateway.settings import SettingError, Settings, load_settings

if TYPE_CHECKING:
    import socket

_log = structlog.get_logger(__name__)


def configure_logs(level: str) -> None:
    """One JSON object a line on standard error: event name and fields."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


async def serve(settings: Settings, listener: socket.socket) -> None:
    """One gateway until SIGTERM or SIGINT; a second signal ends it at once. Raises BrokerRefused."""
    stopping = trio.Event()
    gateway = Gateway(settings)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch_signals() -> None:
                async for number in signals:
                    if stopping.is_set():
                        _log.warning("stopped_at_once", signal=number)
                        nursery.cancel_scope.cancel()
                    stopping.set()

            nursery.start_soon(watch_signals, name="signals")
            await gateway.run(stopping, listener)
            nursery.cancel_scope.cancel()


def main() -> int:
    """Read the settings, run, and turn what the operator has to mend into one line and status 2."""
    try:
        settings = load_settings(os.environ)
    except SettingError as error:
        print(error, file=sys.stderr)  # noqa: T201 -- the operator's one line
        return 2
    configure_logs(settings.log_level)
    try:
        listener = open_listener(settings.gateway_host, settings.gateway_port)
    except OSError as error:
        print(f"TRIREME_GATEWAY_HOST, TRIREME_GATEWAY_PORT: cannot listen there: {error}", file=sys.stderr)  # noqa: T201 -- the operator's one line
        return 2
    refused: list[BrokerRefused] = []
    with listener:
        try:
            trio.run(serve, settings, listener)
        except* BrokerRefused as group:
            leaf: BaseException = group
            while isinstance(leaf, BaseExceptionGroup):
                leaf = leaf.exceptions[0]
            refused.append(BrokerRefused(str(leaf)))
    if refused:
        print(refused[0], file=sys.stderr)  # noqa: T201 -- the operator's one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
