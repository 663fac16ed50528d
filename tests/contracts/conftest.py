"""`on`: where a contract is kept: by the twin, and by the real server."""

from __future__ import annotations

import pytest

from tests.contracts.worlds import Servers, Twins


@pytest.fixture(params=["twin", "server"])
def on(request: pytest.FixtureRequest) -> Twins | Servers:
    if request.param == "twin":
        return Twins()
    return Servers(request.getfixturevalue("redis_url"), request.getfixturevalue("mongodb_url"))


@pytest.fixture
def servers(redis_url: str, mongodb_url: str) -> Servers:
    return Servers(redis_url, mongodb_url)
