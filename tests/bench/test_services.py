"""The local services: durable settings, a clean end, no orphans, and failures that say what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pymongo
import pytest
import redis
from pymongo import WriteConcern

from bench.services import Services, explain_failure, port_is_taken, run_services
from bench.services_command import DEFAULT_REDIS_PORT

_HOLD = """
import sys, time
from pathlib import Path
from bench.services import run_services
with run_services(Path(sys.argv[1])) as services:
    print(*services.pids.values(), flush=True)
    time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def _gone_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def test_valkey_keeps_what_it_was_told(services: Services) -> None:
    with redis.Redis.from_url(services.redis_url, decode_responses=True) as client:
        settings = client.config_get("appendonly", "appendfsync", "maxmemory-policy", "unixsocket")
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "everysec"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings.get("unixsocket", "") == ""


def test_mongod_commits_by_majority(mongodb_url: str) -> None:
    with pymongo.MongoClient[dict[str, Any]](mongodb_url) as client:
        collection = client.get_default_database()["probe"].with_options(
            write_concern=WriteConcern(w="majority", j=True)
        )
        assert collection.insert_one({"x": 1}).acknowledged


def test_data_survives_a_restart_on_other_ports(tmp_path: Path) -> None:
    with run_services(tmp_path) as first:
        with redis.Redis.from_url(first.redis_url) as client:
            client.set("kept", "1")
        with pymongo.MongoClient[dict[str, Any]](first.mongodb_url) as mongo:
            mongo.get_default_database()["probe"].insert_one({"_id": 1})
    assert _gone_within(list(first.pids.values()), 0.0)
    with run_services(tmp_path) as second:
        assert second.mongodb_url != first.mongodb_url
        with redis.Redis.from_url(second.redis_url) as client:
            assert client.get("kept") == b"1"
        with pymongo.MongoClient[dict[str, Any]](second.mongodb_url) as mongo:
            assert mongo.get_default_database()["probe"].count_documents({}) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_services_do_not_survive_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(_alive(pid) for pid in pids)
        parent.send_signal(number)
        parent.wait(5)
    assert _gone_within(pids, 4.0)


def test_command_only_idles_where_both_services_are_given() -> None:
    environment = {
        **os.environ,
        "TRIREME_REDIS_URL": "redis://127.0.0.1:1",
        "TRIREME_MONGODB_URL": "mongodb://127.0.0.1:1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "bench", "services"], stderr=subprocess.PIPE, text=True, env=environment
    ) as command:
        assert command.stderr is not None
        assert "nothing to start" in command.stderr.readline()
        assert command.poll() is None
        command.terminate()
        assert command.wait(4) == 0


def test_a_taken_default_port_is_one_line(tmp_path: Path) -> None:
    if port_is_taken(DEFAULT_REDIS_PORT):
        pytest.skip("another program holds the default port")
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(DEFAULT_REDIS_PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as holder:
        deadline = time.monotonic() + 5
        while not port_is_taken(DEFAULT_REDIS_PORT) and time.monotonic() < deadline:
            time.sleep(0.05)
        environment = {**os.environ, "TRIREME_REDIS_URL": "", "TRIREME_MONGODB_URL": "mongodb://127.0.0.1:1"}
        result = subprocess.run(
            [sys.executable, "-m", "bench", "services", "--data-dir", str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        holder.terminate()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "6379" in result.stderr
    assert "TRIREME_REDIS_URL" in result.stderr


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file",
            "install libcurl4",
        ),
        ("mongod: /lib/libc.so.6: version `GLIBC_2.34' not found", "too old"),
        ("listen failed: Address already in use", "port is taken"),
    ],
)
def test_known_failures_say_what_to_do(output: str, expected: str) -> None:
    line = explain_failure("mongod", output, "point TRIREME_MONGODB_URL at a server")
    assert line is not None
    assert expected in line
    assert "TRIREME_MONGODB_URL" in line
    assert "\n" not in line


def test_unknown_failures_are_not_explained_away() -> None:
    assert explain_failure("mongod", "something else broke", "advice") is None
