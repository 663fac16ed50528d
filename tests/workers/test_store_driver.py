"""The MongoDB driver under cancellation: whoever is given up while no server answers leaves the client in order."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError, ServerSelectionTimeoutError

from bench.services import free_port
from workers.store.driver import mend_driver

pytestmark = pytest.mark.anyio


async def test_a_client_whose_waiting_operations_were_cancelled_is_not_stuck_for_good() -> None:
    """A worker was deaf for good after a failover: a query that ran out of time had left the topology's lock taken."""
    mend_driver()
    client: AsyncMongoClient[dict[str, object]] = AsyncMongoClient(
        "127.0.0.1", free_port(), serverSelectionTimeoutMS=1000, connectTimeoutMS=200, heartbeatFrequencyMS=500
    )

    async def ask() -> None:
        with suppress(PyMongoError):
            await client.admin.command("ping")

    for _ in range(3):
        with anyio.move_on_after(0.3):
            async with anyio.create_task_group() as tasks:
                for _ in range(30):  # at once: each has to wait for the lock that the ones before it leave
                    tasks.start_soon(ask)
    with anyio.fail_after(5.0), pytest.raises(ServerSelectionTimeoutError):
        await client.admin.command("ping")
    await client.close()  # a stuck one cannot even be closed
