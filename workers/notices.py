"""`conversation_update` frames: what a step of a conversation's state means to each of its members. Pure; called by
`plan.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from protocol import codec, frames
from protocol.frames import ConversationEvent
from protocol.models import AGENT_EVENTS, EventKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.conversations import Owned
    from workers.projection import Folded

_UNSEEN: Final = AGENT_EVENTS | {EventKind.BANNED, EventKind.UNBANNED}
"""What leaves the conversation as it was, for those who stay."""
Notice = tuple["Sequence[str]", bytes]
"""(users, frame)"""


def created(owned: Owned, user_ids: Sequence[str]) -> Notice:
    """These users have a conversation more."""
    return user_ids, _update(owned, ConversationEvent.CREATED)


def of_event(owned: Owned, kind: EventKind, folded: Folded) -> list[Notice]:
    """Who hears of a step that has just been folded. Nobody hears of an `unbanned` or of an agent's silence: no member
    sees a difference."""
    notices: list[Notice] = []
    joined = [membership.user_id for membership in folded.joined]
    if joined:
        notices.append(created(owned, joined))
    if folded.left:
        notices.append((folded.left, _update(owned, ConversationEvent.REMOVED)))
    staying = [user_id for user_id in owned.roster if user_id not in joined]
    is_seen = bool(joined or folded.left) or kind not in _UNSEEN
    if staying and is_seen:
        notices.append((staying, _update(owned, ConversationEvent.UPDATED)))
    return notices


def _update(owned: Owned, event: ConversationEvent) -> bytes:
    payload = frames.ConversationUpdatePayload(
        conversation=owned.shown(), conversation_id=owned.conversation_id, event=event, version=owned.last
    )
    return codec.JSON.encode(frames.ConversationUpdate(payload=payload))
