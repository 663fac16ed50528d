"""Delivered and read marks: resolve, raise, tell the authors, flush. One book per lane; overlaps with the lane's
commits.

Called by `consumer.py` with the receipt records of the stream. They wait for the next tick (≤ 100 ms), which raises the
marks, flushes them and only then tells the authors, so that no later owner can know less than an author was told. A
stream entry is acknowledged after its flush. Marks never go down: every step takes a maximum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from protocol import codec, frames, keys, records
from protocol.watermarks import unread
from workers import group_receipts, metrics

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from workers.conversations import Conversations, Member, Owned
    from workers.delivery import Courier, Down
    from workers.store.marks import MarkStore
    from workers.store.messages import MessageStore

RECENT_MESSAGES = 50_000
"""Messages whose place is remembered per generation, two generations: receipts mostly come within seconds (about 200
bytes each).
"""
GROUP_AUTHORS_SPAN = 1000
"""Most messages whose authors hear of one tick's moves in a group; older ones see it when they next read."""


class Place(NamedTuple):
    """Where a committed message lies."""

    conversation_id: str
    sequence_number: int
    countable: int
    replyable: bool


class RecentPlaces:
    """Message id → place for what was committed here lately: two generations, so that forgetting is one assignment."""

    def __init__(self, limit: int = RECENT_MESSAGES) -> None:
        self._limit = limit
        self._young: dict[str, Place] = {}
        self._old: dict[str, Place] = {}

    def get(self, message_id: str) -> Place | None:
        return self._young.get(message_id) or self._old.get(message_id)

    def put(self, message_id: str, place: Place) -> None:
        self._young[message_id] = place
        if len(self._young) >= self._limit:
            self._old, self._young = self._young, {}


class _Moved:
    """What the next tick tells about one member."""

    __slots__ = ("delivered", "read")

    def __init__(self) -> None:
        self.delivered = self.read = False


class Receipts:
    """The marks of one lane's conversations. One tick is `resolve`, `flush`, `tell`, in this order."""

    def __init__(
        self, conversations: Conversations, messages: MessageStore, marks: MarkStore, courier: Courier, shards: int
    ) -> None:
        self._conversations = conversations
        self._messages = messages
        self._marks = marks
        self._courier = courier
        self._shards = shards
        self.recent = RecentPlaces()
        self._incoming: list[records.Receipts] = []
        self._moved: dict[tuple[str, str], _Moved] = {}
        self.delivered_ids: dict[str, list[str]] = {}
        """User → ids that were put into the inbox here and are delivered now; the lane takes them out."""

    @property
    def waiting(self) -> bool:
        """Is there anything to resolve or tell?"""
        return bool(self._incoming or self._moved or self._conversations.replied)

    @property
    def shards(self) -> list[int]:
        """Of the conversations that the next `tell` is about."""
        moved = [name for name, _ in self._moved.keys() | self._conversations.replied]
        return sorted({keys.shard_of(name, self._shards) for name in moved})

    def receive(self, record: records.Receipts) -> None:
        """Take a record for the next tick. Never awaits."""
        self._incoming.append(record)

    def _raise_known(self, record: records.Receipts) -> records.Receipts | None:
        """Raise the marks of messages that memory knows; the rest of the record, or None."""
        delivered = [mark for mark in record.delivered if not self._deliver(mark)]
        read = [rest for mark in record.read if (rest := self._read(mark)) is not None]
        return records.Receipts(delivered, read) if delivered or read else None

    def _deliver(self, mark: records.DeliveredMark) -> bool:
        place = self.recent.get(mark.message_id)
        owned = None if place is None else self._conversations.get(place.conversation_id)
        if place is None or owned is None:
            return False
        self._raise_delivered(owned, mark.user_id, mark.device_id, place.sequence_number)
        return True

    def _read(self, mark: records.ReadMark) -> records.ReadMark | None:
        unknown = []
        for message_id in mark.message_ids:
            place = self.recent.get(message_id)
            owned = None if place is None else self._conversations.get(place.conversation_id)
            if place is None or owned is None:
                unknown.append(message_id)
            else:
                self._raise_read(owned, mark.user_id, mark.device_id, place)
        return records.ReadMark(mark.user_id, mark.device_id, unknown) if unknown else None

    def _visible(self, owned: Owned, user_id: str, sequence: int) -> Member | None:
        member = owned.members.get(user_id)
        if member is None or not member.join_seq <= sequence <= owned.last:
            metrics.RECEIPTS.labels("ignored").inc()
            return None
        return member

    def _raise_delivered(self, owned: Owned, user_id: str, device_id: str, sequence: int) -> None:
        member = self._visible(owned, user_id, sequence)
        if member is None:
            return
        key = (owned.conversation_id, user_id)
        if sequence > member.devices.get(device_id, 0):
            member.devices[device_id] = sequence
            self._conversations.dirty[key] = member
        if member.reach(sequence):
            self._moved.setdefault(key, _Moved()).delivered = True
            self._leave_inbox(owned, user_id, sequence)

    def _raise_read(self, owned: Owned, user_id: str, device_id: str, place: Place) -> None:
        self._raise_delivered(owned, user_id, device_id, place.sequence_number)
        member = owned.members.get(user_id)
        if member is None or place.sequence_number <= member.read or place.sequence_number < member.join_seq:
            return
        member.read_to(place.sequence_number, place.countable)
        key = (owned.conversation_id, user_id)
        self._conversations.dirty[key] = member
        self._moved.setdefault(key, _Moved()).read = True

    def _leave_inbox(self, owned: Owned, user_id: str, sequence: int) -> None:
        gone = owned.leave_inbox(user_id, sequence)
        if gone:
            self.delivered_ids.setdefault(user_id, []).extend(gone)

    async def resolve(self) -> None:
        """Raise the marks of all records taken so far. Raises StoreUnavailable: nothing is lost, call again."""
        incoming, self._incoming = self._incoming, []
        unknown = [rest for record in incoming if (rest := self._raise_known(record)) is not None]
        if not unknown:
            return
        try:
            await self._look_up(unknown)
        except BaseException:
            self._incoming = unknown + self._incoming
            raise
        for record in unknown:
            # What is still unknown is no message of ours, or not of this shard: ignored and counted, no oracle.
            if (rest := self._raise_known(record)) is not None:
                metrics.RECEIPTS.labels("ignored").inc(len(rest.delivered) + len(rest.read))

    async def _look_up(self, pending: list[records.Receipts]) -> None:
        ids = {mark.message_id for record in pending for mark in record.delivered}
        ids.update(message_id for record in pending for mark in record.read for message_id in mark.message_ids)
        located = await self._messages.locate(list(ids))
        shard_of = {at.conversation_id: keys.shard_of(at.conversation_id, self._shards) for at in located.values()}
        await self._conversations.load(shard_of)
        for message_id, at in located.items():
            self.recent.put(message_id, Place(at.conversation_id, at.sequence_number, at.countable, at.replyable))

    def leave(self, shards: Collection[int]) -> None:
        """Somebody else owns these and tells what is to be told of them."""
        replied = self._conversations.replied
        for key in [*self._moved, *replied]:
            if keys.shard_of(key[0], self._shards) in shards:
                self._moved.pop(key, None)
                replied.discard(key)

    async def tell(self, down: Down, now_ms: int) -> None:
        """Add `receipt_update` frames for the authors concerned, and badges for the reader's other devices. Raises
        BrokerUnavailable, StoreUnavailable.
        """
        replied, self._conversations.replied = self._conversations.replied, set()
        for key in replied:
            self._moved.setdefault(key, _Moved()).read = True
        moved, self._moved = self._moved, {}
        try:
            await self._conversations.load(
                {name: keys.shard_of(name, self._shards) for name, _ in moved if self._conversations.get(name) is None}
            )
            notices: list[tuple[Sequence[str], bytes]] = []
            groups: dict[str, list[str]] = {}
            for (conversation_id, user_id), what in moved.items():
                owned = self._conversations.get(conversation_id)
                member = None if owned is None else owned.members.get(user_id)
                if owned is None or member is None:
                    continue
                if owned.is_group:
                    groups.setdefault(conversation_id, []).append(user_id)
                else:
                    notices += _direct_update(owned, member, what, now_ms)
                # The writer may remove the member during the wait: hold on to it.
                if what.read and await self._courier.devices(user_id) > 1:
                    notices.append(_badge(owned, member))
            told = []
            for conversation_id, user_ids in groups.items():
                if (owned := self._conversations.get(conversation_id)) is not None:
                    told.append((owned, _shown(owned, user_ids)))
                    notices += await self._group_updates(owned, user_ids, now_ms)
            await self._courier.notify(notices, down)
            for owned, marks in told:
                owned.announced.update(marks)
        except BaseException:
            self._moved = moved | self._moved
            raise
        metrics.RECEIPTS.labels("told").inc(len(moved))

    async def _group_updates(self, owned: Owned, user_ids: list[str], now_ms: int) -> list[tuple[Sequence[str], bytes]]:
        """One frame for each author of whose messages somebody else has just stored or read one."""
        steps = group_receipts.steps(owned, user_ids)
        if not steps:
            return []
        top = max(step.through for step in steps)
        bottom = max(min(step.after for step in steps), top - GROUP_AUTHORS_SPAN)
        messages = await self._messages.authors(owned.conversation_id, bottom, top)
        return [
            ((author,), group_receipts.frame(owned, author, sequence, mover, now_ms))
            for author, (sequence, mover) in group_receipts.concerned(owned, steps, messages).items()
        ]

    async def flush(self, lazy: bool) -> None:
        """Write the dirty marks, majority-journalled. Raises StoreUnavailable, and then everything is dirty again."""
        if not self._conversations.dirty and not (lazy and self._conversations.lazy):
            return
        async with self._conversations.loading:
            await self._flush(lazy)

    async def _flush(self, lazy: bool) -> None:
        dirty = self._conversations.take_dirty(lazy)
        if not dirty:
            return
        marks = [member.mark(conversation_id) for (conversation_id, _), member in dirty.items()]
        try:
            await self._marks.flush_marks(marks)
        except BaseException:
            for member, mark in zip(dirty.values(), marks, strict=True):
                for device_id, sequence in mark.devices.items():
                    member.devices[device_id] = max(sequence, member.devices.get(device_id, 0))
            self._conversations.put_back(dirty)
            raise


def _shown(owned: Owned, user_ids: Iterable[str]) -> dict[str, tuple[int, int]]:
    return {name: owned.members[name].told_marks() for name in user_ids if name in owned.members}


def _direct_update(owned: Owned, member: Member, what: _Moved, now_ms: int) -> list[tuple[Sequence[str], bytes]]:
    """Both marks as they stand, for the other one of the two; a mark that is still at nothing is left out. Who hides
    what they read tells nothing by reading."""
    if not what.delivered and member.hide_reads:
        return []
    delivered, read = member.told_marks()
    payload = frames.ReceiptUpdatePayload(
        conversation_id=owned.conversation_id,
        user_id=member.user_id,
        delivered_through=delivered or msgspec.UNSET,
        read_through=read or msgspec.UNSET,
        timestamp=now_ms,
    )
    authors = [other for other in owned.roster if other != member.user_id]
    return [(authors, codec.JSON.encode(frames.ReceiptUpdate(payload=payload)))]


def _badge(owned: Owned, member: Member) -> tuple[Sequence[str], bytes]:
    frame = frames.ConversationUpdate(
        payload=frames.ConversationUpdatePayload(
            conversation_id=owned.conversation_id,
            unread_count=unread(owned.countable, member.read_countable),
            event=frames.ConversationEvent.READ,
            version=member.read,
        )
    )
    return (member.user_id,), codec.JSON.encode(frame)
