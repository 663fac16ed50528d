"""Time, processes and what is on its way between them.

One Trio run is one world. Its clock stands still while anything can run and then jumps to whatever is due next. Every
message between processes is an event of the network with a delay from the seed; a process is a set of tasks that can be
killed at any await or held still for a while. Trio's own choice among runnable tasks comes from the same seed.
"""

from __future__ import annotations

import heapq
import traceback
from collections import deque
from contextvars import ContextVar
from math import ceil
from typing import TYPE_CHECKING, Any, Final

import trio
from trio._core import _run as trio_run  # the only way to its scheduler's dice and queue

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine

EPOCH_MS: Final = 1_800_000_000_000
"""Wall clock of every world at its start."""

TICKS: Final = 2048
"""Per second."""

OWNER: ContextVar[Process | None] = ContextVar("owner", default=None)
"""The process a task belongs to; inherited by the tasks it starts."""


class Process:
    """A set of tasks that lives, stands still and dies together."""

    def __init__(self, name: str, network: Network) -> None:
        self.name = name
        self.network = network
        self.alive = True
        self.paused = False
        self.stopping: Any = None
        """Set by whoever starts it, for an orderly end."""
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.on_kill: list[Callable[[], None]] = []
        """What the rest of the world sees at once when this process dies: its sockets close."""
        self._held_tasks: list[trio.lowlevel.Task] = []
        self._held_events: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    async def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`main` and everything it starts, to the end."""
        OWNER.set(self)
        try:
            with self.scope:
                await main()
        except Exception:  # noqa: BLE001 -- boundary "process": its end is kept for the verdict
            self.network.crashes.append(traceback.format_exc())
        finally:
            self.alive = False
            self.ended.set()

    def kill(self) -> None:
        """Ends wherever its tasks stand. Nothing it does on its way out reaches anybody."""
        if self.alive:
            self.alive = False
            self.network.note("kill", self.name)
            for close in self.on_kill:
                close()
            self._held_events.clear()
            self.resume()
            self.scope.cancel()

    def pause(self) -> None:
        """Stands still: no task of it runs, what reaches it waits."""
        self.paused = True
        self.network.note("pause", self.name)

    def resume(self) -> None:
        """Goes on where it stood."""
        if self.paused:
            self.paused = False
            self.network.note("resume", self.name)
            tasks, self._held_tasks = self._held_tasks, []
            events, self._held_events = self._held_events, []
            trio_run.GLOBAL_RUN_CONTEXT.runner.runq.extend(tasks)
            for call, arguments in events:
                self.network.at(0.0, self, call, *arguments)

    def hold_task(self, task: trio.lowlevel.Task) -> None:
        self._held_tasks.append(task)

    def hold_event(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._held_events.append((call, arguments))


class _RunQueue(deque[trio.lowlevel.Task]):
    """Trio's queue of runnable tasks, but those of a paused process wait there."""

    def append(self, task: trio.lowlevel.Task) -> None:
        owner = task.context.get(OWNER)
        if owner is not None and owner.paused:
            owner.hold_task(task)
        else:
            super().append(task)


class NoSockets:
    """Trio's I/O manager of a world, in which there is nothing to poll: no turn of the scheduler asks the kernel."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        """Trio's own socket, by which other threads would wake it."""
        return getattr(self._real, name)

    def get_events(self, _timeout: float) -> tuple[()]:
        return ()

    def process_events(self, _events: object) -> None:
        pass


class Clock(trio.abc.Clock):
    """Seconds since the world began; jumps when nothing can run."""

    def __init__(self) -> None:
        self.now = 1.0
        self.network: Network | None = None

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Trio asks when it has nothing to run: time passes here and only here, until something can run again."""
        network = self.network
        if network is not None:
            network.pass_time(self, deadline)
        return 0.0


class Answer:
    """What one task waits for."""

    __slots__ = ("error", "task", "value")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.value: Any = None
        self.error: BaseException | None = None

    def give(self, value: Any = None, error: BaseException | None = None) -> None:
        """Once; afterwards it is ignored, and so it is where nobody waits any more."""
        task, self.task = self.task, None
        if task is not None:
            self.value, self.error = value, error
            trio.lowlevel.reschedule(task)

    @property
    def awaited(self) -> bool:
        return self.task is not None

    async def wait(self) -> Any:
        """*Cancellation*: what comes later is dropped."""
        self.task = trio.lowlevel.current_task()

        def leave(_raise_cancel: object) -> trio.lowlevel.Abort:
            self.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)
        if self.error is not None:
            raise self.error
        return self.value


class Network:
    """All that is on its way. `rng` decides every delay; `trace` collects what happened where it is a list."""

    def __init__(self, clock: Clock, rng: random.Random) -> None:
        self.rng = rng
        self.trace: list[str] | None = None
        self.events = 0
        self.crashes: list[str] = []
        self.ambushes: dict[str, Callable[[Process], None]] = {}
        """Called once, with the next process that does this: `write` (acknowledges or inserts) or `load` (looks where
        logs end). For faults that wait for their moment."""
        self.slow = 0.02
        """Part of the messages that take long."""
        self._clock = clock
        self._heap: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._counter = 0
        self._runnable: deque[trio.lowlevel.Task] = deque()
        self._sockets: Any = None
        """Trio's own, while the world has none."""
        clock.network = self

    @property
    def now(self) -> float:
        return self._clock.now

    def wall_ms(self) -> int:
        return EPOCH_MS + int(self._clock.now * 1000)

    def note(self, *what: object) -> None:
        """Say what happened, for `--trace`."""
        if self.trace is not None:
            self.trace.append(f"{self._clock.now:10.6f} " + " ".join(map(str, what)))

    def pass_by(self, owner: Process | None, doing: str) -> None:
        """This process is about to do something that a fault may wait for."""
        if owner is not None and (ambush := self.ambushes.pop(doing, None)) is not None:
            ambush(owner)

    def delay(self) -> float:
        """How long a message is under way: around a millisecond, seldom much longer."""
        rng = self.rng
        if rng.random() < self.slow:
            return rng.random() * 0.8
        return 0.0002 + rng.random() * 0.002

    def at(self, delay: float, owner: Process | None, call: Callable[..., None], *arguments: Any) -> float:
        """Call back after a delay, in `owner` (None: outside of all processes); not where it is dead by then.

        Returns when.
        """
        due = self._clock.now + delay
        self.at_time(due, owner, call, *arguments)
        return due

    def at_time(self, due: float, owner: Process | None, call: Callable[..., None], *arguments: Any) -> None:
        """The same at a moment of the clock. What is due at one moment happens in the order it was asked for."""
        self._counter += 1
        # To the next tick, so that what happens at about the same time meets in one turn of the scheduler.
        due = ceil(due * TICKS) / TICKS
        heapq.heappush(self._heap, (due, self._counter, owner, call, arguments))

    def join(self) -> None:
        """Called inside of the run: from now on the processes' tasks can be held."""
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        self._runnable = runner.runq = _RunQueue(runner.runq)  # the one of this run only
        self._sockets = runner.io_manager
        runner.io_manager = NoSockets(self._sockets)  # type: ignore[assignment]

    def leave(self) -> None:
        """The world is over: Trio closes down on its own."""
        self._clock.network = None
        trio_run.GLOBAL_RUN_CONTEXT.runner.io_manager = self._sockets

    def pass_time(self, clock: Clock, deadline: float) -> None:
        """Carry out what is due before `deadline`, each at its time, until a task can run."""
        heap = self._heap
        while not self._runnable:
            due = heap[0][0] if heap else float("inf")
            if deadline < due or due == float("inf"):
                if deadline == float("inf"):
                    raise RuntimeError("the world stands still: no task can run, and nothing is due")
                clock.now = max(clock.now, deadline)
                return
            clock.now = max(clock.now, due)
            while heap and heap[0][0] <= clock.now:
                _, _, owner, call, arguments = heapq.heappop(heap)
                self.events += 1
                if owner is not None and owner.paused:
                    owner.hold_event(call, arguments)
                elif owner is None or owner.alive:
                    self._carry_out(call, arguments)

    def _carry_out(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """What fails here is kept for the verdict: the world goes on, so that it can come to its end."""
        try:
            call(*arguments)
        except Exception:  # noqa: BLE001 -- boundary "process": a bug of whoever is called, or of a twin
            self.crashes.append(traceback.format_exc())


def make_deterministic(rng: random.Random) -> None:
    """Trio's dice are ours: the order of runnable tasks follows from the seed."""
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r = rng  # as trio's own test tools do
