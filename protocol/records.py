"""Every Redis Streams record. Gateways and workers know each other only through these.

Three directions: *ingest* records go into a conversation's shard, *queries* to any worker that reads MongoDB, *down*
records to one gateway or REST instance. Frames inside down records are already JSON bytes: a worker encodes once, the
gateway writes the same bytes to every recipient. A connection is named by (instance id, connection number).
"""

from __future__ import annotations

import msgspec

from protocol.errors import ErrorCode
from protocol.models import ConversationType, MessageType


class Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What lies in a stream: a MessagePack array led by its tag."""


# --- ingest: gateway or REST → shard owner ---------------------------------------------------------------------------


class SendMessage(Record, tag="m", frozen=True, gc=False):
    """A client's message, checked by the gateway, not yet accepted by the conversation."""

    instance: str
    connection: int
    sender_id: str
    device_id: str
    conversation_id: str
    client_message_id: str
    idempotency_key: str
    receiver_id: str
    content: str
    message_type: MessageType
    media_url: str | None
    reply_to_message_id: str | None
    timestamp: int


class DeliveredMark(Record, frozen=True, gc=False):
    user_id: str
    device_id: str
    message_id: str


class ReadMark(Record, frozen=True, gc=False):
    user_id: str
    device_id: str
    message_ids: list[str]


class Receipts(Record, tag="r", frozen=True, gc=False):
    """Receipts one gateway collected for one shard within a tick, in arrival order per user."""

    delivered: list[DeliveredMark]
    read: list[ReadMark]


class CreateConversation(Record, tag="c", frozen=True, gc=False):
    """`instance`/`request`: who waits for the `CommandOutcome`. `command_id`: the idempotency key of its log entry."""

    instance: str
    request: str
    command_id: str
    conversation_id: str
    conversation_type: ConversationType
    actor: str
    participants: list[str]
    agent_id: str


class AddParticipants(Record, tag="a", frozen=True, gc=False):
    instance: str
    request: str
    command_id: str
    conversation_id: str
    actor: str
    user_ids: list[str]


class RemoveParticipant(Record, tag="d", frozen=True, gc=False):
    instance: str
    request: str
    command_id: str
    conversation_id: str
    actor: str
    user_id: str


GroupCommand = CreateConversation | AddParticipants | RemoveParticipant
IngestRecord = SendMessage | Receipts | CreateConversation | AddParticipants | RemoveParticipant


# --- query: gateway → any worker -------------------------------------------------------------------------------------


class OpenQuery(Record, tag="o", frozen=True, gc=False):
    """A device authenticated (or sent `sync`): which conversations, how far is it, how far are they.

    `cursors` overrides the device's stored cursors. Answered by `OpenAnswer`.
    """

    instance: str
    connection: int
    user_id: str
    device_id: str
    cursors: dict[str, int]


class PageQuery(Record, tag="p", frozen=True, gc=False):
    """Next backlog page of one conversation after a sequence. Answered by `PageAnswer`."""

    instance: str
    connection: int
    user_id: str
    conversation_id: str
    after_sequence: int
    limit: int


class RangeQuery(Record, tag="g", frozen=True, gc=False):
    """A client's `retransmit`. Answered by a `Reply`."""

    instance: str
    connection: int
    user_id: str
    conversation_id: str
    from_sequence: int
    to_sequence: int


class HistoryQuery(Record, tag="h", frozen=True, gc=False):
    """A client's `history`. Answered by a `Reply`."""

    instance: str
    connection: int
    user_id: str
    conversation_id: str
    before_sequence: int
    limit: int


class HeadsQuery(Record, tag="s", frozen=True, gc=False):
    """The gateway's sweep (contract C8): heads of all conversations of these users. Answered by `HeadsAnswer`."""

    instance: str
    user_ids: list[str]


Query = OpenQuery | PageQuery | RangeQuery | HistoryQuery | HeadsQuery


# --- down: worker → one instance -------------------------------------------------------------------------------------


class Outcome(Record, tag="k", frozen=True, gc=False):
    """What became of one send: a `message_ack` or `error` frame for the connection it came from."""

    connection: int
    idempotency_key: str
    frame: bytes


class Delivery(Record, tag="l", frozen=True, gc=False):
    """Committed messages from..to of one conversation, as one `messages` frame, for those of `users` who are here.

    `skip` is the connection that sent all of them itself (0: none): it has its acks, so it gets no copy, but its
    cursor moves. Within an instance's stream the deliveries of a conversation come in sequence order.
    """

    conversation_id: str
    from_sequence: int
    to_sequence: int
    users: list[str]
    skip: int
    frame: bytes


class Notice(Record, tag="n", frozen=True, gc=False):
    """A frame outside any log (receipt_update, conversation_update) for those of `users` who are here."""

    users: list[str]
    frame: bytes


class OpenHead(Record, frozen=True, gc=False):
    """One live membership as of an `OpenAnswer`: visible range, device cursor, and the digest at the head."""

    conversation_id: str
    cursor: int
    head: int
    digest: bytes


class OpenAnswer(Record, tag="O", frozen=True, gc=False):
    """Answer to `OpenQuery`: `unread` over all live memberships."""

    connection: int
    unread: int
    heads: list[OpenHead]


class PageAnswer(Record, tag="P", frozen=True, gc=False):
    """Answer to `PageQuery`: accounts for from..to; `digest` is the one at `to_sequence`; empty page, empty frame.

    `from_sequence` is the asked `after_sequence` + 1 even where the member sees nothing that early: it tells
    the session which question this answers.
    """

    connection: int
    conversation_id: str
    from_sequence: int
    to_sequence: int
    has_more: bool
    digest: bytes
    frame: bytes


class Reply(Record, tag="R", frozen=True, gc=False):
    """A frame for one connection that asked for it."""

    connection: int
    frame: bytes


class UserHead(Record, frozen=True, gc=False):
    user_id: str
    conversation_id: str
    head: int


class HeadsAnswer(Record, tag="S", frozen=True, gc=False):
    heads: list[UserHead]


class Replaced(Record, tag="X", frozen=True, gc=False):
    """From gateway to gateway: the device of this connection has connected elsewhere, the newest wins."""

    connection: int


class CommandOutcome(Record, tag="C", frozen=True, gc=False):
    """Answer to a group command for the REST request that waits.

    `code` is None on success; `body` is JSON (the conversation).
    """

    request: str
    code: ErrorCode | None
    message: str
    body: bytes


DownItem = Outcome | Delivery | Notice | OpenAnswer | PageAnswer | Reply | HeadsAnswer | CommandOutcome | Replaced
"""One stream entry on `down:{instance}` holds a list of these, in order."""


# --- instances -------------------------------------------------------------------------------------------------------


class InstanceInfo(msgspec.Struct, frozen=True):
    """Value of `instance:{id}` (JSON). `kind`: gateway, rest or worker."""

    kind: str
    endpoint: str
    load: int
    draining: bool
