"""The load driver as its parent sees it: a child process that takes one command and gives one answer at a time.

Called by the load benches, and by the chaos run for its crowds and its links. The child's standard error is the
parent's, so that what it says is seen.
"""

from __future__ import annotations

import select
import subprocess
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER_GRACE_SECONDS = 15.0
"""A driver past its own deadline by this much is stuck."""
STOP_SECONDS = 5.0


class DriverError(Exception):
    """The driver died or does not answer."""


class DriverProcess:
    """A running driver; `pid` is for the CPU accounting."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def command(self, command: msgspec.Struct, timeout_seconds: float) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises DriverError."""
        self.command_only(command)
        return self.answer(timeout_seconds)

    def command_only(self, command: msgspec.Struct) -> None:
        """Send one command; its answer, where there is one, is waited for by `answer`. Raises DriverError."""
        _pipe(self._process.stdin).write(msgspec.json.encode(command) + b"\n")

    def answer(self, timeout_seconds: float) -> dict[str, Any]:
        """The next line it says. Raises DriverError."""
        answer: dict[str, Any] = msgspec.json.decode(read_line(self._process, timeout_seconds + ANSWER_GRACE_SECONDS))
        return answer


def read_line(process: subprocess.Popen[bytes], timeout_seconds: float) -> bytes:
    """One line of a child's unbuffered standard output. Raises DriverError at its end or after `timeout_seconds`."""
    stdout = _pipe(process.stdout)
    if not select.select([stdout], [], [], timeout_seconds)[0]:
        raise DriverError(f"no answer from {process.args!r} within {timeout_seconds:.0f} s")
    line = stdout.readline()
    if not line:
        raise DriverError(f"{process.args!r} ended with status {process.wait(STOP_SECONDS)}")
    return line


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise DriverError("the child has no pipe")
    return pipe


@contextmanager
def open_driver(module: str = "bench.driver", *words: str) -> Iterator[DriverProcess]:
    """Start a driver, or another module that works like one; it ends with the block, since its input does."""
    arguments = (sys.executable, "-m", module, *words)
    with subprocess.Popen(arguments, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield DriverProcess(process)
        finally:
            _pipe(process.stdin).close()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def open_peer(*arguments: str, module: str = "bench.peers") -> Iterator[tuple[int, int]]:
    """Start a bare echo server of `peers`, or another module that says `ready PORT`. Yields its pid and port."""
    command = (sys.executable, "-m", module, *arguments)
    with subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE) as process:
        try:
            ready = read_line(process, ANSWER_GRACE_SECONDS).split()
            yield process.pid, int(ready[1])
        finally:
            process.kill()
