"""What a shard's previous owner read and never acknowledged: read first, in order, and poison found among it.

Called by a lane's reader. An entry that was handed out twice without an outcome is a suspect: from then on it is tried
alone, so that no other is suspected with it. A delivery count alone proves nothing: it grows in every outage in which
shards change hands. So a trial is written down before it begins and taken back by whoever survives it. Whoever dies at
once proves the entry to be poison, and it is buried unread three leases after it was first read (reliability.md F-W6);
who dies later may have died of what kept the trial waiting, so that takes three deaths, at the fifth delivery (section
10.5).
"""

from __future__ import annotations

import math
import time
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import structlog

from protocol.models import DLQErrorType
from workers.broker import BrokerUnavailable, GroupMissing
from workers.suspects import PROOF, Suspects

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workers.broker import Broker
    from workers.dead_letters import DeadLetters
    from workers.delivery import Down
    from workers.entries import StreamEntry
    from workers.suspects import Delivered

SUSPECT_DELIVERIES: Final = 2
AT_ONCE_SECONDS: Final = 2.0
"""A trial takes a commit, a few milliseconds. One that goes on for longer waits for the store or for Redis."""
LOOK_SECONDS: Final = 0.5
STALE_SECONDS: Final = 3.0
"""What was read so long ago and is not in hand came to a read that was under way when its shard moved here, or to a
process that had stood still."""

log = structlog.get_logger()


class Stage(Enum):
    """How far an entry has come in a lane: its shard is another's; not read here; read; decided, to be acknowledged."""

    FOREIGN = "foreign"
    UNKNOWN = "unknown"
    IN_HAND = "in hand"
    DONE = "done"


class Host(Protocol):
    """The lane."""

    @property
    def is_stopping(self) -> bool:
        """Has this process been asked to end?"""

    def stage(self, shard: int, entry_id: bytes) -> Stage:
        """How far an entry has come."""

    async def wait_for_room(self) -> None:
        """Until it may read more."""

    async def take(self, entries: Sequence[StreamEntry], redelivered: bool) -> None:
        """Entries that were read."""

    def done(self, shard: int, entry_id: bytes) -> None:
        """This one is decided."""

    async def publish_and_settle(self, down: Down, decided: Mapping[int, Sequence[bytes]]) -> None:
        """Tell, then acknowledge what is decided."""


class TakeOver:
    """Reads what is pending of one lane's shards. `trial`: shared by the lanes of a process, so that at most one entry
    is on trial in it."""

    def __init__(self, broker: Broker, dead_letters: DeadLetters, host: Host, trial: anyio.Lock, batch: int) -> None:
        self.settled = anyio.Event()
        """Set when something was acknowledged, or a shard lost."""
        self._broker = broker
        self._suspects = Suspects(broker)
        self._dead_letters = dead_letters
        self._host = host
        self._trial = trial
        self._batch = batch
        self._survived: dict[int, set[bytes]] = {}
        """Shard → entries whose trial this process lived through while Redis did not answer: still to be taken back."""

    async def read(self, shard: int) -> None:
        """All that is pending of a shard and not in hand. Raises BrokerUnavailable, GroupMissing."""
        await self._take_back()
        after = b"0"
        while self._is_ours(shard):
            await self._host.wait_for_room()
            pending = await self._suspects.pending(shard, after, self._batch)
            if not pending:
                return
            while pending and self._is_ours(shard):
                count = await self._read_some(shard, after, pending)
                after = pending[count - 1].entry_id
                pending = pending[count:]

    async def strangers(self, shards: Sequence[int]) -> list[int]:
        """Those of these shards that have pending entries nobody has in hand, among the first of them. Raises
        BrokerUnavailable, GroupMissing."""
        await self._take_back()
        found = []
        for shard in shards:
            stale = await self._suspects.pending(shard, b"0", self._batch, int(STALE_SECONDS * 1000))
            if any(self._host.stage(shard, entry.entry_id) is Stage.UNKNOWN for entry in stale):
                log.warning("pending_of_nobody", shard=shard, entries=len(stale))
                found.append(shard)
        return found

    def _is_ours(self, shard: int) -> bool:
        return self._host.stage(shard, b"") is not Stage.FOREIGN

    async def _read_some(self, shard: int, after: bytes, pending: Sequence[Delivered]) -> int:
        """Read those in front that can be read together, or one suspect, or pass over those in hand: how many."""
        in_hand = [self._host.stage(shard, found.entry_id) is Stage.IN_HAND for found in pending]
        if in_hand[0]:
            return in_hand.index(False) if False in in_hand else len(in_hand)
        if pending[0].times >= SUSPECT_DELIVERIES:
            await self._try_alone(shard, after, pending[0])
            return 1
        count = 0
        while count < len(pending) and not in_hand[count] and pending[count].times < SUSPECT_DELIVERIES:
            count += 1
        log.info("pending_taken_over", shard=shard, entries=count)
        await self._host.take(await self._broker.read_pending(shard, after, count), redelivered=True)
        return count

    async def _try_alone(self, shard: int, after: bytes, suspect: Delivered) -> None:
        async with self._trial:
            entry_id = suspect.entry_id
            if await self._suspects.weight(shard, entry_id) >= PROOF:
                await self._bury(shard, suspect)
                return
            log.warning("entry_tried_alone", shard=shard, entry=entry_id.decode(), deliveries=suspect.times)
            try:
                await self._suspects.begin_trial(shard, entry_id)
                await self._host.take(await self._broker.read_pending(shard, after, 1), redelivered=True)
                await self._wait_for_outcome(shard, entry_id)
                await self._suspects.end_trial(shard, entry_id)
            except (BrokerUnavailable, GroupMissing):
                self._survived.setdefault(shard, set()).add(entry_id)
                raise
            except anyio.get_cancelled_exc_class():
                if self._host.is_stopping:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                        await self._suspects.end_trial(shard, entry_id)
                raise

    async def _take_back(self) -> None:
        """Trials that Redis could not be told the end of, of shards that are another's by now too."""
        while self._survived:
            shard, entry_ids = next(iter(self._survived.items()))
            for entry_id in entry_ids:
                await self._suspects.end_trial(shard, entry_id)
            del self._survived[shard]

    async def _wait_for_outcome(self, shard: int, entry_id: bytes) -> None:
        doubted_at = anyio.current_time() + AT_ONCE_SECONDS
        while (stage := self._host.stage(shard, entry_id)) in (Stage.IN_HAND, Stage.DONE):
            if anyio.current_time() >= doubted_at:
                await self._suspects.doubt_trial(shard, entry_id)
                doubted_at = math.inf
            if stage is Stage.DONE:
                await self._host.publish_and_settle({}, {})
            self.settled = anyio.Event()
            with anyio.move_on_after(LOOK_SECONDS):
                await self.settled.wait()

    async def _bury(self, shard: int, suspect: Delivered) -> None:
        """Out of the stream first, unread; then it is read once more, to know whose it is."""
        entry = await self._suspects.read(shard, suspect.entry_id)
        reason = f"whoever read it died, {suspect.times} times"
        letter_id = ""
        if entry.payload is not None:
            letter_id = await self._dead_letters.bury_unread(entry, reason, DLQErrorType.UNKNOWN, _now_ms())
        self._host.done(shard, suspect.entry_id)
        await self._host.publish_and_settle({}, {})
        await self._suspects.end_trial(shard, suspect.entry_id)
        if letter_id and not entry.letter_id:
            down: Down = {}
            for instance, item in await self._dead_letters.name(letter_id, entry, reason, _now_ms()):
                down.setdefault(instance, []).append(item)
            await self._host.publish_and_settle(down, {})


def _now_ms() -> int:
    """The one place where a take-over reads the clock."""
    return time.time_ns() // 1_000_000
