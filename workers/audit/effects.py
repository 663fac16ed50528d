"""What the changes in a log must have made of the messages they name, against what the messages say. Pure.

A change is an entry; its effect on its target is a projection written after it (`workers/store/changes.py`). Only
messages that are changed, or that some entry changes, are remembered here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.models import EventKind, SystemEvent

if TYPE_CHECKING:
    from workers.audit.report import Findings
    from workers.audit.snapshot import Entry

_ID_MS = slice(4, 15)
"""Of a message id: when it was made, epoch ms in hexadecimal (`protocol.keys.new_message_id`)."""
_CLOCK_SLACK_MS = 1000


class _View:
    """A message after the changes to it that were taken so far."""

    __slots__ = ("content", "deleted_seq", "edit_ids", "edited_seq", "hidden_by", "last_seq", "reactions", "said")

    def __init__(self) -> None:
        self.content: str | None = None
        self.edited_seq: int | None = None
        self.deleted_seq = 0
        self.edit_ids: list[str] = []
        self.said: list[int] = []
        """Sequences of the edits that still say what they said."""
        self.hidden_by: set[str] = set()
        self.reactions: set[tuple[str, str]] = set()
        self.last_seq = 0


class Effects:
    """The changes of one log."""

    def __init__(self, conversation_id: str, findings: Findings) -> None:
        self._conversation_id = conversation_id
        self._findings = findings
        self._views: dict[str, _View] = {}
        self._shown: dict[str, Entry] = {}
        """Messages that are not as they were sent, by id."""

    def note(self, entry: Entry) -> None:
        """An entry as it is stored, where anything of it can have changed."""
        self._shown[entry.message_id] = entry
        if entry.deleted_at is not None and (entry.content or entry.media_url):
            self._add("a deleted message still holds what it said", entry, has_media=entry.media_url is not None)

    def take(self, entry: Entry, event: SystemEvent | None) -> None:
        """The entry of a change; `event` None: an edit whose content is gone."""
        target_id = entry.target_message_id or ""
        view = self._views.setdefault(target_id, _View())
        view.last_seq = entry.sequence_number
        if event is None or event.event is EventKind.EDITED:
            view.edit_ids.append(entry.message_id)
            view.edited_seq = entry.sequence_number
            view.content = None if event is None or not isinstance(event.content, str) else event.content
            view.said += [entry.sequence_number] if entry.content else []
            if event is None and entry.deleted_at is None:
                self._add("the entry of an edit is empty and not deleted", entry)
            return
        emoji = event.emoji if isinstance(event.emoji, str) else ""
        match event.event:
            case EventKind.DELETED:
                view.deleted_seq = entry.sequence_number
            case EventKind.HIDDEN:
                view.hidden_by.add(entry.hidden_for or "")
            case EventKind.REACTED:
                view.reactions.add((event.actor, emoji))
            case EventKind.UNREACTED:
                view.reactions.discard((event.actor, emoji))
            case _:
                self._add(f"a {event.event.value} entry names a message", entry)

    def _add(self, statement: str, entry: Entry, **evidence: object) -> None:
        self._findings.add(
            "effects",
            statement,
            self._conversation_id,
            sequence=entry.sequence_number,
            message_id=entry.message_id,
            **evidence,
        )

    def finish(self, first: Entry | None, written_through: int | None) -> None:
        """Compare. `first`: the first entry that is still there; `written_through`: no effect of a later entry need be
        written yet (None: all must be)."""
        edit_ids = {message_id: view for view in self._views.values() for message_id in view.edit_ids}
        for target_id, view in self._views.items():
            if written_through is not None and view.last_seq > written_through:
                self._shown.pop(target_id, None)
                continue
            shown = self._shown.pop(target_id, None)
            if shown is not None:
                self._compare(shown, view)
            elif first is not None and not _is_removed(target_id, first):
                self._miss(target_id, view)
        for entry in self._shown.values():
            if entry.is_system:
                self._compare_edit(entry, edit_ids.get(entry.message_id), written_through)
            elif _is_touched(entry) and (entry.expires_at is None or entry.content or entry.changed_seq is not None):
                self._add("changed, and no entry of the log says so", entry, changed_seq=entry.changed_seq)

    def _compare(self, shown: Entry, view: _View) -> None:
        has_disappeared = shown.expires_at is not None and shown.deleted_at is not None
        if view.deleted_seq and shown.deleted_at is None:
            self._add("deleted in the log, and still there", shown, by=view.deleted_seq)
        if not view.deleted_seq and shown.deleted_at is not None and shown.expires_at is None:
            self._add("gone, and no entry of the log deletes it", shown)
        if view.deleted_seq and view.said:
            self._add("deleted, and the entries of its edits still say what it said", shown, edits=view.said)
        if view.deleted_seq or has_disappeared:
            return
        if shown.edited_seq != view.edited_seq or (view.content is not None and shown.content != view.content):
            self._add("does not say what its last edit says", shown, edited_seq=shown.edited_seq, by=view.edited_seq)
        if set(shown.hidden_by) != view.hidden_by:
            self._add("is hidden from others than the log says", shown, by=sorted(view.hidden_by))
        if {(given.user_id, given.emoji) for given in shown.reactions} != view.reactions:
            self._add("has other reactions than the log gives it", shown, by=sorted(view.reactions))
        if shown.changed_seq != view.last_seq:
            self._add("has not taken the last change of it", shown, changed_seq=shown.changed_seq, by=view.last_seq)

    def _miss(self, target_id: str, view: _View) -> None:
        statement = "a change in the log has left no trace on the message it names"
        self._findings.add("effects", statement, self._conversation_id, message_id=target_id, by=view.last_seq)

    def _compare_edit(self, entry: Entry, target: _View | None, written_through: int | None) -> None:
        """Entries of edits go with the content of their target, and are hidden with it."""
        if target is not None and written_through is not None and target.last_seq > written_through:
            return
        is_gone = entry.deleted_at is not None
        if target is None:
            if is_gone or entry.hidden_by:
                self._add("a system message is hidden or gone, and is no edit", entry)
            return
        if is_gone and not target.deleted_seq and entry.expires_at is None:
            self._add("the entry of an edit is gone, and its message is not deleted", entry)


def _is_touched(entry: Entry) -> bool:
    return (
        entry.changed_seq is not None
        or entry.edited_seq is not None
        or entry.deleted_at is not None
        or bool(entry.hidden_by)
        or bool(entry.reactions)
    )


def _is_removed(message_id: str, first: Entry) -> bool:
    """May retention have removed it? Not where the log begins with 1, nor where its id is younger than what is left."""
    if first.sequence_number == 1:
        return False
    try:
        made_ms = int(message_id[_ID_MS], 16)
    except ValueError:
        return True
    return made_ms <= first.created_at.timestamp() * 1000 + _CLOCK_SLACK_MS
