"""What a load bench reports: latencies, CPU per role from the operating system's accounting, one table, one JSON file.

Called by the load benches and the driver. Holds no opinion on how the load was made; never starts or stops anything.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Latencies:
    """Samples of one latency in seconds, kept exactly: eight bytes each, 8 MB for a million."""

    __slots__ = ("add", "samples_seconds")

    def __init__(self) -> None:
        self.samples_seconds = array("d")
        self.add = self.samples_seconds.append
        """Take one sample in seconds; a bound method, since it is called once per message."""

    def summary_ms(self) -> dict[str, float]:
        """p50, p90, p99 and max in milliseconds (nearest rank); empty when nothing was measured."""
        if not self.samples_seconds:
            return {}
        ordered = sorted(self.samples_seconds)
        return {
            "p50": milliseconds(nearest_rank(ordered, 0.50)),
            "p90": milliseconds(nearest_rank(ordered, 0.90)),
            "p99": milliseconds(nearest_rank(ordered, 0.99)),
            "max": milliseconds(ordered[-1]),
        }


def nearest_rank(ordered: Sequence[float], quantile: float) -> float:
    """The smallest sample that at least `quantile` of all do not exceed. Raises IndexError when there is none."""
    rank = -int(-quantile * len(ordered) // 1)
    return ordered[max(rank, 1) - 1]


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


# --- CPU and memory of processes -------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """User and system time of one process with all its threads (proc(5), fields 14 and 15 of `stat`).

    The kernel scales these from its nanosecond accounting, so the error is one tick per reading, whatever the load.
    Raises ProcessLookupError when there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def thread_cpu_seconds(pid: int) -> float:
    """The same to the nanosecond, but only of the threads that live now (`schedstat`, first field): for a process whose
    threads do not come and go, over a window of any length. Raises ProcessLookupError when there is no such process.
    """
    tasks = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
    if not tasks:
        raise ProcessLookupError(pid)
    return sum(int(task.read_text("ascii").split()[0]) for task in tasks) / 1e9


def memory_kib(pid: int) -> dict[str, int]:
    """`rss` and `pss` (shared pages divided among their users) of one process in KiB."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            sizes[name.lower()] = int(rest.split()[0])
    return sizes


def forget_peak(pid: int) -> int:
    """The greatest resident size of a process counts from now on (proc(5), `clear_refs` 5). Returns today's, in KiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")
    return memory_kib(pid)["rss"]


def peak_kib(pid: int) -> int:
    """The greatest resident size of a process since `forget_peak` (proc(5), VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def machine_cpu_seconds() -> float:
    """What all processors have worked since boot (proc(5), `stat`: everything but idle, iowait and guests)."""
    fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_SECOND


class RoleClock:
    """CPU seconds each role (gateway, worker, valkey, …) has used since `start`, and how busy the rest was."""

    def __init__(self, roles: Mapping[str, Iterable[int]]) -> None:
        self._roles = {role: list(pids) for role, pids in roles.items()}
        self.start()

    def _read(self) -> dict[str, float]:
        return {role: sum(map(cpu_seconds, pids)) for role, pids in self._roles.items()}

    def start(self) -> None:
        """The timed window begins now."""
        self._started = self._read()
        self._machine = machine_cpu_seconds()
        self._at = time.monotonic()

    def used_seconds(self) -> dict[str, float]:
        """CPU seconds per role since `start`. Raises ProcessLookupError when a process died within the window."""
        now = self._read()
        return {role: now[role] - self._started[role] for role in now}

    def elsewhere_cores(self) -> float:
        """Processors kept busy since `start` by anything but these roles: more than a few tenths spoils latencies."""
        others = machine_cpu_seconds() - self._machine - sum(self.used_seconds().values())
        return round(max(0.0, others) / max(time.monotonic() - self._at, 1e-9), 2)


SERVER_ROLES = ("gateway", "worker", "valkey", "mongod", "rest")


def cpu_us_per_message(used_seconds: Mapping[str, float], messages: int) -> dict[str, float]:
    """Microseconds per message: `total` over the server roles, each role, and the load generator's `driver` beside."""
    figures = {role: round(seconds * 1e6 / messages, 1) for role, seconds in used_seconds.items()}
    total = sum(used_seconds.get(role, 0.0) for role in SERVER_ROLES)
    return {"total": round(total * 1e6 / messages, 1), **figures}


# --- what was measured where -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine as far as it explains a figure."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of the checkout, with `+` when the product's code differs from it; "unknown" outside a checkout."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "gateway", "workers", "protocol")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changed else name


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(("git", *arguments), cwd=here, check=True, capture_output=True, text=True).stdout.strip()


# --- output ----------------------------------------------------------------------------------------------------------


def verdict(violations: Sequence[str]) -> str | list[str]:
    """ "ok", or the violations."""
    return list(violations) if violations else "ok"


def print_table(title: str, figures: Mapping[str, Any]) -> None:
    """One row per figure; a mapping becomes `name value` pairs in one cell, a list one line per item."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in figures.items():
        table.add_row(name, show(value))
    Console().print(table)


def show(value: Any) -> str:
    """A figure as a person reads it."""
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {show(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(show(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """The same figures as one indented JSON object. Raises OSError."""
    encoded = msgspec.json.format(msgspec.json.encode(figures), indent=2)
    Path(path).write_bytes(encoded + b"\n")
