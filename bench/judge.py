"""The end of a run: what should have been seen, and what it amounts to, against what was. Called by `Ledger`."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import UNSET

from bench.evidence import Conversation, Send, Showing, Stay, Violation
from bench.folds import GroupState, MessageView, committed_hash, is_changed, system_event, target_of
from protocol.errors import ErrorCode
from protocol.models import (
    GROUP_LIMIT,
    JOINING,
    LEAVING,
    MESSAGE_EVENTS,
    EventKind,
    MessageType,
    StoredMessage,
    SystemEvent,
)
from protocol.watermarks import DIGEST_BYTES, content_hash
from workers.audit.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PAGE_SECONDS: Final = 60.0
"""A page shows at least what was told so long before it came, however busy the machine is."""
_MANAGED: Final = frozenset(
    (
        EventKind.ADDED,
        EventKind.REMOVED,
        EventKind.BANNED,
        EventKind.UNBANNED,
        EventKind.ROLES,
        EventKind.RENAMED,
        EventKind.SILENCED,
        EventKind.DISAPPEARING,
    )
)
"""What only an owner or an admin may do."""


_TAKES_EDITS: Final = frozenset((EventKind.DELETED, EventKind.HIDDEN))


class _Change(msgspec.Struct, frozen=True):
    """A change of a message, in its place in the log. `viewer`: the one for whom it is, or "" for everybody."""

    sequence: int
    event: SystemEvent
    viewer: str


class Judge:
    """One judgement over everything collected; adds to `found`."""

    def __init__(
        self,
        conversations: dict[str, Conversation],
        sends: dict[tuple[str, str, str], Send],
        found: list[Violation],
    ) -> None:
        self._conversations = conversations
        self._sends = sends
        self._found = found

    def judge(self) -> list[Violation]:
        """All violations, those given included."""
        for (conversation_id, sender_id, key), send in self._sends.items():
            if send.ack is None and send.refusal is None:
                self._add("unanswered", conversation_id, sender_id, f"key {key} was sent and never acked nor refused")
            elif send.change is not None and send.ack is not None and send.ack[0] == send.target:
                self._judge_needless(conversation_id, sender_id, key, send)
        for conversation_id, conversation in self._conversations.items():
            self._judge_log(conversation_id, conversation)
            self._judge_reach(conversation_id, conversation)
            changes = self._changes(conversation_id, conversation)
            self._judge_showings(conversation_id, conversation, changes)
            self._judge_hidden(conversation_id, conversation)
            self._judge_views(conversation_id, conversation, changes)
            if not conversation.direct:
                self._judge_rules(conversation_id, conversation)
        return self._found

    def _add(self, kind: str, conversation_id: str, user_id: str, detail: str) -> None:
        self._found.append(Violation(kind=kind, conversation_id=conversation_id, user_id=user_id, detail=detail))

    # --- the log -----------------------------------------------------------------------------------------------------

    def _judge_log(self, conversation_id: str, conversation: Conversation) -> None:
        """The log itself: without holes, and each of its entries is one that somebody sent, once, unaltered."""
        everything = Runs()
        for sequence in sorted({*conversation.entries, *conversation.acked}):
            everything.add(sequence)
        for first, last in everything.missing(1, conversation.head):
            self._add("hole", conversation_id, "-", f"nobody was told of the sequences {first}..{last} (C3)")
        for sequence, message in conversation.entries.items():
            event = system_event(message)
            if event is not None and event.event in MESSAGE_EVENTS:
                self._judge_change(conversation_id, conversation, message, event)
            elif message.message_type is not MessageType.SYSTEM:
                self._judge_message(conversation_id, message, conversation.acked.get(sequence))

    def _judge_message(self, conversation_id: str, message: StoredMessage, author: tuple[str, str] | None) -> None:
        sequence = message.sequence_number
        if author is None or author[0] != message.sender_id:
            detail = f"sequence {sequence}, {message.message_id} of {message.sender_id}, belongs to no acked send"
            self._add("invented", conversation_id, message.sender_id, detail)
            return
        send = self._sends[(conversation_id, *author)]
        if (
            send.change is not None
            or send.ack != (message.message_id, sequence)
            or content_hash(send.content).hex() != committed_hash(message)
        ):
            detail = f"sequence {sequence} is {message.message_id}; its send: acked as {send.ack}, or other content"
            self._add("altered", conversation_id, message.sender_id, detail)

    def _judge_change(
        self, conversation_id: str, conversation: Conversation, message: StoredMessage, event: SystemEvent
    ) -> None:
        """The entry of a change says what its author sent, and of a `hidden` one nothing that its author did not mean
        for everybody."""
        sequence = message.sequence_number
        author = conversation.acked.get(sequence)
        if author is None:
            detail = f"sequence {sequence} ({event.event.value} by {event.actor or '?'}) belongs to no acked change"
            self._add("invented", conversation_id, event.actor, detail)
            return
        user_id, key = author
        send = self._sends[(conversation_id, user_id, key)]
        if event.event is EventKind.HIDDEN:
            secret = f"{user_id}\0{key}\0{send.target}".encode()
            true = event.commitment == blake2b(secret, digest_size=DIGEST_BYTES).hexdigest()
            if event.actor or event.targets:
                detail = f"sequence {sequence} shows everybody what was deleted for one"
                self._add("leak", conversation_id, user_id, detail)
        else:
            true = event.actor == user_id and event.targets == [send.target] and _said(event) == send.content
        if not true or send.change is not event.event or send.ack != (message.message_id, sequence):
            detail = f"sequence {sequence} ({event.event.value}) is not what was sent as {key}, acked as {send.ack}"
            self._add("altered", conversation_id, user_id, detail)

    def _judge_needless(self, conversation_id: str, user_id: str, key: str, send: Send) -> None:
        """Acked as its target: it was so already, and another entry of this user says so."""
        conversation = self._conversations[conversation_id]
        entries = [
            event.event
            for message in conversation.entries.values()
            if (event := system_event(message)) is not None
            and event.event in MESSAGE_EVENTS
            and self._is_like(conversation, message, event, user_id, send)
        ]
        if send.change is EventKind.UNREACTED:
            was_so = EventKind.REACTED not in entries or EventKind.UNREACTED in entries
        else:
            was_so = send.change in (EventKind.REACTED, EventKind.HIDDEN) and send.change in entries
        if not was_so:
            self._add(
                "ack", conversation_id, user_id, f"key {key} ({send.change}) was acked without an entry of the log"
            )

    @staticmethod
    def _is_like(
        conversation: Conversation, message: StoredMessage, event: SystemEvent, user_id: str, send: Send
    ) -> bool:
        """Is this entry of the same user, about the same message, with the same emoji?"""
        if event.event is EventKind.HIDDEN:
            author = conversation.acked.get(message.sequence_number, ("", ""))
            return author[0] == user_id and message.target_message_id in (UNSET, send.target)
        return (event.actor, target_of(message, event), _said(event)) == (user_id, send.target, send.content)

    # --- who got what ------------------------------------------------------------------------------------------------

    def _judge_reach(self, conversation_id: str, conversation: Conversation) -> None:
        head = conversation.head
        stays = fold_stays(conversation)
        for (user_id, device_id), seen in conversation.seen.items():
            mine = stays.get(user_id, [])
            allowed = [(stay.first, head if stay.last is None else stay.last) for stay in mine]
            for first, last in seen.runs.outside(allowed):
                detail = f"{device_id} saw {first}..{last}; allowed: {allowed}"
                self._add("foreign", conversation_id, user_id, detail)
        devices: dict[str, set[str]] = {}
        for user_id, device_id in self._devices():
            devices.setdefault(user_id, set()).add(device_id)
        for user_id, mine in stays.items():
            for device_id in devices.get(user_id, ()):
                self._judge_device(conversation_id, conversation, user_id, device_id, mine)

    def _devices(self) -> set[tuple[str, str]]:
        return {device for conversation in self._conversations.values() for device in conversation.seen}

    def _judge_device(
        self, conversation_id: str, conversation: Conversation, user_id: str, device_id: str, stays: list[Stay]
    ) -> None:
        seen = conversation.seen.get((user_id, device_id))
        runs = Runs() if seen is None else seen.runs
        for stay in stays:
            last = conversation.head if stay.last is None else stay.last
            holes = runs.missing(stay.first, last)
            if stay.last is not None and device_id not in stay.watching and holes and holes[-1][1] == last:
                holes.pop()  # it was away when its user left: what it did not get by then it may not get any more
            for low, high in holes:
                entry = conversation.entries.get(low)
                name = entry.message_id if entry is not None else conversation.acked.get(low, "?")
                detail = (
                    f"{device_id} never got {low}..{high} (first: {name}), visible from {stay.first} to {last} (C5)"
                )
                self._add("lost", conversation_id, user_id, detail)

    # --- what messages look like -------------------------------------------------------------------------------------

    def _changes(self, conversation_id: str, conversation: Conversation) -> dict[str, list[_Change]]:
        """Message id → its changes in the order of the log."""
        changes: dict[str, list[_Change]] = {}
        for sequence in sorted(conversation.entries):
            message = conversation.entries[sequence]
            event = system_event(message)
            if event is None or event.event not in MESSAGE_EVENTS:
                continue
            target, viewer = target_of(message, event), ""
            if event.event is EventKind.HIDDEN:
                author = conversation.acked.get(sequence)
                if author is None:
                    continue
                viewer, target = author[0], self._sends[(conversation_id, *author)].target
            mine = changes.setdefault(target, [])
            mine.append(_Change(sequence, event, viewer))
            if event.event in _TAKES_EDITS:  # what its edits said goes with it
                for change in mine:
                    entry = conversation.entries[change.sequence]
                    if change.event.event is EventKind.EDITED and isinstance(entry.message_id, str):
                        changes.setdefault(entry.message_id, []).append(_Change(sequence, event, viewer))
            elif event.event is EventKind.EDITED and isinstance(message.message_id, str):
                # Whoever has hidden the message before does not see what it says now, either.
                hidden = [change for change in mine if change.event.event is EventKind.HIDDEN]
                for change in hidden:
                    changes.setdefault(message.message_id, []).append(_Change(sequence, change.event, change.viewer))
        return changes

    def _judge_showings(
        self, conversation_id: str, conversation: Conversation, changes: dict[str, list[_Change]]
    ) -> None:
        """A page shows a message as it was after some change, and after those told before the page was asked for."""
        stays = fold_stays(conversation)
        for shown in conversation.showings:
            message = shown.message
            if isinstance(message.expires_at, type(message.created_at)) and not message.content:
                continue
            mine = [
                change for change in changes.get(str(message.message_id), ()) if change.viewer in ("", shown.user_id)
            ]
            view = MessageView()
            states = [msgspec.structs.replace(view)]
            settled = 0
            for number, change in enumerate(mine, 1):
                view.take(change.event)
                states.append(msgspec.structs.replace(view))
                if _is_settled(conversation.known_at.get(change.sequence), shown):
                    settled = number
            states += _veiled(states, mine, message.sequence_number, stays.get(shown.user_id, ()))
            if not any(state.shows_as(message) for state in states[settled:]):
                self._judge_stale(conversation_id, shown, states, settled)

    def _judge_stale(self, conversation_id: str, shown: Showing, states: list[MessageView], settled: int) -> None:
        message = shown.message
        what = f"sequence {message.sequence_number} as {_look(message)}"
        if states[settled].deleted and message.content:
            self._add("leak", conversation_id, shown.user_id, f"{what} after it was deleted")
        elif any(state.shows_as(message) for state in states[:settled]):
            self._add("stale", conversation_id, shown.user_id, f"{what}, after change {settled} of {len(states) - 1}")
        else:
            self._add("altered", conversation_id, shown.user_id, f"{what}, which none of its changes makes of it")

    def _judge_hidden(self, conversation_id: str, conversation: Conversation) -> None:
        """A `hidden` entry shows its target to its actor, and to nobody else."""
        for sequence, told in conversation.told.items():
            author = conversation.acked.get(sequence)
            for user_id, is_told in told:
                if author is not None and is_told != (user_id == author[0]):
                    detail = (
                        f"sequence {sequence} {'shows' if is_told else 'hides'} what {author[0]} deleted for himself"
                    )
                    self._add("leak" if is_told else "altered", conversation_id, user_id, detail)

    def _judge_views(self, conversation_id: str, conversation: Conversation, changes: dict[str, list[_Change]]) -> None:
        """Every device that has the whole log shows what the log amounts to."""
        stays = fold_stays(conversation)
        for (user_id, device_id), viewed in conversation.viewed.items():
            mine = stays.get(user_id)
            if not mine or mine[-1].last is not None or viewed.through != conversation.head:
                continue
            expected = dict(_expected_views(conversation, changes, user_id, mine[-1].first))
            shown = {
                message_id: view
                for message_id, view in viewed.views.items()
                if conversation.message_ids.get(message_id, 0) >= mine[-1].first and view != MessageView()
            }
            for message_id in sorted(expected.keys() | shown.keys()):
                if expected.get(message_id) != shown.get(message_id):
                    detail = (
                        f"{device_id} shows {message_id} as {shown.get(message_id)}, not {expected.get(message_id)}"
                    )
                    self._add("view", conversation_id, user_id, detail)

    # --- who may -----------------------------------------------------------------------------------------------------

    def _judge_rules(self, conversation_id: str, conversation: Conversation) -> None:
        """Whoever is in the log was allowed to: a member, not silenced, an admin where it takes one."""
        state = GroupState()
        silenced: set[str] = set()
        for sequence in sorted(conversation.entries):
            message = conversation.entries[sequence]
            event = system_event(message)
            actor = message.sender_id if event is None else event.actor
            if event is not None and event.event is EventKind.HIDDEN:
                actor = conversation.acked.get(sequence, ("",))[0]
            created_ms = int(message.created_at.timestamp() * 1000)
            if message.message_type is not MessageType.SYSTEM or (event is not None and event.event in MESSAGE_EVENTS):
                if actor not in state.participants:
                    self._add("rights", conversation_id, actor, f"sequence {sequence} is of somebody who is not in it")
                elif _is_silenced(state, event, actor, created_ms):
                    self._add("muted", conversation_id, actor, f"sequence {sequence} is of somebody who is silenced")
            if event is None:
                continue
            if event.event in _MANAGED and not state.may_manage(actor):
                detail = f"sequence {sequence} ({event.event.value}) is of a plain member or a stranger"
                self._add("rights", conversation_id, actor, detail)
            if event.event is EventKind.ADDED and state.banned.intersection(event.targets):
                self._add("rights", conversation_id, actor, f"sequence {sequence} adds somebody who is banned")
            state.take(event)
            silenced.update(event.targets if event.event is EventKind.SILENCED else ())
            if len(state.participants) > GROUP_LIMIT:
                self._add("rights", conversation_id, actor, f"sequence {sequence} makes it over {GROUP_LIMIT}")
        for (name, sender_id, key), send in self._sends.items():
            if name == conversation_id and send.refusal is ErrorCode.MUTED and sender_id not in silenced:
                self._add("refusal", name, sender_id, f"key {key} was refused as muted; nobody silenced its sender")


def _said(event: SystemEvent) -> str:
    for said in (event.content, event.emoji):
        if isinstance(said, str):
            return said
    return ""


def _is_settled(known_at: float | None, shown: Showing) -> bool:
    return known_at is not None and (known_at < shown.opened_at or known_at < shown.at - PAGE_SECONDS)


def _look(message: StoredMessage) -> str:
    look = "it was sent" if not is_changed(message) else "changed"
    if message.edited_at is not UNSET:
        look = "edited"
    if message.deleted_at is not UNSET:
        look = "deleted"
    return f"{look} ({len(message.content)} characters, {len(message.reactions or ())} reactions)"


def _is_silenced(state: GroupState, event: SystemEvent | None, actor: str, created_ms: int) -> bool:
    """A silenced member says nothing new; taking back is not saying."""
    says = event is None or event.event in (EventKind.EDITED, EventKind.REACTED)
    return says and created_ms < state.silenced.get(actor, 0)


def _expected_views(
    conversation: Conversation, changes: dict[str, list[_Change]], user_id: str, first: int
) -> Iterator[tuple[str, MessageView]]:
    for message_id, mine in changes.items():
        sequence = conversation.message_ids.get(message_id, 0)
        if sequence < first or conversation.entries[sequence].message_type is MessageType.SYSTEM:
            continue
        view = MessageView()
        for change in mine:
            if change.viewer in ("", user_id):
                view.take(change.event)
        if view != MessageView():
            yield message_id, view


def _veiled(
    states: Sequence[MessageView], changes: Sequence[_Change], sequence: int, stays: Iterable[Stay]
) -> list[MessageView]:
    """How a message is shown, too, to who has left since: without reactions once there was a later change, and without
    its text once that was an edit. Nobody sees what was made of a message after they left."""
    left = [stay.last for stay in stays if stay.last is not None and stay.last >= sequence]
    later = [change for change in changes if any(change.sequence > last for last in left)]
    if not later:
        return []
    bare = [msgspec.structs.replace(state, reactions=frozenset()) for state in states]
    return [*bare, MessageView(content="", deleted=True)] if any(_is_edit(change) for change in later) else bare


def _is_edit(change: _Change) -> bool:
    return change.event.event is EventKind.EDITED


def fold_stays(conversation: Conversation) -> dict[str, list[Stay]]:
    """Everybody's visible ranges, from the system messages in log order; for a 1:1 conversation as declared."""
    if conversation.direct:
        return conversation.stays
    ends = {(user_id, stay.last): stay for user_id, stays in conversation.stays.items() for stay in stays}
    folded: dict[str, list[Stay]] = {}
    for sequence in sorted(conversation.entries):
        event = system_event(conversation.entries[sequence])
        if event is None or event.event not in JOINING | LEAVING:
            continue
        for user_id in event.targets:
            stays = folded.setdefault(user_id, [])
            if event.event in JOINING:
                stays.append(Stay(sequence))
            elif stays and stays[-1].last is None:
                end = ends[(user_id, sequence)]
                stays[-1].last = sequence
                stays[-1].watching = end.watching
    return folded
