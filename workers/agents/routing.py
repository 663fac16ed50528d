"""Which agent a message is for: the one it names, else the conversation's, else the default one.

Called by the runner for each task. Where the members have said that a conversation is plaintext, what a message is
about (`intents.py`) may choose another of the agents that are in it. Nobody is asked who is not in the conversation;
but while the conversation's own agent is disabled or gone from the registry, the default agent answers in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from protocol.models import AGENT_PREFIX, Agent, AgentStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.agents.intents import Intents
    from workers.agents.registry import Registry
    from workers.store import Store
    from workers.store.agent_tasks import Task


class Route(NamedTuple):
    """`agent` is asked, `speaker_id` is the member that says what comes of it. `intent`: "" where nobody looked."""

    agent: Agent
    speaker_id: str
    intent: str


class Router:
    """Decides for one task at a time. Raises StoreUnavailable."""

    def __init__(self, store: Store, registry: Registry, intents: Intents) -> None:
        self._store = store
        self._registry = registry
        self._intents = intents

    async def route(self, task: Task) -> Route | None:
        """Where a message goes; None: no agent answers here."""
        named = task.event.receiver_id
        if named.startswith(AGENT_PREFIX) and (agent := await self._enabled(named)) is not None:
            intent = await self._intents.of(task.event.content, [agent]) if task.plaintext else ""
            return Route(agent, named, intent)
        speaker_id = named if named.startswith(AGENT_PREFIX) else task.agent_id
        if not speaker_id:
            return None
        intent = ""
        if task.plaintext and speaker_id == task.agent_id:
            present = await self._present(task)
            intent = await self._intents.of(task.event.content, present)
            chosen = next((agent for agent in present if intent in agent.capabilities), None)
            if intent and chosen is not None:
                return Route(chosen, chosen.agent_id, intent)
        agent = await self._enabled(speaker_id) or await self._default()
        return None if agent is None else Route(agent, speaker_id, intent)

    async def _present(self, task: Task) -> Sequence[Agent]:
        """The enabled agents in the conversation, its own one first."""
        members = await self._store.agent_tasks.participants(task.conversation_id)
        names = [name for name in members if name.startswith(AGENT_PREFIX) and name != task.agent_id]
        found = [await self._enabled(name) for name in [task.agent_id, *names]]
        return [agent for agent in found if agent is not None]

    async def _enabled(self, agent_id: str) -> Agent | None:
        agent = await self._registry.get(agent_id)
        return agent if agent is not None and agent.status is AgentStatus.ENABLED else None

    async def _default(self) -> Agent | None:
        agent = await self._store.agents.default()
        return agent if agent is not None and agent.status is AgentStatus.ENABLED else None
