"""Every Redis Streams record. Gateways and workers know each other only through these.

Three directions: *ingest* records go into a conversation's shard, *queries* to any worker that reads MongoDB, *down*
records to one gateway or REST instance. Frames inside down records are already JSON bytes: a worker encodes once, the
gateway writes the same bytes to every recipient. A connection is named by (instance id, connection number).
"""

from __future__ import annotations

import msgspec

from protocol.errors import AuthErrorCode, ErrorCode
from protocol.keys import trace_id
from protocol.models import SYSTEM_SENDER, ConversationType, MessageType, Role, UserStatus


class Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What lies in a stream: a MessagePack array led by its tag."""


# --- ingest: gateway or REST → shard owner ---------------------------------------------------------------------------


class SendMessage(Record, tag="m", frozen=True, gc=False):
    """A client's message, checked at the door (`limits.check_message`), not yet accepted by the conversation.

    From a connection it is answered with an `Outcome`; from REST (`request` set) with a `CommandOutcome`.
    """

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
    forwarded: bool = False
    request: str = ""


class Edit(Record, tag="e", frozen=True, gc=False):
    content: str


class Delete(Record, tag="d", frozen=True, gc=False):
    """For everybody, or for the actor alone."""

    for_all: bool


class React(Record, tag="r", frozen=True, gc=False):
    emoji: str
    add: bool


class ChangeMessage(Record, tag="e", frozen=True, gc=False):
    """An edit, a deletion or a reaction: becomes an entry of the log that names its target.

    Answered as `SendMessage` is, with a `message_ack` of the entry.
    """

    instance: str
    connection: int
    request: str
    sender_id: str
    device_id: str
    conversation_id: str
    client_message_id: str
    idempotency_key: str
    message_id: str
    change: Edit | Delete | React


class Typing(Record, tag="t", frozen=True, gc=False):
    """Somebody writes, or has stopped: told to the other members who are online, never stored."""

    user_id: str
    conversation_id: str
    started: bool


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
    title: str = ""
    plaintext: bool = False


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


class SetRole(Record, tag="role", frozen=True, gc=False):
    user_id: str
    role: Role


class Rename(Record, tag="rename", frozen=True, gc=False):
    title: str


class Silence(Record, tag="silence", frozen=True, gc=False):
    """`until`: epoch ms; 0 lets the member speak again."""

    user_id: str
    until: int


class Ban(Record, tag="ban", frozen=True, gc=False):
    """Out, if in, and not to be added again before `Unban`."""

    user_id: str


class Unban(Record, tag="unban", frozen=True, gc=False):
    user_id: str


class SetDisappearing(Record, tag="disappear", frozen=True, gc=False):
    """`seconds`: how long content sent from now on is kept; 0 for ever."""

    seconds: int


class AgentNotice(Record, tag="agent", frozen=True, gc=False):
    """The actor, an agent, has not answered this message: in time, or not at all."""

    message_id: str
    in_time: bool


class ChangeConversation(Record, tag="u", frozen=True, gc=False):
    """Any other step of a conversation's state: becomes a system message. Answered by `CommandOutcome`."""

    instance: str
    request: str
    command_id: str
    conversation_id: str
    actor: str
    change: SetRole | Rename | Silence | Ban | Unban | SetDisappearing | AgentNotice


class LookAtAccount(Record, tag="s", frozen=True, gc=False):
    """What this member's account says may have changed: whom it blocks, whether it hides what it reads. No entry of the
    log. The owner of the conversation looks, and answers with a `CommandOutcome` without a body."""

    instance: str
    request: str
    conversation_id: str
    user_id: str


GroupCommand = CreateConversation | AddParticipants | RemoveParticipant | ChangeConversation
LogRecord = SendMessage | ChangeMessage | GroupCommand | LookAtAccount
"""What a shard's owner takes in order; receipts and typing overtake it."""
IngestRecord = (
    SendMessage
    | ChangeMessage
    | Receipts
    | Typing
    | CreateConversation
    | AddParticipants
    | RemoveParticipant
    | ChangeConversation
    | LookAtAccount
)


def trace_of(record: LogRecord) -> str:
    """The trace id of what a record asks for (`keys.trace_id`); the same for every retry."""
    if isinstance(record, SendMessage | ChangeMessage):
        return trace_id(record.conversation_id, record.sender_id, record.idempotency_key)
    if isinstance(record, LookAtAccount):
        return trace_id(record.conversation_id, record.user_id, "")
    return trace_id(record.conversation_id, SYSTEM_SENDER, record.command_id)


# --- query: gateway → any worker -------------------------------------------------------------------------------------


class OpenQuery(Record, tag="o", frozen=True, gc=False):
    """A device authenticated (or sent `sync`): which conversations, how far is it, how far are they.

    `cursors` overrides the device's stored cursors. `issued_ms`: when the token was made, so that a worker can tell
    whether the device was revoked since. Answered by `OpenAnswer`; one that is only a check by `TokenGood`, unless it
    is refused.
    """

    instance: str
    connection: int
    user_id: str
    device_id: str
    cursors: dict[str, int]
    issued_ms: int = 0
    is_check: bool = False


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


class PresenceQuery(Record, tag="w", frozen=True, gc=False):
    """May this user watch these people, and how are they? Answered by `PresenceAnswer`."""

    instance: str
    connection: int
    user_id: str
    user_ids: list[str]


Query = OpenQuery | PageQuery | RangeQuery | HistoryQuery | HeadsQuery | PresenceQuery


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
    """One live membership as of an `OpenAnswer`: visible range, device cursor, and the digest at the head.

    Or one that has ended, whose end, its head, this device has not seen.
    """

    conversation_id: str
    cursor: int
    head: int
    digest: bytes


class OpenAnswer(Record, tag="O", frozen=True, gc=False):
    """Answer to `OpenQuery`: `unread` over all live memberships; or why the token is no longer good."""

    connection: int
    unread: int
    heads: list[OpenHead]
    refusal: AuthErrorCode | None = None


class TokenGood(Record, tag="T", frozen=True, gc=False):
    """Answer to an `OpenQuery` that is only a check: the token of this connection was not revoked."""

    connection: int


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
    """`ended`: the user is no longer in it; the head is the last that they may see."""

    user_id: str
    conversation_id: str
    head: int
    ended: bool = False


class HeadsAnswer(Record, tag="S", frozen=True, gc=False):
    heads: list[UserHead]


class Watched(Record, frozen=True, gc=False):
    """`last_seen`: epoch ms; 0 where it is not known or not shown."""

    user_id: str
    status: UserStatus
    last_seen: int


class PresenceAnswer(Record, tag="W", frozen=True, gc=False):
    """Those of the people asked for whom this connection's user may watch, as they are now; `refused`: the others."""

    connection: int
    people: list[Watched]
    refused: list[str]


class Replaced(Record, tag="X", frozen=True, gc=False):
    """From gateway to gateway: the device of this connection has connected elsewhere, the newest wins."""

    connection: int


class CommandOutcome(Record, tag="C", frozen=True, gc=False):
    """Answer to a command for the REST request that waits.

    `code` is None on success; `body` is JSON: the conversation, or the `message_ack` payload of a message.
    """

    request: str
    code: ErrorCode | None
    message: str
    body: bytes


DownItem = (
    Outcome
    | Delivery
    | Notice
    | OpenAnswer
    | TokenGood
    | PageAnswer
    | Reply
    | HeadsAnswer
    | PresenceAnswer
    | CommandOutcome
    | Replaced
)
"""One stream entry on `down:{instance}` holds a list of these, in order."""


# --- pub/sub: what all gateways that care hear at once; lost where nobody listens ------------------------------------


class Revoked(msgspec.Struct, tag="revoked", frozen=True):
    """On `user:{user_id}`: tokens of this device (empty: of all) made before `before_ms` are no longer good."""

    device_id: str
    before_ms: int


class Tell(msgspec.Struct, tag="tell", frozen=True):
    """On `user:{user_id}` and `notification:{user_id}`: a JSON frame for the user's devices (empty: all of them)."""

    frame: msgspec.Raw
    device_id: str = ""


class PushJob(msgspec.Struct, tag="push", frozen=True):
    """On `notification:{user_id}` and in `notifications`: none of the user's devices has confirmed this message. No
    content, no names. `badge`: the user's unread messages of all conversations."""

    conversation_id: str
    message_id: str
    sequence_number: int
    badge: int


UserSignal = Revoked | Tell


class PresenceChange(msgspec.Struct, frozen=True):
    """On `presence:{user_id}`. `hidden_from`: a user id, or `*`, who may no longer watch this person.

    `settled`: no quick return is to be waited for (a dead gateway was buried).
    """

    status: UserStatus
    last_seen: int
    hidden_from: str = ""
    settled: bool = False


class MigrationTicket(msgspec.Struct, frozen=True):
    """Value of `migration:{hash}`: what the session token of a `migration` frame stands for; taken once.

    Times in epoch ms: when the original token ends, and when it was made.
    """

    user_id: str
    device_id: str
    expires_ms: int
    issued_ms: int


# --- instances -------------------------------------------------------------------------------------------------------


class InstanceInfo(msgspec.Struct, frozen=True):
    """Value of `instance:{id}` (JSON). `kind`: gateway, rest or worker."""

    kind: str
    endpoint: str
    load: int
    draining: bool
