"""Tasks in hand: one after the other in each conversation, within each agent's bound, until each of them is done.

`take` is called by the role for what the stream and the sweep bring. A task is finished when its answer's commit was
seen, or when nobody will answer it, which the conversation is told. Until then it stays in MongoDB, so whoever takes
this process' place asks again; the answer's key keeps that from being a second answer.

*Cancellation*: safe anywhere, for the same reason.
"""

from __future__ import annotations

import random
from bisect import insort
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import anyio
import anyio.abc
import structlog

from protocol import keys, webhooks
from workers import metrics
from workers.agents.calls import Answer, Caller, Failure
from workers.agents.classes import Context
from workers.agents.replies import now_ms
from workers.breaker import Breaker, BreakerOpen
from workers.broker import BrokerUnavailable
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from protocol.models import Agent, AgentKind
    from workers.agents.replies import Replies
    from workers.agents.routing import Route, Router
    from workers.settings import Settings
    from workers.store import Store
    from workers.store.agent_tasks import Task

IN_HAND: Final = 2000
"""Tasks that one process has taken: each may hold 48 KiB. More wait in the stream and in MongoDB."""
LANE_TASKS: Final = 50
"""Of one conversation: whoever writes faster than an agent answers takes no room from others."""
FINISHED_KEPT: Final = 10_000
"""Tasks whose end is remembered here, so that one that comes again by the stream is not asked again."""
AGENTS_KEPT: Final = 1000
"""Agents whose bound and breaker are remembered; idle ones are forgotten past it."""
SHOWN_AFTER_SECONDS: Final = 0.5
"""An agent that answers sooner is not shown at work."""
TYPING_EVERY_SECONDS: Final = 4.0
"""Typing ends by itself after 6 s."""
PROGRESS_SPACING_SECONDS: Final = 0.2
_FLUSH_SECONDS: Final = 0.05
_PAUSE_SECONDS: Final = 1.0
_AT_ONCE_MS: Final = 1000
"""A message older than this was waiting for something else than its way."""

log = structlog.get_logger(__name__)


class _Desk:
    """One agent's place in this process: how many calls at once, and whether it is spared for now."""

    def __init__(self, agent: Agent) -> None:
        self.room = anyio.CapacityLimiter(agent.concurrency)
        self.breaker = Breaker("agent", webhooks.FAILURES_TO_OPEN, webhooks.OPEN_SECONDS)


class Runner:
    """The agents of this process at work."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        router: Router,
        callers: Mapping[AgentKind, Caller],
        replies: Replies,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        self._settings = settings
        self._store = store
        self._router = router
        self._callers = callers
        self._replies = replies
        self._tasks = tasks
        self._lanes: dict[str, list[Task]] = {}
        """Conversation → its tasks that wait behind the one at work."""
        self._in_hand: set[str] = set()
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._done: list[str] = []
        """Finished, and not written down yet."""
        self._broken: list[tuple[str, str]] = []
        """(task, error) of those that met a bug, and are not written down yet."""
        self._desks: OrderedDict[str, _Desk] = OrderedDict()
        self.room_left = anyio.Event()
        self.holds: Callable[[int], bool] = lambda _: True
        """Is this partition ours?"""
        self.share = 1
        """Processes among which each agent's bound is shared out."""

    @property
    def in_hand(self) -> int:
        """Tasks taken and not finished."""
        return len(self._in_hand)

    @property
    def has_room(self) -> bool:
        return len(self._in_hand) < IN_HAND

    def wants(self, message_id: str, conversation_id: str) -> bool:
        """Is this one neither in hand nor finished, and is there room for it?"""
        if message_id in self._in_hand or message_id in self._finished:
            return False
        return self.has_room and len(self._lanes.get(conversation_id, ())) < LANE_TASKS

    def take(self, tasks: Iterable[Task]) -> None:
        """Put tasks into their lanes, in the order of the log. Never awaits. One that finds no room is found again."""
        for task in tasks:
            if not self.wants(task.message_id, task.conversation_id):
                continue
            self._in_hand.add(task.message_id)
            lane = self._lanes.get(task.conversation_id)
            if lane is None:
                lane = self._lanes[task.conversation_id] = []
                self._tasks.start_soon(self._run_lane, task.conversation_id, name="agent lane")
            insort(lane, task, key=lambda waiting: waiting.event.sequence_number)
        metrics.AGENT_TASKS_IN_HAND.set(len(self._in_hand))

    async def _run_lane(self, conversation_id: str) -> None:
        lane = self._lanes[conversation_id]
        while lane:
            task = lane.pop(0)
            if self.holds(task.partition):
                await self._see_through(task)
                self._finished[task.message_id] = None
                while len(self._finished) > FINISHED_KEPT:
                    self._finished.popitem(last=False)
            self._in_hand.discard(task.message_id)
            self.room_left.set()
        del self._lanes[conversation_id]
        metrics.AGENT_TASKS_IN_HAND.set(len(self._in_hand))

    async def _see_through(self, task: Task) -> None:
        """Until the task is done; servers that are away are waited for."""
        while True:
            try:
                outcome = await self._serve(task)
            except (StoreUnavailable, BrokerUnavailable) as error:
                log.warning("agent_task_waits", message_id=task.message_id, error=str(error)[:200])
                await anyio.sleep(_PAUSE_SECONDS)
                continue
            except Exception as error:  # boundary "record": this task fails, the others go on
                log.error("agent_task_broke", message_id=task.message_id, exc_info=error)
                self._broken.append((task.message_id, type(error).__name__))
                outcome = "failed"
            metrics.AGENT_TASKS.labels(outcome).inc()
            log.debug("agent_task_done", message_id=task.message_id, outcome=outcome)
            return

    async def _serve(self, task: Task) -> str:
        """Ask and answer; what became of it."""
        route = await self._router.route(task)
        if route is None or route.agent.kind not in self._callers:
            # Nobody is there; or somebody who reads and answers by a connection of its own.
            self._done.append(task.message_id)
            return "unanswerable" if route is None else "silent"
        desk = self._desk(route.agent)
        async with desk.room:
            found, in_time = await self._ask(task, route, desk)
        if isinstance(found, Answer):
            refused = None if found.text is None else await self._replies.say(task, route.speaker_id, found.text)
            self._done.append(task.message_id)
            if refused is not None:
                log.info("agent_answer_refused", message_id=task.message_id, code=refused.value)
                return "refused"
            return "silent" if found.text is None else "answered"
        log.warning("agent_failed", agent_id=route.agent.agent_id, message_id=task.message_id, reason=found.reason)
        await self._replies.give_up(task, route.speaker_id, in_time=in_time)
        await self._store.agent_tasks.fail(task.message_id, route.agent.agent_id, found.reason, datetime.now(UTC))
        return "failed" if in_time else "timeout"

    def _desk(self, agent: Agent) -> _Desk:
        desk = self._desks.get(agent.agent_id)
        if desk is None:
            for name in [name for name, other in self._desks.items() if not other.room.borrowed_tokens]:
                if len(self._desks) < AGENTS_KEPT:
                    break
                del self._desks[name]
            desk = self._desks[agent.agent_id] = _Desk(agent)
        self._desks.move_to_end(agent.agent_id)
        desk.room.total_tokens = max(1, agent.concurrency // self.share)
        return desk

    # --- one agent asked about one message ---------------------------------------------------------------------------

    async def _ask(self, task: Task, route: Route, desk: _Desk) -> tuple[Answer | Failure, bool]:
        """Its answer, or the last failure and whether it came in time."""
        age_ms = now_ms() - keys.made_at_ms(task.message_id)
        if age_ms < _AT_ONCE_MS:
            metrics.AGENT_ROUTING_SECONDS.observe(age_ms / 1000)
        seconds = route.agent.timeout_seconds
        found: Answer | Failure = Failure(f"no answer within {seconds:g} s")
        async with anyio.create_task_group() as group:
            group.start_soon(self._show, task, route)
            with anyio.move_on_after(seconds) as scope:
                found = await self._try(task, route, desk)
            group.cancel_scope.cancel()
        if scope.cancelled_caught:
            desk.breaker.failed()
        return found, not scope.cancelled_caught

    async def _try(self, task: Task, route: Route, desk: _Desk) -> Answer | Failure:
        """Up to `webhooks.TRIES` times, each spared where the agent has failed lately."""
        caller = self._callers[route.agent.kind]
        context = self._context(task, route)
        for number in range(1, webhooks.TRIES + 1):
            try:
                desk.breaker.admit()
            except BreakerOpen:
                return Failure("it has failed lately, and is not asked for a while", is_final=True)
            with metrics.AGENT_CALL_SECONDS.time():
                found = await caller.call(route.agent, task, context)
            if isinstance(found, Answer):
                desk.breaker.succeeded()
                return found
            (desk.breaker.failed if found.is_away else desk.breaker.succeeded)()
            if found.is_final or number == webhooks.TRIES:
                break
            delay = webhooks.quick_retry_seconds(number)
            await anyio.sleep(delay * random.uniform(1 - webhooks.JITTER, 1 + webhooks.JITTER))
        return found

    def _context(self, task: Task, route: Route) -> Context:
        told_at = float("-inf")

        async def progress(stage: str, text: str) -> None:
            nonlocal told_at
            if anyio.current_time() - told_at < PROGRESS_SPACING_SECONDS:
                return
            told_at = anyio.current_time()
            await self._replies.progress(task, route.speaker_id, stage[:64], text[:1000])

        return Context(self._settings, route.agent.agent_id, task.user_id, route.intent, progress)

    async def _show(self, task: Task, route: Route) -> None:
        """The agent at work, for whoever waits for it: once it takes a while."""
        await anyio.sleep(SHOWN_AFTER_SECONDS)
        try:
            await self._replies.progress(task, route.speaker_id, "working", "")
            while True:
                await self._replies.type(task, route.speaker_id, started=True)
                await anyio.sleep(TYPING_EVERY_SECONDS)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_PAUSE_SECONDS):
                await self._replies.type(task, route.speaker_id, started=False)

    # --- what is done ------------------------------------------------------------------------------------------------

    async def keep_books(self) -> None:
        """Write down what is done, until cancelled. What a crash keeps from being written is asked again, and meets its
        answer."""
        while True:
            await anyio.sleep(_FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write down what is done now."""
        done, self._done = self._done, []
        try:
            if done:
                await self._store.agent_tasks.finish(done, datetime.now(UTC))
            while self._broken:
                message_id, error = self._broken[0]
                await self._store.agent_tasks.fail(message_id, "", error, datetime.now(UTC))
                del self._broken[0]
        except StoreUnavailable as failure:
            self._done += done
            log.warning("agent_tasks_not_finished", tasks=len(done), error=str(failure)[:200])
            await anyio.sleep(_PAUSE_SECONDS)
