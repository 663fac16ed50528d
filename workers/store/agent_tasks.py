"""What agents have been asked and have not answered: the outbox behind their answers, which no client would repeat.

A task is written before the event that it comes from is confirmed, and is done only when the answer's commit was seen.
`_id` is the message's id, so a message is asked about once, however often its event comes. Called by the sink of the
events role, and by the agents role. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from pymongo.errors import BulkWriteError

from protocol.events import MessageReceivedEvent
from protocol.models import to_document
from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
WAITING: Final = "waiting"
DONE: Final = "done"
FAILED: Final = "failed"
_DUPLICATE_KEY: Final = 11000
_DONE_LIFE: Final = timedelta(days=1)
"""An event that comes again so late was lost for a day; the answer's own key still keeps it from a second answer."""
_FAILED_LIFE: Final = timedelta(days=7)
"""As a dead letter's."""


class Home(NamedTuple):
    """Of a conversation, what never changes: its agent ("" for none), whose it is, and whether it is plaintext."""

    agent_id: str
    user_id: str
    plaintext: bool


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One message that an agent is to be asked about. `agent_id`, `user_id`, `plaintext`: of the conversation."""

    partition: int
    agent_id: str
    user_id: str
    plaintext: bool
    event: MessageReceivedEvent

    @property
    def message_id(self) -> str:
        return self.event.message_id

    @property
    def conversation_id(self) -> str:
        return self.event.conversation_id


class Waiting(NamedTuple):
    """Where in the queue a task stands."""

    created_at: datetime
    message_id: str
    conversation_id: str


class AgentTaskStore:
    """Reader and writer of `agent_tasks`."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._tasks = database["agent_tasks"]
        self._conversations = database["conversations"]

    async def homes(self, conversation_ids: Iterable[str]) -> dict[str, Home]:
        """What is known of these conversations."""
        fields = {"agent_id": 1, "user_id": 1, "plaintext": 1}
        with store_errors():
            found = self._conversations.find({"_id": {"$in": list(conversation_ids)}}, fields)
            return {
                document["_id"]: Home(document["agent_id"], document["user_id"], document.get("plaintext", False))
                async for document in found
            }

    async def participants(self, conversation_id: str) -> list[str]:
        """Who is in a conversation now, as far as it is flushed."""
        with store_errors():
            document = await self._conversations.find_one({"_id": conversation_id}, {"participants": 1})
        return [] if document is None else list(document["participants"])

    async def add(self, tasks: Sequence[Task], now: datetime) -> list[Task]:
        """Write tasks down; those that were not there yet."""
        documents = [
            {**to_document(task), "_id": task.message_id, "status": WAITING, "created_at": now} for task in tasks
        ]
        known: set[str] = set()
        try:
            with store_errors():
                await self._tasks.insert_many(documents, ordered=False)
        except StoreUnavailable as failure:
            known = _duplicates(failure)
        return [task for task in tasks if task.message_id not in known]

    async def waiting(
        self, partitions: Iterable[int], after: Waiting | None, before: datetime, limit: int
    ) -> list[Waiting]:
        """Tasks of these partitions, written down before a time, that nobody has finished; oldest first."""
        wanted: Document = {"status": WAITING, "partition": {"$in": list(partitions)}, "created_at": {"$lte": before}}
        if after is not None:
            behind = {"created_at": after.created_at, "_id": {"$gt": after.message_id}}
            wanted["$or"] = [{"created_at": {"$gt": after.created_at}}, behind]
        fields = {"created_at": 1, "event.conversation_id": 1}
        with store_errors():
            found = self._tasks.find(wanted, fields, sort=[("created_at", 1), ("_id", 1)], limit=limit)
            return [
                Waiting(document["created_at"], document["_id"], document["event"]["conversation_id"])
                async for document in found
            ]

    async def get(self, message_ids: Iterable[str]) -> list[Task]:
        """Those of these tasks that nobody has finished."""
        with store_errors():
            found = self._tasks.find({"_id": {"$in": list(message_ids)}, "status": WAITING})
            return [msgspec.convert(document, Task) async for document in found]

    async def finish(self, message_ids: Sequence[str], now: datetime) -> None:
        """Nothing more is to be done about these; what was said is not kept here."""
        change = {"$set": {"status": DONE, "forget_at": now + _DONE_LIFE}, "$unset": {"event": ""}}
        with store_errors():
            await self._tasks.update_many({"_id": {"$in": list(message_ids)}}, change)

    async def fail(self, message_id: str, agent_id: str, error: str, now: datetime) -> None:
        """This agent has not answered, and is not asked again."""
        change = {"status": FAILED, "failed_agent_id": agent_id, "error": error, "forget_at": now + _FAILED_LIFE}
        with store_errors():
            await self._tasks.update_one({"_id": message_id, "status": WAITING}, {"$set": change})


def _duplicates(failure: StoreUnavailable) -> set[str]:
    """Whose ids were there already. Raises `failure` where it is about anything else."""
    error = failure.__cause__
    if not isinstance(error, BulkWriteError) or error.details["writeConcernErrors"]:
        raise failure
    refused = error.details["writeErrors"]
    if any(problem["code"] != _DUPLICATE_KEY for problem in refused):
        raise failure
    return {problem["op"]["_id"] for problem in refused}
