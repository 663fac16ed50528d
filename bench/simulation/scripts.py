"""The Lua scripts of both sides, said again in Python. The operation fuzz compares each with the real one.

Called by `valkey.Valkey` for EVAL; a script whose text is not among the product's is refused.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

import gateway
import workers
from bench.simulation.gaps import NotTwinned
from bench.simulation.keyspace import Refusal

Call = Any
"""`call(command, *arguments)`: run a command on the keyspace. Arguments may be bytes, str or int."""

_decode = msgspec.json.Decoder().decode


def _attach(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    previous = call(b"HGET", keys[0], argv[0])
    if call(b"HLEN", keys[0]) == 0 and call(b"ZCARD", keys[3]) < int(argv[7]):
        call(b"ZADD", keys[3], argv[6], argv[5])
    call(b"HSET", keys[0], argv[0], argv[1])
    call(b"EXPIRE", keys[0], argv[3])
    call(b"SADD", keys[2], argv[5])
    call(b"EXPIRE", keys[2], argv[3])
    call(b"SET", keys[1], argv[2], b"EX", argv[4])
    call(b"PUBLISH", keys[1], argv[2])
    return previous


def _detach(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    instance = argv[1].decode()
    value = call(b"HGET", keys[0], argv[0])
    if value is not None:
        entry = _decode(value)
        if entry["instance_id"] == instance and entry["connection_id"] == argv[2].decode():
            call(b"HDEL", keys[0], argv[0])
    left = call(b"HVALS", keys[0])
    if not any(_decode(other)["instance_id"] == instance for other in left):
        call(b"SREM", keys[2], argv[5])
    if left:
        return 0
    if call(b"ZCARD", keys[3]) < int(argv[7]):
        call(b"ZADD", keys[3], argv[6], argv[5])
    call(b"SET", keys[1], argv[3], b"EX", argv[4])
    call(b"PUBLISH", keys[1], argv[3])
    return 1


def _refresh(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    gone = call(b"EXISTS", keys[0]) == 0
    for at in range(4, len(argv), 2):
        call(b"HSETNX", keys[0], argv[at], argv[at + 1])
    call(b"EXPIRE", keys[0], argv[1])
    call(b"SADD", keys[2], argv[3])
    call(b"EXPIRE", keys[2], argv[1])
    call(b"SET", keys[1], argv[0], b"EX", argv[2])
    if gone:
        call(b"PUBLISH", keys[1], argv[0])
    return 1


def _bury(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    if call(b"EXISTS", keys[0]) == 1:
        return -1
    for at, user in enumerate(argv[5:]):
        connections, presence = keys[5 + 2 * at], keys[6 + 2 * at]
        if call(b"SREM", keys[1], user) == 1:
            for field, value in call(b"HGETALL", connections).items():
                try:
                    mine = _decode(value)["instance_id"] == argv[0].decode()
                except msgspec.DecodeError:
                    mine = True
                if mine:
                    call(b"HDEL", connections, field)
            if call(b"EXISTS", connections) == 0:
                call(b"SET", presence, argv[1], b"EX", argv[3])
                call(b"PUBLISH", presence, argv[2])
                call(b"ZADD", keys[4], argv[4], user)
    left = call(b"SCARD", keys[1])
    if left == 0:
        call(b"DEL", keys[1], keys[2])
        call(b"SREM", keys[3], argv[0])
    return left


def _fill_session(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    if call(b"GET", keys[0]) == argv[0]:
        call(b"SET", keys[0], argv[1], b"EX", argv[2])


def _look_session(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    value = call(b"GET", keys[0])
    if value is None:
        call(b"SET", keys[0], argv[0], b"EX", argv[1])
    return value


def _hold_leases(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    held = []
    for key in keys:
        owner = call(b"GET", key)
        mine = owner is None or owner == argv[0]
        if mine:
            call(b"SET", key, argv[0], b"PX", argv[1])
        held.append(int(mine))
    return held


def _release_leases(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    for key in keys:
        if call(b"GET", key) == argv[0]:
            call(b"DEL", key)
    return len(keys)


def _push_inbox(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    at = 2
    for key in keys:
        count = int(argv[at])
        call(b"RPUSH", key, *argv[at + 1 : at + 1 + count])
        call(b"LTRIM", key, b"-%d" % int(argv[1]), b"-1")
        call(b"EXPIRE", key, argv[0])
        at += count + 1
    return len(keys)


def _settle(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    at = 1
    for key in keys:
        count = int(argv[at])
        if count > 0:
            call(b"XACK", key, argv[0], *argv[at + 1 : at + 1 + count])
        floor = argv[at + count + 1]
        if floor:
            with suppress(Refusal):
                floor = call(b"XPENDING", key, argv[0])[1] or floor
            call(b"XTRIM", key, b"MINID", b"~", floor)
        at += count + 2
    return len(keys)


def _tell(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    leases = int(argv[1])
    for key in keys[:leases]:
        owner = call(b"GET", key)
        if owner is not None and owner != argv[0]:
            return 0
    for key, record in zip(keys[leases:], argv[4:], strict=True):
        call(b"XADD", key, b"NOMKSTREAM", b"MAXLEN", b"~", argv[2], b"*", argv[3], record)
    return 1


def _spend(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    taken = int(call(b"GET", keys[0]) or b"0")
    if taken >= int(argv[0]):
        return max(1, call(b"PTTL", keys[0]))
    if call(b"INCR", keys[0]) == 1:
        call(b"EXPIRE", keys[0], argv[1])
    return 0


def _claim_push(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    due, claimed = keys
    for entry in call(b"ZRANGEBYSCORE", claimed, b"-inf", argv[0], b"LIMIT", b"0", argv[2]):
        call(b"ZREM", claimed, entry)
        call(b"ZADD", due, b"NX", argv[0], entry)
    taken = call(b"ZRANGEBYSCORE", due, b"-inf", argv[0], b"LIMIT", b"0", argv[2])
    for entry in taken:
        call(b"ZREM", due, entry)
        call(b"ZADD", claimed, argv[1], entry)
    return taken


def _finish_push(call: Call, keys: list[bytes], argv: list[bytes]) -> Any:
    due, claimed = keys
    count = int(argv[1])
    for entry in argv[2 : 2 + count]:
        if call(b"ZSCORE", claimed, entry) == float(argv[0]):
            call(b"ZREM", claimed, entry)
    for at in range(2 + count, len(argv), 2):
        call(b"ZADD", due, b"NX", argv[at], argv[at + 1])
    return 1


_TWINS: Final[dict[str, Any]] = {
    "attach": _attach,
    "detach": _detach,
    "refresh": _refresh,
    "bury": _bury,
    "claim_push": _claim_push,
    "finish_push": _finish_push,
    "fill_session": _fill_session,
    "look_session": _look_session,
    "hold_leases": _hold_leases,
    "release_leases": _release_leases,
    "push_inbox": _push_inbox,
    "settle": _settle,
    "spend": _spend,
    "tell": _tell,
}


def _load() -> dict[bytes, Any]:
    found = {}
    for package in (gateway, workers):
        for path in sorted((Path(package.__file__ or "").parent / "lua").glob("*.lua")):
            if path.stem not in _TWINS:
                raise NotTwinned(f"{path.name} has no twin in {__name__}")
            found[path.read_bytes()] = _TWINS[path.stem]
    return found


SCRIPTS: Final = _load()
"""Text of a script → its twin."""
