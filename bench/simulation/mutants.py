"""Bugs of real systems (reliability.md section 10.6), each as a small change of the product for as long as a context
lasts.

A simulator that does not find them within a bounded number of seeds proves nothing by finding nothing in the product:
`tests/bench/test_mutants.py` holds it to that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import anyio
import anyio.lowlevel
import msgspec
from pymongo import WriteConcern
from pymongo.errors import BulkWriteError, PyMongoError
from pymongo.read_concern import ReadConcern

import workers.store
from bench.simulation import replica_set
from bench.simulation.valkey import SERVER
from gateway.broker import RedisBroker
from gateway.sweep import HeadSweep
from protocol import codec, frames, keys, records
from protocol.models import MessageStatus
from workers.broker import Broker, BrokerUnavailable, Settlement
from workers.commit import Committer
from workers.consumer import Lane
from workers.plan import Planner
from workers.store import messages as store_messages
from workers.store.conversations import ConversationStore
from workers.store.indexes import SCOPED_KEY_INDEX, SEQUENCE_INDEX
from workers.store.messages import Found, MessageStore, OutcomeUnknown, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

_LOCAL: Final = ReadConcern("local")


@contextmanager
def _ack_on_xadd() -> Iterator[None]:
    """The gateway acknowledges what the stream has taken."""
    published = RedisBroker._published

    def ack(self: RedisBroker, record: Any, reply: Any) -> None:
        published(self, record, reply)
        if type(reply) is bytes and isinstance(record, records.SendMessage):
            payload = frames.MessageAckPayload(
                message_id="msg_" + reply.hex()[:26],
                sequence_number=1,
                status=MessageStatus.SENT,
                timestamp=record.timestamp,
                conversation_id=record.conversation_id,
                idempotency_key=record.idempotency_key,
            )
            frame = frames.MessageAck(client_message_id=record.client_message_id, payload=payload)
            item = records.Outcome(record.connection, record.idempotency_key, codec.JSON.encode(frame))
            self._receiver.route([item])

    with patch.object(RedisBroker, "_published", ack):
        yield


@contextmanager
def _cache_before_message() -> Iterator[None]:
    """The idempotency record is written first, and believed."""
    append = MessageStore.append

    async def cache_and_append(self: MessageStore, documents: Any) -> None:
        for document in documents:
            name = "cache:" + ":".join(document[part] for part in _KEY)
            try:
                cached = {"$setOnInsert": {"document": document}}
                await _cache(self).update_one({"_id": name}, cached, upsert=True)
            except PyMongoError as error:
                raise OutcomeUnknown(str(error)) from error
        await append(self, documents)

    async def find_cached(self: MessageStore, wanted: Any) -> dict[Any, Found]:
        names = {"cache:" + ":".join(key): key for key in wanted}
        try:
            found = await _cache(self).find({"_id": {"$in": list(names)}}).to_list()
        except PyMongoError as error:
            raise OutcomeUnknown(str(error)) from error
        return {names[one["_id"]]: _found(one["document"]) for one in found}

    with patch.object(MessageStore, "append", cache_and_append), patch.object(MessageStore, "find_keys", find_cached):
        yield


_KEY: Final = ("conversation_id", "sender_id", "idempotency_key")


def _cache(store: MessageStore) -> Any:
    """A collection of its own: the auditor knows what `idempotency_keys` holds."""
    handle: Any = store._keys
    return type(handle)(handle._client, "key_cache", handle._write_concern, handle._read_concern)


def _found(document: dict[str, Any]) -> Found:
    return Found(
        document["_id"],
        document["sequence_number"],
        document["countable"],
        document["created_at"],
        fingerprint(document),
        as_sent=True,
        deleted=False,
    )


@contextmanager
def _numbers_from(take: Callable[[Committer, str, int], Any]) -> Iterator[None]:
    """Sequence numbers come from a counter that is raised first; `take` raises it and says where it stands."""
    plan = Committer._plan

    async def take_and_plan(self: Committer, batch: Any, look_up: bool, now_ms: int) -> Any:
        await self._conversations.load({entry.conversation_id: entry.shard for entry in batch})
        for name, count in Counter(entry.conversation_id for entry in batch).items():
            owned = self._conversations.get(name)
            if owned is not None:
                try:
                    owned.last = await take(self, name, count) - count
                except PyMongoError as error:
                    raise OutcomeUnknown(str(error)) from error
        return await plan(self, batch, look_up, now_ms)

    with patch.object(Committer, "_plan", take_and_plan):
        yield


def _inc_counter_then_insert() -> AbstractContextManager[None]:
    """`$inc` in MongoDB, then the insert."""

    async def take(self: Committer, name: str, count: int) -> int:
        counters: Any = self._store.db["counters"]
        after = await counters.find_one_and_update({"_id": name}, {"$inc": {"n": count}}, upsert=True)
        return int(after["n"])

    return _numbers_from(take)


def _redis_incr_sequence() -> AbstractContextManager[None]:
    """`INCR` in Redis, then the insert."""

    async def take(_self: Committer, name: str, count: int) -> int:
        await anyio.sleep(0.001)
        space = SERVER.get().keyspace
        return int([space.execute(b"INCR", [b"counter:" + name.encode()]) for _ in range(count)][-1])

    return _numbers_from(take)


@contextmanager
def _new_message_id_on_retry() -> Iterator[None]:
    """A repeat is found, and acknowledged under an id of its own."""
    known = Planner._known

    def rename(self: Planner, key: Any, plan: Any) -> Any:
        found = known(self, key, plan)
        if found is None:
            return None
        return msgspec.structs.replace(found, message_id=keys.new_message_id(found.created_ms, next(self._entropy), 0))

    with patch.object(Planner, "_known", rename):
        yield


@contextmanager
def _without_index(name: str) -> Iterator[None]:
    """The database does not judge."""
    indexes = replica_set.unique_indexes

    def fewer() -> dict[str, list[replica_set.UniqueIndex]]:
        return {collection: [one for one in found if one.name != name] for collection, found in indexes().items()}

    with patch.object(replica_set, "unique_indexes", fewer):
        yield


@contextmanager
def _pipelined_batches() -> Iterator[None]:
    """The next batch of a conversation does not wait for the one before."""

    async def write_loop(self: Any) -> None:
        async with anyio.create_task_group() as group:
            while True:
                while not self._queue:
                    if self._stopping:
                        return
                    self._queued = anyio.Event()
                    await self._queued.wait()
                batch = self._next_batch()[:1]
                self._room.set()
                group.start_soon(finish, self, batch)
                await anyio.lowlevel.checkpoint()

    async def finish(self: Any, batch: Any) -> None:
        down: Any = defaultdict(list)
        for plan in await self._commit(batch):
            await self._deliver(plan, down)
        for entry in batch:
            self.done(entry.shard, entry.entry_id)
        await self.publish_and_settle(down, {})
        self._to_tell.set()

    def next_batch(self: Any) -> Any:
        return [self._queue.popleft()]

    with patch.object(Lane, "_write_loop", write_loop), patch.object(Lane, "_next_batch", next_batch):
        yield


@contextmanager
def _ack_at_w1() -> Iterator[None]:
    """The primary's word is enough."""
    with patch.object(workers.store, "WRITE_CONCERN", WriteConcern(1)):
        yield


@contextmanager
def _unordered_bulk() -> Iterator[None]:
    """A batch goes on behind an error."""

    async def append(self: MessageStore, documents: Any) -> None:
        try:
            await self._messages.insert_many(documents, ordered=False)
        except BulkWriteError as error:
            raise store_messages._classify(error) from error
        except PyMongoError as error:
            raise OutcomeUnknown(str(error)) from error

    with patch.object(MessageStore, "append", append):
        yield


@contextmanager
def _no_resync() -> Iterator[None]:
    """Nobody compares heads, and a repeat is told to its sender alone."""
    with (
        patch.object(HeadSweep, "due_queries", lambda _self, _now: iter(())),
        patch.object(Planner, "_tell_again", staticmethod(lambda *_: None)),
    ):
        yield


@contextmanager
def _publish_after_xack() -> Iterator[None]:
    """Acknowledged first, told afterwards."""
    publish = Broker.publish_and_settle

    async def settle_first(self: Broker, down: Any, settlements: Any, decided: Any, *rest: Any, **more: Any) -> None:
        await publish(self, {}, settlements, decided)
        await publish(self, down, [], {}, *rest, **more)

    with ExitStack() as stack:
        stack.enter_context(_no_resync())
        stack.enter_context(patch.object(Broker, "publish_and_settle", settle_first))
        yield


@contextmanager
def _pubsub_only() -> Iterator[None]:
    """What is told while a gateway is not listening is lost, as on a channel."""
    publish = Broker.publish_and_settle

    async def publish_to_listeners(self: Broker, down: Any, *rest: Any, **more: Any) -> None:
        server = SERVER.get()
        listening = {key for blocked in server._blocked for key in blocked.keys}
        heard = {name: items for name, items in down.items() if keys.down(name).encode() in listening}
        await publish(self, heard, *rest, **more)

    with ExitStack() as stack:
        stack.enter_context(_no_resync())
        stack.enter_context(patch.object(Broker, "publish_and_settle", publish_to_listeners))
        yield


@contextmanager
def _dedupe_by_local_read() -> Iterator[None]:
    """A repeat is what the primary alone has."""
    find = MessageStore.find_keys

    async def find_local(self: MessageStore, wanted: Any) -> Any:
        handle = self._messages
        self._messages = handle.with_options(read_concern=_LOCAL)
        try:
            return await find(self, wanted)
        finally:
            self._messages = handle

    with patch.object(MessageStore, "find_keys", find_local):
        yield


@contextmanager
def _take_over_by_local_read() -> Iterator[None]:
    """The end of a log is what the primary alone has."""
    begin = ConversationStore.__init__

    def begin_local(self: ConversationStore, database: Any) -> None:
        begin(self, database)
        self._messages = self._messages.with_options(read_concern=_LOCAL)

    with patch.object(ConversationStore, "__init__", begin_local):
        yield


@contextmanager
def _xack_before_insert() -> Iterator[None]:
    """Acknowledged when it is taken, written afterwards."""
    commit = Lane._commit

    async def settle_and_commit(self: Any, batch: Any) -> Any:
        shards: dict[int, list[bytes]] = defaultdict(list)
        for entry in batch:
            shards[entry.shard].append(entry.entry_id)
        settlements = [Settlement(shard, ids, b"") for shard, ids in shards.items()]
        with suppress(BrokerUnavailable):
            await self._broker.publish_and_settle({}, settlements, {})
        return await commit(self, batch)

    with patch.object(Lane, "_commit", settle_and_commit):
        yield


MUTANTS: Final[dict[str, Callable[[], AbstractContextManager[None]]]] = {
    "ack_on_xadd": _ack_on_xadd,
    "cache_before_message": _cache_before_message,
    "inc_counter_then_insert": _inc_counter_then_insert,
    "redis_incr_sequence": _redis_incr_sequence,
    "new_message_id_on_retry": _new_message_id_on_retry,
    "no_unique_key": lambda: _without_index(SCOPED_KEY_INDEX),
    "no_unique_sequence": lambda: _without_index(SEQUENCE_INDEX),
    "pipelined_batches": _pipelined_batches,
    "ack_at_w1": _ack_at_w1,
    "unordered_bulk": _unordered_bulk,
    "publish_after_xack": _publish_after_xack,
    "pubsub_only": _pubsub_only,
    "dedupe_by_local_read": _dedupe_by_local_read,
    "take_over_by_local_read": _take_over_by_local_read,
    "xack_before_insert": _xack_before_insert,
}
"""Name → the bug, for as long as its context lasts."""
