"""A database process that is killed, paused and brought back as often as wanted: Valkey, or a member of the set."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Final

import redis

from bench.services import (
    HOST,
    START_DEADLINE_SECONDS,
    STOP_DEADLINE_SECONDS,
    ServicesError,
    log_tail,
    spawn,
    stop,
    valkey_answers,
    valkey_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POLL_SECONDS: Final = 0.02
BROKEN_FILE: Final = "Bad file format"


class Server:
    """One such process between its starts and its ends. To be started from the main thread: it ends with it."""

    def __init__(self, name: str, arguments: list[str], port: int, log: Path) -> None:
        self.name = name
        self.port = port
        self.log = log
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the one that runs. Raises ServicesError where none does."""
        if self._process is None:
            raise ServicesError(f"{self.name} was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it (again): same port, same data."""
        self._process = spawn(self._arguments, self.log)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> None:
        """For good, from whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            stop(self._process, STOP_DEADLINE_SECONDS)

    def wait_until(self, ready: Callable[[], bool], deadline: float) -> None:
        """Poll. Raises ServicesError with the end of its log when it ends or the monotonic deadline passes."""
        while not ready():
            if not self.is_running:
                raise ServicesError(f"{self.name} ended; its log ends with:\n{log_tail(self.log)}")
            if time.monotonic() >= deadline:
                raise ServicesError(f"{self.name} was not ready in time; its log ends with:\n{log_tail(self.log)}")
            time.sleep(POLL_SECONDS)


class Valkey(Server):
    """One Valkey, with its append-only file (everysec). Its data lie in `directory`/NAME."""

    def __init__(self, name: str, directory: Path, port: int, log: Path) -> None:
        self.data_dir = directory / name
        self.data_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(name, valkey_arguments(self.data_dir, port), port, log)
        self.cuts = 0
        """How often its file was cut where it was broken."""

    def start_ready(self) -> None:
        """Start it and wait until it has loaded its data. A file that a full disk has left broken is cut where it
        breaks, as an operator would: all that is behind is lost to Redis."""
        try:
            self._come_up()
        except ServicesError as error:
            if BROKEN_FILE not in str(error):
                raise
            self._cut_file()
            self._come_up()

    def _come_up(self) -> None:
        self.start()
        self.wait_until(lambda: valkey_answers(self.port), time.monotonic() + START_DEADLINE_SECONDS)

    def _cut_file(self) -> None:
        """`valkey-check-aof --fix`, which is the server's own binary by another name. Raises ServicesError.

        Of the last file alone: by the manifest it takes the base of Valkey 9, a dump, for commands.
        """
        last = max(self.data_dir.glob("appendonlydir/*.incr.aof"), key=lambda file: int(file.name.split(".")[-3]))
        said = subprocess.run(
            ["valkey-check-aof", "--fix", str(last)],
            executable=self._arguments[0],
            input=b"y\n",
            capture_output=True,
            check=False,
            timeout=START_DEADLINE_SECONDS,
        )
        if said.returncode != 0:
            words = said.stdout.decode(errors="replace")[-500:]
            raise ServicesError(f"{self.name}: its file cannot be mended: {words}")
        self.cuts += 1

    def forget(self) -> None:
        """Remove its data, while it is down."""
        shutil.rmtree(self.data_dir)
        self.data_dir.mkdir()

    def client(self) -> redis.Redis:
        """Of this server itself, around the links."""
        return redis.Redis(HOST, self.port, socket_timeout=5.0)

    def follow(self, port: int) -> None:
        """Become a replica of who is behind that port of loopback, and wait until it has everything. Raises
        ServicesError."""
        with self.client() as client:
            client.replicaof(HOST, port)
            deadline = time.monotonic() + START_DEADLINE_SECONDS
            self.wait_until(lambda: client.info("replication").get("master_link_status") == "up", deadline)

    def promote(self) -> None:
        """Follow nobody any more."""
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def offset(self) -> int:
        """Bytes of the replication stream that it has written, or as a replica applied."""
        with self.client() as client:
            said = client.info("replication")
        return int(said["master_repl_offset"] if said["role"] == "master" else said["slave_repl_offset"])

    def refuses_writes(self) -> bool:
        """Because it cannot write them to its disk?"""
        with self.client() as client:
            try:
                client.set("chaos:probe", "", ex=1)
            except redis.ResponseError as error:
                return str(error).startswith("MISCONF")
        return False
