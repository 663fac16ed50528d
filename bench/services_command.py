"""`python -m bench services`: the local servers of the Procfile, as far as the environment names no others.

They stay a little when everything is told to end, so that gateways and workers can drain.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import redis

from bench import object_store
from bench.services import (
    HOST,
    START_DEADLINE_SECONDS,
    Server,
    ServicesError,
    mongod_is_primary,
    port_is_taken,
    start_mongod,
    start_valkey,
    valkey_answers,
)

if TYPE_CHECKING:
    import argparse
    from types import FrameType

DEFAULT_REDIS_PORT: Final = 6379
DEFAULT_MONGODB_PORT: Final = 27017
DEFAULT_DATA_DIR: Final = ".data"
LINGER_SECONDS: Final = 2.5
"""honcho signals all processes at once: the databases stay for this long, at most, so that the others can drain."""
DATABASES: Final = ("TRIREME_REDIS_URL", "TRIREME_MONGODB_URL")
"""Who brings both of them brings everything: then nothing is started here."""
VARIABLES: Final = (*DATABASES, object_store.VARIABLE)
READY: Final = {"valkey": valkey_answers, "mongod": mongod_is_primary, "s3": object_store.answers}
"""Server → may it be used, by its port?"""


class _Stopped(Exception):
    """SIGTERM or SIGINT came."""


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    # The second signal (from the terminal and from honcho, say) must not interrupt the clean end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise _Stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, default=Path(DEFAULT_DATA_DIR), help="data and logs (default .data)")
    parser.add_argument("--redis-port", type=int, default=DEFAULT_REDIS_PORT)
    parser.add_argument("--s3-port", type=int, default=object_store.DEFAULT_S3_PORT)
    parser.add_argument(
        "--mongodb-port", type=int, default=DEFAULT_MONGODB_PORT, help="a data directory keeps the port it began with"
    )


def main(args: argparse.Namespace) -> int:
    """Run what the environment does not name, until SIGTERM or SIGINT. Returns the exit status."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    given = [name for name in VARIABLES if os.environ.get(name)]
    try:
        if set(given) >= {*DATABASES}:
            _say(f"{', '.join(given)} are set: nothing to start")
            _wait([])
        _run_missing(args.data_dir.resolve(), given, args)
    except _Stopped:
        return 0
    except ServicesError as error:
        _say(str(error))
        return 1
    return 1


def _run_missing(data_dir: Path, given: list[str], args: argparse.Namespace) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + START_DEADLINE_SECONDS
    ports = dict(zip(VARIABLES, (args.redis_port, args.mongodb_port, args.s3_port), strict=True))
    missing = {name: port for name, port in ports.items() if name not in given}
    for name, port in missing.items():
        _check_port(port, name)
    servers: list[Server] = []
    with ExitStack() as stack:
        # The slowest first; they start side by side.
        if (port := missing.get(object_store.VARIABLE)) is not None:
            servers.append(stack.enter_context(object_store.start_store(data_dir, port)))
        if (port := missing.get("TRIREME_MONGODB_URL")) is not None:
            servers.append(stack.enter_context(start_mongod(data_dir, port)))
        if (port := missing.get("TRIREME_REDIS_URL")) is not None:
            servers.append(stack.enter_context(start_valkey(data_dir, port)))
            stack.callback(_linger, port)
        for server in reversed(servers):
            server.wait_until(partial(READY[server.name], server.port), deadline)
        _say("services_ready " + " ".join(f"{server.name}={HOST}:{server.port}" for server in servers))
        _wait(servers)


def _check_port(port: int, variable: str) -> None:
    if port_is_taken(port):
        raise ServicesError(
            f"port {port} is taken by another program: stop it, or set {variable} to use the server that is there"
        )


def _wait(servers: list[Server]) -> NoReturn:
    """Returns only by `_Stopped` (a signal) or ServicesError (a server ended by itself)."""
    while True:
        time.sleep(0.25)
        for server in servers:
            if server.process.poll() is not None:
                raise ServicesError(f"{server.name} ended by itself with status {server.process.returncode}")


def _linger(port: int) -> None:
    """Stay while somebody is still connected, so that gateways and workers can drain; bounded by `LINGER_SECONDS`."""
    deadline = time.monotonic() + LINGER_SECONDS
    with redis.Redis(HOST, port, socket_timeout=1.0) as client:
        while time.monotonic() < deadline:
            try:
                if len(client.client_list()) <= 1:
                    return
            except redis.RedisError:
                return
            time.sleep(0.05)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
