"""A session in a test: made in one line, already in the state a playbook starts from. Times are plain numbers."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from protocol import frames, records
from protocol.commands import Send
from protocol.limits import Limits, TokenBucket
from protocol.models import MessagePayload, MessageType
from protocol.session import Session

WALL_MS = 1_732_300_000_000
DIGEST = bytes(range(16))


def auth(resume: dict[str, int] | UnsetType = UNSET) -> frames.Auth:
    return frames.Auth(
        payload=frames.AuthPayload(
            user_id="usr_a", auth_token="t", device_id="phone", platform="web", app_version="1.0", resume=resume
        )
    )


def message(
    key: str = "k1",
    content: str = "hello",
    kind: MessageType = MessageType.TEXT,
    media_url: str | None = None,
    client_message_id: str | None = "c1",
) -> frames.Message:
    return frames.Message(
        client_message_id=client_message_id,
        idempotency_key=key,
        payload=MessagePayload(
            conversation_id="conv_1", content=content, message_type=kind, media_url=media_url, timestamp=WALL_MS
        ),
    )


def edit(key: str = "e1", content: str = "better") -> frames.MessageEdit:
    return frames.MessageEdit(
        payload=frames.EditPayload(
            client_message_id="c1", idempotency_key=key, conversation_id="conv_1", message_id="msg_1", content=content
        )
    )


def delete(key: str = "d1", scope: frames.DeleteScope = frames.DeleteScope.ALL) -> frames.MessageDelete:
    return frames.MessageDelete(
        payload=frames.DeletePayload(idempotency_key=key, conversation_id="conv_1", message_id="msg_1", scope=scope)
    )


def reaction(key: str = "r1", op: frames.ReactionOp = frames.ReactionOp.ADD) -> frames.MessageReaction:
    return frames.MessageReaction(
        payload=frames.ReactionPayload(
            idempotency_key=key, conversation_id="conv_1", message_id="msg_1", emoji="+1", op=op
        )
    )


def typing(conversation_id: str = "conv_1", state: frames.TypingState = frames.TypingState.START) -> frames.Typing:
    return frames.Typing(payload=frames.TypingPayload(conversation_id=conversation_id, state=state))


def presence_subscribe(*user_ids: str) -> frames.PresenceSubscribe:
    return frames.PresenceSubscribe(payload=frames.PeoplePayload(user_ids=list(user_ids)))


def error_of(command: object) -> frames.ErrorPayload:
    assert isinstance(command, Send)
    assert isinstance(command.frame, frames.Error)
    return command.frame.payload


def new_session(limits: Limits | None = None) -> Session:
    return Session("gw1", 7, limits or Limits(), 0.0)


def opening_session(limits: Limits | None = None, bucket: TokenBucket | None = None) -> Session:
    session = new_session(limits)
    session.receive(auth(), 0.0, WALL_MS)
    session.admit("usr_a", "phone", "sess_1", 1e9, bucket, 0.0)
    return session


def live_session(
    heads: dict[str, tuple[int, int]] | None = None, limits: Limits | None = None, bucket: TokenBucket | None = None
) -> Session:
    """`heads`: conversation → (cursor, head). With cursor == head everywhere the session is live and synced."""
    session = opening_session(limits, bucket)
    session.opened(open_answer(heads or {}), 0.0, WALL_MS)
    return session


def open_answer(heads: dict[str, tuple[int, int]], unread: int = 0) -> records.OpenAnswer:
    return records.OpenAnswer(
        7, unread, [records.OpenHead(name, cursor, head, DIGEST) for name, (cursor, head) in heads.items()]
    )


def page_answer(name: str, first: int, last: int, has_more: bool = False) -> records.PageAnswer:
    """A page whose frame tells what it holds; an empty page has none."""
    frame = f"{name} {first}..{last}".encode() if last >= first else b""
    return records.PageAnswer(7, name, first, last, has_more, DIGEST, frame)


def page_query(name: str, after: int, limit: int = 100) -> records.PageQuery:
    return records.PageQuery("gw1", 7, "usr_a", name, after, limit)


def open_query(cursors: dict[str, int]) -> records.OpenQuery:
    return records.OpenQuery("gw1", 7, "usr_a", "phone", cursors)
