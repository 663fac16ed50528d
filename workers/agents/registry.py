"""Who an agent is, quickly: the registry behind its cache `agent:{agent_id}` (5 min).

Called by the HTTP API, which changes it, and by whoever routes messages. A change is seen at once: its key says nothing
for `_HOLD_SECONDS`, so that what somebody read before the change is not cached after it.

Raises StoreUnavailable; without Redis it is only slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from protocol import codec, keys
from protocol.models import Agent
from workers.broker import Broker, BrokerUnavailable

if TYPE_CHECKING:
    from workers.store import Store

_HOLD_SECONDS: Final = 5
"""Longer than a read of one agent takes."""

log = structlog.get_logger(__name__)
_decode = msgspec.json.Decoder(Agent).decode


class Registry:
    """Agents by id."""

    def __init__(self, store: Store, broker: Broker) -> None:
        self._store = store
        self._broker = broker

    async def get(self, agent_id: str) -> Agent | None:
        """One agent, disabled ones too; None where there is none."""
        cached = await self._cached(agent_id)
        if cached is not None:
            return cached
        agent = await self._store.agents.get(agent_id)
        if agent is not None:
            await self._fill(agent)
        return agent

    async def hold(self, agent_id: str) -> None:
        """The agent is about to change, or has just done so: nothing is cached for a moment."""
        try:
            await self._broker.command("SET", keys.agent(agent_id), b"", "EX", _HOLD_SECONDS)
        except BrokerUnavailable as error:
            log.warning("agent_cache_not_held", agent_id=agent_id, error=str(error)[:200])

    async def _cached(self, agent_id: str) -> Agent | None:
        try:
            value = await self._broker.command("GET", keys.agent(agent_id))
        except BrokerUnavailable:
            return None
        if not value:
            return None
        try:
            return _decode(value)
        except msgspec.DecodeError as error:
            # Written by another release: the store says it in ours.
            log.warning("agent_cache_unreadable", agent_id=agent_id, error=str(error)[:200])
            return None

    async def _fill(self, agent: Agent) -> None:
        try:
            await self._broker.command(
                "SET", keys.agent(agent.agent_id), codec.encode_value(agent), "EX", keys.AGENT_TTL_SECONDS, "NX"
            )
        except BrokerUnavailable as error:
            log.warning("agent_not_cached", agent_id=agent.agent_id, error=str(error)[:200])
