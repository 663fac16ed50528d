"""Looks at Redis that change nothing: what state it is in, who owns what, what lies where. For start-up checks, for the
doctor and for who traces a message. Raises what `Broker` raises.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from protocol import keys
from workers.broker import GroupMissing
from workers.entries import StreamEntry, unusual_entry

if TYPE_CHECKING:
    from workers.broker import Broker


class RedisCondition(msgspec.Struct, frozen=True):
    """What our promises rest on. `shards`: as recorded at the first start; None before it."""

    version: str
    policy: str
    shards: int | None
    aof: bool
    aof_ok: bool
    used_memory_bytes: int
    max_memory_bytes: int

    @property
    def major(self) -> int:
        """Of a version that cannot be read: 0."""
        first = self.version.partition(".")[0]
        return int(first) if first.isdigit() else 0


async def condition(broker: Broker) -> RedisCondition:
    """As `fitness.judge_redis` takes it."""
    info = await broker.command("INFO")
    shards = await broker.command("GET", keys.SHARDS)
    return RedisCondition(
        version=str(info.get("redis_version", "")),
        policy=str(info.get("maxmemory_policy", "noeviction")),
        shards=None if shards is None else int(shards),
        aof=bool(info.get("aof_enabled", 0)),
        aof_ok=info.get("aof_last_write_status", "ok") == "ok",
        used_memory_bytes=int(info.get("used_memory", 0)),
        max_memory_bytes=int(info.get("maxmemory", 0)),
    )


class ShardLoad(NamedTuple):
    """`waiting`: entries that nobody has read yet. `pending`: read and not decided. `owner`: "" for nobody."""

    shard: int
    owner: str
    waiting: int
    pending: int


async def shard_loads(broker: Broker, shards: int) -> list[ShardLoad]:
    """How every shard stands."""
    owners = await broker.command("MGET", *[keys.lease(shard) for shard in range(shards)])
    found = []
    for shard, owner in enumerate(owners):
        waiting = pending = 0
        try:
            for group in await broker.command("XINFO", "GROUPS", keys.ingest(shard)):
                fields = dict(zip(group[::2], group[1::2], strict=True)) if isinstance(group, list) else group
                pending = int(_field(fields, "pending") or 0)
                waiting = int(_field(fields, "lag") or 0)
        except GroupMissing:
            pass
        found.append(ShardLoad(shard, "" if owner is None else owner.decode(), waiting, pending))
    return found


def _field(fields: dict[object, object], name: str) -> int | None:
    value = fields.get(name, fields.get(name.encode()))
    return value if isinstance(value, int) else None


class EntryState(StrEnum):
    """How far a stream entry is: not read by anybody; read and not decided; decided and told."""

    WAITING = "waiting"
    PENDING = "pending"
    ACKNOWLEDGED = "acknowledged"


class Standing(NamedTuple):
    state: EntryState
    deliveries: int
    idle_ms: int


async def entry_standing(broker: Broker, shard: int, entry_id: bytes) -> Standing:
    """How far an entry is that lies in its stream."""
    stream = keys.ingest(shard)
    rows = await broker.command("XPENDING", stream, keys.INGEST_GROUP, entry_id, entry_id, 1)
    if rows:
        return Standing(EntryState.PENDING, int(rows[0][3]), int(rows[0][2]))
    for group in await broker.command("XINFO", "GROUPS", stream):
        fields = dict(zip(group[::2], group[1::2], strict=True)) if isinstance(group, list) else group
        last = fields.get("last-delivered-id", fields.get(b"last-delivered-id"))
        if isinstance(last, (bytes, str)) and _place(last) < _place(entry_id):
            return Standing(EntryState.WAITING, 0, 0)
    return Standing(EntryState.ACKNOWLEDGED, 0, 0)


def _place(entry_id: bytes | str) -> tuple[int, int]:
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    first, _, second = text.partition("-")
    return int(first), int(second or 0)


async def entries(broker: Broker, shard: int, after: bytes, count: int) -> list[StreamEntry]:
    """Entries of a shard from an id on (b"-" for the first, b"(…" for behind it), delivered to nobody."""
    reply = await broker.command("XRANGE", keys.ingest(shard), after, "+", "COUNT", count)
    return [unusual_entry(shard, entry_id, fields) for entry_id, fields in reply or ()]


async def lease_owner(broker: Broker, shard: int) -> str:
    """Who owns a shard; "" for nobody."""
    owner: bytes | None = await broker.command("GET", keys.lease(shard))
    return "" if owner is None else owner.decode()


async def is_in_inbox(broker: Broker, user_id: str, message_id: str) -> bool:
    """Does this message wait for a device of this user?"""
    return await broker.command("LPOS", keys.inbox(user_id), message_id) is not None
