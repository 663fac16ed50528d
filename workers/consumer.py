"""One lane: the stream loop over a disjoint set of shards. Read, batch, commit, tell, acknowledge last.

Three tasks share a lane. The *reader* takes entries from the stream: receipts raise marks at once, everything else
queues. The *writer* commits what has queued meanwhile, publishes it, then acknowledges. The *teller* sends receipts to
authors and flushes marks. So receipts and the next batch overlap with a commit that waits for the journal, and a batch
is whatever came during the one before.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
import structlog

from protocol import codec, keys, records
from protocol.models import DLQErrorType
from workers import metrics
from workers.broker import Broker, BrokerUnavailable, GroupMissing
from workers.commit import Committer
from workers.conversations import Conversations
from workers.dead_letters import DeadLetters, error_type_of
from workers.delivery import Courier, Down, Registry
from workers.ends import Ends
from workers.fence import Fence
from workers.plan import Entry, Plan
from workers.receipts import Receipts
from workers.shard_log import ShardLog
from workers.store.errors import StoreUnavailable
from workers.takeover import STALE_SECONDS, Stage, TakeOver
from workers.typists import Typists
from workers.unheard import Unheard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from protocol.events import Outgoing
    from workers.entries import StreamEntry
    from workers.interest import Interest
    from workers.store import Store
    from workers.store.messages import Key

BLOCK_MS: Final = 250
"""How long a read waits: also how long a newly leased shard waits for its first read."""
READ_SPACING_SECONDS: Final = 0.008
"""Between the starts of two reads of a busy lane. An idle lane reads at once; a busy one gathers, because a read, a
commit and a publish cost about 1.5 ms of CPU over all processes however few entries they carry."""
QUEUE_BATCHES: Final = 4
"""Entries read ahead of the writer, in batches; past it the stream keeps them. With MongoDB away a lane holds so many,
and the batch it cannot commit: 2,500 by default, 120 MB of messages of the greatest size."""
BATCH_BYTES: Final = 2 * 1024 * 1024
"""Content of one commit: 500 messages of 4 KiB. It bounds the insert and the record that goes to each gateway."""
MARKS_WAITING: Final = 20_000
"""Receipts read and not flushed, about 5 MB: more than come in two ticks; past it nothing is read before a flush."""
KEYS_WAITING: Final = 50_000
"""Idempotency keys whose write failed, about 20 MB; past it the oldest are dropped: the messages' own index answers for
them."""
LEASE_SPACING_SECONDS: Final = 0.1
"""Between two looks at leases that another may have; the process itself looks every 0.5 s (`lease.py`)."""
FIRST_TICK_SECONDS: Final = 0.02
TICK_SECONDS: Final = 0.1
"""Receipts gather for a tick: the first after a pause comes soon, the others within protocol.md's 100 ms."""
HEADS_SECONDS: Final = 1.0
"""What the log can rebuild is flushed within 1 s; `idempotency_keys` every tick, since in one write a second they would
hold up a commit for 50 ms at 4,000 msg/s."""
REPAIR_MS: Final = 20_000
"""How far back a new owner looks for heads that the previous one did not flush: its lease (5 s), the flush and more.
What was written last is looked at however old it is (`store.heads.unflushed`)."""
LONGEST_BACKOFF_SECONDS: Final = 2.0

log = structlog.get_logger()


class Lane:
    """Shards `index` modulo the number of lanes, as far as this worker holds their leases."""

    def __init__(
        self,
        store: Store,
        broker: Broker,
        registry: Registry,
        batch: int,
        shards: int,
        edit_seconds: int,
        interest: Interest,
        worker_id: str = "",
        trial: anyio.Lock | None = None,
        conversations: int = 20_000,
        push_after_ms: int = 3000,
    ) -> None:
        """`batch`, `conversations`, `push_after_ms`: see the settings. `trial`: of a process, see `takeover.py`."""
        self._worker_id = worker_id
        self.may_read: Callable[[], bool] = lambda: True
        """Does nothing say that another owns these shards by now? To be asked right before a read."""
        self._store = store
        self._broker = broker
        self._batch = batch
        self._shards = shards
        self._most_conversations = conversations
        self._read_ahead = QUEUE_BATCHES * max(batch, shards)
        self._conversations = Conversations(store.conversations)
        self._courier = Courier(registry)
        self._receipts = Receipts(self._conversations, store.messages, store.marks, self._courier, shards)
        self._typists = Typists(self._conversations, self._courier, shards)
        self._ends = Ends(self._conversations)
        self._unheard = Unheard(store, broker, self._conversations, push_after_ms)
        self._dead_letters = DeadLetters(store.dead_letters, store.messages)
        self._committer = Committer(
            store, self._conversations, self._receipts.recent, self._dead_letters, edit_seconds, interest
        )
        self._takeover = TakeOver(broker, self._dead_letters, self, trial or anyio.Lock(), batch)
        self._logs: dict[int, ShardLog] = {}
        self._new_shards: list[int] = []
        self._unrepaired: set[int] = set()  # shards taken over, whose heads may lag behind their logs
        self._queue: deque[Entry] = deque()
        self._queued, self._room, self._to_tell = anyio.Event(), anyio.Event(), anyio.Event()
        self._unflushed: list[tuple[int, bytes]] = []
        self._marks = 0
        """Receipts of the unflushed entries."""
        self._committing: set[str] = set()  # conversations of the batch that is being committed
        self._keys: list[tuple[Key, str, datetime]] = []
        self._inbox: dict[str, list[str]] = defaultdict(list)
        self._heads_at = 0.0
        self._stop = anyio.Event()
        self._is_traced = log.is_enabled_for(logging.DEBUG)
        self._stopping = False

    # --- what it holds, for the gauges -------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Entries that wait for the writer."""
        return len(self._queue)

    @property
    def marks_waiting(self) -> int:
        """Receipts read and not flushed."""
        return self._marks

    @property
    def keys_waiting(self) -> int:
        """Idempotency keys to write."""
        return len(self._keys)

    @property
    def conversations_held(self) -> int:
        """Conversations in memory."""
        return self._conversations.held

    def set_shards(self, shards: frozenset[int]) -> None:
        """The leases of this lane changed. What it had read of a lost shard is the next owner's."""
        lost, gained = self._logs.keys() - shards, shards - self._logs.keys()
        for shard in lost:
            del self._logs[shard]
        if lost:
            self._queue = deque(entry for entry in self._queue if entry.shard not in lost)
            self._unflushed = [(shard, entry_id) for shard, entry_id in self._unflushed if shard not in lost]
            self._dead_letters.forget_shards(shards)
            self._unrepaired -= lost
            self._takeover.settled.set()
        if lost or gained:
            # Of those that come too: the batch in hand, when a lease ended, may have brought its conversations back.
            self._conversations.forget_shards(shards - gained)
        for shard in gained:
            self._logs[shard] = ShardLog()
            self._new_shards.append(shard)
            self._unrepaired.add(shard)

    # --- what a take-over asks ---------------------------------------------------------------------------------------

    @property
    def is_stopping(self) -> bool:
        """Has this process been asked to end?"""
        return self._stop.is_set()

    def stage(self, shard: int, entry_id: bytes) -> Stage:
        """How far an entry has come here."""
        shard_log = self._logs.get(shard)
        if shard_log is None:
            return Stage.FOREIGN
        if entry_id in shard_log.outstanding:
            return Stage.IN_HAND
        return Stage.DONE if entry_id in shard_log.done else Stage.UNKNOWN

    async def run(self, stopping: anyio.Event) -> None:
        """Work until `stopping`; then finish what was read and return."""
        self._stop = stopping
        async with anyio.create_task_group() as group:
            group.start_soon(self._tell_loop, name="teller")
            async with anyio.create_task_group() as movers:
                movers.start_soon(self._write_loop, name="writer")
                with anyio.CancelScope() as reading:
                    movers.start_soon(self._cancel_when, stopping, reading)
                    await self._read_loop()
                self._stopping = True
                self._queued.set()
            group.cancel_scope.cancel()
        await self._tick(force=True)

    @staticmethod
    async def _cancel_when(stopping: anyio.Event, scope: anyio.CancelScope) -> None:
        await stopping.wait()
        scope.cancel()

    # --- reader ------------------------------------------------------------------------------------------------------

    async def _read_loop(self) -> None:
        backoff = 0.05
        taken_at = 0.0
        look_at = anyio.current_time() + STALE_SECONDS
        while True:
            try:
                if anyio.current_time() >= look_at:
                    look_at = anyio.current_time() + STALE_SECONDS
                    self._new_shards += await self._takeover.strangers(list(self._logs))
                while self._new_shards:
                    # Taken out before the waits, in which more may be added behind it.
                    shard = self._new_shards.pop()
                    await self._dead_letters.load((shard,))
                    await self._takeover.read(shard)
                    self._to_tell.set()  # its heads may be repaired
                await self.wait_for_room()
                await anyio.sleep_until(taken_at + READ_SPACING_SECONDS)
                # Looked at behind the waits: a lease may have ended during them. What is taken of another's shard, its
                # owner does not see in its place.
                if not self._logs or not self.may_read():
                    await anyio.sleep(0.1)
                    continue
                entries = await self._read_new()
                taken_at = anyio.current_time()
                if self._new_shards:
                    # Of a shard that came during the waits, what its previous owner read is before this. Both are
                    # pending now, and read in order next.
                    entries = [entry for entry in entries if entry.shard not in self._new_shards]
                await self.take(entries, redelivered=False)
                backoff = 0.05
            except GroupMissing:
                await self._start_over()
            except (BrokerUnavailable, StoreUnavailable) as error:
                log.warning("lane_waits", error=str(error)[:200])
                # Redis may have made entries pending whose reply was lost: look among them before reading on.
                self._new_shards = list(self._logs)
                await anyio.sleep(backoff)
                backoff = min(backoff * 2, LONGEST_BACKOFF_SECONDS)

    async def _read_new(self) -> list[StreamEntry]:
        """New entries, no more than there is room for. Redis counts them per stream: each shard gets its share, and
        those that used it up get what the others left."""
        room, shards = self._room_left, sorted(self._logs)
        share = max(1, min(self._batch, room // len(shards)))
        entries = await self._broker.read_ingest(shards, share, BLOCK_MS)
        room -= len(entries)
        counts = Counter(entry.shard for entry in entries)
        busy = [shard for shard, count in counts.items() if count == share < self._batch]
        if busy and room >= len(busy):
            entries += await self._broker.read_ingest(busy, min(self._batch, room // len(busy)), None)
        return entries

    @property
    def _room_left(self) -> int:
        return self._read_ahead - len(self._queue)

    async def wait_for_room(self) -> None:
        # A batch's worth, so that reads stay as great as commits are, and at least one entry of each shard.
        while self._room_left < max(self._batch, len(self._logs)) or self._marks >= MARKS_WAITING:
            self._room = anyio.Event()
            await self._room.wait()

    async def _start_over(self) -> None:
        """Redis came back empty: nothing in memory about these shards can be trusted to be alone any more."""
        log.warning("streams_missing", shards=len(self._logs))
        try:
            # The leases are gone too. Whose shard another has by now reads nothing until it is told so: what two owners
            # read in turn is committed out of order.
            while not await self._holds_all():  # noqa: ASYNC110 - Redis tells nobody
                await anyio.sleep(LEASE_SPACING_SECONDS)
            await self._broker.create_ingest_groups(list(self._logs))  # leases move meanwhile
        except BrokerUnavailable:
            await anyio.sleep(0.1)
            return
        for shard_log in self._logs.values():
            shard_log.outstanding.clear()
            shard_log.done.clear()
        self._conversations.forget_shards(frozenset())

    async def _holds_all(self) -> bool:
        held = await self._broker.hold_leases(self._worker_id, list(self._logs))
        return self._logs.keys() <= set(held)

    async def take(self, entries: Sequence[StreamEntry], redelivered: bool) -> None:
        for entry in entries:
            shard_log = self._logs.get(entry.shard)
            if shard_log is None or entry.entry_id in shard_log.outstanding:
                continue
            shard_log.outstanding[entry.entry_id] = None
            if entry.payload is None:
                metrics.INGESTED.labels("lost").inc()
                self.done(entry.shard, entry.entry_id)
                self._to_tell.set()
                continue
            try:
                record = codec.decode_ingest(entry.payload)
            except msgspec.DecodeError as error:
                await self._bury_unreadable(entry, str(error))
                continue
            if self._is_traced and not isinstance(record, records.Receipts | records.Typing):
                log.debug("< entry", trace=records.trace_of(record), shard=entry.shard, entry=entry.entry_id.decode())
            if entry.letter_id and isinstance(record, records.Receipts | records.Typing):
                await self._dead_letters.settle_unlogged(entry.letter_id, _now_ms())
            if isinstance(record, records.Receipts):
                self._receipts.receive(record)
                self._unflushed.append((entry.shard, entry.entry_id))
                self._marks += len(record.delivered) + len(record.read)
                self._to_tell.set()
            elif isinstance(record, records.Typing):
                self._typists.receive(record, entry.entry_id, _now_ms())
                self.done(entry.shard, entry.entry_id)
                self._to_tell.set()
            else:
                # Whether a replay's key is in the log already is looked up, as for what was read before.
                is_doubtful = redelivered or bool(entry.letter_id)
                self._queue.append(Entry(entry.shard, entry.entry_id, record, is_doubtful, entry.letter_id))
        if self._queue:
            self._queued.set()

    async def _bury_unreadable(self, entry: StreamEntry, reason: str) -> None:
        await self._dead_letters.bury_unread(entry, reason, DLQErrorType.VALIDATION_FAILED, _now_ms())
        self.done(entry.shard, entry.entry_id)
        # Nobody may come after it: its acknowledgement does not wait for the next commit.
        self._to_tell.set()

    def done(self, shard: int, entry_id: bytes) -> None:
        shard_log = self._logs.get(shard)
        if shard_log is not None:
            shard_log.outstanding.pop(entry_id, None)
            shard_log.done.append(entry_id)

    # --- writer ------------------------------------------------------------------------------------------------------

    async def _write_loop(self) -> None:
        while True:
            while not self._queue:
                if self._stopping:
                    return
                self._queued = anyio.Event()
                await self._queued.wait()
            batch = self._next_batch()
            self._room.set()
            down: Down = defaultdict(list)
            decided: dict[int, list[bytes]] = {}
            outgoing: list[Outgoing] = []
            self._committing = {entry.conversation_id for entry in batch}
            for plan in await self._commit(batch):
                await self._deliver(plan, down)
                outgoing += plan.events
                for entry in plan.unwritten:
                    decided.setdefault(entry.shard, []).append(entry.entry_id)
            self._committing = set()
            for entry in batch:
                self.done(entry.shard, entry.entry_id)
            await self.publish_and_settle(down, decided, outgoing)
            self._to_tell.set()

    def _next_batch(self) -> list[Entry]:
        """Up to a batch, in order; no conversation takes more than half of it while others wait.

        A removal ends its conversation's part: what follows is committed after `memberships` shows that it happened, so
        that nobody pages past the end of a stay.
        """
        batch: list[Entry] = []
        held_back: list[Entry] = []
        room: dict[str, int] = defaultdict(lambda: max(1, self._batch // 2))
        size = 0
        while self._queue and len(batch) < self._batch and size < BATCH_BYTES:
            entry = self._queue.popleft()
            if room[entry.conversation_id] == 0:
                held_back.append(entry)
                continue
            room[entry.conversation_id] -= 1
            if entry.may_end_a_stay:
                room[entry.conversation_id] = 0
            batch.append(entry)
            if type(entry.record) is records.SendMessage:
                size += len(entry.record.content)
        self._queue.extendleft(reversed(held_back))
        return batch

    async def _commit(self, batch: list[Entry]) -> list[Plan]:
        """Commit together what no dead letter stands in the way of."""
        now_ms = _now_ms()
        batch, told = await self._dead_letters.sift(batch, now_ms)
        plans = await self._commit_fit(batch) if batch else []
        return [*plans, _saying(told)] if told else plans

    async def _commit_fit(self, batch: list[Entry]) -> list[Plan]:
        """Commit together; where that fails for a reason nobody foresaw, one by one, and bury the one that fails
        alone.
        """
        try:
            return [await self._committer.commit(batch, _now_ms())]
        except Exception as error:
            log.exception("batch_failed", entries=len(batch))
            if len(batch) > 1:
                return [plan for entry in batch for plan in await self._commit([entry])]
            told = await self._dead_letters.bury(list(batch), batch[0], repr(error), error_type_of(error), _now_ms())
            return [_saying(told)]

    async def _deliver(self, plan: Plan, down: Down) -> None:
        self._note_heads(plan)
        while True:
            try:
                offline = await self._courier.deliver([*plan.again, *plan.committed], down)
                break
            except BrokerUnavailable as error:
                log.warning("delivery_waits", error=str(error)[:200])
                await anyio.sleep(0.2)
        if plan.notices:
            try:
                await self._courier.notify(plan.notices, down)
            except BrokerUnavailable as error:
                # The log says it too, and lists of conversations are read from the store.
                log.warning("notices_lost", notices=len(plan.notices), error=str(error)[:200])
        for user_id, messages in offline.items():
            for message in messages:
                assert isinstance(message.message_id, str)
                self._inbox[user_id].append(message.message_id)
                owned = self._conversations.get(message.conversation_id)
                if owned is not None:
                    owned.note_inboxed(user_id, message.sequence_number, message.message_id)
        for instance, item in plan.outcomes:
            if instance:
                down[instance].append(item)

    def _note_heads(self, plan: Plan) -> None:
        if self._is_traced:
            for key, message_id, _ in plan.keys:
                log.debug("= committed", trace=keys.trace_id(*key), message_id=message_id)
        self._unheard.note(self._ends.note(plan), _now_ms())
        self._keys += plan.keys

    async def publish_and_settle(
        self,
        down: Down,
        decided: Mapping[int, Sequence[bytes]],
        outgoing: Sequence[Outgoing] = (),
        fence: Fence | None = None,
    ) -> None:
        settlements = [log_.settle(shard) for shard, log_ in self._logs.items() if log_.done]
        if not down and not settlements:
            return
        try:
            await self._broker.publish_and_settle(down, settlements, decided, outgoing, fence)
        except BrokerUnavailable as error:
            # Senders ask again, the sweep repairs pushes, and entries stay pending until their ids come round again.
            log.warning("publish_failed", instances=len(down), error=str(error)[:200])
            for shard, entry_ids, _ in settlements:
                if shard in self._logs:
                    self._logs[shard].done = entry_ids + self._logs[shard].done
        self._takeover.settled.set()

    # --- teller ------------------------------------------------------------------------------------------------------

    async def _tell_loop(self) -> None:
        while True:
            await self._to_tell.wait()
            self._to_tell = anyio.Event()
            await anyio.sleep(FIRST_TICK_SECONDS)
            await self._tick()
            while self._receipts.waiting or self._typists.waiting or self._unflushed or self._unsaved:
                await anyio.sleep(TICK_SECONDS)
                await self._tick()

    @property
    def _unsaved(self) -> bool:
        return bool(
            self._ends.waiting
            or self._unheard.waiting
            or self._keys
            or self._inbox
            or self._unrepaired
            or self._conversations.dirty
            or self._conversations.lazy
        )

    async def _tick(self, force: bool = False) -> None:
        try:
            await self._settle_receipts()
            await self._flush_keys()
            if force or anyio.current_time() - self._heads_at >= HEADS_SECONDS:
                await self._repair_heads()
                await self._flush_heads()
                self._heads_at = anyio.current_time()
                self._conversations.shrink(self._most_conversations, self._committing)
            await self._unheard.look(_now_ms(), force=force)
        except (StoreUnavailable, BrokerUnavailable) as error:
            log.warning("flush_waits", error=str(error)[:200])
            await anyio.sleep(0 if force else LONGEST_BACKOFF_SECONDS / 4)

    async def _settle_receipts(self) -> None:
        """Marks first, then their authors, then the acknowledgement of the entries that moved them."""
        entries, self._unflushed = self._unflushed, []
        marks, self._marks = self._marks, 0
        down: Down = defaultdict(list)
        try:
            await self._typists.tell(down, _now_ms())
            await self._receipts.resolve()
            await self._receipts.flush(lazy=False)
            # The script tells all or nothing: of what is known to be another's, it is not even asked.
            self._receipts.leave(await self._broker.foreign_leases(self._worker_id, self._receipts.shards))
            fence = Fence(self._worker_id, self._receipts.shards)
            await self._receipts.tell(down, _now_ms())
        except BaseException:
            self._unflushed = entries + self._unflushed
            self._marks += marks
            raise
        self._room.set()
        for shard, entry_id in entries:
            self.done(shard, entry_id)
        await self.publish_and_settle(down, {}, fence=fence)
        delivered, self._receipts.delivered_ids = self._receipts.delivered_ids, {}
        if delivered:
            await self._broker.drop_from_inbox(delivered)

    async def _repair_heads(self) -> None:
        """What the previous owner acknowledged and died before it flushed: nobody speaks of it again, and the gateways'
        sweep knows the ends of logs from what is flushed."""
        if not (shards := frozenset(self._unrepaired)):
            return
        heads, ends = await self._store.heads.recent(shards, _now_ms() - REPAIR_MS)
        shard_of = {head.conversation_id: keys.shard_of(head.conversation_id, self._shards) for head in heads}
        # Loading finds the marks that these messages moved; they are flushed before the heads.
        await self._conversations.load(shard_of)
        busy = set()
        for head in heads:
            if self._ends.knows(head):
                continue
            if head.conversation_id in self._committing:
                busy.add(shard_of[head.conversation_id])  # its marks may not be noted yet
            elif shard_of[head.conversation_id] in self._logs:
                self._ends.adopt(head)
        await self._unheard.missed(ends, _now_ms())
        self._unrepaired -= shards - busy

    async def _flush_heads(self) -> None:
        """Inboxes, then all marks, then the heads that say the marks are written."""
        inbox, self._inbox = self._inbox, defaultdict(list)
        if inbox:
            await self._broker.push_inbox(inbox)
        heads = self._ends.take()
        try:
            await self._receipts.flush(lazy=True)
            await self._store.marks.flush_heads(heads)
        except BaseException:
            self._ends.put_back(heads)
            raise

    async def _flush_keys(self) -> None:
        keys, self._keys = self._keys, []
        try:
            await self._store.messages.remember_keys(keys)
        except BaseException:
            waiting = keys + self._keys
            self._keys = waiting[-KEYS_WAITING:]
            metrics.KEYS_DROPPED.inc(len(waiting) - len(self._keys))
            raise


def _saying(outcomes: list[tuple[str, records.DownItem]]) -> Plan:
    """A plan that commits nothing and tells these."""
    plan = Plan()
    plan.outcomes = outcomes
    return plan


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
