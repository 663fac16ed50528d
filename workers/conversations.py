"""What a shard's owner keeps in memory of each conversation: head, members, marks. Loaded from the store, dropped
after any doubt.

Used by the ingest role: `plan.py` plans against it, `groups.py` changes membership, `receipts.py` moves marks. Losing
all of it costs a reload and nothing else, because the log, the memberships and the unacknowledged stream entries hold
the truth.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import structlog

from protocol import codec
from protocol.models import Conversation, ConversationType, Membership, Role, SystemEvent
from workers.store.conversations import ConversationStore, Loaded, new_membership
from workers.store.marks import Mark

if TYPE_CHECKING:
    from collections.abc import Iterable

OWN_SENDS = 256
"""Own messages remembered while the delivered mark is behind them; with more, the next delivery_ack moves it."""

log = structlog.get_logger()


class Member:
    """A live member with its watermarks; `devices` holds only cursors that moved here and are not flushed."""

    __slots__ = ("delivered", "devices", "join_seq", "own", "read", "read_countable", "role", "user_id")

    def __init__(self, membership: Membership) -> None:
        self.user_id = membership.user_id
        self.role = membership.role
        self.join_seq = membership.join_seq
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

    def mark(self, conversation_id: str) -> Mark:
        """What the next flush writes for this member; forgets the moved cursors."""
        devices, self.devices = self.devices, {}
        return Mark(conversation_id, self.user_id, self.delivered, self.read, self.read_countable, devices)


class Projection:
    """Membership changes of one conversation that `memberships` does not show yet: the last stay of each user they
    touch.
    """

    __slots__ = ("joined", "left", "roles")

    def __init__(self) -> None:
        self.joined: dict[str, Membership] = {}
        self.left: dict[str, int] = {}
        self.roles: dict[str, Role] = {}

    def add(self, event: SystemEvent, joined: Iterable[Membership], sequence: int) -> None:
        """One more system message, whose stays `Owned.fold_event` returned."""
        for membership in joined:
            self.joined[membership.user_id] = membership
            self.left.pop(membership.user_id, None)
        if event.event in ("removed", "left"):
            for user_id in event.targets:
                self.left[user_id] = sequence
        if isinstance(event.roles, dict):
            self.roles.update(event.roles)

    async def write(self, store: ConversationStore, owned: Owned) -> None:
        """Make `memberships` and `conversations` show it. Raises StoreUnavailable; safe to repeat."""
        stays = [
            msgspec.structs.replace(stay, leave_seq=self.left[user_id]) if user_id in self.left else stay
            for user_id, stay in self.joined.items()
        ]
        ended = [(user_id, at) for user_id, at in self.left.items() if user_id not in self.joined]
        await store.apply(owned.conversation_id, owned.membership_seq, owned.roster, stays, ended, self.roles.items())


class Low(NamedTuple):
    """The lowest of the members' marks, whose it is, and the next one up: so that an author's own mark can be left
    out.
    """

    mark: int
    user_id: str
    others: int

    def without(self, user_id: str) -> int:
        """What all but this member have reached."""
        return self.others if user_id == self.user_id else self.mark


class GroupMarks(NamedTuple):
    """What everybody in a group has stored and read."""

    delivered: Low
    read: Low

    def for_author(self, user_id: str) -> tuple[int, int]:
        """(delivered, read) through which all others have come."""
        return self.delivered.without(user_id), self.read.without(user_id)


def _low(marks: list[tuple[int, str]]) -> Low:
    if not marks:
        return Low(0, "", 0)
    mark, user_id = min(marks)
    return Low(mark, user_id, min((other for other, name in marks if name != user_id), default=mark))


class Owned:
    """One conversation in its owner's memory. `last`, `digest`, `countable`, `created_ms`: its head as planned, then
    committed.
    """

    __slots__ = (
        "announced",
        "conversation",
        "conversation_id",
        "countable",
        "created_ms",
        "digest",
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
        self.last = loaded.last if loaded else 0
        self.digest = loaded.digest if loaded else bytes(16)
        self.countable = loaded.countable if loaded else 0
        created_at = loaded.last_created_at if loaded else None
        self.created_ms = int(created_at.timestamp() * 1000) if created_at else 0
        self.inboxed: dict[str, list[tuple[int, str]]] = {}
        """User → (sequence, message id) put into the inbox here and not yet delivered."""
        self.announced = self.group_marks()
        """What the authors of a group have been told."""

    @property
    def is_group(self) -> bool:
        return self.conversation.conversation_type is ConversationType.GROUP

    def default_receiver(self, sender_id: str) -> str:
        """Who a message without receiver_id is for: the other participant, or the group itself."""
        if self.is_group:
            return self.conversation_id
        return next((user_id for user_id in self.roster if user_id != sender_id), sender_id)

    def group_marks(self) -> GroupMarks:
        """What everybody has reached now."""
        members = self.members.values()
        return GroupMarks(
            _low([(member.delivered, member.user_id) for member in members]),
            _low([(member.read, member.user_id) for member in members]),
        )

    def fold_event(self, event: SystemEvent, sequence: int) -> list[Membership]:
        """Apply one system message to the members; returns the stays it began."""
        joined = []
        if event.event in ("created", "added"):
            # Who joins has nothing unread from before: all that counts so far is behind its mark.
            for user_id in event.targets:
                role = Role.OWNER if event.event == "created" and user_id == event.actor else Role.MEMBER
                membership = new_membership(self.conversation_id, user_id, role, sequence, self.countable)
                self.members[user_id] = Member(membership)
                joined.append(membership)
        else:
            for user_id in event.targets:
                self.members.pop(user_id, None)
                self.inboxed.pop(user_id, None)
        if isinstance(event.roles, dict):
            for user_id, role in event.roles.items():
                if user_id in self.members:
                    self.members[user_id].role = role
        self.membership_seq = sequence
        self.roster = tuple(self.members)
        return joined

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
        member.read = sequence
        member.read_countable = countable
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
        missing = [name for name in shard_of if name not in self._owned]
        if not missing:
            return
        for name, loaded in (await self._store.load(missing)).items():
            owned = Owned(shard_of[name], loaded.conversation, loaded)
            await self._fold_tail(owned, loaded)
            for user_id in owned.members:
                for waiting in (self.dirty, self.lazy):
                    moved = waiting.get((name, user_id))
                    if moved is not None:
                        self._overlay(owned.members[user_id], moved)
                        waiting[name, user_id] = owned.members[user_id]
            self._owned[name] = owned

    async def _fold_tail(self, owned: Owned, loaded: Loaded) -> None:
        """Redo the effects of messages whose projection was not written before a crash."""
        projection: Projection | None = None
        countable_at_head = owned.countable
        for message in loaded.tail:
            if message.system_content is None:
                if (member := owned.sent(message.sender_id, message.sequence_number, message.countable)) is not None:
                    self.lazy[owned.conversation_id, message.sender_id] = member
            elif message.sequence_number > loaded.membership_seq:
                event = codec.decode_system_event(message.system_content)
                owned.countable = message.countable
                projection = projection or Projection()
                projection.add(event, owned.fold_event(event, message.sequence_number), message.sequence_number)
        owned.countable = countable_at_head
        if projection is not None:
            log.info("projection_repaired", conversation_id=owned.conversation_id, through=owned.membership_seq)
            await projection.write(self._store, owned)

    @staticmethod
    def _overlay(member: Member, moved: Member) -> None:
        member.delivered = max(member.delivered, moved.delivered)
        if moved.read > member.read:
            member.read, member.read_countable = moved.read, moved.read_countable
        for device_id, sequence in moved.devices.items():
            member.devices[device_id] = max(sequence, member.devices.get(device_id, 0))

    def forget(self, conversation_ids: Iterable[str]) -> None:
        """Drop states that may be wrong; the next use loads them with majority reads."""
        for name in conversation_ids:
            self._owned.pop(name, None)

    def forget_shards(self, kept: frozenset[int]) -> None:
        """Another worker may own the rest now."""
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
