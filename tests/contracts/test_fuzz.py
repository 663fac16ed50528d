"""The same random operations on a twin and on its server: answers, errors and all that is left are the same."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import redis.exceptions
from pymongo import ReplaceOne, UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError

import gateway
import workers
from bench.simulation.mongo import SET
from protocol import codec
from protocol.models import ConnectionRegistry
from tests.contracts.worlds import Twins
from workers.store.conversations import heads_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.contracts.worlds import Servers
    from workers.broker import Broker
    from workers.store import Store

SEEDS: Final = range(20)
STEPS: Final = 150
_PLACE: Final = re.compile(rb"\A\d{10,}-\d+\Z")
_SCRIPTS: Final = {
    path.stem: path.read_text()
    for package in (gateway, workers)
    for path in (Path(package.__file__ or "").parent / "lua").glob("*.lua")
}


# --- Valkey ----------------------------------------------------------------------------------------------------------


def entry(rng: random.Random) -> bytes:
    name = rng.choice(("gw_1", "gw_2"))
    return codec.encode_value(ConnectionRegistry(instance_id=name, connection_id=str(rng.randint(1, 2)), timestamp=1))


def script(rng: random.Random, ids: list[bytes]) -> tuple[Any, ...]:
    """EVAL of one of ours."""
    user, device, place = rng.choice("ab"), rng.choice(("d1", "d2")), rng.choice(ids)
    where = (f"connection:{user}", f"presence:{user}", "users:gw_1", "seen")
    name, keys, argv = rng.choice(
        [
            ("attach", where, (device, entry(rng), b"{}", 60, 60, user, 5, 100)),
            ("detach", where, (device, "gw_1", rng.choice("12"), b"{}", 60, user, 6, 100)),
            ("refresh", where[:3], (b"{}", 60, 60, user, device, entry(rng))),
            (
                "bury",
                ("instance:gw_1", "users:gw_1", "down:gw_1", "instances", "seen", *where[:2]),
                ("gw_1", b"{}", b"{}", 60, 7, user),
            ),
            ("hold_leases", ("l1", "l2"), (rng.choice("vw"), 60_000)),
            ("release_leases", ("l1", "l2"), (rng.choice("vw"),)),
            ("look_session", ("session",), (rng.choice("pq"), 60)),
            ("fill_session", ("session",), (rng.choice("pq"), "{}", 60)),
            ("spend", ("allowance",), (3, 60)),
            ("push_inbox", ("i1", "i2"), (60, 3, 2, "m1", "m2", 1, rng.choice(("m3", "m4")))),
            ("settle", ("s1", "s2"), ("g", 1, place, "", 0, place)),
            ("claim_push", ("z", "z2"), (rng.randint(0, 3), rng.randint(1, 9), rng.randint(1, 3))),
            ("finish_push", ("z", "z2"), (rng.randint(1, 9), 2, "a", "b", 2, rng.choice("ab"))),
            ("tell", ("l1", "s1", "s2"), (rng.choice("vw"), 1, 1000, "r", "x", "y")),
        ]
    )
    return ("EVAL", _SCRIPTS[name], len(keys), *keys, *argv)


def command(rng: random.Random, ids: list[bytes]) -> tuple[Any, ...]:
    """Any command of those in use."""
    if rng.random() < 0.35:
        return script(rng, ids)
    stream, key, place = rng.choice(("s1", "s2")), rng.choice(("k1", "k2")), rng.choice(ids)
    value, field = str(rng.randint(0, 3)), rng.choice("fg")
    return rng.choice(
        [
            ("XADD", stream, "*", "r", value),
            ("XADD", stream, "NOMKSTREAM", "MAXLEN", "~", 1000, "*", "r", value),
            ("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM"),
            ("XREADGROUP", "GROUP", "g", "owner", "COUNT", 2, "STREAMS", stream, ">"),
            ("XREADGROUP", "GROUP", "g", "owner", "COUNT", 2, "STREAMS", "s1", "s2", ">", ">"),
            ("XREADGROUP", "GROUP", "g", "owner", "COUNT", 5, "STREAMS", stream, place),
            ("XREADGROUP", "GROUP", "g", "owner", "NOACK", "COUNT", 1, "STREAMS", stream, ">"),
            ("XREAD", "COUNT", 3, "STREAMS", stream, place),
            ("XACK", stream, "g", place, rng.choice(ids)),
            ("XTRIM", stream, "MINID", place),
            ("XRANGE", stream, place, place),
            ("XPENDING", stream, "g"),
            ("XLEN", stream),
            ("DEL", rng.choice((stream, key, "h", "m", "z", "l"))),
            ("SET", key, value, "EX", 100),
            ("SET", key, value, "NX", "PX", 100_000),
            ("GET", key),
            ("MGET", "k1", "k2", "h"),
            ("GETDEL", key),
            ("INCR", "n"),
            ("HSET", "h", field, value),
            ("HGET", "h", field),
            ("HDEL", "h", field),
            ("HINCRBY", "c", field, 2),
            ("HLEN", "h"),
            ("HVALS", "h"),
            ("HKEYS", "connection:a"),
            ("SADD", "m", value, field),
            ("SREM", "m", value),
            ("SMEMBERS", "m"),
            ("SCARD", "users:gw_1"),
            ("ZADD", "z", value, field),
            ("ZADD", "z", "NX", value, field, 2, "h"),
            ("ZREMRANGEBYRANK", "z", 0, -3),
            ("ZPOPMIN", "z", 1),
            ("ZCARD", "seen"),
            ("RPUSH", "l", value),
            ("LTRIM", "l", -3, -1),
            ("LRANGE", "l", 0, 1),
            ("LREM", "l", 1, value),
            ("EXISTS", key, stream, "h"),
            ("HGET", key, field),
            ("PUBLISH", "c", "x"),
        ]
    )


def plain(reply: Any, ids: list[bytes], *, unordered: bool) -> Any:
    """A reply without what depends on the clock, and without an order nobody promises."""
    if isinstance(reply, bytes) and _PLACE.match(reply):
        if reply not in ids:
            ids.append(reply)
        return f"id {ids.index(reply)}"
    if isinstance(reply, (list, tuple)):
        items = [plain(item, ids, unordered=False) for item in reply]
        return sorted(items) if unordered else items
    if isinstance(reply, set):
        return sorted(reply)
    if isinstance(reply, int) and not isinstance(reply, bool) and reply > 1000:
        return "a time"
    return bool(reply) if reply is True or reply is False else reply


async def play(broker: Broker, seed: int) -> list[Any]:
    rng = random.Random(seed)
    ids = [b"0-1"]
    heard: list[Any] = []
    client: Any = broker.client
    for _ in range(STEPS):
        words = command(rng, list(ids))
        await anyio.sleep(0.003)  # so that ids of different steps differ, on any clock
        try:
            reply = plain(await client.execute_command(*words), ids, unordered=words[0] in ("HVALS", "HKEYS"))
        except redis.exceptions.ResponseError as error:
            reply = str(error).split(maxsplit=1)[0]
        name = next((stem for stem, text in _SCRIPTS.items() if words[0] == "EVAL" and words[1] == text), words[0])
        heard.append((name, *(words[1:] if name == words[0] else ()), reply))
    return [[item if not isinstance(item, bytes) or not _PLACE.match(item) else "id" for item in one] for one in heard]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_valkey_and_its_twin_answer_alike(servers: Servers, seed: int) -> None:
    heard: list[list[Any]] = []

    async def scenario(broker: Broker) -> None:
        heard.append(await play(broker, seed))

    Twins().broker(scenario)
    servers.broker(scenario)
    for ours, theirs in zip(*heard, strict=True):
        assert ours == theirs


# --- MongoDB ---------------------------------------------------------------------------------------------------------

_DAY: Final = datetime(2027, 1, 15, tzinfo=UTC)


def message(rng: random.Random) -> dict[str, Any]:
    sequence = rng.randint(1, 12)
    return {
        "_id": f"msg_{rng.randint(1, 30)}",
        "conversation_id": rng.choice("cd"),
        "sender_id": rng.choice("ab"),
        "idempotency_key": f"k{rng.randint(1, 8)}",
        "sequence_number": sequence,
        "countable": sequence,
        "digest": bytes([sequence] * 16),
        "type": rng.choice(("text", "system")),
        "content": rng.choice(("", "x")),
        "created_at": _DAY + timedelta(seconds=sequence, microseconds=1234),
    }


def write(rng: random.Random) -> tuple[str, Any]:
    """(collection, what to do with it)."""
    name = f"msg_{rng.randint(1, 30)}"
    member = f"c:{rng.choice('ab')}"
    number = rng.randint(1, 9)
    newer = {"_id": name, "changed_seq": {"$not": {"$gte": number}}}
    seen = {"$setOnInsert": {"role": "member", "devices": {}}, "$max": {"read_seq": number}}
    operations: list[tuple[str, Callable[[Any], Any]]] = [
        ("messages", lambda c: c.insert_many([message(rng) for _ in range(3)], ordered=True)),
        ("messages", lambda c: c.insert_many([message(rng) for _ in range(3)], ordered=False)),
        ("messages", lambda c: c.bulk_write([UpdateOne(newer, {"$set": {"changed_seq": number, "content": "e"}})])),
        (
            "messages",
            lambda c: c.bulk_write(
                [
                    UpdateOne(newer, {"$set": {"changed_seq": number}, "$addToSet": {"hidden_by": rng.choice("ab")}}),
                    UpdateMany({"content": "e", "type": {"$in": ["text"]}}, {"$unset": {"content": ""}}),
                ],
                ordered=True,
            ),
        ),
        ("messages", lambda c: c.bulk_write([UpdateOne({"_id": name}, {"$pull": {"hidden_by": "a"}})], ordered=False)),
        ("memberships", lambda c: c.bulk_write([UpdateOne({"_id": member}, seen, upsert=True)], ordered=False)),
        ("memberships", lambda c: c.bulk_write([UpdateOne({"_id": member}, {"$max": {"devices.d1": number}})])),
        (
            "memberships",
            lambda c: c.bulk_write(
                [
                    ReplaceOne(
                        {"_id": member, "changed_seq": {"$not": {"$gte": number}}},
                        {"_id": member, "changed_seq": number, "devices": {"d2": 1}},
                        upsert=True,
                    )
                ],
                ordered=False,
            ),
        ),
        ("memberships", lambda c: c.update_one({"_id": member, "$or": [{"x": None}]}, {"$set": {"x": number}})),
        (
            "memberships",
            lambda c: c.update_one({"_id": member}, [{"$set": {"y": {"$ifNull": ["$y", number]}}}], upsert=True),
        ),
    ]
    return rng.choice(operations)


async def act(collection: Any, do: Callable[[Any], Any]) -> Any:
    try:
        done = await do(collection)
    except BulkWriteError as error:
        return [(one["index"], one["code"], list(one["keyPattern"])) for one in error.details["writeErrors"]]
    return getattr(done, "matched_count", None) if type(done).__name__ in ("UpdateResult", "_Result") else "done"


async def look(store: Store, rng: random.Random) -> Any:
    """What some reads of the product find."""
    messages: Any = store.db["messages"]
    low = rng.randint(1, 8)
    queries: Sequence[dict[str, Any]] = (
        {"conversation_id": "c", "sequence_number": {"$gte": low, "$lte": low + 3}},
        {
            "$or": [
                {"conversation_id": "c", "sender_id": "a", "idempotency_key": {"$in": ["k1", "k2"]}},
                {"_id": "msg_1"},
            ]
        },
        {"conversation_id": {"$in": ["c", "d"]}, "type": "system", "hidden_by": {"$exists": False}},
        {"hidden_by": "a"},
        {"created_at": {"$lt": _DAY + timedelta(seconds=low)}, "content": {"$ne": "x"}},
    )
    found = await messages.find(
        rng.choice(queries), {"digest": 0}, sort=[("_id", 1)], limit=rng.choice((0, 2))
    ).to_list()
    heads = await (await messages.aggregate(heads_pipeline(["c", "d"]))).to_list()
    return found, sorted(heads, key=lambda head: str(head["_id"]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_mongodb_and_its_twin_do_alike(servers: Servers, seed: int) -> None:
    heard: list[list[Any]] = []
    left: list[dict[str, Any]] = []

    async def scenario(store: Store) -> None:
        rng = random.Random(seed)
        told: list[Any] = []
        for _ in range(STEPS // 3):
            name, do = write(rng)
            told.append(await act(store.db[name], do))
            told.append(await look(store, rng))
        heard.append(told)

    async def on_twin(store: Store) -> None:
        await scenario(store)
        committed = SET.get().committed
        left.append({name: committed.get(name, {}) for name in ("messages", "memberships")})

    Twins().store(on_twin)
    servers.store(scenario)
    for ours, theirs in zip(*heard, strict=True):
        assert ours == theirs
    for name, documents in left[0].items():
        assert documents == {document["_id"]: document for document in servers.documents(name)}
