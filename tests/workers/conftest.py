"""What the workers' tests share: the two seams on the run's real servers, and the REST role with a shard owner."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from bench.services import free_port
from protocol import records
from tests.workers.lanes import Yard
from tests.workers.seeding import Rest
from workers import ingest
from workers.broker import Broker, open_broker
from workers.codes import Codes
from workers.egress import open_egress
from workers.instances import Instance
from workers.rest import app
from workers.rest.desk import Desk
from workers.senders import NoSender
from workers.settings import Settings, load_settings
from workers.store import Store, open_store
from workers.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def store(mongodb_url: str) -> AsyncIterator[Store]:
    """A store over an empty database."""
    async with open_store(mongodb_url) as opened:
        yield opened


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    """A broker over an empty Valkey."""
    async with open_broker(redis_url) as opened:
        yield opened


@pytest.fixture
async def yard(store: Store, broker: Broker) -> Yard:
    """One gateway's view of the stream, for the tests that run lanes."""
    opened = Yard(store, broker)
    await opened.open()
    return opened


@pytest.fixture
def settings(redis_url: str, mongodb_url: str) -> Settings:
    """Dev settings on this test's servers, with few shards so that roles start quickly."""
    environ = {
        "TRIREME_ENV": "dev",
        "TRIREME_REDIS_URL": redis_url,
        "TRIREME_MONGODB_URL": mongodb_url,
        "TRIREME_SHARDS": "4",
        "TRIREME_REST_PORT": str(free_port()),
        "TRIREME_COMMAND_TIMEOUT_SECONDS": "5",
        "TRIREME_LOG_LEVEL": "error",
    }
    return load_settings(environ, ["ingest", "query", "rest"])


@asynccontextmanager
async def serving(settings: Settings, store: Store, broker: Broker, *, owner: bool) -> AsyncIterator[Rest]:
    """The REST role over HTTP; with `owner`, the ingest role decides its commands."""
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(app.run, settings, store, broker, stopping)
        if owner:
            group.start_soon(ingest.run, settings, store, broker, stopping)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{settings.rest_port}", timeout=20) as client:
            with anyio.fail_after(10):
                while not await _is_ready(client):  # noqa: ASYNC110 - it is another task that listens
                    await anyio.sleep(0.02)
            yield Rest(client, settings.admin_token)
        stopping.set()


async def _is_ready(client: httpx2.AsyncClient) -> bool:
    try:
        return (await client.get("/health/ready")).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
async def rest(settings: Settings, store: Store, broker: Broker) -> AsyncIterator[Rest]:
    async with serving(settings, store, broker, owner=True) as running:
        yield running


@pytest.fixture
async def rest_without_owner(settings: Settings, store: Store, broker: Broker) -> AsyncIterator[Rest]:
    """Nobody holds the shards: commands are never decided."""
    short = load_settings(
        {
            "TRIREME_ENV": "dev",
            "TRIREME_REDIS_URL": settings.redis_url,
            "TRIREME_MONGODB_URL": settings.mongodb_url,
            "TRIREME_SHARDS": "4",
            "TRIREME_REST_PORT": str(settings.rest_port),
            "TRIREME_COMMAND_TIMEOUT_SECONDS": "0.3",
        },
        ["rest"],
    )
    async with serving(short, store, broker, owner=False) as running:
        yield running


@pytest.fixture
async def desk(settings: Settings, store: Store, broker: Broker, rest: Rest) -> AsyncIterator[Desk]:
    """A second REST process' desk, beside the one that serves."""
    instance = Instance(broker, "rest_second", records.InstanceInfo("rest", "http://second", 0, False))
    async with open_egress("") as egress, anyio.create_task_group() as group:
        await group.start(instance.run)
        yield Desk(
            settings,
            store,
            broker,
            instance,
            Tokens(settings.jwt_private_key),
            Codes(settings, store, NoSender()),
            None,
            egress,
        )
        group.cancel_scope.cancel()
