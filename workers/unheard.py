"""Who has not confirmed what was said: seen by the conversation's owner, who has their marks in memory.

Part of a lane. A second after something was said in a conversation its members' delivered marks are looked at; whoever
is behind is put among what is due for the push role (`push_queue.py`), which looks again when their time is over. So a
device that confirms within a second costs nothing but the look, and a burst costs one entry for each who is behind.

Nothing is lost with this process: whoever takes its shards over looks at all that was said in their last seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from protocol import keys
from protocol.models import AGENT_PREFIX
from workers import push_queue

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workers.broker import Broker
    from workers.conversations import Conversations, Owned
    from workers.store import Store

LOOK_MS: Final = 1000
"""From a message to the look at who has confirmed it. What was said meanwhile is looked at as much later."""


class _Said(NamedTuple):
    """What has to be confirmed: everything up to `sequence`, said by `at_ms`."""

    owned: Owned
    sequence: int
    at_ms: int


class Unheard:
    """The conversations of one lane that are to be looked at, the earliest first."""

    def __init__(self, store: Store, broker: Broker, conversations: Conversations, after_ms: int) -> None:
        """`after_ms`: from a message to the push."""
        self._store = store
        self._broker = broker
        self._conversations = conversations
        self._after_ms = after_ms
        self._said: dict[str, _Said] = {}

    @property
    def waiting(self) -> bool:
        """Is there anything to look at?"""
        return bool(self._said)

    def note(self, said: Iterable[Owned], now_ms: int) -> None:
        """Something was said in these, and is committed. Never awaits."""
        for owned in said:
            if owned.conversation_id not in self._said:
                self._said[owned.conversation_id] = _Said(owned, owned.last, now_ms)

    async def look(self, now_ms: int, *, force: bool = False) -> None:
        """At those whose second is over; with `force` at all. Raises BrokerUnavailable: they are looked at again."""
        ripe = [said for said in self._said.values() if force or said.at_ms + LOOK_MS <= now_ms]
        behind: list[tuple[str, int]] = []
        for said in ripe:
            # Where it was forgotten or read anew meanwhile: older marks show more people behind, never fewer.
            owned = self._conversations.get(said.owned.conversation_id) or said.owned
            through = owned.last if force else said.sequence
            behind += [(entry, said.at_ms + self._after_ms) for entry in _behind(owned, through)]
        await push_queue.add(self._broker, behind)
        for said in ripe:
            self._done(said)

    def _done(self, said: _Said) -> None:
        name = said.owned.conversation_id
        del self._said[name]
        owned = self._conversations.get(name)
        if owned is not None and owned.last > said.sequence:
            self._said[name] = _Said(owned, owned.last, said.at_ms + LOOK_MS)

    async def missed(self, ends: Mapping[str, int], now_ms: int) -> None:
        """The previous owner may have died before it looked at these ends of logs. Of what is in memory the marks are
        known; elsewhere whoever is behind is due. Raises BrokerUnavailable, StoreUnavailable."""
        known = {name: owned for name in ends if (owned := self._conversations.get(name)) is not None}
        self.note(known.values(), now_ms)
        at_ms = now_ms + self._after_ms
        behind = await self._store.pushes.behind({name: end for name, end in ends.items() if name not in known})
        await push_queue.add(self._broker, [(keys.push_entry(*pair), at_ms) for pair in behind])


def _behind(owned: Owned, sequence: int) -> list[str]:
    return [
        keys.push_entry(user_id, owned.conversation_id)
        for user_id, member in owned.members.items()
        if member.delivered < sequence and not user_id.startswith(AGENT_PREFIX)
    ]
