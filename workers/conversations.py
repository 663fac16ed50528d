"""What a shard's owner keeps in memory of each conversation: head, members, marks. Loaded from the store, dropped
after any doubt.

Used by the ingest role: `plan.py` plans against it, `groups.py` changes membership, `receipts.py` moves marks. Losing
all of it costs a reload and nothing else, because the log, the memberships and the unacknowledged stream entries hold
the truth.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog

from protocol import codec
from protocol.models import (
    JOINING,
    LEAVING,
    Conversation,
    ConversationType,
    EventKind,
    Membership,
    Role,
    SystemEvent,
)
from workers.projection import Folded, Projection, effect_of_tail
from workers.store.conversations import ConversationStore, Loaded, TailMessage, new_membership
from workers.store.marks import Mark

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Sequence

INBOXED = 256
"""Messages remembered per member who is offline, to take them out of the inbox at their receipt (100 bytes each)."""
OWN_SENDS = 256
"""Own messages remembered while the delivered mark is behind them; with more, the next delivery_ack moves it."""

log = structlog.get_logger()


class Member:
    """A live member with its watermarks; `devices` holds only cursors that moved here and are not flushed."""

    __slots__ = (
        "blocks",
        "delivered",
        "devices",
        "hide_reads",
        "join_seq",
        "own",
        "read",
        "read_countable",
        "role",
        "shown",
        "silenced_until",
        "user_id",
    )

    def __init__(self, membership: Membership) -> None:
        self.user_id = membership.user_id
        self.role = membership.role
        self.join_seq = membership.join_seq
        until = membership.silenced_until
        self.silenced_until = 0 if until is msgspec.UNSET else int(until.timestamp() * 1000)
        """Epoch ms; 0: not silenced."""
        self.hide_reads = False
        self.blocks = False
        """In a 1:1 conversation: takes nothing from the other."""
        shown = membership.shown_read_seq
        self.shown: int | None = None if shown is msgspec.UNSET else shown
        """The read mark as others may know it; None: as it is."""
        self.delivered = membership.delivered_seq
        self.read = membership.read_seq
        self.read_countable = membership.read_countable
        self.devices: dict[str, int] = {}
        self.own: deque[int] = deque(maxlen=OWN_SENDS)
        """Own messages above the delivered mark: who wrote a message has it, once it has what came before."""

    def reach(self, sequence: int) -> bool:
        """A device of this member holds everything up to `sequence`: raise the delivered mark, over own messages that
        follow directly. True where it moved."""
        if sequence <= self.delivered:
            return False
        self.delivered = sequence
        while self.own and self.own[0] <= self.delivered + 1:
            self.delivered = max(self.delivered, self.own.popleft())
        return True

    def read_to(self, sequence: int, countable: int) -> None:
        """The member has read everything up to `sequence`; whether others may know it is settled now, for good."""
        self.read = sequence
        self.read_countable = max(self.read_countable, countable)
        if self.shown is not None and not self.hide_reads:
            self.shown = sequence

    def hide(self, hides: bool) -> bool:
        """From now on the member hides what it reads, or no longer. What was shown stays shown, and what was read while
        it was hidden stays hidden. True where that is a change."""
        is_change = hides is not self.hide_reads
        self.hide_reads = hides
        self.freeze()
        return is_change

    def freeze(self) -> None:
        """Who hides shows no more from here on than has been shown."""
        if self.hide_reads and self.shown is None:
            self.shown = self.read

    def shown_marks(self) -> tuple[int, int]:
        """(delivered, read) as others may know them: what somebody has read and hides they have got, no more."""
        return max(self.delivered, self.read), self.told_marks()[1]

    def told_marks(self) -> tuple[int, int]:
        """(delivered, read) as a `receipt_update` tells them: only what a device has confirmed is delivered, and what
        was hidden is not read."""
        return self.delivered, self.read if self.shown is None else self.shown

    def mark(self, conversation_id: str) -> Mark:
        """What the next flush writes for this member; forgets the moved cursors."""
        devices, self.devices = self.devices, {}
        return self.watermarks(conversation_id)._replace(devices=devices)

    def watermarks(self, conversation_id: str) -> Mark:
        """The marks without the cursors."""
        return Mark(conversation_id, self.user_id, self.delivered, self.read, self.read_countable, {}, self.shown)


class Owned:
    """One conversation in its owner's memory. `last`, `digest`, `countable`, `created_ms`: its head as planned, then
    committed.
    """

    __slots__ = (
        "announced",
        "banned",
        "blocked",
        "conversation",
        "conversation_id",
        "countable",
        "created_ms",
        "digest",
        "disappearing_seconds",
        "inboxed",
        "last",
        "members",
        "membership_seq",
        "roster",
        "shard",
    )

    def __init__(self, shard: int, conversation: Conversation, loaded: Loaded | None = None) -> None:
        assert isinstance(conversation.conversation_id, str)
        self.conversation_id = conversation.conversation_id
        self.shard = shard
        self.conversation = conversation
        self.membership_seq = loaded.membership_seq if loaded else 0
        self.members = {m.user_id: Member(m) for m in loaded.members} if loaded else {}
        self.roster: tuple[str, ...] = tuple(self.members)
        """Ids of the live members, one object until membership changes: messages with the same roster travel
        together.
        """
        seconds = conversation.disappearing_seconds
        self.disappearing_seconds = 0 if seconds is msgspec.UNSET else seconds
        self.banned = set(loaded.banned) if loaded else set()
        self.blocked = False
        """1:1: one of the two takes nothing from the other."""
        if loaded is not None:
            for member in self.members.values():
                member.hide_reads = member.user_id in loaded.hiding
            self.heed_blocks(loaded.blocking)
        self.last = loaded.last if loaded else 0
        self.digest = loaded.digest if loaded else bytes(16)
        self.countable = loaded.countable if loaded else 0
        created_at = loaded.last_created_at if loaded else None
        self.created_ms = int(created_at.timestamp() * 1000) if created_at else 0
        self.inboxed: dict[str, deque[tuple[int, str]]] = {}
        """User → (sequence, message id) put into the inbox here and not yet delivered, the latest of them: what is
        older leaves the inbox when the user comes back."""
        self.announced = {name: member.told_marks() for name, member in self.members.items()} if self.is_group else {}
        """Of a group: member → its marks that the authors have been told."""

    @property
    def is_group(self) -> bool:
        return self.conversation.conversation_type is ConversationType.GROUP

    def note_inboxed(self, user_id: str, sequence: int, message_id: str) -> None:
        """The message waits in this user's inbox."""
        waiting = self.inboxed.get(user_id)
        if waiting is None:
            waiting = self.inboxed[user_id] = deque(maxlen=INBOXED)
        waiting.append((sequence, message_id))

    def leave_inbox(self, user_id: str, sequence: int) -> list[str]:
        """Everything up to `sequence` is delivered: the ids that need not wait any more."""
        waiting = self.inboxed.get(user_id)
        gone = []
        while waiting and waiting[0][0] <= sequence:
            gone.append(waiting.popleft()[1])
        if not waiting:
            self.inboxed.pop(user_id, None)
        return gone

    @property
    def is_pair(self) -> bool:
        """A 1:1 conversation as it should be."""
        return not self.is_group and len(self.roster) == 2

    def default_receiver(self, sender_id: str) -> str:
        """Who a message without receiver_id is for: the other participant, or the group itself."""
        if self.is_group:
            return self.conversation_id
        return next((user_id for user_id in self.roster if user_id != sender_id), sender_id)

    def shown(self) -> Conversation:
        """The conversation as it stands in memory."""
        return msgspec.structs.replace(
            self.conversation, participants=list(self.roster), last_sequence_number=self.last
        )

    def heed_blocks(self, blocking: frozenset[tuple[str, str]]) -> None:
        """`blocking`: (who, whom) of all blocks between the two of a 1:1 conversation."""
        for member in self.members.values():
            member.blocks = any((member.user_id, other) in blocking for other in self.roster)
        self.blocked = not self.is_group and any(member.blocks for member in self.members.values())

    def fold_event(self, event: SystemEvent, sequence: int) -> Folded:
        """Apply one system message; returns the stays it began and ended."""
        joined: list[Membership] = []
        left: list[str] = []
        kind = event.event
        if kind in JOINING:
            # Who joins has nothing unread from before: all that counts so far is behind its mark.
            for user_id in event.targets:
                role = Role.OWNER if kind is EventKind.CREATED and user_id == event.actor else Role.MEMBER
                membership = new_membership(self.conversation_id, user_id, role, sequence, self.countable)
                self.members[user_id] = Member(membership)
                joined.append(membership)
        elif kind in LEAVING:
            for user_id in event.targets:
                self.inboxed.pop(user_id, None)
                if self.members.pop(user_id, None) is not None:
                    left.append(user_id)
        self._fold_state(event)
        self.membership_seq = sequence
        if joined or left:
            self.roster = tuple(self.members)
        return Folded(joined, left)

    def _fold_state(self, event: SystemEvent) -> None:
        if event.event is EventKind.BANNED:
            self.banned.update(event.targets)
        elif event.event is EventKind.UNBANNED:
            self.banned.difference_update(event.targets)
        elif event.event is EventKind.SILENCED and isinstance(event.until, int):
            for user_id in event.targets:
                if user_id in self.members:
                    self.members[user_id].silenced_until = event.until
        elif event.event is EventKind.DISAPPEARING and isinstance(event.seconds, int):
            self.disappearing_seconds = event.seconds
            self.conversation = msgspec.structs.replace(
                self.conversation, disappearing_seconds=event.seconds or msgspec.UNSET
            )
        if isinstance(event.title, str):
            self.conversation = msgspec.structs.replace(self.conversation, title=event.title or msgspec.UNSET)
        if isinstance(event.roles, dict):
            for user_id, role in event.roles.items():
                if user_id in self.members:
                    self.members[user_id].role = role

    def adopt(self, memberships: Iterable[Membership]) -> None:
        """The members of a conversation that has no system messages (1:1)."""
        self.members = {m.user_id: Member(m) for m in memberships}
        self.roster = tuple(self.members)

    def sent(self, sender_id: str, sequence: int, countable: int) -> Member | None:
        """A member's own message at `sequence` is committed: it has read everything up to there. Returns it where its
        marks moved. Only a delivery_ack makes others' messages delivered, so that mark follows own messages, no
        more."""
        member = self.members.get(sender_id)
        if member is None or member.read >= sequence:
            return None
        member.read_to(sequence, countable)
        if member.delivered >= sequence - 1:
            member.reach(sequence)
        else:
            member.own.append(sequence)
        return member


class Conversations:
    """The owned conversations of one lane. `dirty` marks survive a reload: they are put over what the store says."""

    def __init__(self, store: ConversationStore) -> None:
        self._store = store
        self._owned: dict[str, Owned] = {}
        self.loading = anyio.Lock()
        """Held by a load, and by a flush of marks: what was read before one must not stand for what is there behind it.
        """
        self._forgets = 0
        """Times that states were dropped: what was being read meanwhile is read again."""
        self.dirty: dict[tuple[str, str], Member] = {}
        """(conversation, user) → member whose receipts moved its marks since the last flush."""
        self.replied: set[tuple[str, str]] = set()
        """(conversation, user) whose own send read others' messages: their authors are told with the next receipts."""
        self.lazy: dict[tuple[str, str], Member] = {}
        """The same for marks that own sends moved: the log can rebuild them, so they wait for the slower flush."""

    def get(self, conversation_id: str) -> Owned | None:
        return self._owned.get(conversation_id)

    def put(self, owned: Owned) -> None:
        self._owned[owned.conversation_id] = owned

    async def load(self, shard_of: dict[str, int]) -> None:
        """Bring in these conversations (id → shard) where they are not here; unknown ids stay unknown. Raises
        StoreUnavailable.
        """
        if all(name in self._owned for name in shard_of):
            return
        # Writer and teller both load: what one of them read must not replace what the other has moved on since.
        async with self.loading:
            while missing := [name for name in shard_of if name not in self._owned]:
                forgets = self._forgets
                found = [
                    await self._build(shard_of[name], one) for name, one in (await self._store.load(missing)).items()
                ]
                if forgets == self._forgets:
                    for owned, senders in found:
                        if owned.conversation_id not in self._owned:
                            self._put_over(owned, senders)
                            self._owned[owned.conversation_id] = owned
                    return

    def _put_over(self, owned: Owned, senders: Container[str]) -> None:
        """Put marks that are not flushed over what was read: also those that moved during the reads. `senders`: whose
        marks its tail has moved."""
        for user_id, member in owned.members.items():
            key = owned.conversation_id, user_id
            for waiting in (self.dirty, self.lazy):
                moved = waiting.get(key)
                if moved is not None:
                    self._overlay(member, moved)
                    waiting[key] = member
            member.freeze()
            if user_id in senders:
                self.lazy[key] = member

    async def _build(self, shard: int, loaded: Loaded) -> tuple[Owned, set[str]]:
        """A conversation as the store has it, its tail folded; and whose marks the tail has moved."""
        owned = Owned(shard, loaded.conversation, loaded)
        loaded_ids = {member.user_id for member in loaded.members}
        senders = await self._fold_tail(owned, loaded)
        joined = [user_id for user_id in owned.members if user_id not in loaded_ids]
        if joined:
            await self.look([(owned, joined)])
        return owned, senders

    async def look(self, whose: Sequence[tuple[Owned, Collection[str]]]) -> list[tuple[Owned, Member]]:
        """Read what these members' accounts say, and heed it; returns those who now begin or cease to hide what they
        read. Raises StoreUnavailable."""
        hiding = await self._store.hiding({user_id for _, user_ids in whose for user_id in user_ids})
        pairs = [(owned.roster[0], owned.roster[1]) for owned, _ in whose if owned.is_pair]
        blocking = await self._store.blocking(pairs) if pairs else frozenset()
        changed = []
        for owned, user_ids in whose:
            if owned.is_pair:
                owned.heed_blocks(blocking)
            for user_id in user_ids:
                member = owned.members.get(user_id)
                if member is not None and member.hide(user_id in hiding):
                    changed.append((owned, member))
        return changed

    async def _fold_tail(self, owned: Owned, loaded: Loaded) -> set[str]:
        """Redo the effects of messages whose projection was not written before a crash; whose marks that moved."""
        senders: set[str] = set()
        projection: Projection | None = None
        countable_at_head = owned.countable
        for message in loaded.tail:
            if message.system_content is None:
                if owned.sent(message.sender_id, message.sequence_number, message.countable) is not None:
                    senders.add(message.sender_id)
            elif message.sequence_number > loaded.membership_seq:
                projection = projection or Projection()
                self._fold_system(owned, message.system_content, message, projection)
        owned.countable = countable_at_head
        if projection is not None:
            log.info("projection_repaired", conversation_id=owned.conversation_id, through=owned.membership_seq)
            await self._store.apply([projection.through(owned)])
        return senders

    @staticmethod
    def _fold_system(owned: Owned, content: str, message: TailMessage, projection: Projection) -> None:
        if not content:
            # An edit whose content went with its target: there is nothing left to do.
            owned.membership_seq = message.sequence_number
            return
        event = codec.decode_system_event(content)
        owned.countable = message.countable
        folded = owned.fold_event(event, message.sequence_number)
        projection.add(event, folded, message.sequence_number, message.created_at)
        if (effect := effect_of_tail(event, message)) is not None:
            projection.add_effect(effect)

    @staticmethod
    def _overlay(member: Member, moved: Member) -> None:
        member.delivered = max(member.delivered, moved.delivered)
        if moved.read > member.read:
            member.read, member.read_countable = moved.read, moved.read_countable
        if moved.shown is not None:
            member.shown = max(moved.shown, member.shown or 0)
        for device_id, sequence in moved.devices.items():
            member.devices[device_id] = max(sequence, member.devices.get(device_id, 0))

    def forget(self, conversation_ids: Iterable[str]) -> None:
        """Drop states that may be wrong; the next use loads them with majority reads."""
        self._forgets += 1
        for name in conversation_ids:
            self._owned.pop(name, None)

    def shrink(self, limit: int, busy: Container[str]) -> None:
        """With more than `limit` here forget a quarter, those first that were quiet longest; none that are `busy` or
        have marks to flush or tell."""
        if len(self._owned) <= limit:
            return
        kept = {name for names in (self.dirty, self.lazy, self.replied) for name, _ in names}
        idle = [owned for name, owned in self._owned.items() if name not in kept and name not in busy]
        idle.sort(key=lambda owned: owned.created_ms)
        self.forget([owned.conversation_id for owned in idle[: len(self._owned) - limit + limit // 4]])

    @property
    def held(self) -> int:
        """Conversations in memory."""
        return len(self._owned)

    def forget_shards(self, kept: frozenset[int]) -> None:
        """Another worker may own the rest now."""
        self._forgets += 1
        self._owned = {name: owned for name, owned in self._owned.items() if owned.shard in kept}

    def take_dirty(self, lazy: bool) -> dict[tuple[str, str], Member]:
        """The members to flush, with the lazy ones or without; put them back with `put_back` where the flush failed."""
        dirty, self.dirty = self.dirty, {}
        if lazy:
            dirty = self.lazy | dirty
            self.lazy = {}
        return dirty

    def put_back(self, dirty: dict[tuple[str, str], Member]) -> None:
        """A flush failed: its members are dirty again (with what they have reached by now)."""
        for key, member in dirty.items():
            self.dirty.setdefault(key, member)
