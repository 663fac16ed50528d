"""One run of the world from a seed: start it, let people talk while things break, let it come to rest, judge it."""

from __future__ import annotations

import gc
import random
import traceback
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
import trio

from bench import journal
from bench.simulation.evidence import history_of, queues_of, snapshot_of
from bench.simulation.mongo import SET
from bench.simulation.nemesis import LOSSES, Nemesis
from bench.simulation.network import Clock, Network, make_deterministic
from bench.simulation.processes import SHARDS, House, seams
from bench.simulation.replica_set import ReplicaSet
from bench.simulation.valkey import SERVER, Valkey
from bench.simulation.workload import GROUP, Workload
from workers.audit.auditor import audit
from workers.audit.history import End, Fault

if TYPE_CHECKING:
    from bench.simulation.phones import Phone
    from workers.audit.report import Violation

STORIES: Final = (1.5, 2.5, 2.5, 4.0, 4.0, 7.0)
"""People talk and things break for so long, seconds: what happens closely together meets, and some faults take long."""
REST_SECONDS: Final = 45.0
"""From the last fault to the moment at which everybody must have everything (reliability.md, I14: 30 s; two more
retries of a phone)."""
LOOK_SECONDS: Final = 0.2
PROOF_SECONDS: Final = 20.0
FLUSH_SECONDS: Final = 1.3
"""What is flushed later is flushed by then, where nothing was in its way."""
LATEST_FLUSH_SECONDS: Final = 3.0
"""And so much later where something was: looked at only where the first look found anything."""


class Verdict(msgspec.Struct):
    """What one seed came to."""

    seed: int
    violations: list[str]
    events: int = 0
    seconds: float = 0.0
    """Of the virtual clock."""
    sent: int = 0
    faults: int = 0
    trace: list[str] = []


class World:
    """Everything of one run."""

    def __init__(self, seed: int, *, trace: bool) -> None:
        self.seed = seed
        self.rng = random.Random(f"trireme {seed}")
        self.clock = Clock()
        self.network = Network(self.clock, random.Random(self.rng.getrandbits(64)))
        if trace:
            self.network.trace = []
        self.valkey = Valkey(self.network)
        self.set = ReplicaSet(self.network)
        self.journal: list[journal.Event] = []
        self.violations: list[str] = []
        self.blows: list[tuple[str, float, float]] = []
        """(fault, from, to)."""

    def record(self, event: journal.Event) -> None:
        """What a phone did or saw."""
        self.journal.append(event)

    async def run(self) -> None:
        """From start to rest."""
        SERVER.set(self.valkey)
        SET.set(self.set)
        self.network.join()
        try:
            await self._live()
        finally:
            self.network.leave()

    async def _live(self) -> None:
        async with trio.open_nursery() as nursery:
            house = House(self.network, nursery)
            house.start_rest()
            for _ in range(2):
                house.start_gateway()
                house.start_worker()
            workload = Workload(self.network, house, self.record, random.Random(self.rng.getrandbits(64)))
            await workload.begin(nursery)
            dice = random.Random(self.rng.getrandbits(64))
            nemesis = Nemesis(self.network, house, self.valkey, self.set, dice, workload.stir)
            ends = self.clock.now + self.rng.choice(STORIES)
            nursery.start_soon(workload.run, ends, name="workload")
            await nemesis.run(ends, workload.phones)
            self.blows = nemesis.blows
            await self._come_to_rest(workload)
            workload.speak_last()
            await self._come_to_rest(workload)
            await self._prove(workload.phones)
            await trio.sleep(FLUSH_SECONDS)
            await self._come_to_rest(workload)
            faults = {name for name, _, _ in nemesis.blows}
            if found := self._judge(house, workload, faults):
                await trio.sleep(LATEST_FLUSH_SECONDS)
                await self._come_to_rest(workload)
                found = self._judge(house, workload, faults)
            self.violations += found
            nursery.cancel_scope.cancel()

    async def _come_to_rest(self, workload: Workload) -> None:
        """Until nobody waits for anything."""
        deadline = self.clock.now + REST_SECONDS
        missing = ["nothing was looked at"]
        while missing and self.clock.now < deadline and not self.network.crashes:
            await trio.sleep(LOOK_SECONDS)
            missing = self._missing(workload)
        self.violations += [f"I14: {what}" for what in missing]

    def _missing(self, workload: Workload) -> list[str]:
        """What has not come about yet."""
        missing = [] if workload.done else ["a command of REST has no outcome"]
        missing += [f"{phone.client.device_id} is not online" for phone in workload.phones if not phone.online]
        for phone in workload.phones:
            missing += [f"{phone.client.device_id} has no outcome for {key}" for key in phone.client.pending]
        for queue in queues_of(self.valkey.keyspace, SHARDS).shards:
            if queue.pending or queue.unread:
                missing.append(f"shard {queue.shard} has {queue.unread} entries unread and {queue.pending} pending")
        members: dict[str, list[dict[str, Any]]] = {}
        for member in self.set.committed.get("memberships", {}).values():
            members.setdefault(member["user_id"], []).append(member)
        heads: dict[str, int] = {}
        for message in self.set.committed.get("messages", {}).values():
            name = message["conversation_id"]
            heads[name] = max(heads.get(name, 0), message["sequence_number"])
        for phone in workload.phones:
            for member in members.get(phone.client.user_id, ()):
                name = member["conversation_id"]
                last = heads.get(name, 0)
                log = phone.client.logs.get(name)
                cursor = 0 if log is None or log.cursor is None else log.cursor
                if "leave_seq" not in member and last >= member["join_seq"] and cursor < last:
                    missing.append(f"{phone.client.device_id} has {cursor} of {last} in {name}")
        return missing

    async def _prove(self, phones: list[Phone]) -> None:
        """Every phone compares its digests with the server's."""
        with trio.move_on_after(PROOF_SECONDS):
            for asks in (True, False):
                while not all(phone.client.synced for phone in phones):  # noqa: ASYNC110 -- time is virtual
                    await trio.sleep(LOOK_SECONDS)
                for phone in phones if asks else ():
                    phone.sync()
            return
        self.violations += [f"I14: {p.client.device_id} got no sync_complete" for p in phones if not p.client.synced]

    def _judge(self, house: House, workload: Workload, faults: set[str]) -> list[str]:
        """What is wrong with all that happened and all there is."""
        now = self.clock.now
        events = [
            *history_of(self.journal, GROUP),
            *workload.counts,
            *workload.announced,
            *self._fault_events(),
            End(t=now),
        ]
        events.sort(key=lambda event: event.t)
        snapshot = snapshot_of(self.set, self.valkey.keyspace, SHARDS, now)
        wrong = [str(found) for found in audit(events, snapshot) if not _is_excused(found, faults)]
        wrong += [f"digest: {event}" for event in self.journal if isinstance(event, journal.Contradicted)]
        wrong += [phone.complaint for phone in workload.phones if phone.complaint]
        if faults.isdisjoint(LOSSES):
            stored = {message["idempotency_key"] for message in self.set.committed.get("messages", {}).values()}
            wrong += [f"I12: {key} was taken and is nowhere" for key in house.taken if key not in stored]
        if (bugs := house.isolated_errors()) > 0:
            wrong.append(f"{bugs} bugs ended one connection")
        return wrong

    def _fault_events(self) -> list[Fault]:
        return [Fault(t=begun, what=name, since=begun, until=ended) for name, begun, ended in self.blows]


def _is_excused(found: Violation, faults: set[str]) -> bool:
    """What nobody promises under these faults.

    A Redis that loses entries loses them without an error: a message comes into the log with its retry, behind those
    that were sent after it. With them go the leases: two owners may tell receipts from two memories then (seeds 989,
    1434); what is stored only goes forward. And where somebody deletes leases, two owners read one stream in turn for a
    while, each with a part of what one connection sent, and commit the parts in any order.
    """
    if found.invariant == "I9" and found.statement == "marks went back":
        return not faults.isdisjoint(LOSSES)
    if found.statement == "a retransmit was answered late":
        return True  # a message may be under way for most of a second here, and there are six
    if found.invariant == "I7" and found.statement.startswith("sent later"):
        return not faults.isdisjoint(LOSSES | {"steal_leases"})
    return False


def run_universe(seed: int, *, trace: bool = False) -> Verdict:
    """One seed, from start to verdict."""
    world = World(seed, trace=trace)
    make_deterministic(random.Random(world.rng.getrandbits(64)))
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        with seams(world.network, random.Random(world.rng.getrandbits(64))):
            trio.run(world.run, clock=world.clock)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        world.violations.append("crash: " + "".join(traceback.format_exception(error)))
    finally:
        world.violations[:0] = [f"crash: {text}" for text in world.network.crashes[:5]]
        if gc_was_on:
            gc.enable()
    sent = sum(type(event).__name__ == "Sent" for event in world.journal)
    return Verdict(
        seed=seed,
        violations=world.violations,
        events=world.network.events,
        seconds=world.clock.now,
        sent=sent,
        faults=len(world.blows),
        trace=world.network.trace or [],
    )


def quiet_logs() -> None:
    """The product's log lines are of no use here, and cost more than the product."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=True)
