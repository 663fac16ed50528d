"""What breaks, and when: all from the seed. When `run` returns, everything stands again and nothing more will break."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from protocol import keys

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from bench.simulation.network import Network, Process
    from bench.simulation.phones import Phone
    from bench.simulation.processes import House
    from bench.simulation.replica_set import ReplicaSet
    from bench.simulation.valkey import Valkey

LOSSES: Final = frozenset(("wipe", "restart_empty", "restart_behind"))
"""Faults in which Redis loses entries."""
BLOWS: Final = (2, 7)
"""Faults of a run, at least and at most."""


class Nemesis:
    """The faults of one run."""

    def __init__(
        self,
        network: Network,
        house: House,
        valkey: Valkey,
        replica_set: ReplicaSet,
        rng: random.Random,
        stir: Callable[[float], None],
    ) -> None:
        """`stir`: has people say something within so many seconds, where a fault is worth nothing in silence."""
        self.blows: list[tuple[str, float, float]] = []
        """(fault, from, to)."""
        self._network = network
        self._house = house
        self._valkey = valkey
        self._set = replica_set
        self._rng = rng
        self._stir = stir
        self._runs = 0
        self._phones: list[Phone] = []
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (4, self._kill_worker),
            (3, self._pause_worker),
            (2, self._kill_gateway),
            (2, self._pause_gateway),
            (1, self._drain_worker),
            (1, self._drain_gateway),
            (4, self._fail_over),
            (2, self._wipe),
            (2, self._restart_empty),
            (3, self._restart_behind),
            (2, self._steal_leases),
            (2, self._stall_valkey),
            (2, self._cut_lines),
            (1, self._switch_off),
        ]

    async def run(self, ends: float, phones: list[Phone]) -> None:
        """Strike until then, and put everything back."""
        rng = self._rng
        self._phones = phones
        self._network.slow = rng.choice((0.0, 0.01, 0.03))
        self._valkey.faults.lost = rng.choice((0.0, 0.0, 0.002, 0.01))
        self._valkey.faults.refused_down = rng.choice((0.0, 0.0, 0.1, 0.3))
        self._valkey.faults.refused = rng.choice((0.0, 0.0, 0.0, 0.01))
        self._valkey.faults.repeated = rng.choice((0.0, 0.05, 0.2))
        self._valkey.keyspace.trims_roughly = rng.random() < 0.5
        self._set.faults.lost = rng.choice((0.0, 0.0, 0.005, 0.02))
        begins = self._network.now
        if self._valkey.faults.lost:
            self.blows.append(("lost_commands", begins, ends))
        moments = sorted(begins + rng.random() * (ends - begins) for _ in range(rng.randint(*BLOWS)))
        # In some runs Redis loses nothing, so that what it took must have become something.
        spared = LOSSES if rng.random() < 0.4 else frozenset()
        weights = [0 if blow.__name__.removeprefix("_") in spared else weight for weight, blow in self._kinds]
        async with trio.open_nursery() as nursery:
            for moment in moments:
                await trio.sleep_until(moment)
                ((_, blow),) = rng.choices(self._kinds, weights)
                nursery.start_soon(self._strike, blow)
        await trio.sleep_until(ends)
        self._stop()

    async def _strike(self, blow: Callable[[], Awaitable[None]]) -> None:
        name = blow.__name__.removeprefix("_")
        begun = self._network.now
        self._network.note("nemesis", name)
        await blow()
        self.blows.append((name, begun, self._network.now))

    def _stop(self) -> None:
        self._network.note("nemesis", "is gone")
        self.blows.append(("everything", self._network.now, self._network.now))
        self._network.slow = 0.0
        for faults in (self._valkey.faults, self._set.faults):
            faults.lost = 0.0
        self._valkey.faults.refused = self._valkey.faults.refused_down = self._valkey.faults.repeated = 0.0
        for phone in self._phones:
            phone.switch_on()

    def _some(self, processes: list[Process]) -> Process | None:
        alive = [process for process in processes if process.alive]
        return self._rng.choice(alive) if alive else None

    async def _soon(self, longest: float) -> None:
        await trio.sleep(self._rng.random() * longest)

    # --- processes ---------------------------------------------------------------------------------------------------

    async def _kill_worker(self) -> None:
        victim = self._some(self._house.workers)
        if self._rng.random() < 0.7:
            victim = await self._wait_for("write") or victim
            await self._soon(0.006)
        if victim is not None:
            victim.kill()
            await self._soon(1.0)
            self._house.start_worker()

    async def _wait_for(self, doing: str) -> Process | None:
        """The next worker that does this (`Network.ambushes`)."""
        passed = trio.Event()
        found: list[Process] = []

        def seize(process: Process) -> None:
            found.append(process)
            passed.set()

        self._network.ambushes[doing] = seize
        with trio.move_on_after(1.5):
            await passed.wait()
        return found[0] if found and found[0] in self._house.workers else None

    async def _kill_gateway(self) -> None:
        victim = self._some(self._house.gateways)
        if victim is not None:
            victim.kill()
            await self._soon(1.0)
            self._house.start_gateway()

    async def _pause_worker(self) -> None:
        victim = self._some(self._house.workers)
        if self._rng.random() < 0.4:
            victim = await self._wait_for("write") or victim
        await self._pause(victim)

    async def _pause_gateway(self) -> None:
        await self._pause(self._some(self._house.gateways))

    async def _pause(self, victim: Process | None) -> None:
        if victim is not None and not victim.paused:
            victim.pause()
            # A lease lasts 5 s: some pauses outlast it.
            await self._soon(7.0 if self._rng.random() < 0.6 else 0.3)
            self._stir(0.05)
            victim.resume()

    async def _drain_worker(self) -> None:
        await self._drain(self._some(self._house.workers))
        self._house.start_worker()

    async def _drain_gateway(self) -> None:
        self._house.start_gateway()
        await self._drain(self._some(self._house.gateways[:-1]))

    async def _drain(self, victim: Process | None) -> None:
        if victim is not None and victim.stopping is not None:
            self._network.note("drain", victim.name)
            victim.stopping.set()
            with trio.move_on_after(3.0):
                await victim.ended.wait()
            victim.kill()

    # --- MongoDB -----------------------------------------------------------------------------------------------------

    async def _fail_over(self) -> None:
        self._set.stall(20.0)
        await self._soon(6.5 if self._rng.random() < 0.3 else 0.6)
        if self._rng.random() < 0.5:
            # Writers look again what became of what only the primary has.
            self._set.reset()
            if self._rng.random() < 0.5:
                await self._wait_for("load")
                await self._soon(0.015)
            else:
                await self._soon(0.4)
        self._set.fail_over(self._rng.random() * (3.0 if self._rng.random() < 0.3 else 0.5))

    # --- Valkey ------------------------------------------------------------------------------------------------------

    async def _wipe(self) -> None:
        self._valkey.wipe()

    async def _restart_empty(self) -> None:
        await self._restart(None)

    async def _restart_behind(self) -> None:
        """It comes back with what it had a moment before: a replica was promoted, or a log was behind."""
        copy = self._valkey.keyspace.copy()
        await self._soon(1.0)
        await self._restart(copy)

    async def _restart(self, copy: object) -> None:
        if self._valkey.down:
            return
        self._valkey.stop()
        await self._soon(1.5)
        self._runs += 1
        self._valkey.start(f"run{self._runs}", copy)  # type: ignore[arg-type]  # what `copy` gave

    async def _stall_valkey(self) -> None:
        self._valkey.stalled_until = self._network.now + self._rng.random() * 3.0

    async def _steal_leases(self) -> None:
        """Somebody deletes the leases, or writes another's name into them."""
        self._network.note("valkey", "leases stolen")
        self._stir(1.0)
        space = self._valkey.keyspace
        for shard in range(2):
            key = keys.lease(shard).encode()
            if self._rng.random() < 0.5:
                space.remove(key)
            else:
                space.execute(b"SET", [key, b"worker-thief", b"PX", b"%d" % self._rng.randint(10, 3000)])

    # --- lines -------------------------------------------------------------------------------------------------------

    async def _cut_lines(self) -> None:
        for phone in self._phones:
            if phone.line is not None and self._rng.random() < 0.6:
                phone.line.cut()

    async def _switch_off(self) -> None:
        phone = self._rng.choice(self._phones)
        phone.switch_off()
        await self._soon(4.0)
        phone.switch_on()
