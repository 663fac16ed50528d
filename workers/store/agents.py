"""The registry of agents. Called by the HTTP API and, through `workers/agents/registry.py`, by whoever routes.

An agent's account is the user of the same id, made before its entry here. At most one agent is the default: a partial
unique index says so. Every method raises StoreUnavailable.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pymongo import ReturnDocument
from pymongo.errors import BulkWriteError, DuplicateKeyError

from protocol.models import Agent, AgentStatus, to_document
from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
_WITHOUT_SECRET: Final = {"secret": 0}
_DUPLICATE_KEY: Final = 11000


class DefaultTaken(Exception):
    """Two were made the default at the same moment; the other one is it."""


class Sought(msgspec.Struct, frozen=True):
    """Which agents to list; None: any. `text`: somewhere in name or description, in any case."""

    capability: str | None = None
    status: AgentStatus | None = None
    text: str | None = None


class AgentStore:
    """Reader and writer of `agents`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._agents = database["agents"]

    async def create(self, agent: Agent, secret: str) -> None:
        """Store a new agent; `secret` signs what a webhook gets, "" for other kinds. Raises DefaultTaken."""
        document = to_document(agent)
        if secret:
            document["secret"] = secret
        try:
            with store_errors():
                await self._step_down(agent.agent_id, stands=agent.is_default)
                await self._agents.insert_many([document])
        except StoreUnavailable as failure:
            error = failure.__cause__
            if isinstance(error, BulkWriteError) and error.details["writeErrors"][0]["code"] == _DUPLICATE_KEY:
                raise DefaultTaken from None
            raise

    async def get(self, agent_id: str) -> Agent | None:
        """One agent, or None."""
        with store_errors():
            document = await self._agents.find_one({"_id": agent_id}, _WITHOUT_SECRET)
        return None if document is None else msgspec.convert(document, Agent)

    async def default(self) -> Agent | None:
        """The agent for whoever names none."""
        with store_errors():
            document = await self._agents.find_one({"is_default": True}, _WITHOUT_SECRET)
        return None if document is None else msgspec.convert(document, Agent)

    async def secret(self, agent_id: str) -> str:
        """What signs the calls of a webhook; "" where there is none."""
        with store_errors():
            document = await self._agents.find_one({"_id": agent_id}, {"secret": 1})
        return "" if document is None else str(document.get("secret", ""))

    async def page(self, sought: Sought, after: str | None, limit: int) -> tuple[list[Agent], str | None]:
        """At most `limit` agents by id behind one, and the id to go on from when there are more."""
        wanted: Document = {}
        if after is not None:
            wanted["_id"] = {"$gt": after}
        if sought.capability is not None:
            wanted["capabilities"] = sought.capability
        if sought.status is not None:
            wanted["status"] = sought.status.value
        if sought.text is not None:
            like = {"$regex": re.escape(sought.text), "$options": "i"}
            wanted["$or"] = [{"name": like}, {"description": like}]
        with store_errors():
            found = await self._agents.find(wanted, _WITHOUT_SECRET, sort=[("_id", 1)], limit=limit + 1).to_list()
        agents = [msgspec.convert(document, Agent) for document in found[:limit]]
        return agents, agents[-1].agent_id if len(found) > limit else None

    async def change(self, agent_id: str, values: Mapping[str, Any], now: datetime) -> Agent | None:
        """Set fields of an agent; the agent as it is then, None for an unknown one. Raises DefaultTaken."""
        try:
            with store_errors():
                await self._step_down(agent_id, stands=values.get("is_default") is True)
                document = await self._agents.find_one_and_update(
                    {"_id": agent_id},
                    {"$set": {**values, "updated_at": now}},
                    projection=_WITHOUT_SECRET,
                    return_document=ReturnDocument.AFTER,
                )
        except StoreUnavailable as failure:
            if isinstance(failure.__cause__, DuplicateKeyError):
                raise DefaultTaken from None
            raise
        return None if document is None else msgspec.convert(document, Agent)

    async def delete(self, agent_id: str) -> bool:
        """Forget an agent. False where there is none."""
        with store_errors():
            return (await self._agents.delete_one({"_id": agent_id})).deleted_count == 1

    async def _step_down(self, agent_id: str, *, stands: bool) -> None:
        """Whoever is the default makes room for this one."""
        if stands:
            others = {"is_default": True, "_id": {"$ne": agent_id}}
            await self._agents.update_many(others, {"$set": {"is_default": False}})
