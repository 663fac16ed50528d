"""The figures of the load benches: percentiles, CPU accounting, what a verdict looks like."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import pytest

from bench import figures

if TYPE_CHECKING:
    from pathlib import Path


def test_percentiles_are_nearest_rank() -> None:
    latencies = figures.Latencies()
    for sample_ms in range(100, 0, -1):
        latencies.add(sample_ms / 1000)
    assert latencies.summary_ms() == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def test_one_sample_is_every_percentile_and_none_is_no_figure() -> None:
    latencies = figures.Latencies()
    assert latencies.summary_ms() == {}
    latencies.add(0.25)
    assert latencies.summary_ms() == {"p50": 250.0, "p90": 250.0, "p99": 250.0, "max": 250.0}


def worked(pid: int, seconds: float = 0.2) -> None:
    """Until it has had so much of a processor, however busy the machine."""
    before, deadline = figures.cpu_seconds(pid), time.monotonic() + 20
    while figures.cpu_seconds(pid) < before + seconds:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_cpu_of_a_busy_child_is_seen_and_of_a_sleeping_one_is_not() -> None:
    busy = subprocess.Popen((sys.executable, "-c", "while True: pass"))
    idle = subprocess.Popen((sys.executable, "-c", "import time; time.sleep(60)"))
    try:
        time.sleep(0.3)
        clock = figures.RoleClock({"worker": [busy.pid], "gateway": [idle.pid]})
        clock.start()
        worked(busy.pid)
        used = clock.used_seconds()
        assert used["worker"] > 0.1
        assert used["gateway"] < 0.05
    finally:
        for child in (busy, idle):
            child.kill()
            child.wait()


def test_both_ways_of_counting_cpu_agree() -> None:
    busy = subprocess.Popen((sys.executable, "-c", "while True: pass"))
    try:
        worked(busy.pid)
        exact, ticks = figures.thread_cpu_seconds(busy.pid), figures.cpu_seconds(busy.pid)
        assert exact > 0.1
        assert abs(exact - ticks) < 0.1
    finally:
        busy.kill()
        busy.wait()


def test_work_of_processes_outside_the_roles_is_shown() -> None:
    stranger = subprocess.Popen((sys.executable, "-c", "while True: pass"))
    idle = subprocess.Popen((sys.executable, "-c", "import time; time.sleep(60)"))
    try:
        time.sleep(0.3)
        without, within = figures.RoleClock({"gateway": [idle.pid]}), figures.RoleClock({"worker": [stranger.pid]})
        began = time.monotonic()
        worked(stranger.pid)
        used = within.used_seconds()["worker"]
        assert used > 0.1
        assert without.elsewhere_cores() > used / (time.monotonic() - began) * 0.7
    finally:
        for child in (stranger, idle):
            child.kill()
            child.wait()


def test_a_process_that_died_within_the_window_is_an_error_not_a_zero() -> None:
    child = subprocess.Popen((sys.executable, "-c", "import time; time.sleep(60)"))
    clock = figures.RoleClock({"worker": [child.pid]})
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        clock.used_seconds()


def test_the_total_holds_the_servers_and_not_the_driver() -> None:
    used = {"gateway": 0.5, "worker": 0.25, "valkey": 0.125, "mongod": 0.125, "rest": 0.0, "driver": 7.0}
    shown = figures.cpu_us_per_message(used, 10_000)
    assert shown["total"] == 100.0
    assert shown["gateway"] == 50.0
    assert shown["driver"] == 700.0


def test_memory_of_this_process_is_plausible() -> None:
    sizes = figures.memory_kib(os.getpid())
    assert 1_000 < sizes["pss"] <= sizes["rss"] < 10_000_000


def test_the_verdict_is_ok_or_the_violations() -> None:
    assert figures.verdict([]) == "ok"
    assert figures.verdict(["lost: one"]) == ["lost: one"]


def test_the_json_file_holds_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    figures.write_json(str(path), {"messages_per_second": 7000.5, "verdict": "ok", "machine": figures.machine()})
    loaded = msgspec.json.decode(path.read_bytes())
    assert loaded["messages_per_second"] == 7000.5
    assert loaded["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12345.67, "12,345.7"), (0.12345, "0.123"), (30000, "30,000"), ({"a": 1, "b": "x"}, "a 1  b x")],
)
def test_values_are_shown_as_people_read_them(value: object, shown: str) -> None:
    assert figures.show(value) == shown
