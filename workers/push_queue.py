"""What is due to be looked at in Redis: one entry per (user, conversation), however much is said there meanwhile.

The ingest role adds entries (`unheard.py`), the push role takes them with a lease and finishes them. So whoever dies in
between loses none, and a burst is one entry. The times are epoch ms. Every function raises BrokerUnavailable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from protocol import codec, keys, records
from workers.broker import LUA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workers.broker import Broker

DUE_LIMIT: Final = 500_000
"""Entries that wait for a push role, about 60 MB; past it those that have waited longest go: nobody runs the role, or
too few do."""
JOBS_LIMIT: Final = 100_000
"""Push jobs that the stream keeps for those who read it."""
_AT_ONCE: Final = 1000
"""Entries per command: 100 KB, half a millisecond of Redis."""
_CLAIM: Final = (LUA / "claim_push.lua").read_bytes()
_FINISH: Final = (LUA / "finish_push.lua").read_bytes()


class Due(NamedTuple):
    """One entry. `device_id`: the only device that is still to be told, "" for all of the user's."""

    user_id: str
    conversation_id: str
    device_id: str = ""

    @property
    def entry(self) -> str:
        return keys.push_entry(*self)


async def add(broker: Broker, dues: Sequence[tuple[str, int]]) -> None:
    """Have somebody look at these entries at these times; those that wait already keep theirs."""
    if not dues:
        return
    for start in range(0, len(dues), _AT_ONCE):
        words: list[str | int] = []
        for entry, at_ms in dues[start : start + _AT_ONCE]:
            words += (at_ms, entry)
        await broker.command("ZADD", keys.PUSH_DUE, "NX", *words)
    await broker.command("ZREMRANGEBYRANK", keys.PUSH_DUE, 0, -DUE_LIMIT - 1)


async def claim(broker: Broker, now_ms: int, lease_ms: int, count: int) -> list[Due]:
    """At most `count` that are due, the caller's until `lease_ms`."""
    taken = await broker.command(
        "EVAL", _CLAIM, 2, keys.PUSH_DUE, keys.PUSH_CLAIMED, now_ms, lease_ms, count
    )  # fmt: skip
    return [Due(*entry.decode().split(" ")) for entry in taken]


async def finish(broker: Broker, done: Sequence[Due], lease_ms: int, again: Mapping[Due, int]) -> None:
    """Let these go that were claimed until `lease_ms`; `again` are looked at then. Whose lease has ended meanwhile is
    somebody else's."""
    argv: list[str | int] = [lease_ms, len(done), *(due.entry for due in done)]
    for due, at_ms in again.items():
        argv += (at_ms, due.entry)
    await broker.command("EVAL", _FINISH, 2, keys.PUSH_DUE, keys.PUSH_CLAIMED, *argv)


async def waiting(broker: Broker) -> int:
    """How many entries there are that nobody has in hand."""
    return int(await broker.command("ZCARD", keys.PUSH_DUE))


async def overdue(broker: Broker, before_ms: int) -> int:
    """How many should have been looked at before then, and were not."""
    return int(await broker.command("ZCOUNT", keys.PUSH_DUE, "-inf", before_ms))


async def announce(broker: Broker, user_id: str, job: records.PushJob) -> None:
    """Tell whoever listens: the stream first, then the channel, where it is lost if nobody does."""
    value = codec.encode_value(job)
    await broker.command(
        "XADD", keys.NOTIFICATIONS, "MAXLEN", "~", JOBS_LIMIT, "*",
        keys.FIELD, value, keys.NOTIFICATION_USER_FIELD, user_id,
    )  # fmt: skip
    await broker.command("PUBLISH", keys.notification_channel(user_id), value)
