"""What Redis holds, for the audit: the ingest streams, what has a bound, who is shown online. Only reads.

*Raises* BrokerUnavailable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

from protocol import keys
from protocol.models import UserStatus
from workers.audit.snapshot import Amount, Queues, ShardQueue, Shown
from workers.audit.timeline import OFFLINE_SECONDS
from workers.broker import DOWN_LIMIT, QUERY_LIMIT, Broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HIGH_WATER: Final = 20_000
"""Entries of one shard at which gateways refuse (the default of `TRIREME_INGEST_HIGH_WATER`)."""
WINDOW: Final = 32
NODE: Final = 100
"""Entries a stream may keep beyond an approximate trim (stream-node-max-entries)."""
_SCAN: Final = 1000
_UNREAD_SHOWN: Final = 1000
_LOOK_AGAIN_SECONDS: Final = OFFLINE_SECONDS + 1


async def read_queues(broker: Broker, high_water: int, tell: Callable[[str], None]) -> Queues:
    """Everything in Redis that is audited. Who seems to be a ghost is looked at again 21 s later."""
    shards = int(await broker.look("GET", keys.SHARDS) or 0)
    instances = await broker.live_instances()
    gateways = sum(info.kind == "gateway" for info in instances.values())
    states = [await _shard(broker, shard) for shard in range(shards)]
    limit = high_water + gateways * WINDOW + NODE
    amounts = [Amount(what=keys.ingest(state.shard), value=state.length, limit=limit) for state in states]
    amounts += [amount async for amount in _bounded(broker)]
    ghosts: list[Shown] | None = None
    if any(info.kind == "worker" for info in instances.values()):
        ghosts = []
        suspects = await _ghosts(broker, None)
        if suspects:
            tell(f"{len(suspects)} users shown online have no connection: looking again in {_LOOK_AGAIN_SECONDS:.0f} s")
            await anyio.sleep(_LOOK_AGAIN_SECONDS)
            still = await _ghosts(broker, suspects)
            ghosts = [Shown(user_id=user_id, seconds=_LOOK_AGAIN_SECONDS) for user_id in sorted(still)]
    return Queues(shards=states, amounts=amounts, ghosts=ghosts)


async def _shard(broker: Broker, shard: int) -> ShardQueue:
    stream = keys.ingest(shard)
    if not await broker.look("EXISTS", stream):
        return ShardQueue(shard=shard, length=0, pending=0, unread=0, consumers=0)
    length = int(await broker.look("XLEN", stream))
    for group in await broker.look("XINFO", "GROUPS", stream):
        told = _fields(group)
        if told["name"] == keys.INGEST_GROUP.encode():
            # The server's own `lag` is unknown once somebody has deleted entries.
            after = b"(" + told["last-delivered-id"]
            unread = len(await broker.look("XRANGE", stream, after, b"+", b"COUNT", _UNREAD_SHOWN))
            return ShardQueue(
                shard=shard, length=length, pending=told["pending"], unread=unread, consumers=told["consumers"]
            )
    return ShardQueue(shard=shard, length=length, pending=0, unread=length, consumers=0)


def _fields(reply: Any) -> dict[str, Any]:
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode() if isinstance(name, bytes) else name: value for name, value in pairs}


async def _scan(broker: Broker, pattern: str) -> AsyncIterator[str]:
    cursor: bytes | int = 0
    while True:
        cursor, names = await broker.look("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN)
        for name in names:
            yield name.decode()
        if int(cursor) == 0:
            return


async def _bounded(broker: Broker) -> AsyncIterator[Amount]:
    """Streams and lists that have a bound of their own."""
    yield Amount(what=keys.QUERY, value=int(await broker.look("XLEN", keys.QUERY)), limit=QUERY_LIMIT + NODE)
    async for name in _scan(broker, keys.down("*")):
        yield Amount(what=name, value=int(await broker.look("XLEN", name)), limit=DOWN_LIMIT + NODE)
    async for name in _scan(broker, keys.inbox("*")):
        yield Amount(what=name, value=int(await broker.look("LLEN", name)), limit=keys.INBOX_LIMIT)


async def _ghosts(broker: Broker, among: set[str] | None) -> set[str]:
    """Users who are shown online although no living instance has a connection of theirs."""
    alive = set(await broker.live_instances())
    if among is None:
        among = {name.removeprefix(keys.PRESENCE_PREFIX) async for name in _scan(broker, keys.presence("*"))}
    names = sorted(among)
    found = set()
    for start in range(0, len(names), _SCAN):
        some = names[start : start + _SCAN]
        shown = await broker.presences(some)
        online = [name for name in some if name in shown and shown[name].status is UserStatus.ONLINE]
        places = await broker.locate(online) if online else {}
        found |= {name for name in online if alive.isdisjoint(places[name])}
    return found
