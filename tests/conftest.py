"""What all tests share: one Valkey and one mongod per run, both empty when a test begins."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pymongo
import pytest
import redis

from bench.services import Services, run_services
from tests import machine
from tests.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xdist.remote import Producer

_databases = count(1)


def pytest_configure(config: pytest.Config) -> None:
    machine.keep_data_in_memory()
    machine.compile_once(config)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several processes, each with servers of its own, for the whole suite; none for a part that somebody names."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else machine.SUITE_PROCESSES


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Schedule:
    return Schedule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a run of several processes what takes long begins first: what is short fills them to the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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


@pytest.fixture(scope="session")
def mongodb_server(services: Services) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """A client of the run's mongod: one, because its handshakes take longer than what is asked of it."""
    with pymongo.MongoClient[dict[str, Any]](services.mongodb_url) as client:
        yield client


@pytest.fixture
def mongodb_url(services: Services, mongodb_server: pymongo.MongoClient[dict[str, Any]]) -> str:
    """The URL of an empty database. Emptied rather than dropped: its indexes take half a second to make."""
    database = mongodb_server["test"]
    for name in database.list_collection_names():
        database[name].delete_many({})
    return services.mongodb_url.rsplit("/", 1)[0] + "/test"


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
