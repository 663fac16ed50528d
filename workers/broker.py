"""The Redis side of every worker role: the only module here that imports redis.

Called by the roles with records and plain values; never decides anything. Keys come from `protocol.keys`, scripts from
`lua/`.

*Raises*: `BrokerUnavailable` where Redis cannot be reached or refuses for a reason that passes; `GroupMissing` where a
consumer group is gone, so Redis came back empty. *Cancellation*: a cancelled command closes its pooled connection, so
no reply can reach the next caller.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from protocol import codec, keys, records
from protocol.models import Presence, UserStatus
from workers.breaker import Breaker, BreakerOpen, guarded
from workers.entries import StreamEntry, entries_of
from workers.invalidations import invalidations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from protocol.events import Outgoing
    from workers.fence import Fence

LUA = Path(__file__).parent / "lua"
_CLOSED_TRANSPORT = "the handler is closed"
"""How uvloop says that a connection ended between two writes of redis-py, which passes it on as it is."""
DOWN_LIMIT = 100_000
"""Most entries a down stream keeps when its instance has stopped reading but not yet lost its lease (10 s)."""
QUERY_LIMIT = 10_000
EVENTS_LIMIT = 100_000
"""Events the stream keeps for those who read it; the outbox has what nobody confirmed."""
COMMAND_SECONDS = 5.0
"""Deadline of a command that does not block."""
BURIED_AT_ONCE = 200
"""Users taken off a dead gateway per call: 2 ms of Redis."""
BREAKER_FAILURES = 5
BREAKER_OPEN_SECONDS = 10.0
"""Reliability.md section 11."""
_CLAIM_SECONDS = 10
"""Longer than the two reads behind a session cache entry take."""
_HOLD_SECONDS = 30
"""Longer than any write to MongoDB takes."""


class BrokerUnavailable(Exception):
    """Redis is away, loading, full or failing over: try again later."""


class GroupMissing(Exception):
    """The stream or its consumer group does not exist: Redis came back empty."""


class Settlement(NamedTuple):
    """What a lane has finished in one shard: ids to acknowledge, and the lowest id that must stay in the stream."""

    shard: int
    entry_ids: list[bytes]
    floor: bytes


@asynccontextmanager
async def open_broker(url: str) -> AsyncIterator[Broker]:
    """Connect lazily to Redis at `url`; closes its pool on exit."""
    client = redis.asyncio.Redis.from_url(
        url,
        # No silent second try: an append must not be repeated, and a listener that reconnects is no longer tracked to.
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
        protocol=2,
        socket_connect_timeout=2.0,
        max_connections=256,
        health_check_interval=0,
    )
    try:
        yield Broker(client)
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await client.aclose()


@contextmanager
def _passing_errors() -> Iterator[None]:
    """Name Redis' passing failures. Of a request its breaker hears of them, and says when it need not be tried."""
    breakers = guarded()
    if breakers is None:
        with _named_errors():
            yield
        return
    try:
        breakers.redis.admit()
    except BreakerOpen:
        raise BrokerUnavailable("Redis was away lately") from None
    try:
        with _named_errors():
            yield
    except BrokerUnavailable:
        breakers.redis.failed()
        raise
    breakers.redis.succeeded()


_NO_LISTENER = "The client ID you want redirect to"
"""Who was to hear of changes is gone: Redis was restarted between two commands, say."""


@contextmanager
def _named_errors() -> Iterator[None]:
    """Unreachable, out of memory, busy, loading, failing over: BrokerUnavailable."""
    try:
        yield
    except RuntimeError as error:
        if _CLOSED_TRANSPORT not in str(error):
            raise
        raise BrokerUnavailable(str(error)[:200]) from error
    except redis.exceptions.ResponseError as error:
        text = str(error)
        if text.startswith("NOGROUP") or "requires the key to exist" in text or "no such key" in text:
            raise GroupMissing(text) from error
        if isinstance(error, redis.exceptions.OutOfMemoryError) or text.startswith(
            ("OOM", "LOADING", "BUSY ", "READONLY", "MISCONF", "UNBLOCKED", "MASTERDOWN", "NOREPLICAS", _NO_LISTENER)
        ):
            raise BrokerUnavailable(text) from error
        raise
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError, TimeoutError) as error:
        raise BrokerUnavailable(str(error) or type(error).__name__) from error


class Broker:
    """Every Redis command of the workers. `client` is for tests and for the registry's own connection."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client = client
        self.breaker = Breaker("redis", BREAKER_FAILURES, BREAKER_OPEN_SECONDS)
        """For requests only: see `breaker.guarding`."""
        for command in ("XREADGROUP", "XREAD", "XRANGE", "XPENDING"):
            client.set_response_callback(command, _as_it_comes)
        # One name for the library's untyped method.
        self._execute: Callable[..., Awaitable[Any]] = client.execute_command
        self._settle = client.register_script((LUA / "settle.lua").read_bytes())
        self._tell = client.register_script((LUA / "tell.lua").read_bytes())
        self._hold = client.register_script((LUA / "hold_leases.lua").read_bytes())
        self._release = client.register_script((LUA / "release_leases.lua").read_bytes())
        self._spend = client.register_script((LUA / "spend.lua").read_bytes())
        self._look_session = client.register_script((LUA / "look_session.lua").read_bytes())
        self._fill_session = client.register_script((LUA / "fill_session.lua").read_bytes())
        self._bury = client.register_script((LUA / "bury.lua").read_bytes())
        self._push_inbox = client.register_script((LUA / "push_inbox.lua").read_bytes())

    async def command(self, *args: Any) -> Any:
        """One command that does not block, for the rooms beside this one; its reply as it comes."""
        return await self._run(*args)

    async def _run(self, *args: Any) -> Any:
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                return await self._execute(*args)

    # --- start-up ----------------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        """Raises BrokerUnavailable while Redis does not answer."""
        await self._run("PING")

    async def agree_shards(self, shards: int) -> int:
        """Record the shard count at the first start; returns the count on record, which the caller must compare."""
        await self._run("SET", keys.SHARDS, shards, "NX")
        if (stored := await self._run("GET", keys.SHARDS)) is None:
            raise BrokerUnavailable("emptied between two commands")
        return int(stored)

    # --- ingest ------------------------------------------------------------------------------------------------------

    async def append_ingest(self, shard: int, record: records.IngestRecord) -> None:
        """Append a record to its shard."""
        await self._run("XADD", keys.ingest(shard), "*", keys.FIELD, codec.encode_record(record))

    async def append_replay(self, shard: int, payload: bytes, letter_id: str) -> None:
        """Append what a dead letter holds to its shard again, byte for byte."""
        await self._run("XADD", keys.ingest(shard), "*", keys.FIELD, payload, keys.LETTER_FIELD, letter_id.encode())

    async def create_ingest_groups(self, shards: Iterable[int]) -> bool:
        """Make stream and group of each shard where they are missing; the group starts at the stream's beginning. Was
        one missing?"""
        made = [await self.create_group(keys.ingest(shard), keys.INGEST_GROUP) for shard in shards]
        return any(made)

    async def create_group(self, stream: str, group: str, start: str = "0") -> bool:
        """Make a group, and its stream, where they are missing. Was it?"""
        try:
            await self._run("XGROUP", "CREATE", stream, group, start, "MKSTREAM")
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
            return False
        return True

    async def read_ingest(self, shards: Sequence[int], count: int, block_ms: int | None) -> list[StreamEntry]:
        """New entries of these shards, at most `count` per shard, waiting up to `block_ms` for the first; None: not at
        all."""
        streams = [keys.ingest(shard) for shard in shards]
        with _passing_errors():
            # The client's own deadline: a blocking read must not hang when its connection dies silently.
            with anyio.move_on_after((block_ms or 0) / 1000 + 2) as scope:
                reply = await self._execute(
                    "XREADGROUP", "GROUP", keys.INGEST_GROUP, keys.INGEST_CONSUMER, "COUNT", count,
                    *(() if block_ms is None else ("BLOCK", block_ms)), "STREAMS", *streams, *[">"] * len(streams),
                )  # fmt: skip
            if scope.cancelled_caught:
                raise BrokerUnavailable("blocking read got no answer")
        return entries_of(reply)

    async def read_pending(self, shard: int, after: bytes, count: int) -> list[StreamEntry]:
        """Entries of a shard that its previous owner read and did not acknowledge, after an id (b"0" for all)."""
        reply = await self._run(
            "XREADGROUP", "GROUP", keys.INGEST_GROUP, keys.INGEST_CONSUMER,
            "COUNT", count, "STREAMS", keys.ingest(shard), after,
        )  # fmt: skip
        return entries_of(reply)

    async def publish_and_settle(
        self,
        down: Mapping[str, list[records.DownItem]],
        settlements: Sequence[Settlement],
        decided: Mapping[int, Sequence[bytes]],
        outgoing: Sequence[Outgoing] = (),
        fence: Fence | None = None,
    ) -> None:
        """Append one record per instance, then acknowledge and trim: publishing comes first on the same connection.

        What replaces what was told before, as receipts do, needs a `fence`; an entry of a log has its place whoever
        tells it.

        Only what is `decided` without a trace (shard → entry ids) is acknowledged before it is told, so that no later
        owner decides it otherwise; an outcome that is lost so is asked for again.

        A publish that Redis refuses is not repeated here: acks are asked for again by clients, pushes repaired by the
        sweep, events found in the outbox.
        """
        with _passing_errors():
            async with self.client.pipeline(transaction=False) as pipe:
                for shard, entry_ids in decided.items():
                    pipe.execute_command("XACK", keys.ingest(shard), keys.INGEST_GROUP, *entry_ids)
                if fence is not None and down:
                    stream_keys, argv = fence.arguments(down, DOWN_LIMIT)
                    await self._tell(keys=stream_keys, args=argv, client=pipe)
                else:
                    for instance_id, items in down.items():
                        pipe.execute_command(*_down_command(instance_id, codec.encode_down(items)))
                for item in outgoing:
                    pipe.execute_command(*_event_command(item))
                if settlements:
                    stream_keys, argv = _settle_arguments(settlements)
                    await self._settle(keys=stream_keys, args=argv, client=pipe)
                with anyio.fail_after(COMMAND_SECONDS):
                    await pipe.execute(raise_on_error=False)

    # --- down --------------------------------------------------------------------------------------------------------

    async def publish_down(self, instance_id: str, items: list[records.DownItem]) -> None:
        """One record for one instance; dropped where its stream is gone."""
        await self._run(*_down_command(instance_id, codec.encode_down(items)))

    async def create_down(self, instance_id: str) -> None:
        """Make an instance's own stream, so that others' records are kept."""
        await self._run("XADD", keys.down(instance_id), "*", keys.FIELD, codec.encode_down([]))

    async def read_down(self, instance_id: str, last_id: bytes, block_ms: int) -> list[tuple[bytes, bytes]]:
        """(entry id, encoded items) after `last_id`, waiting up to `block_ms`."""
        with _passing_errors():
            with anyio.move_on_after(block_ms / 1000 + 2) as scope:
                reply = await self._execute(
                    "XREAD", "COUNT", 100, "BLOCK", block_ms, "STREAMS", keys.down(instance_id), last_id
                )
            if scope.cancelled_caught:
                raise BrokerUnavailable("blocking read got no answer")
        return [(entry_id, fields[1]) for _, entries in reply or () for entry_id, fields in entries]

    async def trim_down(self, instance_id: str, min_id: bytes) -> None:
        """Drop what the instance has read."""
        await self._run("XTRIM", keys.down(instance_id), "MINID", min_id)

    # --- query -------------------------------------------------------------------------------------------------------

    async def append_query(self, query: records.Query) -> None:
        """Append a query for any worker; the stream is capped, since a lost query is asked again."""
        await self._run("XADD", keys.QUERY, "MAXLEN", "~", QUERY_LIMIT, "*", keys.FIELD, codec.encode_record(query))

    async def read_queries(self, consumer: str, count: int, block_ms: int) -> list[bytes]:
        """Encoded queries nobody else has read. Without acknowledgement: a worker that dies leaves them to be asked
        again.
        """
        try:
            with _passing_errors():
                with anyio.move_on_after(block_ms / 1000 + 2) as scope:
                    reply = await self._execute(
                        "XREADGROUP", "GROUP", keys.QUERY_GROUP, consumer,
                        "COUNT", count, "BLOCK", block_ms, "NOACK", "STREAMS", keys.QUERY, ">",
                    )  # fmt: skip
                if scope.cancelled_caught:
                    raise BrokerUnavailable("blocking read got no answer")
        except GroupMissing:
            await self.create_group(keys.QUERY, keys.QUERY_GROUP)
            return []
        return [fields[1] for _, entries in reply or () for _, fields in entries]

    # --- events ------------------------------------------------------------------------------------------------------

    async def append_events(self, outgoing: Sequence[Outgoing]) -> None:
        """Append them again: the stream lost them, or whoever read them died."""
        with _passing_errors():
            async with self.client.pipeline(transaction=False) as pipe:
                for item in outgoing:
                    pipe.execute_command(*_event_command(item))
                with anyio.fail_after(COMMAND_SECONDS):
                    await pipe.execute()

    async def read_events(self, consumer: str, count: int, block_ms: int) -> list[tuple[str, bytes]]:
        """(message id, CloudEvent) that no other process of the events role has read. Without acknowledgement: what a
        process does not confirm is found in the outbox."""
        try:
            with _passing_errors():
                with anyio.move_on_after(block_ms / 1000 + 2) as scope:
                    reply = await self._execute(
                        "XREADGROUP", "GROUP", keys.EVENTS_GROUP, consumer,
                        "COUNT", count, "BLOCK", block_ms, "NOACK", "STREAMS", keys.EVENTS, ">",
                    )  # fmt: skip
                if scope.cancelled_caught:
                    raise BrokerUnavailable("blocking read got no answer")
        except GroupMissing:
            await self.create_group(keys.EVENTS, keys.EVENTS_GROUP)
            return []
        return [(fields[3].decode(), fields[1]) for _, entries in reply or () for _, fields in entries]

    # --- leases, instances, registry, inbox --------------------------------------------------------------------------

    async def hold_leases(
        self, worker_id: str, shards: Sequence[int], lease: Callable[[int], str] = keys.lease
    ) -> list[int]:
        """Take or renew; returns the shards the worker holds now for `keys.LEASE_TTL_MS` more."""
        if not shards:
            return []
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                held = await self._hold(keys=[lease(shard) for shard in shards], args=[worker_id, keys.LEASE_TTL_MS])
        return [shard for shard, mine in zip(shards, held, strict=True) if mine]

    async def free_leases(self, shards: Sequence[int], lease: Callable[[int], str] = keys.lease) -> list[int]:
        """Which of these shards nobody holds."""
        return [shard for shard, owner in await self._owners(shards, lease) if owner is None]

    async def foreign_leases(self, worker_id: str, shards: Sequence[int]) -> list[int]:
        """Which of these shards somebody else holds."""
        mine = (None, worker_id.encode())
        return [shard for shard, owner in await self._owners(shards) if owner not in mine]

    async def _owners(
        self, shards: Sequence[int], lease: Callable[[int], str] = keys.lease
    ) -> list[tuple[int, bytes | None]]:
        if not shards:
            return []
        return list(zip(shards, await self._run("MGET", *map(lease, shards)), strict=True))

    async def release_leases(
        self, worker_id: str, shards: Sequence[int], lease: Callable[[int], str] = keys.lease
    ) -> None:
        """Give up what is still this worker's."""
        if shards:
            with _passing_errors():
                await self._release(keys=[lease(shard) for shard in shards], args=[worker_id])

    async def renew_instance(self, instance_id: str, info: records.InstanceInfo) -> None:
        """Say that this instance lives, for `keys.INSTANCE_TTL_SECONDS`."""
        await self._run("SET", keys.instance(instance_id), codec.encode_value(info), "EX", keys.INSTANCE_TTL_SECONDS)
        await self._run("SADD", keys.INSTANCES, instance_id)

    async def remove_instance(self, instance_id: str) -> None:
        """Forget an instance and its stream."""
        await self._run("DEL", keys.instance(instance_id), keys.down(instance_id))
        await self._run("SREM", keys.INSTANCES, instance_id)

    async def live_instances(self) -> dict[str, records.InstanceInfo]:
        """Instance id → info of all whose lease lives."""
        leases = await self._leases()
        return {name: codec.decode_instance(value) for name, value in leases.items() if value is not None}

    async def dead_instances(self) -> list[str]:
        """Those that are listed and whose lease has ended."""
        return [name for name, value in (await self._leases()).items() if value is None]

    async def _leases(self) -> dict[str, bytes | None]:
        names = [name.decode() for name in await self._run("SMEMBERS", keys.INSTANCES)]
        if not names:
            return {}
        return dict(zip(names, await self._run("MGET", *[keys.instance(name) for name in names]), strict=True))

    async def bury(self, instance_id: str, died_ms: int) -> int:
        """Take some users off a dead instance, and with the last of them all that was its own.

        Returns how many are left, -1 when it lives after all.
        """
        user_ids = await self._run("SRANDMEMBER", keys.users(instance_id), BURIED_AT_ONCE)
        names = [user_id.decode() for user_id in user_ids]
        own = [keys.instance(instance_id), keys.users(instance_id), keys.down(instance_id), keys.INSTANCES, keys.SEEN]
        for name in names:
            own += (keys.connection(name), keys.presence(name))
        shown = codec.encode_value(Presence(status=UserStatus.OFFLINE, last_seen=died_ms))
        change = codec.encode_value(records.PresenceChange(UserStatus.OFFLINE, died_ms, settled=True))
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                left = await self._bury(
                    keys=own, args=[instance_id, shown, change, keys.PRESENCE_TTL_SECONDS, died_ms, *names]
                )
        return int(left)

    async def presences(self, user_ids: Sequence[str]) -> dict[str, Presence]:
        """How these users are; those of whom nothing is known are left out."""
        if not user_ids:
            return {}
        values = await self._run("MGET", *[keys.presence(user_id) for user_id in user_ids])
        return {
            user_id: codec.decode_presence(value)
            for user_id, value in zip(user_ids, values, strict=True)
            if value is not None
        }

    async def take_seen(self, count: int) -> list[str]:
        """Users who came or went, the earliest first; they are the caller's now."""
        return [name.decode() for name, _ in await self._run("ZPOPMIN", keys.SEEN, count)]

    async def locate(self, user_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """User → ids of the instances that hold its connections, one per device (empty: offline)."""
        with _passing_errors():
            async with self.client.pipeline(transaction=False) as pipe:
                for user_id in user_ids:
                    pipe.execute_command("HVALS", keys.connection(user_id))
                with anyio.fail_after(COMMAND_SECONDS):
                    replies = await pipe.execute()
        return {
            user_id: tuple(codec.decode_registry(value).instance_id for value in reply)
            for user_id, reply in zip(user_ids, replies, strict=True)
        }

    async def push_inbox(self, inboxes: Mapping[str, list[str]]) -> None:
        """Remember undelivered message ids for users who are offline."""
        argv: list[Any] = [keys.INBOX_TTL_SECONDS, keys.INBOX_LIMIT]
        for ids in inboxes.values():
            argv += [len(ids), *ids]
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                await self._push_inbox(keys=[keys.inbox(user_id) for user_id in inboxes], args=argv)

    async def read_inbox(self, user_id: str, count: int) -> list[str]:
        """The oldest `count` ids of a user's inbox."""
        return [name.decode() for name in await self._run("LRANGE", keys.inbox(user_id), 0, count - 1)]

    async def forget_inbox(self, user_id: str) -> None:
        """Nobody will come for it."""
        await self._run("DEL", keys.inbox(user_id))

    async def drop_from_inbox(self, delivered: Mapping[str, list[str]]) -> None:
        """Remove message ids that were delivered."""
        with _passing_errors():
            async with self.client.pipeline(transaction=False) as pipe:
                for user_id, ids in delivered.items():
                    for message_id in ids:
                        pipe.execute_command("LREM", keys.inbox(user_id), 1, message_id)
                with anyio.fail_after(COMMAND_SECONDS):
                    await pipe.execute()

    # --- session cache -----------------------------------------------------------------------------------------------

    async def look_session(self, user_id: str, claim: str) -> bytes | None:
        """The cached value; no JSON: a claim or hold. None: nothing was there, and now `claim` is."""
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                found: bytes | None = await self._look_session(
                    keys=[keys.session(user_id)], args=[claim, _CLAIM_SECONDS]
                )
        return found

    async def fill_session(self, user_id: str, claim: str, value: bytes) -> None:
        """Cache what was read since `claim` was placed, unless something changed meanwhile."""
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                await self._fill_session(keys=[keys.session(user_id)], args=[claim, value, keys.SESSION_TTL_SECONDS])

    async def hold_session(self, user_id: str) -> None:
        """Nobody reads or fills the cache while the truth changes; for 30 s, should `drop_session` never come."""
        await self._run("SET", keys.session(user_id), "hold", "EX", _HOLD_SECONDS)

    async def drop_session(self, user_id: str) -> None:
        """What was cached, held or claimed is void."""
        await self._run("DEL", keys.session(user_id))

    async def connected_devices(self, user_id: str) -> list[str]:
        """The devices of a user that are in the registry."""
        return [name.decode() for name in await self._run("HKEYS", keys.connection(user_id))]

    async def last_seen(self, user_id: str) -> bytes | None:
        """The encoded `Presence` of a user, while Redis remembers it."""
        found: bytes | None = await self._run("GET", keys.presence(user_id))
        return found

    async def look(self, command: str, *args: str | bytes | int) -> Any:
        """A command that only reads, answered as Redis says it: for the audit."""
        return await self._run(command, *args)

    # --- pub/sub and allowances --------------------------------------------------------------------------------------

    async def signal_user(self, user_id: str, signal: records.UserSignal) -> None:
        """Tell the gateways that hold this user's connections. Lost where there are none."""
        await self._run("PUBLISH", keys.user_channel(user_id), codec.encode_value(signal))

    async def notify_user(self, user_id: str, tell: records.Tell) -> None:
        """A frame for a user's devices that are online, outside any conversation."""
        await self._run("PUBLISH", keys.notification_channel(user_id), codec.encode_value(tell))

    async def publish_presence(self, user_id: str, change: records.PresenceChange) -> None:
        """Tell the gateways where somebody watches this user."""
        await self._run("PUBLISH", keys.presence(user_id), codec.encode_value(change))

    async def spend(self, purpose: str, subject: str, limit: int, window_seconds: int) -> float:
        """Take one of `limit` per window → 0.0, or the seconds until the window ends (nothing is taken then).

        The window begins with its first use and does not slide.
        """
        with _passing_errors():
            with anyio.fail_after(COMMAND_SECONDS):
                wait_ms = await self._spend(keys=[keys.allowance(purpose, subject)], args=[limit, window_seconds])
        return int(wait_ms) / 1000

    @asynccontextmanager
    async def registry_changes(self) -> AsyncIterator[AsyncIterator[list[str] | None]]:
        """Server-assisted invalidation: yields the users whose `connection:{user_id}` changed, None for "anything may
        have".

        One connection listens on `__redis__:invalidate`, another tracks the key prefix in broadcast mode and redirects
        to it (https://valkey.io/topics/client-side-caching/). Raises BrokerUnavailable when either breaks: the caller
        forgets all it cached.
        """
        with _passing_errors():
            async with invalidations(self.client, keys.CONNECTION_PREFIX) as changes:
                yield changes


def _as_it_comes(response: Any, **options: Any) -> Any:
    return response


def _down_command(instance_id: str, payload: bytes) -> tuple[Any, ...]:
    return ("XADD", keys.down(instance_id), "NOMKSTREAM", "MAXLEN", "~", DOWN_LIMIT, "*", keys.FIELD, payload)


def _event_command(item: Outgoing) -> tuple[Any, ...]:
    event = codec.encode_value(item.event)
    limit = ("MAXLEN", "~", EVENTS_LIMIT)
    return ("XADD", keys.EVENTS, *limit, "*", keys.FIELD, event, keys.EVENT_MESSAGE_FIELD, item.message_id)


def _settle_arguments(settlements: Sequence[Settlement]) -> tuple[list[str], list[Any]]:
    stream_keys = []
    argv: list[Any] = [keys.INGEST_GROUP]
    for shard, entry_ids, floor in settlements:
        stream_keys.append(keys.ingest(shard))
        argv += [len(entry_ids), *entry_ids, floor]
    return stream_keys, argv
