"""All that runs in a chaos run: Valkey, three mongods, the links between, two gateways, two workers, REST, the crowd.

    phones ── gateways ── links ── Valkey ── links ── workers ── links ── mongod ×3 ── links ── mongod ×3
      └─ links ─┘  (a quarter of the phones comes through links)

One worker and one gateway run under libfaketime, where it is installed, so that their wall clocks can jump.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from bench.chaos.crowd import Look
from bench.chaos.disks import Disk, make_disk, own_mounts
from bench.chaos.links import Weather
from bench.chaos.replica_set import ReplicaSet
from bench.chaos.samples import Sample
from bench.chaos.server import Valkey
from bench.driver_process import DriverProcess, open_driver
from bench.services import HOST, Services, free_port
from bench.stack import WS_PATH, Process, Stack, run_stack, start_again, wait_ready

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import redis

    from bench.chaos.crowd import Talk

GATEWAYS: Final = 2
WORKERS: Final = 2
MEMBERS: Final = 3
FAKETIME: Final = tuple(
    Path(place) / "faketime/libfaketime.so.1" for place in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu")
)
CLOCKWORK: Final = ("gateway-2", "worker-2")
"""Whose wall clock can jump."""
SMALL_DISKS: Final = ("mongod-2", "mongod-3")
VALKEY_DISK: Final = "valkey"
DRIVER_NAME: Final = "trireme-workers"
"""What the workers' and REST's MongoDB driver calls itself in its handshake."""
COMMAND_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.2
DRAIN_SECONDS: Final = 4.0


class Answer(msgspec.Struct):
    """Of the crowd, to a `Look`."""

    samples: list[Sample]
    acked: int
    refused: list[str]


class Rig:
    """The running system with hands on every part of it. Everything is synchronous: faults are scripts."""

    def __init__(
        self,
        directory: Path,
        stack: Stack,
        valkeys: tuple[Valkey, Valkey],
        replica_set: ReplicaSet,
        links: Links,
        disks: Sequence[Disk],
        valkey_disk: Disk | None,
        clock_file: Path | None,
    ) -> None:
        self.directory = directory
        self.stack = stack
        self.valkey, self.standby = valkeys
        """The one that serves, and the one that does not run but to take over from it."""
        self.replica_set = replica_set
        self.links = links
        self.disks = list(disks)
        """Under members of the set; empty where the machine does not allow it."""
        self.valkey_disk = valkey_disk
        """Under both Valkeys; None where the machine does not allow it."""
        self.talks: Sequence[Talk] = ()
        """Of the present chapter."""
        self.crowd: DriverProcess | None = None
        self.samples: list[Sample] = []
        """Of the present chapter."""
        self.acked = 0
        self.troubles: list[str] = []
        """What should not have happened and no message shows."""
        self._clock_file = clock_file

    # --- time passes -------------------------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Let the load go on for so long, and look at it."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
            self.look()

    def look(self) -> None:
        """Fetch what the crowd has seen since the last look. Raises DriverError."""
        if self.crowd is None:
            return
        answer = msgspec.convert(self.crowd.command(Look(), COMMAND_SECONDS), Answer)
        self.samples += answer.samples
        self.acked = answer.acked
        self.troubles += [text for text in answer.refused if text not in self.troubles]

    # --- the system's own processes ----------------------------------------------------------------------------------

    def processes(self, role: str) -> list[Process]:
        """gateway or worker."""
        return [process for process in self.stack.processes if process.role == role]

    def kill(self, process: Process) -> None:
        """SIGKILL, and wait until it is gone."""
        process.popen.kill()
        process.popen.wait()

    def terminate(self, process: Process) -> None:
        """SIGTERM; until it has drained and ended. One that does not end in time is killed, and told of."""
        process.popen.terminate()
        deadline = time.monotonic() + DRAIN_SECONDS + 4.0
        while process.popen.poll() is None and time.monotonic() < deadline:
            self.sleep(0.05)
        if process.popen.poll() is None:
            self.troubles.append(f"{process.name} did not end {DRAIN_SECONDS + 4:.0f} s after SIGTERM")
            self.kill(process)
        elif process.popen.returncode != 0:
            self.troubles.append(f"{process.name} ended with status {process.popen.returncode} after SIGTERM")

    def pause(self, process: Process) -> None:
        process.popen.send_signal(signal.SIGSTOP)

    def resume(self, process: Process) -> None:
        process.popen.send_signal(signal.SIGCONT)

    def start(self, *processes: Process) -> list[Process]:
        """Start the successors of ended ones, and wait until those with a health page are ready."""
        started = [start_again(self.stack, process) for process in processes]
        wait_ready(started)
        return started

    @staticmethod
    def open_files(pid: int) -> int:
        """Descriptors this process has open."""
        return len(os.listdir(f"/proc/{pid}/fd"))

    def mend(self) -> None:
        """Whatever a fault has left behind: everything runs, every link is good."""
        self.links.mend()
        for disk in (*self.disks, *filter(None, (self.valkey_disk,))):
            disk.free()
        for process in list(self.stack.processes):
            if process.popen.poll() is None:
                self.resume(process)
            else:
                self.troubles.append(f"{process.name} had ended with status {process.popen.returncode}")
                self.start(process)
        for member in self.replica_set.members:
            if member.is_running:
                member.resume()
            else:
                member.start()
        if self.valkey.is_running:
            self.valkey.resume()
        else:
            self.valkey.start_ready()

    def redis(self) -> redis.Redis:
        """A client of Valkey itself, around the links."""
        return self.valkey.client()

    def fail_over(self) -> None:
        """The standby serves from now on: every link to Valkey leads there."""
        self.valkey, self.standby = self.standby, self.valkey
        names = [*self.links.named("gateway"), *self.links.named("worker"), "valkey", "replica"]
        self.links.set(*(Weather(link=name, port=self.valkey.port) for name in names))

    # --- clocks ------------------------------------------------------------------------------------------------------

    @property
    def has_clockwork(self) -> bool:
        return self._clock_file is not None

    def shift_clocks(self, hours: float) -> None:
        """The wall clocks of `CLOCKWORK` are so many hours off from now on."""
        if self._clock_file is not None:
            _write_whole(self._clock_file, f"{hours * 3600:+.0f}")


class Links:
    """The process of the links, and what each is called: gateway-1, worker-1, …, valkey (everybody else) and replica (a
    standby): to Valkey; mongod-1, …: to a member; phones-1, …: to a gateway."""

    def __init__(self, process: DriverProcess, ports: dict[str, int]) -> None:
        self.ports = ports
        self._process = process
        self._changed: set[str] = set()

    def set(self, *weathers: Weather) -> None:
        """From now on. Raises DriverError."""
        for weather in weathers:
            self._process.command(weather, COMMAND_SECONDS)
            self._changed.add(weather.link)

    @staticmethod
    def open_files(pid: int) -> int:
        """Descriptors this process has open."""
        return len(os.listdir(f"/proc/{pid}/fd"))

    def mend(self) -> None:
        """Good weather everywhere."""
        self.set(*(Weather(link=name) for name in sorted(self._changed)))
        self._changed.clear()

    def named(self, prefix: str) -> list[str]:
        """All links whose name begins so."""
        return [name for name in self.ports if name.startswith(prefix)]


def _write_whole(path: Path, text: str) -> None:
    """Nobody reads half of it."""
    draft = path.with_suffix(".new")
    draft.write_text(text + "\n")
    draft.replace(path)


@contextmanager
def open_rig(directory: Path) -> Iterator[Rig]:
    """Bring everything up, without a crowd. Raises StackError, ServicesError, DriverError.

    Resource handling: every process ends with the block, or with this process however it ends.
    """
    with ExitStack() as exits:
        ports = {f"mongod-{place}": free_port() for place in range(1, MEMBERS + 1)}
        redis_port = free_port()
        gateway_ports = [free_port() for _ in range(GATEWAYS)]
        targets = {
            **ports,
            **{f"gateway-{place}": redis_port for place in range(1, GATEWAYS + 1)},
            **{f"worker-{place}": redis_port for place in range(1, WORKERS + 1)},
            **dict.fromkeys(("valkey", "replica"), redis_port),
            **{f"phones-{place}": port for place, port in enumerate(gateway_ports, 1)},
        }
        links = exits.enter_context(_open_links(targets))
        disks, valkey_disk = _make_disks(directory, exits)
        valkeys = _valkeys(directory, redis_port)
        for valkey in valkeys:
            exits.callback(valkey.end)
        valkeys[0].start_ready()
        replica_set = ReplicaSet(directory, list(ports.values()), links.ports)
        for member in replica_set.members:
            exits.callback(member.end)
        replica_set.start()
        clock_file, clockwork = _clockwork(directory)
        own: dict[str, dict[str, str]] = {
            name: {"TRIREME_REDIS_URL": f"redis://{HOST}:{links.ports[name]}"}
            for name in targets
            if name.startswith(("gateway", "worker"))
        }
        for place, port in enumerate(gateway_ports, 1):
            own[f"gateway-{place}"]["TRIREME_GATEWAY_PORT"] = str(port)
        for name in CLOCKWORK:
            own[name].update(clockwork)
        backing = Services(f"redis://{HOST}:{links.ports['valkey']}", replica_set.url, {"valkey": valkeys[0].pid})
        stack = exits.enter_context(
            run_stack(
                gateways=GATEWAYS,
                workers=WORKERS,
                settings={"TRIREME_DRAIN_SECONDS": str(DRAIN_SECONDS)},
                own_settings=own,
                services=backing,
                data_dir=directory,
            )
        )
        rig = Rig(directory, stack, valkeys, replica_set, links, disks, valkey_disk, clock_file)
        exits.callback(_let_go, rig)
        yield rig


def _let_go(rig: Rig) -> None:
    """A stopped process cannot end."""
    for process in rig.stack.processes:
        if process.popen.poll() is None:
            rig.resume(process)
    rig.valkey.resume()
    for member in rig.replica_set.members:
        member.resume()


@contextmanager
def _open_links(targets: dict[str, int]) -> Iterator[Links]:
    arguments = [f"{name}={port}" for name, port in targets.items()]
    with open_driver("bench.chaos.links", *arguments) as process:
        yield Links(process, process.answer(COMMAND_SECONDS))


def _make_disks(directory: Path, exits: ExitStack) -> tuple[list[Disk], Disk | None]:
    """Under the data of the second and the third member (the first alone is no majority), and under Valkey's."""
    if not own_mounts():
        return [], None
    made = [make_disk(directory / f"{name}.img", directory / name) for name in (*SMALL_DISKS, VALKEY_DISK)]
    found = [disk for disk in made if disk is not None]
    for disk in found:
        exits.callback(disk.unmount)
    return (found[:-1], found[-1]) if len(found) == len(made) else ([], None)


def _valkeys(directory: Path, port: int) -> tuple[Valkey, Valkey]:
    """The one that serves first, and its standby."""
    data = directory / VALKEY_DISK
    return (
        Valkey("valkey-1", data, port, directory / "valkey-1.log"),
        Valkey("valkey-2", data, free_port(), directory / "valkey-2.log"),
    )


def _clockwork(directory: Path) -> tuple[Path | None, dict[str, str]]:
    """The file that says how far off the clocks are, and the environment that makes a process read it every second."""
    library = next((path for path in FAKETIME if path.exists()), None)
    if library is None:
        return None, {}
    clock_file = directory / "clock"
    _write_whole(clock_file, "+0")
    return clock_file, {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock_file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def phone_urls(rig: Rig) -> list[list[str]]:
    """Sets of gateway addresses for the phones: one of four comes through links, the others go straight."""
    straight = list(rig.stack.ws_urls)
    through = [f"ws://{HOST}:{rig.links.ports[name]}{WS_PATH}" for name in rig.links.named("phones")]
    return [straight, straight, straight, through]
