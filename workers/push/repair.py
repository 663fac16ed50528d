"""Redis forgot what was due, or a part of it: made again from the log. Part of the push role.

`PUSH_EPOCH` names the Redis process in which the two sets are whole. Where it is missing or names another, whoever is
behind in a conversation that was written to since the checkpoint is due. The checkpoint, in MongoDB, says up to when
everything was looked at: it is moved only while nothing waits longer than it should.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol import keys
from workers import metrics, push_queue
from workers.broker import BrokerUnavailable
from workers.push.looks import epoch_ms, moment
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.store import Store

LOOK_SECONDS: Final = 1.0
CHECKPOINT_SECONDS: Final = 10.0
MARGIN_MS: Final = 60_000
"""Between a message and the checkpoint: its look, its telling and the lease of whoever may have died with it."""
FURTHEST_MS: Final = 3_600_000
"""How far back is looked at most: a second of MongoDB for a million messages."""
_REPAIR_MS: Final = 60_000
"""A repair that takes longer lost its process."""

log = structlog.get_logger(__name__)


async def keep_whole(store: Store, broker: Broker) -> None:
    """Until cancelled. However many do it."""
    name = secrets.token_hex(8)
    noted_at = anyio.current_time()
    while True:
        try:
            if await mend(store, broker, name) and anyio.current_time() - noted_at >= CHECKPOINT_SECONDS:
                noted_at = anyio.current_time()
                await _note(store, broker)
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("push_repair_waits", error=str(error)[:200])
        await anyio.sleep(LOOK_SECONDS)


async def mend(store: Store, broker: Broker, name: str) -> bool:
    """Make again what Redis forgot, if it did; True where the two sets are whole. Raises BrokerUnavailable,
    StoreUnavailable."""
    run_id = str((await broker.command("INFO", "server"))["run_id"])
    if await broker.command("GET", keys.PUSH_EPOCH) == run_id.encode():
        return True
    if not await broker.command("SET", keys.PUSH_REPAIR, name, "NX", "PX", _REPAIR_MS):
        return False
    now_ms = _now_ms()
    checkpoint = await store.pushes.checkpoint()
    since_ms = now_ms - MARGIN_MS if checkpoint is None else max(epoch_ms(checkpoint), now_ms - FURTHEST_MS)
    found = 0
    async for ends in store.pushes.said_since(since_ms):
        behind = await store.pushes.behind(ends)
        found += len(behind)
        await push_queue.add(broker, [(keys.push_entry(*pair), now_ms) for pair in behind])
    await broker.command("SET", keys.PUSH_EPOCH, run_id)
    await broker.command("DEL", keys.PUSH_REPAIR)
    log.info("push_repaired", members=found, since_seconds=(now_ms - since_ms) // 1000)
    return True


async def _note(store: Store, broker: Broker) -> None:
    now_ms = _now_ms()
    metrics.PUSH_DUE.set(await push_queue.waiting(broker))
    if await push_queue.overdue(broker, now_ms - MARGIN_MS // 2) == 0:
        await store.pushes.set_checkpoint(moment(now_ms - MARGIN_MS))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
