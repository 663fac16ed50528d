"""What the ledger has collected: per send, per conversation, per device. Filled by `ledger`, read by `judge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from workers.audit.runs import Runs

if TYPE_CHECKING:
    from bench import journal
    from protocol.errors import ErrorCode
    from protocol.models import EventKind, StoredMessage


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """`kind`: lost, doubled, order, ack, altered, foreign, hole, receipt, unanswered, invented, digest; leak (shown to
    whom it is hidden from, or after it was deleted), stale (a change that was told is not in a page asked for later),
    view (a device shows something else than the log amounts to), muted, rights, refusal.
    """

    kind: str
    conversation_id: str
    user_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} (conversation {self.conversation_id}, user {self.user_id})"


class Seen:
    """What one device saw of one conversation. `high`: the pushed sequence behind which the next one has to come;
    `restarted`: the `sync` that has already brought the line back once; `late_high`: the same as `high` for what still
    comes on the connection before.
    """

    __slots__ = ("connection", "high", "late_high", "restarted", "runs")

    def __init__(self) -> None:
        self.connection = 0
        self.high = 0
        self.late_high = 0
        self.restarted = 0
        self.runs = Runs()


class Stay:
    """A user's visible range. `watching`: devices that were connected when the end of it became known."""

    __slots__ = ("first", "last", "left_at", "watching")

    def __init__(self, first: int) -> None:
        self.first = first
        self.last: int | None = None
        self.left_at = 0.0
        self.watching: set[str] = set()


class Showing(NamedTuple):
    """A message as one page showed it: one that is not as it was sent, or that somebody had begun to change.

    `opened_at`: the page was asked for later than that (when its connection was opened, say).
    """

    message: StoredMessage
    user_id: str
    at: float
    opened_at: float


class Send:
    """A message, or a change of the message `target` (see `journal.Sent`), and what became of it."""

    __slots__ = ("ack", "change", "content", "refusal", "target")

    def __init__(self, content: str, change: EventKind | None, target: str) -> None:
        self.content = content
        self.change = change
        self.target = target
        self.ack: tuple[str, int] | None = None
        self.refusal: ErrorCode | None = None


class Conversation:
    """Everything about one conversation."""

    __slots__ = (
        "acked",
        "direct",
        "entries",
        "known_at",
        "message_ids",
        "seen",
        "showings",
        "stays",
        "told",
        "touched",
        "viewed",
    )

    def __init__(self) -> None:
        self.entries: dict[int, StoredMessage] = {}
        """As they were sent, where anybody was shown that."""
        self.message_ids: dict[str, int] = {}
        self.acked: dict[int, tuple[str, str]] = {}
        """Sequence → (sender, idempotency key) of the send that was acked with it."""
        self.seen: dict[tuple[str, str], Seen] = {}
        self.stays: dict[str, list[Stay]] = {}
        self.direct = False
        self.touched: set[str] = set()
        """Ids of the messages that somebody has begun to change."""
        self.known_at: dict[int, float] = {}
        """Sequence of a change → when the first of all devices was told of it: it was committed by then."""
        self.showings: list[Showing] = []
        self.told: dict[int, set[tuple[str, bool]]] = {}
        """Sequence of a `hidden` entry → (user, was shown the target?)."""
        self.viewed: dict[tuple[str, str], journal.Viewed] = {}

    @property
    def head(self) -> int:
        """The greatest sequence anybody was told of; 0 where there is none."""
        return max(max(self.entries, default=0), max(self.acked, default=0))
