"""Are the servers fit for what is promised? Each condition becomes a finding in plain words, and what to do about it.

Called at start-up, where a bad finding refuses to start and a doubtful one is a warning in the log, and by the doctor,
who prints all of them (reliability.md section 10.5, "Start-up checks").
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from workers.inspection import RedisCondition
    from workers.store.condition import Condition

OLDEST_REDIS: Final = 7
"""XAUTOCLAIM and XTRIM MINID come with 6.2; trimmed entries leave the pending list since 7."""
LONGEST_SKEW_SECONDS: Final = 5.0
_FULL_SHARE: Final = 0.9


class Level(StrEnum):
    GOOD = "good"
    DOUBTFUL = "doubtful"
    BAD = "bad"


class Finding(msgspec.Struct, frozen=True):
    """`what`: one sentence. `advice`: what to do, where something is to be done."""

    subject: str
    level: Level
    what: str
    advice: str = ""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.what}; {self.advice}" if self.advice else self.what


def judge_redis(found: RedisCondition, shards: int) -> list[Finding]:
    """`shards`: the setting."""
    return [_version(found), _policy(found), _shards(found, shards), _persistence(found), _memory(found)]


def _version(found: RedisCondition) -> Finding:
    if found.major < OLDEST_REDIS:
        advice = f"version {OLDEST_REDIS} or newer is needed"
        return Finding("redis version", Level.BAD, f"Redis is version {found.version}", advice)
    return Finding("redis version", Level.GOOD, f"Redis is version {found.version}")


def _policy(found: RedisCondition) -> Finding:
    if found.policy != "noeviction":
        what = f"Redis has maxmemory-policy {found.policy}: it may evict a stream"
        return Finding("redis eviction", Level.BAD, what, "set noeviction")
    return Finding("redis eviction", Level.GOOD, "Redis evicts nothing (maxmemory-policy noeviction)")


def _shards(found: RedisCondition, shards: int) -> Finding:
    if found.shards not in (None, shards):
        what = f"TRIREME_SHARDS is {shards}, but this installation was started with {found.shards}"
        return Finding("redis shards", Level.BAD, what, f"set TRIREME_SHARDS={found.shards} everywhere")
    return Finding("redis shards", Level.GOOD, f"the ingest log has {shards} shards, as recorded")


def _persistence(found: RedisCondition) -> Finding:
    if not found.aof:
        what = "Redis writes no append-only file: what it has accepted and nobody has committed goes with it"
        advice = "clients send it again, so nothing acknowledged is lost; set appendonly yes to spare them that"
        return Finding("redis persistence", Level.DOUBTFUL, what, advice)
    if not found.aof_ok:
        what = "Redis cannot write its append-only file"
        return Finding("redis persistence", Level.DOUBTFUL, what, "look at its disk: it refuses writes meanwhile")
    return Finding("redis persistence", Level.GOOD, "Redis writes its append-only file")


def _memory(found: RedisCondition) -> Finding:
    if not found.max_memory_bytes:
        return Finding("redis memory", Level.GOOD, f"Redis uses {_mib(found.used_memory_bytes)}, without a bound")
    what = f"Redis uses {_mib(found.used_memory_bytes)} of {_mib(found.max_memory_bytes)}"
    if found.used_memory_bytes > found.max_memory_bytes * _FULL_SHARE:
        return Finding("redis memory", Level.DOUBTFUL, what, "when it is full it takes no messages: give it more")
    return Finding("redis memory", Level.GOOD, what)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def judge_mongodb(found: Condition) -> list[Finding]:
    """In the order in which one makes the next possible."""
    findings = [Finding("mongodb version", Level.GOOD, f"MongoDB is version {found.version}"), _replica_set(found)]
    if found.has_primary:
        findings += [_journal(found), _fences(found)]
    return [*findings, _clock(found)]


def _replica_set(found: Condition) -> Finding:
    if not found.is_replica_set:
        what = "MongoDB is not a replica set member: majority writes need one"
        return Finding("mongodb replica set", Level.BAD, what, "start it with --replSet and run rs.initiate()")
    if not found.has_primary:
        what = "the replica set has no primary that we reach"
        return Finding("mongodb replica set", Level.BAD, what, "look at rs.status(): a majority of it must be up")
    return Finding("mongodb replica set", Level.GOOD, "MongoDB is a replica set with a primary")


def _journal(found: Condition) -> Finding:
    if found.majority_journal is None:
        what = "we may not ask whether majority writes are journalled (replSetGetConfig)"
        return Finding("mongodb journal", Level.DOUBTFUL, what, "look for writeConcernMajorityJournalDefault: true")
    if not found.majority_journal:
        what = "writeConcernMajorityJournalDefault is false: a majority may forget what it has acknowledged"
        return Finding("mongodb journal", Level.BAD, what, "set it to true with rs.reconfig()")
    return Finding("mongodb journal", Level.GOOD, "majority writes are journalled")


def _fences(found: Condition) -> Finding:
    if found.unfenced:
        what = f"without a unique index: {'; '.join(found.unfenced)}"
        advice = "drop an index on these fields that is not unique, and start a worker: it makes them"
        return Finding("mongodb indexes", Level.BAD, what, advice)
    return Finding("mongodb indexes", Level.GOOD, "the unique indexes are there")


def _clock(found: Condition) -> Finding:
    """Nothing of the promise rests on clocks, so a wrong one is no reason to stay down."""
    skew = found.skew_seconds
    if abs(skew) >= LONGEST_SKEW_SECONDS:
        what = f"our clock and MongoDB's are {abs(skew):.1f} s apart (ours is {'ahead' if skew > 0 else 'behind'})"
        advice = "order and durability do not depend on it; times shown, tokens and expiry do: set the clocks (NTP)"
        return Finding("clocks", Level.DOUBTFUL, what, advice)
    return Finding("clocks", Level.GOOD, f"our clock and MongoDB's agree within {max(abs(skew), 0.001):.3f} s")
