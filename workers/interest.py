"""Whose messages become events: those of conversations with an agent or to one, everybody's while an app listens.

Part of the ingest role; asked by `plan.py` for each message, so it answers from memory. An app that has just begun to
listen is heard of within `EVERY_SECONDS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol import events
from protocol.models import AGENT_PREFIX
from workers import listeners
from workers.broker import BrokerUnavailable
from workers.store.errors import StoreUnavailable
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from protocol.models import Conversation
    from workers.broker import Broker
    from workers.drafts import Draft
    from workers.store import Store

EVERY_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)


class Interest:
    """What the store and Redis said last."""

    def __init__(self, *, listened: bool = False) -> None:
        """`listened`: what to go by until it was asked. A message that was no event when it was committed never becomes
        one, so who does not know says yes."""
        self.listened = listened
        """Does an app listen to all conversations?"""

    async def look(self, store: Store, broker: Broker) -> None:
        """Ask now: is there a webhook, or a consumer group on the stream? Raises StoreUnavailable,
        BrokerUnavailable."""
        self.listened = await store.events.has_listeners() or bool(await listeners.groups(broker))

    async def run(self, store: Store, broker: Broker) -> None:
        """Ask again and again, until cancelled."""
        while True:
            try:
                await self.look(store, broker)
            except (StoreUnavailable, BrokerUnavailable) as error:
                log.warning("listeners_unknown", error=str(error)[:200])
            await anyio.sleep(EVERY_SECONDS)

    def wants(self, conversation: Conversation, receiver_id: str) -> bool:
        """Is a message of this conversation, said to this receiver, an event for anybody?"""
        return self.listened or bool(conversation.agent_id) or receiver_id.startswith(AGENT_PREFIX)


def event_of(draft: Draft, conversation: Conversation, message_id: str, sequence: int) -> events.Event:
    """The event that this message is."""
    assert isinstance(conversation.conversation_id, str)
    message = events.MessageReceivedEvent(
        message_id=message_id,
        idempotency_key=draft.key,
        conversation_id=conversation.conversation_id,
        sender_id=draft.sender_id,
        receiver_id=draft.receiver_id,
        sequence_number=sequence,
        message_type=draft.message_type,
        content=draft.content,
        timestamp=from_ms(draft.timestamp_ms),
    )
    return events.event_of(message, conversation.agent_id, conversation.user_id)
