"""The outbox of events: `event_due` in a message's own document, so an event exists exactly when its message does.

It is set by the insert that commits the message and taken away when every consumer here has what it needs. Called by
the ingest role (who listens) and the events role. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protocol import events, keys
from protocol.models import MessageType
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
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
        return [events.Outgoing(message_id, event) for message_id, event, _ in await self._events(found)]

    async def of_messages(self, message_ids: Sequence[str]) -> dict[str, events.Event]:
        """Message id → its event, with what the message says now; those that are no more are left out."""
        with store_errors():
            found = await self._messages.find({"_id": {"$in": list(message_ids)}}).to_list()
        return {message_id: event for message_id, event, _ in await self._events(found)}

    async def between(
        self, since: datetime, until: datetime, after: str, limit: int
    ) -> tuple[list[tuple[events.Event, str]], str | None]:
        """(event, its conversation's agent or "") of messages made in that span, oldest first, behind an id; and the
        id to go on behind, None at the end. What the system wrote is no event."""
        bounds = {
            "$gte": keys.new_message_id(_ms(since), 0, 0),
            "$lt": keys.new_message_id(_ms(until), 0, 0),
            "$gt": after,
        }
        with store_errors():
            found = await self._messages.find({"_id": bounds}, sort=[("_id", 1)], limit=limit).to_list()
        said = [document for document in found if document["type"] != MessageType.SYSTEM.value]
        page = [(event, agent_id) for _, event, agent_id in await self._events(said)]
        return page, found[-1]["_id"] if len(found) == limit else None

    async def agents_of(self, conversation_ids: Iterable[str]) -> dict[str, str]:
        """Conversation id → its agent, "" for none."""
        return {name: home["agent_id"] for name, home in (await self._homes(conversation_ids)).items()}

    async def _events(self, documents: Sequence[Document]) -> list[tuple[str, events.Event, str]]:
        """(message id, event, agent) of messages whose conversations there are."""
        homes = await self._homes({document["conversation_id"] for document in documents})
        return [
            (document["_id"], _event(document, home), home["agent_id"])
            for document in documents
            if (home := homes.get(document["conversation_id"])) is not None
        ]

    async def _homes(self, conversation_ids: Iterable[str]) -> dict[str, Document]:
        fields = {"agent_id": 1, "user_id": 1}
        with store_errors():
            found = self._conversations.find({"_id": {"$in": list(conversation_ids)}}, fields)
            return {home["_id"]: home async for home in found}

    async def confirm(self, message_ids: Sequence[str]) -> None:
        """Everybody who is to get these events has them safe."""
        with store_errors():
            await self._messages.update_many({"_id": {"$in": list(message_ids)}}, {"$unset": {"event_due": ""}})


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


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
