"""What one connection has been given of each conversation, and how it catches up with the rest. Sans-IO.

The half of a session that faces the workers: `session.py` is the other half and the only caller. One cursor per
conversation: the last sequence handed to this connection. A delivery that continues the cursor is sent; one that does
not (a gap, a lagging socket, a backlog under way) is dropped and the conversation is put into `behind`, from where
pages of the log are asked one at a time, round-robin, until the cursor has caught up. So nothing is buffered here,
whatever a client does.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from protocol import frames, records
from protocol.commands import Ask, Command, Send, SendEncoded

if TYPE_CHECKING:
    from protocol.limits import Limits


class State(Enum):
    AWAITING_AUTH = "awaiting_auth"
    OPENING = "opening"
    """Token accepted; waiting for a worker to say where the user's conversations stand."""
    LIVE = "live"
    CLOSED = "closed"


class Sync:
    """A backlog run from an `OpenQuery` to `sync_complete`; lives only as long."""

    __slots__ = ("answered", "asked", "early", "heads", "is_rewind", "reply_auth", "unread")

    def __init__(self, asked: dict[str, int], is_rewind: bool, reply_auth: bool) -> None:
        self.asked = asked
        self.is_rewind = is_rewind
        """The client named the cursors: they may lie behind what this connection was already given."""
        self.reply_auth = reply_auth
        self.answered = False
        self.early: dict[str, int] = {}
        self.heads: dict[str, frames.Head] = {}
        self.unread = 0


class Backlog:
    """The cursors of one connection. Base of `session.Session`, which owns every field that is not declared here."""

    __slots__ = (
        "_asked_at",
        "_asking",
        "_deadline",
        "_limits",
        "_sync",
        "behind",
        "connection",
        "cursors",
        "device_id",
        "instance",
        "issued_ms",
        "lagging",
        "state",
        "user_id",
    )

    def __init__(self, instance: str, connection: int, limits: Limits, now: float) -> None:
        self.instance = instance
        self.connection = connection
        self.user_id = ""
        self.device_id = ""
        self.issued_ms = 0
        """When the token was made; a worker compares it with the device's revocation."""
        self.state = State.AWAITING_AUTH
        self.lagging = False
        self.cursors: dict[str, int] | None = None
        """Conversation → last sequence handed to this connection."""
        self.behind: dict[str, int] | None = None
        """Conversation → greatest sequence known to exist behind its cursor; in round-robin order."""
        self._limits = limits
        self._asking: str | None = None
        self._asked_at = 0.0
        self._deadline = now + limits.auth_timeout_seconds
        self._sync: Sync | None = None

    def _open_query(self, cursors: dict[str, int]) -> records.OpenQuery:
        return records.OpenQuery(self.instance, self.connection, self.user_id, self.device_id, cursors, self.issued_ms)

    def _start_sync(self, asked: dict[str, int], *, is_rewind: bool, reply_auth: bool, now: float) -> None:
        running = self._sync
        if running is not None and not running.answered:
            reply_auth = reply_auth or running.reply_auth
        self._sync = Sync(asked, is_rewind, reply_auth)
        self._deadline = now + self._limits.open_timeout_seconds
        self._asked_at = now

    def _take_heads(self, sync: Sync, heads: list[records.OpenHead]) -> None:
        """A worker has said where the user's conversations stand: what is behind will be paged."""
        self._deadline = float("inf")
        sync.answered = True
        cursors = self.cursors or {}
        behind: dict[str, int] = {}
        missed = sync.early
        if self.behind:
            missed.update(self.behind)
        for head in heads:
            conversation_id = head.conversation_id
            before = cursors.get(conversation_id, 0)
            known = max(head.head, missed.pop(conversation_id, 0), before)
            cursor = cursors[conversation_id] = head.cursor if sync.is_rewind else max(head.cursor, before)
            if known > cursor:
                behind[conversation_id] = known
            sync.heads[conversation_id] = frames.Head(sequence_number=head.head, digest=head.digest.hex())
        behind.update(missed)
        self.cursors = cursors
        self.behind = behind or None
        self._asking = None

    def deliver(self, conversation_id: str, from_sequence: int, to_sequence: int) -> bool:
        """May the live frame that holds from..to be written now?

        False also marks the conversation as behind where it is; the caller then calls `pump`.
        """
        cursors = self.cursors
        if cursors is None:
            if self._sync is not None:
                self._sync.early[conversation_id] = to_sequence
            return False
        cursor = cursors.get(conversation_id, 0)
        if to_sequence <= cursor:
            return False
        behind = self.behind
        if from_sequence == cursor + 1 and not self.lagging and (behind is None or conversation_id not in behind):
            cursors[conversation_id] = to_sequence
            return True
        self._fall_behind(conversation_id, to_sequence)
        return False

    def _fall_behind(self, conversation_id: str, known: int) -> None:
        if self.behind is None:
            self.behind = {}
        if known > self.behind.get(conversation_id, 0):
            self.behind[conversation_id] = known

    def head_seen(self, conversation_id: str, head: int) -> bool:
        """The sweep saw this head. True when the cursor has not reached it: call `note_head` if that stays so."""
        return self.cursors is not None and head > self.cursors.get(conversation_id, 0)

    def note_head(self, conversation_id: str, head: int) -> None:
        """A push vanished: page the log. The caller calls `pump`."""
        if self.head_seen(conversation_id, head):
            self._fall_behind(conversation_id, head)

    def page(self, answer: records.PageAnswer, now: float, wall_ms: int) -> list[Command]:
        """A page of the log arrived: send it, move the cursor, ask for the next."""
        conversation_id = answer.conversation_id
        if self._asking != conversation_id or self.cursors is None or self.behind is None:
            return []
        cursor = self.cursors.get(conversation_id, 0)
        if answer.from_sequence != cursor + 1:
            return []  # a late answer to a question that was asked again from elsewhere
        self._asking = None
        commands: list[Command] = []
        progress = answer.to_sequence > cursor
        if progress:
            if answer.frame:
                commands.append(SendEncoded(answer.frame))
            cursor = self.cursors[conversation_id] = answer.to_sequence
            if self._sync is not None:
                self._sync.heads[conversation_id] = frames.Head(
                    sequence_number=answer.to_sequence, digest=answer.digest.hex()
                )
        known = self.behind.pop(conversation_id, 0)
        if answer.has_more or (progress and known > cursor):
            self.behind[conversation_id] = known
        elif not self.behind:
            self.behind = None
        commands.extend(self.pump(now, wall_ms))
        return commands

    def pump(self, now: float, wall_ms: int) -> list[Command]:
        """Ask for the next page where one is wanted and none is under way; `sync_complete` where nothing is behind.

        The transport calls it whenever its outbox has room again.
        """
        if self.state is not State.LIVE or self._asking is not None or self.lagging:
            return []
        if self.behind:
            conversation_id = next(iter(self.behind))
            self._asking = conversation_id
            self._asked_at = now
            after = 0 if self.cursors is None else self.cursors.get(conversation_id, 0)
            return [
                Ask(
                    records.PageQuery(
                        self.instance, self.connection, self.user_id, conversation_id, after, self._limits.page_limit
                    )
                )
            ]
        sync = self._sync
        if sync is None or not sync.answered:
            return []
        self._sync = None
        return [
            Send(
                frames.SyncComplete(
                    payload=frames.SyncCompletePayload(heads=sync.heads, unread_count=sync.unread, server_time=wall_ms)
                )
            )
        ]
