"""What a log amounts to: who is in a group and in which role, and what each of its messages looks like by now.

Used by the simulated clients for what they show, by the ledger for what they should, and by the replay to compare the
HTTP API's view with both. Pure; entries come in the order of their sequence numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET

from protocol import codec
from protocol.models import (
    JOINING,
    LEAVING,
    MESSAGE_EVENTS,
    SYSTEM_SENDER,
    EventKind,
    MessageType,
    Role,
    StoredMessage,
    SystemEvent,
)
from protocol.watermarks import content_hash

if TYPE_CHECKING:
    from collections.abc import Mapping


class MessageView(msgspec.Struct, kw_only=True):
    """A message after the changes to it. `content` None: as it was sent; "" once it is deleted."""

    content: str | None = None
    edited: bool = False
    deleted: bool = False
    reactions: frozenset[tuple[str, str]] = frozenset()
    """(user, emoji)."""

    def take(self, event: SystemEvent) -> None:
        """One more change. Nothing brings a deleted message back."""
        if self.deleted:
            return
        match event.event:
            case EventKind.EDITED:
                self.content = event.content if isinstance(event.content, str) else ""
                self.edited = True
            case EventKind.DELETED | EventKind.HIDDEN:
                self.content, self.deleted, self.edited, self.reactions = "", True, False, frozenset()
            case EventKind.REACTED:
                self.reactions |= {(event.actor, _emoji(event))}
            case EventKind.UNREACTED:
                self.reactions -= {(event.actor, _emoji(event))}
            case _:
                pass

    def shows_as(self, message: StoredMessage) -> bool:
        """Is this what the server shows?"""
        if self.deleted:
            return message.content == "" and message.deleted_at is not UNSET
        if message.deleted_at is not UNSET or self.edited != (message.edited_at is not UNSET):
            return False
        if self.reactions != reactions_of(message):
            return False
        if self.content is None:  # what may go one day has its hash from the start
            return committed_hash(message) == content_hash(message.content).hex()
        return message.content_hash is not UNSET and message.content == self.content


def _emoji(event: SystemEvent) -> str:
    return event.emoji if isinstance(event.emoji, str) else ""


def reactions_of(message: StoredMessage) -> frozenset[tuple[str, str]]:
    """(user, emoji) of every reaction a message is shown with."""
    if not isinstance(message.reactions, list):
        return frozenset()
    return frozenset((reaction.user_id, reaction.emoji) for reaction in message.reactions)


def shown_view(message: StoredMessage) -> MessageView:
    """The view of a message that comes changed already."""
    deleted, edited = message.deleted_at is not UNSET, message.edited_at is not UNSET
    return MessageView(
        content=message.content if edited or deleted else None,
        edited=edited and not deleted,
        deleted=deleted,
        reactions=frozenset() if deleted else reactions_of(message),
    )


def is_changed(message: StoredMessage) -> bool:
    """Is this message shown otherwise than it was sent?"""
    return (
        (message.content_hash is not UNSET and message.message_type is not MessageType.SYSTEM)
        or message.edited_at is not UNSET
        or message.deleted_at is not UNSET
        or bool(message.reactions)
    )


def system_event(message: StoredMessage) -> SystemEvent | None:
    """What a system message says; None for a message of somebody, and where what it said is gone."""
    if message.message_type is not MessageType.SYSTEM or message.sender_id != SYSTEM_SENDER or not message.content:
        return None
    return codec.decode_system_event(message.content)


def target_of(message: StoredMessage, event: SystemEvent) -> str:
    """The message that a change is about; "" where this viewer is not told."""
    if event.event not in MESSAGE_EVENTS:
        return ""
    if isinstance(message.target_message_id, str):
        return message.target_message_id
    return event.targets[0] if event.targets else ""


def committed_hash(message: StoredMessage) -> str:
    """BLAKE2b-128, hexadecimal, of what was sent, whatever is shown by now."""
    return message.content_hash if isinstance(message.content_hash, str) else content_hash(message.content).hex()


class GroupState:
    """A group after its system messages. `participants`: in the order in which they came."""

    def __init__(self) -> None:
        self.participants: dict[str, Role] = {}
        self.title = ""
        self.silenced: dict[str, int] = {}
        """User → epoch ms until when."""
        self.banned: set[str] = set()
        self.seconds = 0
        self.kinds: Counter[EventKind] = Counter()
        """How many entries there were of each kind."""

    def take(self, event: SystemEvent) -> None:
        """One more entry."""
        self.kinds[event.event] += 1
        if event.event in JOINING:
            for user_id in event.targets:
                self.participants[user_id] = Role.MEMBER
            if event.event is EventKind.CREATED:
                self.participants[event.actor] = Role.OWNER
        elif event.event in LEAVING:
            for user_id in event.targets:
                self.participants.pop(user_id, None)
                self.silenced.pop(user_id, None)
        if isinstance(event.roles, dict):
            self.participants.update(event.roles)
        if isinstance(event.title, str):
            self.title = event.title
        self._take_rest(event)

    def _take_rest(self, event: SystemEvent) -> None:
        match event.event:
            case EventKind.SILENCED:
                until = event.until if isinstance(event.until, int) else 0
                self.silenced.update(dict.fromkeys(event.targets, until))
            case EventKind.BANNED:
                self.banned.update(event.targets)
            case EventKind.UNBANNED:
                self.banned.difference_update(event.targets)
            case EventKind.DISAPPEARING:
                self.seconds = event.seconds if isinstance(event.seconds, int) else 0
            case _:
                pass

    def may_manage(self, user_id: str) -> bool:
        """Owners and admins, and the server itself."""
        return user_id == SYSTEM_SENDER or self.participants.get(user_id) in (Role.OWNER, Role.ADMIN)


def group_state(entries: Mapping[int, StoredMessage]) -> GroupState:
    """What the entries of a log, by sequence, amount to."""
    state = GroupState()
    for sequence in sorted(entries):
        event = system_event(entries[sequence])
        if event is not None:
            state.take(event)
    return state
