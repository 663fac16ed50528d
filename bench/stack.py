"""The whole system as real processes on free ports: services, gateways, workers, REST. Ended by process id when done.

Called by the load benches, the replay and the system tests. `attach` names the default stack that somebody else runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from bench.services import HOST, Services, free_port, log_tail, run_services, spawn, stop
from protocol import dev_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PROJECT: Final = Path(__file__).resolve().parent.parent
DEFAULT_GATEWAY_PORT: Final = 8765
DEFAULT_REST_PORT: Final = 8080
WS_PATH: Final = "/v1/ws"
READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 5.0
"""What honcho gives a process between SIGTERM and SIGKILL."""

UNLIMITED: Final = {
    "TRIREME_MESSAGE_RATE": "1000000",
    "TRIREME_MESSAGE_BURST": "1000000",
    "TRIREME_LOOKUP_RATE": "1000000",
    "TRIREME_AUTH_FAILURES_PER_MINUTE": "1000000",
    "TRIREME_CONVERSATIONS_PER_HOUR": "1000000",
    "TRIREME_GROUP_STEPS_PER_MINUTE": "1000000",
    "TRIREME_ACCOUNT_CHANGES_PER_HOUR": "1000000",
    "TRIREME_CONNECTIONS_PER_SECOND": "1000000",
    "TRIREME_UNAUTHENTICATED_CONNECTIONS": "1000000",
}
"""Every client comes from one address and a load is no abuse: rate limits would measure themselves."""


class StackError(Exception):
    """A process of the stack ended or was not ready in time; the message holds the end of its log."""


class Process(msgspec.Struct, frozen=True):
    """One running process of the stack. `port` is None for a process that listens nowhere."""

    role: str
    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    port: int | None
    arguments: list[str]
    environment: dict[str, str]

    @property
    def ws_url(self) -> str:
        """Where clients of a gateway connect."""
        return f"ws://{HOST}:{self.port}{WS_PATH}"

    @property
    def is_ready(self) -> bool:
        """Says its health page so? A process without one is not waited for."""
        return self.port is None or answers(f"http://{HOST}:{self.port}/health/ready")


class Stack(msgspec.Struct, frozen=True):
    """Where a running system is. `pids`: by role gateway, worker, rest, valkey, mongod; empty where it was attached to.

    `redis_url` and `mongodb_url` are empty too for an attached stack.
    """

    ws_urls: tuple[str, ...]
    rest_url: str
    admin_token: str
    pids: dict[str, list[int]]
    redis_url: str = ""
    mongodb_url: str = ""
    environment: dict[str, str] = {}
    """What every process of this stack was started with, for starting one more of them."""
    log_dir: Path | None = None
    processes: list[Process] = []
    """What runs; empty where it was attached to. `start_again` changes it."""


def attach(*, gateway_port: int = DEFAULT_GATEWAY_PORT, rest_port: int = DEFAULT_REST_PORT, host: str = HOST) -> Stack:
    """The stack of `honcho start` with its public dev secrets. Raises StackError when it does not answer."""
    rest_url = f"http://{host}:{rest_port}"
    for url in (f"http://{host}:{gateway_port}/health/ready", f"{rest_url}/health/ready"):
        if not answers(url):
            raise StackError(f"nothing ready at {url}: start the system first (uv run honcho start)")
    admin_token = os.environ.get("TRIREME_ADMIN_TOKEN") or dev_keys.ADMIN_TOKEN
    return Stack((f"ws://{host}:{gateway_port}{WS_PATH}",), rest_url, admin_token, {})


@contextmanager
def run_stack(
    *,
    gateways: int = 1,
    workers: int = 1,
    transport: str | Sequence[str] = "epoll",
    settings: Mapping[str, str] | None = None,
    own_settings: Mapping[str, Mapping[str, str]] | None = None,
    services: Services | None = None,
    roles: Sequence[str] = ("ingest", "query", "retry"),
    data_dir: Path | None = None,
) -> Iterator[Stack]:
    """Run the system until the block ends; yields when every process with a health page says it is ready.

    `settings` are `TRIREME_*` variables over the defaults (rate limits out of the way), `own_settings` those of one
    process by its name (gateway-1, worker-1, rest), over these. Without `services` the stack has a Valkey and a mongod
    of its own; without `data_dir` everything it writes goes when it ends. To be called from the main thread: the
    processes end with the thread that started them. Of several transports the gateways take one in turn.

    Resource handling: the processes get SIGTERM together and SIGKILL after 5 s; they also end with this process.
    Raises StackError or ServicesError, with the end of the log of whoever failed.
    """
    with ExitStack() as exits:
        directory = data_dir or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="trireme-")))
        backing = services or exits.enter_context(run_services(directory / "services"))
        transports = [transport] if isinstance(transport, str) else list(transport)
        environment = _environment(backing, transports[0], settings or {})
        processes: list[Process] = []
        exits.callback(_end, processes)
        rest_port = free_port()
        own = _own_environments(environment, own_settings or {})
        for number in range(workers):
            name = f"worker-{number + 1}"
            processes.append(_start("worker", name, ["-m", "workers", *roles], own(name), directory, None))
        for number, name in enumerate(f"gateway-{number + 1}" for number in range(gateways)):
            kind = transports[number % len(transports)] if len(transports) > 1 else None
            processes.append(_start_gateway(name, kind, own(name), directory))
        rest = own("rest") | {"TRIREME_REST_PORT": str(rest_port)}
        processes.append(_start("rest", "rest", ["-m", "workers", "rest"], rest, directory, rest_port))
        wait_ready(processes)
        yield Stack(
            ws_urls=tuple(process.ws_url for process in processes if process.role == "gateway"),
            rest_url=f"http://{HOST}:{rest_port}",
            admin_token=environment.get("TRIREME_ADMIN_TOKEN", dev_keys.ADMIN_TOKEN),
            pids=_pids(backing, processes),
            redis_url=backing.redis_url,
            mongodb_url=backing.mongodb_url,
            environment=environment,
            log_dir=directory,
            processes=processes,
        )


def start_again(stack: Stack, process: Process) -> Process:
    """The successor of a process of this stack that has ended: same program, settings and port. It is not ready yet.

    To be called from the main thread, as `run_stack`. Raises ServicesError.
    """
    popen = spawn([sys.executable, *process.arguments], process.log, process.environment, PROJECT)
    successor = msgspec.structs.replace(process, popen=popen)
    stack.processes[stack.processes.index(process)] = successor
    return successor


def _pids(backing: Services, processes: Sequence[Process]) -> dict[str, list[int]]:
    pids = {role: [pid] for role, pid in backing.pids.items()}
    for process in processes:
        pids.setdefault(process.role, []).append(process.popen.pid)
    return pids


def _environment(backing: Services, transport: str, settings: Mapping[str, str]) -> dict[str, str]:
    """What every process of a stack starts with: nothing of ours is inherited."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")},
        "PYTHONUNBUFFERED": "1",
        "TRIREME_ENV": "dev",
        "TRIREME_REDIS_URL": backing.redis_url,
        "TRIREME_MONGODB_URL": backing.mongodb_url,
        "TRIREME_GATEWAY_TRANSPORT": transport,
        **UNLIMITED,
        **settings,
    }


def _own_environments(
    environment: Mapping[str, str], own_settings: Mapping[str, Mapping[str, str]]
) -> Callable[[str], dict[str, str]]:
    """What a process of this name starts with."""
    return lambda name: {**environment, **own_settings.get(name, {})}


def _start(
    role: str, name: str, arguments: list[str], environment: dict[str, str], directory: Path, port: int | None
) -> Process:
    log = directory / f"{name}.log"
    popen = spawn([sys.executable, *arguments], log, environment, PROJECT)
    return Process(role, name, popen, log, port, arguments, environment)


def _start_gateway(name: str, transport: str | None, environment: dict[str, str], directory: Path) -> Process:
    """`transport` None: the environment's. Any free port, where that names none."""
    port = int(environment.get("TRIREME_GATEWAY_PORT", 0)) or free_port()
    own = {**environment, "TRIREME_GATEWAY_PORT": str(port)}
    if transport is not None:
        own["TRIREME_GATEWAY_TRANSPORT"] = transport
    return _start("gateway", name, ["-m", "gateway"], own, directory, port)


def wait_ready(processes: Sequence[Process]) -> None:
    """Until all are ready. Raises StackError when one ends or 30 s have passed."""
    deadline = time.monotonic() + READY_SECONDS
    waiting = list(processes)
    while waiting:
        for process in processes:
            if process.popen.poll() is not None:
                raise StackError(_explain(process, f"ended with status {process.popen.returncode}"))
        waiting = [process for process in waiting if not process.is_ready]
        if waiting and time.monotonic() >= deadline:
            raise StackError(_explain(waiting[0], f"was not ready within {READY_SECONDS:.0f} s"))
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Does this health page say 200 within a second?"""
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _explain(process: Process, what: str) -> str:
    return f"{process.name} {what}; its log ends with:\n{log_tail(process.log)}"


def _end(processes: list[Process]) -> None:
    """SIGTERM to all at once, so that they drain side by side; SIGKILL to those left after 5 s."""
    running = [process for process in processes if process.popen.poll() is None]
    for process in running:
        process.popen.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        stop(process.popen, max(0.1, deadline - time.monotonic()))
