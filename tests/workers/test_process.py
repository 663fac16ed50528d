"""`python -m workers` as a process: it waits, it starts, it refuses in one line, it stops when told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

import redis

from bench.services import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTED_SECONDS = 15


def environment(**settings: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}
    return clean | {"TRIREME_ENV": "dev"} | settings


@contextmanager
def process(*roles: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-m", "workers", *roles],
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + STARTED_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2) as answer:
                assert answer.status == 200
                return
        except (URLError, ConnectionError):
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.05)


def events(stderr: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.splitlines()]


def test_three_roles_in_one_process_start_and_stop_on_a_signal(redis_url: str, mongodb_url: str) -> None:
    port = free_port()
    settings = {
        "TRIREME_REDIS_URL": redis_url,
        "TRIREME_MONGODB_URL": mongodb_url,
        "TRIREME_REST_PORT": str(port),
        "TRIREME_SHARDS": "4",
    }
    with process("ingest", "query", "rest", **settings) as running:
        wait_until_ready(port)
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        _, stderr = running.communicate(timeout=10)
        assert time.monotonic() - started < 4.5, "longer than the drain that honcho allows"
    assert running.returncode == 0, stderr
    names = [event["event"] for event in events(stderr)]
    assert names[-1] == "worker_stopped"
    assert "drain_cut_short" not in names
    with redis.Redis.from_url(redis_url) as client:
        assert client.smembers("instances") == set()
        assert client.keys("lease:*") == []


def test_a_process_says_once_what_it_waits_for_and_can_be_stopped_meanwhile() -> None:
    nobody = free_port()
    with process("query", TRIREME_MONGODB_URL=f"mongodb://127.0.0.1:{nobody}/x?directConnection=true") as waiting:
        assert waiting.stderr is not None
        line = json.loads(waiting.stderr.readline())
        assert (line["event"], line["service"]) == ("waiting_for_service", "mongodb")
        waiting.send_signal(signal.SIGTERM)
        _, stderr = waiting.communicate(timeout=5)
    assert waiting.returncode == 0
    assert [event["event"] for event in events(stderr)] == ["stopping", "worker_stopped"]


def test_another_shard_count_than_the_recorded_one_refuses_to_start(redis_url: str, mongodb_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("shards", 8)
    urls = {"TRIREME_REDIS_URL": redis_url, "TRIREME_MONGODB_URL": mongodb_url}
    with process("query", TRIREME_SHARDS="4", **urls) as refused:
        _, stderr = refused.communicate(timeout=STARTED_SECONDS)
    assert (refused.returncode, stderr) == (
        2,
        "workers: TRIREME_SHARDS is 4, but this installation was started with 8; set TRIREME_SHARDS=8 everywhere\n",
    )


def test_a_redis_that_may_evict_is_refused(redis_url: str, mongodb_url: str) -> None:
    urls = {"TRIREME_REDIS_URL": redis_url, "TRIREME_MONGODB_URL": mongodb_url}
    with redis.Redis.from_url(redis_url) as client:
        before = client.config_get("maxmemory-policy")["maxmemory-policy"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with process("query", **urls) as refused:
                _, stderr = refused.communicate(timeout=STARTED_SECONDS)
        finally:
            client.config_set("maxmemory-policy", before)
    assert refused.returncode == 2
    assert stderr == "workers: Redis has maxmemory-policy allkeys-lru: it may evict a stream; set noeviction\n"


def page(port: int, path: str) -> tuple[int, Any]:
    """Status and JSON of a health page; (0, None) while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())
    except (URLError, ConnectionError):
        return 0, None


def wait_for_page(port: int, wanted: tuple[int, Any]) -> None:
    deadline = time.monotonic() + STARTED_SECONDS
    while (seen := page(port, "/health/ready")) != wanted:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def test_a_worker_says_on_its_metrics_port_what_it_lacks(redis_url: str, mongodb_url: str) -> None:
    nobody, port = free_port(), free_port()
    away = {
        "TRIREME_MONGODB_URL": f"mongodb://127.0.0.1:{nobody}/x?directConnection=true",
        "TRIREME_REDIS_URL": redis_url,
        "TRIREME_WORKER_METRICS_PORT": str(port),
    }
    with process("query", **away):
        wait_for_page(port, (503, {"status": "not_ready", "missing": ["mongodb", "redis"]}))
        assert page(port, "/health/live") == (200, {"status": "ok"})
    with process("query", **{**away, "TRIREME_MONGODB_URL": mongodb_url}):
        wait_for_page(port, (200, {"status": "ok"}))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            assert b"trireme_breaker_state" in answer.read()
