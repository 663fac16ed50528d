"""What is done to Valkey: scripts of the rows F-R* (see `faults`)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from bench.chaos.links import Weather
from bench.services import ServicesError
from protocol import keys

if TYPE_CHECKING:
    import random

    from bench.chaos.disks import Disk
    from bench.chaos.rig import Rig

LAG_SECONDS: Final = 1.0
"""What a replica is behind its primary when that dies."""
PROMOTION_SECONDS: Final = 1.0
"""Until somebody has seen that the primary is dead."""
EXIT_SECONDS: Final = 15.0


def kill_valkey(rig: Rig, rng: random.Random) -> str:
    """F-R1: it comes back with its append-only file, up to a second short."""
    rig.valkey.kill()
    rig.sleep(3.0)
    rig.valkey.start_ready()
    return "back after 3 s"


def empty_valkey(rig: Rig, rng: random.Random) -> str:
    """F-R2."""
    rig.valkey.kill()
    rig.valkey.forget()
    rig.sleep(rng.uniform(0.5, 3.0))
    rig.valkey.start_ready()
    return "back empty"


def flush_valkey(rig: Rig, rng: random.Random) -> str:
    """F-R3."""
    with rig.redis() as client:
        client.flushall()
    return "FLUSHALL"


def freeze_valkey(rig: Rig, rng: random.Random) -> str:
    """F-R4."""
    seconds = rng.uniform(3.0, 10.0)
    rig.valkey.pause()
    rig.sleep(seconds)
    rig.valkey.resume()
    return f"for {seconds:.1f} s"


def cut_off_from_valkey(rig: Rig, rng: random.Random) -> str:
    """F-R6: one gateway or worker, cut (resets), silent both ways, or one way."""
    name = rng.choice([*rig.links.named("gateway"), *rig.links.named("worker")])
    how, weather = rng.choice(
        (
            ("cut", Weather(link=name, refuses=True)),
            ("silent", Weather(link=name, up=False, down=False)),
            ("no requests pass", Weather(link=name, up=False)),
            ("no answers pass", Weather(link=name, down=False)),
        )
    )
    seconds = rng.uniform(4.0, 10.0)
    rig.links.set(weather)
    rig.sleep(seconds)
    rig.links.mend()
    return f"{name}: {how} for {seconds:.1f} s"


def fill_valkey(rig: Rig, rng: random.Random) -> str:
    """F-R7: any write is refused; what only reads or removes goes on."""
    seconds = rng.uniform(3.0, 6.0)
    with rig.redis() as client:
        client.config_set("maxmemory", "1")
        try:
            rig.sleep(seconds)
        finally:
            client.config_set("maxmemory", "0")
    return f"for {seconds:.1f} s"


def trim_ingest(rig: Rig, rng: random.Random) -> str:
    """F-R8: somebody trims entries that are pending or not even read."""
    with rig.redis() as client:
        for _ in range(20):
            pipeline = client.pipeline(transaction=False)
            for shard in range(keys.DEFAULT_SHARDS):
                pipeline.xtrim(keys.ingest(shard), maxlen=0, approximate=False)
            pipeline.execute()
            rig.sleep(0.05)
    return "20 times"


def fail_over(rig: Rig, rng: random.Random) -> str:
    """F-R5: the primary dies for good, and a replica that has not had its last second takes over."""
    primary, replica = rig.valkey, rig.standby
    replica.forget()
    replica.start_ready()
    with primary.client() as client:
        client.config_set("repl-diskless-sync-delay", "0")
    replica.follow(rig.links.ports["replica"])
    rig.sleep(0.5)
    rig.links.set(Weather(link="replica", down=False))
    rig.sleep(LAG_SECONDS)
    lost = primary.offset() - replica.offset()
    primary.kill()
    rig.links.set(Weather(link="replica", refuses=True))  # what is still on its way is lost too
    rig.sleep(PROMOTION_SECONDS)
    replica.promote()
    rig.fail_over()
    if lost <= 0:
        raise ServicesError("the replica had everything")
    return f"{replica.name} for {primary.name}, {lost:,} bytes of {LAG_SECONDS:.0f} s lost"


def fill_valkey_disk(rig: Rig, rng: random.Random) -> str:
    """F-R9, everysec: it refuses every write until there is room again."""
    seconds = rng.uniform(3.0, 6.0)
    disk = _valkey_disk(rig)
    disk.fill()
    rig.sleep(seconds)
    refused = rig.valkey.refuses_writes()
    disk.free()
    if not refused:
        raise ServicesError("it takes writes that it has no room for")
    return f"for {seconds:.1f} s: MISCONF"


def end_valkey_by_its_disk(rig: Rig, rng: random.Random) -> str:
    """F-R9, always: a write that it cannot keep ends it; it is started again when there is room."""
    disk = _valkey_disk(rig)
    with rig.redis() as client:
        client.config_set("appendfsync", "always")
    disk.fill()
    deadline = time.monotonic() + EXIT_SECONDS
    while rig.valkey.is_running and time.monotonic() < deadline:
        rig.sleep(0.1)
    has_ended = not rig.valkey.is_running
    rig.sleep(2.0)
    disk.free()
    if not has_ended:
        raise ServicesError("it goes on without room for what it promised to keep")
    rig.valkey.start_ready()
    return "it ended itself; back after 2 s"


def _valkey_disk(rig: Rig) -> Disk:
    if rig.valkey_disk is None:
        raise ServicesError("there is no small disk")
    return rig.valkey_disk
