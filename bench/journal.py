"""What happens to one simulated device, as events: what it sent, what it was told, what it saw.

Written by `client.Client`, judged by `ledger.Ledger`. `at` is seconds of the clock of whoever drives the client.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bench.folds import MessageView
from protocol.errors import ErrorCode
from protocol.frames import MessagesPayload, ReceiptUpdatePayload
from protocol.models import EventKind, StoredMessage


class Event(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """`connection` counts the connections of this device from 1; 0: it has not been online yet."""

    at: float
    user_id: str
    device_id: str
    connection: int


class Connected(Event, frozen=True, gc=False, kw_only=True):
    """The server let this device in. `resumed` is the last sequence it said it holds, per conversation; `opened_at`:
    when it asked to be let in."""

    resumed: dict[str, int]
    opened_at: float = 0.0
    migrated: bool = False
    """By a session token, while the connection before was still there; its end is no event."""
    ticket: str = ""
    """A hash of that token."""
    unread: int | None = None
    """What `auth_success` counted."""


class Moving(Event, frozen=True, gc=False, kw_only=True):
    """The server asked this device to go elsewhere, and it is about to; `ticket`: a hash of the session token."""

    ticket: str


class Closed(Event, frozen=True, gc=False, kw_only=True):
    code: int


class Sent(Event, frozen=True, gc=False, kw_only=True):
    """`attempt` 1 is the first try of this key. `change` None: a message; else what is done to the message `target`,
    with the new content or the emoji as `content`."""

    conversation_id: str
    idempotency_key: str
    content: str
    attempt: int
    change: EventKind | None = None
    target: str = ""


class Acked(Event, frozen=True, gc=False, kw_only=True):
    conversation_id: str
    idempotency_key: str
    message_id: str
    sequence_number: int
    duplicate: bool
    change: EventKind | None = None


class Refused(Event, frozen=True, gc=False, kw_only=True):
    """An `error` frame; without a key it answers something other than a send."""

    code: ErrorCode
    retryable: bool
    conversation_id: str | None
    idempotency_key: str | None
    change: EventKind | None = None


class Pushed(Event, frozen=True, gc=False, kw_only=True):
    """A `messages` frame as it came, before the client's dedupe."""

    payload: MessagesPayload


class Confirmed(Event, frozen=True, gc=False, kw_only=True):
    """The device said that it holds everything up to here (`delivery_ack`)."""

    conversation_id: str
    message_id: str
    sequence_number: int


class Read(Event, frozen=True, gc=False, kw_only=True):
    """The user said that it has read up to here (`read_receipt`)."""

    conversation_id: str
    sequence_number: int


class Receipt(Event, frozen=True, gc=False, kw_only=True):
    payload: ReceiptUpdatePayload


class Asked(Event, frozen=True, gc=False, kw_only=True):
    """The client found a hole and asked for it again (`retransmit`)."""

    conversation_id: str
    from_sequence: int
    to_sequence: int


class Rewound(Event, frozen=True, gc=False, kw_only=True):
    """The client sent `sync`: until `Synced`, a backlog may bring again what this connection had already."""


class Synced(Event, frozen=True, gc=False, kw_only=True):
    """`sync_complete` came."""


class Viewed(Event, frozen=True, gc=False, kw_only=True):
    """What this device shows by now of the messages that are not as they were sent, by message id."""

    conversation_id: str
    through: int
    views: dict[str, MessageView]


class Looked(Event, frozen=True, gc=False, kw_only=True):
    """A page of the HTTP API, asked for at `asked_at`."""

    conversation_id: str
    asked_at: float
    messages: list[StoredMessage]


class Contradicted(Event, frozen=True, gc=False, kw_only=True):
    """The digest this device folded is not the one the server states for the same sequence."""

    conversation_id: str
    sequence_number: int
    folded: str
    stated: str


Journal = Callable[[Event], None]
