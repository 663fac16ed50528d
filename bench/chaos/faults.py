"""The rows F-* of reliability.md section 6 as data: what each does to the rig, how it ends, how soon all must be well.

A script is a plain function over `rig`; `rig.sleep` lets the load go on. It returns one line that says what it did, and
it leaves nothing broken on purpose, but `Rig.mend` comes behind it. Rows that need more than this machine grants are in
`absent`, with the reason.
"""

from __future__ import annotations

import resource
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from bench.chaos.links import Weather
from bench.chaos.replica_set import ELECTION_MS
from bench.chaos.retention import expire_logs
from bench.chaos.rig import DRIVER_NAME
from bench.chaos.valkey_faults import (
    cut_off_from_valkey,
    empty_valkey,
    end_valkey_by_its_disk,
    fail_over,
    fill_valkey,
    fill_valkey_disk,
    flush_valkey,
    freeze_valkey,
    kill_valkey,
    trim_ingest,
)
from bench.services import HOST, spawn
from protocol import keys

if TYPE_CHECKING:
    import random

    from bench.chaos.rig import Rig


ROLLBACK_SECONDS: Final = 20.0


class Fault(msgspec.Struct, frozen=True):
    """One row."""

    row: str
    name: str
    script: Callable[..., str]
    bound_seconds: float | None
    """reliability.md's "recover within"; None: it has none."""
    counts_from: Literal["begin", "end"]
    """What the bound counts from: the kill itself, or the end of what was done."""
    expected: str
    silent_after_seconds: float | None = None
    """From then until the script's end no message at all may be acked."""
    often: bool = False
    """A row with a star: twice per round."""


# --- workers ---------------------------------------------------------------------------------------------------------


def kill_worker(rig: Rig, rng: random.Random) -> str:
    """F-W1."""
    worker = rng.choice(rig.processes("worker"))
    rig.kill(worker)
    rig.sleep(rng.uniform(0.5, 2.0))
    rig.start(worker)
    return worker.name


def stop_worker(rig: Rig, rng: random.Random) -> str:
    """F-W2."""
    worker = rng.choice(rig.processes("worker"))
    rig.terminate(worker)
    rig.start(worker)
    return worker.name


def freeze_worker(rig: Rig, rng: random.Random) -> str:
    """F-W3: longer than its leases, so that it comes back as a zombie."""
    worker = rng.choice(rig.processes("worker"))
    seconds = rng.uniform(5.5, 9.0)
    rig.pause(worker)
    rig.sleep(seconds)
    rig.resume(worker)
    return f"{worker.name} for {seconds:.1f} s"


def kill_all_workers(rig: Rig, rng: random.Random) -> str:
    """F-W4."""
    workers = rig.processes("worker")
    for worker in workers:
        rig.kill(worker)
    seconds = rng.uniform(5.0, 12.0)
    rig.sleep(seconds)
    rig.start(*workers)
    return f"both for {seconds:.1f} s"


def kill_workers_in_a_row(rig: Rig, rng: random.Random) -> str:
    """F-W5: without hooks in the product the crash points are met by killing at random moments in quick succession."""
    kills = rng.randint(3, 5)
    for _ in range(kills):
        worker = rng.choice(rig.processes("worker"))
        rig.kill(worker)
        rig.sleep(rng.uniform(0.0, 0.3))
        rig.start(worker)
        rig.sleep(rng.uniform(1.0, 2.5))
    return f"{kills} kills"


def poison(rig: Rig, rng: random.Random) -> str:
    """F-W6: entries that nobody can decode, in every shard, between those of the load."""
    with rig.redis() as client:
        for shard in range(keys.DEFAULT_SHARDS):
            client.xadd(keys.ingest(shard), {keys.FIELD: rng.randbytes(rng.randint(1, 60))})
    return f"{keys.DEFAULT_SHARDS} entries"


# --- gateways --------------------------------------------------------------------------------------------------------


def kill_gateway(rig: Rig, rng: random.Random) -> str:
    """F-G1."""
    gateway = rng.choice(rig.processes("gateway"))
    rig.kill(gateway)
    rig.sleep(rng.uniform(1.0, 3.0))
    rig.start(gateway)
    return gateway.name


def drain_gateway(rig: Rig, rng: random.Random) -> str:
    """F-G2."""
    gateway = rng.choice(rig.processes("gateway"))
    rig.terminate(gateway)
    rig.start(gateway)
    return gateway.name


def freeze_gateway(rig: Rig, rng: random.Random) -> str:
    """F-G3: its phones take it for dead after 10 s and go elsewhere."""
    gateway = rng.choice(rig.processes("gateway"))
    seconds = rng.choice((4.0, 14.0))
    rig.pause(gateway)
    rig.sleep(seconds)
    rig.resume(gateway)
    return f"{gateway.name} for {seconds:.0f} s"


def exhaust_files(rig: Rig, rng: random.Random) -> str:
    """F-G4: room for four more descriptors, and forty who want in."""
    gateway = rng.choice(rig.processes("gateway"))
    assert gateway.port is not None
    pid = gateway.popen.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with ExitStack() as sockets:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (rig.open_files(pid) + 4, before[1]))
        for _ in range(40):
            sockets.enter_context(socket.create_connection((HOST, gateway.port), timeout=1.0))
        rig.sleep(3.0)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    return gateway.name


def rolling_restart(rig: Rig, rng: random.Random) -> str:
    """F-G5: every gateway and every worker, one after the other."""
    processes = [*rig.processes("gateway"), *rig.processes("worker")]
    rng.shuffle(processes)
    for process in processes:
        rig.terminate(process)
        rig.start(process)
        rig.sleep(0.5)
    return f"{len(processes)} processes"


def kill_both_gateways(rig: Rig, rng: random.Random) -> str:
    """F-C4: everybody comes back at once."""
    gateways = rig.processes("gateway")
    for gateway in gateways:
        rig.kill(gateway)
    rig.sleep(rng.uniform(0.2, 1.0))
    rig.start(*gateways)
    return "both gateways"


# --- MongoDB ---------------------------------------------------------------------------------------------------------


def kill_primary(rig: Rig, rng: random.Random) -> str:
    """F-M1."""
    primary = rig.replica_set.wait_primary()
    primary.kill()
    rig.sleep(3.0)
    primary.start()
    return primary.name


def freeze_primary(rig: Rig, rng: random.Random) -> str:
    """F-M2: the others elect another one; at SIGCONT it finds out."""
    primary = rig.replica_set.wait_primary()
    seconds = rng.uniform(5.0, 9.0)
    primary.pause()
    rig.sleep(seconds)
    primary.resume()
    return f"{primary.name} for {seconds:.1f} s"


def lose_majority(rig: Rig, rng: random.Random) -> str:
    """F-M3."""
    secondaries = rig.replica_set.secondaries(rig.replica_set.wait_primary())
    for member in secondaries:
        member.kill()
    seconds = rng.uniform(5.0, 8.0)
    rig.sleep(seconds)
    for member in secondaries:
        member.start()
    return f"{' and '.join(member.name for member in secondaries)} for {seconds:.1f} s"


def roll_back(rig: Rig, rng: random.Random) -> str:
    """F-M4: what the primary took alone is taken back when it returns to a set that went on without it."""
    before = rig.replica_set.rollbacks()
    primary = rig.replica_set.wait_primary()
    secondaries = rig.replica_set.secondaries(primary)
    for member in secondaries:
        member.kill()
    rig.sleep(1.2)
    primary.kill()
    for member in secondaries:
        member.start()
    rig.replica_set.wait_primary()
    rig.sleep(0.5)
    primary.start()
    deadline = time.monotonic() + ROLLBACK_SECONDS
    while rig.replica_set.rollbacks() == before and time.monotonic() < deadline:
        rig.sleep(0.2)
    return f"{primary.name}: {rig.replica_set.rollbacks() - before} rollback"


def slow_mongodb(rig: Rig, rng: random.Random) -> str:
    """F-M5: the workers' and REST's connections only; the members among themselves are as fast as ever."""
    names = rig.links.named("mongod")
    rig.links.set(*(Weather(link=name, delay_ms=500.0, jitter_ms=100.0, only=DRIVER_NAME) for name in names))
    rig.sleep(8.0)
    rig.links.mend()
    return "1 s per round trip for 8 s"


def fill_disks(rig: Rig, rng: random.Random) -> str:
    """F-M6: two of three members have no block left; one whose journal cannot be written ends itself."""
    seconds = rng.uniform(5.0, 8.0)
    for disk in rig.disks:
        disk.fill()
    rig.sleep(seconds)
    ended = [member.name for member in rig.replica_set.members if not member.is_running]
    for disk in rig.disks:
        disk.free()
    for member in rig.replica_set.members:
        if not member.is_running:
            member.start()
    return f"for {seconds:.1f} s; ended themselves: {', '.join(ended) or 'none'}"


def crowd_mongodb(rig: Rig, rng: random.Random) -> str:
    """F-M7: a hundred half-open sockets at every member, and every connection of a worker is reset."""
    with ExitStack() as sockets:
        for member in rig.replica_set.members:
            for _ in range(100):
                sockets.enter_context(socket.create_connection((HOST, member.port), timeout=2.0))
        names = rig.links.named("mongod")
        rig.links.set(*(Weather(link=name, resets_per_second=3.0, only=DRIVER_NAME) for name in names))
        rig.sleep(3.0)
        rig.links.mend()
        rig.sleep(1.0)
    return "300 sockets, resets for 3 s"


# --- phones ----------------------------------------------------------------------------------------------------------


def bad_radio(rig: Rig, rng: random.Random) -> str:
    """F-C1: 200 ± 100 ms each way, and one connection in twenty is lost every second; then a black-out."""
    names = rig.links.named("phones")
    rig.links.set(*(Weather(link=name, delay_ms=200.0, jitter_ms=100.0, resets_per_second=0.05) for name in names))
    rig.sleep(5.0)
    rig.links.set(*(Weather(link=name, refuses=True) for name in names))
    rig.sleep(3.0)
    rig.links.mend()
    return "a quarter of the phones for 8 s"


def half_open(rig: Rig, rng: random.Random) -> str:
    """F-C2: nothing passes and nobody says so; the phones come back by another way, the old sockets stand."""
    name = rng.choice(rig.links.named("phones"))
    rig.links.set(Weather(link=name, up=False, down=False))
    rig.sleep(12.0)
    rig.links.mend()
    return name


def slow_readers(rig: Rig, rng: random.Random) -> str:
    """F-C3: a quarter of the phones takes nothing, for less or more than they have patience."""
    seconds = rng.choice((5.0, 13.0))
    names = rig.links.named("phones")
    rig.links.set(*(Weather(link=name, down=False) for name in names))
    rig.sleep(seconds)
    rig.links.mend()
    return f"for {seconds:.0f} s"


# --- time and the machine --------------------------------------------------------------------------------------------


def shift_clocks(rig: Rig, rng: random.Random) -> str:
    """F-K1: the wall clocks of one gateway and one worker jump, and jump back."""
    hours = rng.choice((-1.0, 1.0))
    rig.shift_clocks(hours)
    rig.sleep(6.0)
    rig.shift_clocks(0.0)
    rig.sleep(1.5)  # they look once a second
    return f"{hours:+.0f} h for 6 s"


def starve(rig: Rig, rng: random.Random) -> str:
    """F-K2: four loops on what processors there are, each of which ends by itself."""
    log = rig.directory / "burner.log"
    loop = "import time; end = time.monotonic() + 6\nwhile time.monotonic() < end: pass"
    burners = [spawn([sys.executable, "-c", loop], log) for _ in range(4)]
    rig.sleep(6.0)
    for burner in burners:
        burner.wait()
    return "4 loops for 6 s"


# --- two at once -----------------------------------------------------------------------------------------------------


def kill_across(rig: Rig, rng: random.Random) -> str:
    """F-X: a gateway, a worker and the primary in the same moment."""
    gateway = rng.choice(rig.processes("gateway"))
    worker = rng.choice(rig.processes("worker"))
    primary = rig.replica_set.wait_primary()
    rig.kill(gateway)
    rig.kill(worker)
    primary.kill()
    rig.sleep(2.0)
    primary.start()
    rig.start(gateway, worker)
    return f"{gateway.name}, {worker.name}, {primary.name}"


def flush_and_kill(rig: Rig, rng: random.Random) -> str:
    """F-X: everything in Valkey is gone while a worker dies with a batch in hand."""
    worker = rng.choice(rig.processes("worker"))
    with rig.redis() as client:
        client.flushall()
        rig.kill(worker)
        rig.sleep(rng.uniform(0.0, 1.0))
        client.flushall()
    rig.start(worker)
    return worker.name


FAILOVER_BOUND: Final = 6.0 if ELECTION_MS <= 3000 else 15.0
"""reliability.md, F-M1: 15 s by default, 6 s with an election time-out of 3 s."""

FAULTS: Final = (
    Fault("F-W1", "worker kill -9", kill_worker, 6.0, "begin", "its shards stall, the others go on", often=True),
    Fault("F-W2", "worker SIGTERM", stop_worker, 1.0, "end", "it finishes its batch and gives its leases up"),
    Fault("F-W3", "worker SIGSTOP, then CONT", freeze_worker, 6.0, "begin", "another takes over", often=True),
    Fault("F-W4", "all workers dead", kill_all_workers, 20.0, "end", "no ack", silent_after_seconds=1.0),
    Fault("F-W5", "workers kill -9 in quick succession", kill_workers_in_a_row, 6.0, "end", "shards stall"),
    Fault("F-W6", "poison entries", poison, 20.0, "begin", "they become dead letters, the rest commits"),
    Fault("F-G1", "gateway kill -9", kill_gateway, 15.0, "begin", "phones come back elsewhere", often=True),
    Fault("F-G2", "gateway SIGTERM (drain)", drain_gateway, 1.0, "end", "phones migrate first", often=True),
    Fault("F-G3", "gateway SIGSTOP, then CONT", freeze_gateway, 5.0, "end", "its phones go elsewhere after 10 s"),
    Fault("F-G4", "gateway out of descriptors", exhaust_files, 1.0, "end", "who is in stays in"),
    Fault("F-G5", "rolling restart", rolling_restart, 1.0, "end", "nobody notices but by migrating"),
    Fault("F-R1", "Valkey kill -9, restart", kill_valkey, 5.0, "end", "sends fail fast", often=True),
    Fault("F-R2", "Valkey restart empty", empty_valkey, 10.0, "end", "everything is made again from MongoDB"),
    Fault("F-R3", "FLUSHALL", flush_valkey, 10.0, "end", "un-acked sends vanish and are sent again", often=True),
    Fault("F-R4", "Valkey SIGSTOP, then CONT", freeze_valkey, 5.0, "end", "every command ends within 2 s"),
    Fault("F-R5", "Valkey fails over to a lagging replica", fail_over, 10.0, "end", "the last second never was"),
    Fault("F-R6", "partition from Valkey", cut_off_from_valkey, 5.0, "end", "only that process suffers", often=True),
    Fault("F-R7", "Valkey full", fill_valkey, 5.0, "end", "`overloaded`"),
    Fault("F-R8", "pending entries trimmed", trim_ingest, None, "end", "counted as lost, sent again after 10 s"),
    Fault("F-R9", "Valkey's disk full (everysec)", fill_valkey_disk, 5.0, "end", "sends fail fast"),
    Fault("F-R9", "Valkey's disk full (always)", end_valkey_by_its_disk, 5.0, "end", "sends fail fast"),
    Fault("F-M1", "MongoDB primary kill -9", kill_primary, FAILOVER_BOUND, "begin", "acks pause", often=True),
    Fault("F-M2", "MongoDB primary SIGSTOP, then CONT", freeze_primary, 15.0, "begin", "acks pause"),
    Fault("F-M3", "MongoDB majority gone", lose_majority, 15.0, "end", "no ack at all", silent_after_seconds=1.0),
    Fault("F-M4", "MongoDB true rollback", roll_back, 20.0, "begin", "only what was not acked is taken back"),
    Fault("F-M5", "MongoDB slow", slow_mongodb, 5.0, "end", "batches grow"),
    Fault("F-M6", "MongoDB disks full", fill_disks, 20.0, "end", "no ack, no flood of dead letters"),
    Fault("F-M7", "MongoDB crowded, connections reset", crowd_mongodb, 5.0, "end", "retries"),
    Fault("F-M8", "low ends of logs expire", expire_logs, None, "end", "floors move, what is left is whole"),
    Fault("F-C1", "phones' links slow, lossy, then cut", bad_radio, None, "end", "retries"),
    Fault("F-C2", "phones' links half-open", half_open, None, "end", "the newer connection wins at once"),
    Fault("F-C3", "slow readers", slow_readers, 5.0, "end", "the others notice nothing"),
    Fault("F-C4", "everybody reconnects at once", kill_both_gateways, 10.0, "end", "admission is bounded"),
    Fault("F-K1", "wall clocks jump by an hour", shift_clocks, None, "end", "nothing"),
    Fault("F-K2", "processors starved", starve, 5.0, "end", "acks are later"),
    Fault("F-X", "gateway, worker and primary killed at once", kill_across, None, "end", "acks pause"),
    Fault("F-X", "FLUSHALL and a worker killed", flush_and_kill, None, "end", "un-acked sends vanish"),
)


def absent(rig: Rig) -> dict[str, str]:
    """Rows of the matrix that are not run here, and why."""
    reasons = {
        "F-W6 (crash)": "needs a defect in the product; tests/system/test_dead_letters.py has workers with one",
    }
    if not rig.disks:
        reasons["F-M6"] = reasons["F-R9"] = "not possible here: this machine does not let us mount a small disk"
    if not rig.has_clockwork:
        reasons["F-K1"] = "not possible here: libfaketime is not installed"
    return reasons


def chosen(rig: Rig) -> list[Fault]:
    """The rows that can be run here."""
    missing = absent(rig)
    return [fault for fault in FAULTS if fault.row not in missing]
