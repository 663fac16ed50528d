"""The outbox of events: `event_due` in a message's own document, so an event exists exactly when its message does.

It is set by the insert that commits the message and taken away when every consumer here has what it needs. Called by
the ingest role (who listens) and the events role. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protocol import events
from protocol.models import MessageType
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class EventStore:
    """Reader and writer of the outbox."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._messages = database["messages"]
        self._conversations = database["conversations"]
        self._webhooks = database["webhooks"]

    async def has_listeners(self) -> bool:
        """Does an app listen to the messages of all conversations?"""
        with store_errors():
            return await self._webhooks.find_one({"status": "enabled"}, {"_id": 1}) is not None

    async def due(self, before: datetime, limit: int) -> list[events.Outgoing]:
        """Events of messages committed before, oldest first, that nobody has confirmed."""
        with store_errors():
            found = await self._messages.find(
                {"event_due": {"$lte": before}}, sort=[("event_due", 1)], limit=limit
            ).to_list()
            names = {document["conversation_id"] for document in found}
            fields = {"agent_id": 1, "user_id": 1}
            homes = {
                home["_id"]: home async for home in self._conversations.find({"_id": {"$in": list(names)}}, fields)
            }
        return [
            events.Outgoing(document["_id"], _event(document, homes[document["conversation_id"]]))
            for document in found
            if document["conversation_id"] in homes
        ]

    async def confirm(self, message_ids: Sequence[str]) -> None:
        """Everybody who is to get these events has them safe."""
        with store_errors():
            await self._messages.update_many({"_id": {"$in": list(message_ids)}}, {"$unset": {"event_due": ""}})


def _event(document: Document, home: Document) -> events.Event:
    message = events.MessageReceivedEvent(
        message_id=document["_id"],
        idempotency_key=document["idempotency_key"],
        conversation_id=document["conversation_id"],
        sender_id=document["sender_id"],
        receiver_id=document["receiver_id"],
        sequence_number=document["sequence_number"],
        message_type=MessageType(document["type"]),
        content=document["content"],
        timestamp=document["timestamp"],
    )
    return events.event_of(message, home["agent_id"], home["user_id"])
