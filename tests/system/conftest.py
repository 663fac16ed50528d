"""One running system for all system tests; each of them leaves it as it found it: everything up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.object_store import VARIABLE, run_store
from tests.system.house import SETTINGS, House, run_house

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with run_store(tmp_path_factory.mktemp("s3")) as s3_url, run_house(SETTINGS | {VARIABLE: s3_url}) as house:
        yield house


@pytest.fixture
def house(running: House) -> House:
    """The running system. A process that a failed test left dead is brought back, so that one failure stays one."""
    dead = [name for name in running.pids if not running.is_alive(name)]
    for name in ("valkey", "mongod"):
        if name in dead:
            running.start(name)
    running.start(*(name for name in dead if name not in ("valkey", "mongod")))
    return running


@pytest.fixture(params=["epoll", "trio-websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
