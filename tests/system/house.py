"""The whole system under test: one stack of real processes, each of which can be killed, paused and brought back.

A process is brought back as the kernel knew it: same program, arguments, environment and directory, so the same port.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pymongo
import redis

from bench.services import HOST, free_port, spawn, stop, valkey_arguments
from bench.stack import PROJECT, WS_PATH, Stack, answers, run_stack
from protocol import keys

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping

STUCK_SECONDS: Final = 4
SETTINGS: Final = {"TRIREME_STUCK_SECONDS": str(STUCK_SECONDS), "TRIREME_LOG_LEVEL": "info"}
"""A peer that takes nothing is cut off after 30 s by default; nobody wants to watch that."""
READY_SECONDS: Final = 20.0


class Program(msgspec.Struct, frozen=True):
    """What the kernel knows about a process, enough to start it again."""

    arguments: list[str]
    environment: dict[str, str]
    directory: str


class House:
    """`urls`: the WebSocket address of the gateway of each transport. Processes go by name: epoll, trio-websocket,
    worker-1, worker-2, rest, valkey, mongod."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.rest_url = stack.rest_url
        self.urls = {"epoll": stack.ws_urls[0]}
        self.pids = {
            "epoll": stack.pids["gateway"][0],
            "worker-1": stack.pids["worker"][0],
            "worker-2": stack.pids["worker"][1],
            "rest": stack.pids["rest"][0],
            "valkey": stack.pids["valkey"][0],
            "mongod": stack.pids["mongod"][0],
        }
        self._programs = {name: _program(pid) for name, pid in self.pids.items()}
        self._programs["valkey"] = _valkey(self._programs["valkey"], int(stack.redis_url.rsplit(":", 1)[1]))
        self._restarted: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def gateways(self) -> list[str]:
        return list(self.urls.values())

    def add_gateway(self, transport: str, name: str = "", settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """One more gateway process, on this transport; it goes by it, or by `name`. `settings` go before the others."""
        port = free_port()
        own = {"TRIREME_GATEWAY_PORT": str(port), "TRIREME_GATEWAY_TRANSPORT": transport, **settings}
        name = name or transport
        self._programs[name] = Program(
            [sys.executable, "-m", "gateway"], {**self.stack.environment, **own}, str(PROJECT)
        )
        self.urls[name] = f"ws://{HOST}:{port}{WS_PATH}"
        self.start(name)

    def add_worker(self, name: str, *roles: str, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """One more worker process, which goes by this name. `settings` go before the others."""
        arguments = [sys.executable, "-m", "workers", *roles]
        self._programs[name] = Program(arguments, {**self.stack.environment, **settings}, str(PROJECT))
        self.start(name)

    def remove(self, name: str) -> None:
        """Kill a process that was added, for good."""
        if self.is_alive(name):
            self.kill(name)
        del self.pids[name], self._programs[name]

    # --- faults ------------------------------------------------------------------------------------------------------

    def kill(self, *names: str) -> None:
        """SIGKILL: no goodbye, no flush."""
        for name in names:
            os.kill(self.pids[name], signal.SIGKILL)
            process = self._restarted.pop(name, None)
            if process is not None:
                process.wait()

    def exchange(self, name: str, arguments: list[str]) -> list[str]:
        """Kill a process and run another program in its place from now on; returns the arguments it had."""
        before = self._programs[name]
        if self.is_alive(name):
            self.kill(name)
        self._programs[name] = msgspec.structs.replace(before, arguments=arguments)
        self.start(name)
        return before.arguments

    def terminate(self, name: str) -> None:
        """SIGTERM: drain and end."""
        os.kill(self.pids[name], signal.SIGTERM)

    def pause(self, name: str) -> None:
        os.kill(self.pids[name], signal.SIGSTOP)

    def resume(self, name: str) -> None:
        os.kill(self.pids[name], signal.SIGCONT)

    def start(self, *names: str) -> None:
        """Bring killed processes back and wait until those with a health page say they are ready."""
        for name in names:
            program = self._programs[name]
            before = self._restarted.pop(name, None)
            if before is not None:
                before.wait()
            process = spawn(program.arguments, self.log(name), program.environment, Path(program.directory))
            self._restarted[name] = process
            self.pids[name] = process.pid
        for name in names:
            if name == "valkey":
                with self.redis() as client:
                    wait_until(lambda client=client: _answers_ping(client), "valkey")  # type: ignore[misc]
            if name in self.urls or name == "rest":
                url = self.urls.get(name, self.rest_url).replace("ws://", "http://").removesuffix(WS_PATH)
                wait_until(lambda url=url: answers(f"{url}/health/ready"), f"{name} ready")  # type: ignore[misc]

    def forget(self) -> None:
        """FLUSHALL. Gateways and REST notice at their next lease renewal, 5 s later at most; until then they answer
        `storage_unavailable`."""
        with self.redis() as client:
            client.flushall()

    def wait_remembered(self) -> None:
        """Until all three instances have renewed what Redis lost."""
        with self.redis() as client:
            wait_until(lambda: client.scard(keys.INSTANCES) >= 3, "instances renewed")

    def log(self, name: str) -> Path:
        assert self.stack.log_dir is not None
        return self.stack.log_dir / f"{name}.log"

    def is_alive(self, name: str) -> bool:
        """Is it the very process that was started?"""
        try:
            state = Path(f"/proc/{self.pids[name]}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        return state not in ("Z", "X")

    def resident_kib(self, name: str) -> int:
        status = Path(f"/proc/{self.pids[name]}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1])

    def open_files(self, name: str) -> int:
        return len(os.listdir(f"/proc/{self.pids[name]}/fd"))

    def end(self) -> None:
        for process in self._restarted.values():
            process.send_signal(signal.SIGCONT)
            stop(process, 5.0)

    # --- what lies in the two stores ---------------------------------------------------------------------------------

    @contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        with redis.Redis.from_url(self.stack.redis_url, decode_responses=True) as client:
            yield client

    @contextmanager
    def database(self) -> Iterator[Any]:
        with pymongo.MongoClient[dict[str, Any]](self.stack.mongodb_url, tz_aware=True) as client:
            yield client.get_default_database()

    def sequences(self, conversation_id: str) -> list[int]:
        """The sequence numbers of a conversation as they are stored, ascending."""
        with self.database() as database:
            found = database["messages"].find({"conversation_id": conversation_id}, {"sequence_number": 1})
            return sorted(document["sequence_number"] for document in found)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = READY_SECONDS) -> None:
    """Poll until the condition holds; for what happens outside of this process. Blocks."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def _answers_ping(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:  # refused, or still loading
        return False


def _program(pid: int) -> Program:
    process = Path(f"/proc/{pid}")
    arguments = process.joinpath("cmdline").read_bytes().decode().split("\0")[:-1]
    environment = dict(
        line.split("=", 1) for line in process.joinpath("environ").read_bytes().decode().split("\0") if "=" in line
    )
    return Program(arguments, environment, str(process.joinpath("cwd").readlink()))


def _valkey(program: Program, port: int) -> Program:
    """Valkey overwrites its arguments with a title."""
    return msgspec.structs.replace(program, arguments=valkey_arguments(Path(program.directory), port))


@contextmanager
def run_house(settings: Mapping[str, str] = SETTINGS) -> Iterator[House]:
    """Two workers and a gateway on each transport, on a Valkey and a mongod of their own."""
    with run_stack(workers=2, settings=settings) as stack:
        house = House(stack)
        try:
            house.add_gateway("trio-websocket")
            yield house
        finally:
            house.end()
