"""Where the logs of one lane end, until that is flushed: coalesced, one mark per conversation.

Noted after each commit, flushed within a second by `consumer.py`; what dies with the process its successor finds in the
log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from protocol.models import MessageType
from workers.store.marks import HeadMark
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from workers.conversations import Conversations, Owned
    from workers.plan import Plan

_SYSTEM: Final = MessageType.SYSTEM.value


class Ends:
    """The marks that wait. No method awaits."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations
        self._heads: dict[str, HeadMark] = {}

    @property
    def waiting(self) -> bool:
        """Is there anything to flush?"""
        return bool(self._heads)

    def note(self, plan: Plan) -> list[Owned]:
        """A batch is committed; returns the conversations in which it said something that counts, or found it said."""
        said: dict[str, Owned] = {}
        for conversation_id, is_activity in plan.found.items():
            if (owned := self._conversations.get(conversation_id)) is not None:
                said[conversation_id] = owned
                at = from_ms(owned.created_ms)
                active_at = at if is_activity else self._active_at(conversation_id)
                self._heads[conversation_id] = HeadMark(
                    conversation_id, owned.last, owned.countable, owned.digest, at, active_at
                )
        for document in plan.documents:
            conversation_id, at = document["conversation_id"], document["created_at"]
            # A change of a message, private ones among them, is no activity to order conversations by.
            active_at = self._active_at(conversation_id) if "target_message_id" in document else at
            self._heads[conversation_id] = HeadMark(
                conversation_id, document["sequence_number"], document["countable"], document["digest"], at, active_at
            )
            if conversation_id not in said and document["type"] != _SYSTEM:
                said[conversation_id] = plan.owned[conversation_id]
        return list(said.values())

    def knows(self, head: HeadMark) -> bool:
        """Does a mark wait here that reaches as far?"""
        noted = self._heads.get(head.conversation_id)
        return noted is not None and noted.sequence_number >= head.sequence_number

    def adopt(self, head: HeadMark) -> None:
        """What a previous owner did not flush."""
        self._heads[head.conversation_id] = head._replace(
            active_at=head.active_at or self._active_at(head.conversation_id)
        )

    def take(self) -> list[HeadMark]:
        """All of them, the caller's to flush."""
        heads, self._heads = self._heads, {}
        return list(heads.values())

    def put_back(self, heads: Iterable[HeadMark]) -> None:
        """Their flush failed: what has been noted since reaches further."""
        for head in heads:
            newer = self._heads.get(head.conversation_id, head)
            self._heads[head.conversation_id] = newer._replace(active_at=newer.active_at or head.active_at)

    def _active_at(self, conversation_id: str) -> datetime | None:
        before = self._heads.get(conversation_id)
        return None if before is None else before.active_at
