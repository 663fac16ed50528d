"""Who is typing where, on its way to the others of the conversation: told with the next tick, never stored.

Called by a lane: its reader hands signals over, its teller tells them. Nothing waits for it: what cannot be told now is
dropped, and a client that heard `start` stops by itself after 6 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from protocol import codec, frames, keys, records
from workers import metrics
from workers.broker import BrokerUnavailable
from workers.groups import check_speech
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.conversations import Conversations
    from workers.delivery import Courier, Down

STALE_MS: Final = 6000
"""A signal this old has ended by itself."""
WAITING_LIMIT: Final = 10_000
"""Signals of one tick; past it they are dropped."""

log = structlog.get_logger(__name__)


class Typists:
    """The typing signals of one lane's conversations; the last one per member and tick is told."""

    def __init__(self, conversations: Conversations, courier: Courier, shards: int) -> None:
        self._conversations = conversations
        self._courier = courier
        self._shards = shards
        self._latest: dict[tuple[str, str], bool] = {}

    @property
    def waiting(self) -> bool:
        """Is there anything to tell?"""
        return bool(self._latest)

    def receive(self, record: records.Typing, entry_id: bytes, now_ms: int) -> None:
        """Take a signal for the next tick, unless it is stale. Never awaits."""
        sent_ms = int(entry_id.partition(b"-")[0])
        if now_ms - sent_ms > STALE_MS or len(self._latest) >= WAITING_LIMIT:
            metrics.TYPING.labels("dropped").inc()
        else:
            self._latest[record.conversation_id, record.user_id] = record.started

    async def tell(self, down: Down, now_ms: int) -> None:
        """Add notices for the other members who are online to `down`."""
        latest, self._latest = self._latest, {}
        if not latest:
            return
        try:
            await self._conversations.load({name: keys.shard_of(name, self._shards) for name, _ in latest})
            notices = self._notices(latest, now_ms)
            await self._courier.notify(notices, down)
        except (StoreUnavailable, BrokerUnavailable) as error:
            metrics.TYPING.labels("dropped").inc(len(latest))
            log.warning("typing_dropped", signals=len(latest), error=str(error)[:200])
            return
        metrics.TYPING.labels("told").inc(len(notices))
        metrics.TYPING.labels("refused").inc(len(latest) - len(notices))

    def _notices(self, latest: dict[tuple[str, str], bool], now_ms: int) -> list[tuple[Sequence[str], bytes]]:
        """Only of members who may speak; no word to the others."""
        notices: list[tuple[Sequence[str], bytes]] = []
        for (conversation_id, user_id), started in latest.items():
            owned = self._conversations.get(conversation_id)
            member = None if owned is None else owned.members.get(user_id)
            if owned is not None and member is not None and check_speech(owned, member, now_ms) is None:
                others = [other for other in owned.roster if other != user_id]
                notices.append((others, _frame(conversation_id, user_id, started)))
        return notices


def _frame(conversation_id: str, user_id: str, started: bool) -> bytes:
    state = frames.TypingState.START if started else frames.TypingState.STOP
    payload = frames.TypingNoticePayload(conversation_id=conversation_id, user_id=user_id, state=state)
    return codec.JSON.encode(frames.TypingNotice(payload=payload))
