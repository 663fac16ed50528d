"""What all tests share: one Valkey and one mongod per run, both empty when a test begins."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pymongo
import pytest
import redis

from bench.services import Services, run_services

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE_PROCESSES = 3
"""The suite waits more than it works: 453 s in one process, 183 s in three on two cores."""

HERE = Path(__file__).parent
HOUSES = ("system", "hostile")
"""Packages of tests that each run one whole system for all of theirs."""

_databases = count(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several processes, each with servers of its own, for the whole suite; none for a part that somebody names."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else SUITE_PROCESSES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a running system share a process: one system each, not one per process."""
    for item in items:
        for package in HOUSES:
            if item.path.is_relative_to(HERE / package):
                item.add_marker(pytest.mark.xdist_group(package))


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The servers of this run; they end with it, however it ends."""
    data_dir: Path = tmp_path_factory.mktemp("services")
    with run_services(data_dir) as running:
        yield running


@pytest.fixture
def redis_url(services: Services) -> str:
    """An empty Valkey. Emptied rather than numbered: pub/sub channels are shared by all numbered databases."""
    with redis.Redis.from_url(services.redis_url) as client:
        client.flushall()
        client.script_flush()
    return services.redis_url


@pytest.fixture
def mongodb_url(services: Services) -> str:
    """The URL of an empty database. Emptied rather than dropped: its indexes take half a second to make."""
    server = services.mongodb_url.rsplit("/", 1)[0]
    with pymongo.MongoClient[dict[str, Any]](server) as client:
        database = client["test"]
        for name in database.list_collection_names():
            database[name].delete_many({})
    return f"{server}/test"


@pytest.fixture
def new_mongodb_url(services: Services) -> Iterator[str]:
    """The URL of a database without a collection or an index, for this test only."""
    name = f"test_{next(_databases)}"
    server = services.mongodb_url.rsplit("/", 1)[0]
    yield f"{server}/{name}"
    with pymongo.MongoClient[dict[str, Any]](server) as client:
        client.drop_database(name)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Worker code runs on asyncio with uvloop, and so do its tests."""
    return "asyncio", {"use_uvloop": True}
