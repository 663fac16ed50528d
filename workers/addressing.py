"""Does a message fit the conversation it is sent to? Pure; called by `plan.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.errors import ErrorCode
from protocol.media import KINDS
from protocol.models import AGENT_PREFIX
from workers.groups import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from protocol.media import MediaKind
    from protocol.records import SendMessage
    from workers.conversations import Owned
    from workers.receipts import Place
    from workers.store.media import Use


def check_addressing(
    record: SendMessage, owned: Owned, join_seq: int, replies: Mapping[str, Place], gone: AbstractSet[str]
) -> Refused | None:
    """Does receiver_id fit the conversation, and is the reply target a message of it that is there to be seen?

    `gone`: what was deleted for all just before.
    """
    receiver = record.receiver_id
    if receiver:
        if owned.is_group:
            if receiver != owned.conversation_id and not _is_agent_of(receiver, owned):
                return _unfit("receiver_id of a group message is empty, the conversation or an agent in it")
        elif receiver == record.sender_id or receiver not in owned.members:
            return _unfit("receiver_id is not the other participant")
    if record.reply_to_message_id is not None:
        target = replies.get(record.reply_to_message_id)
        if (
            target is None
            or target.conversation_id != owned.conversation_id
            or target.sequence_number < join_seq
            or not target.replyable
            or record.reply_to_message_id in gone
        ):
            return _unfit("reply_to_message_id is not a message of this conversation")
    return None


def _is_agent_of(receiver_id: str, owned: Owned) -> bool:
    """Everybody in a group sees what is said to one of its agents; who is named is the one that answers."""
    return receiver_id.startswith(AGENT_PREFIX) and receiver_id in owned.members


def check_media(record: SendMessage, media_url: str, usable: Mapping[Use, MediaKind]) -> Refused | None:
    """Is it the sender's own finished upload, or one that a message shows them, of the kind the message says?"""
    kind = usable.get((record.sender_id, media_url))
    if kind is None:
        return _unfit("media_url is not a finished upload that the sender may use")
    if kind is not KINDS.get(record.message_type):
        return _unfit(f"media_url is of kind {kind.value}")
    return None


def _unfit(reason: str) -> Refused:
    return Refused(ErrorCode.VALIDATION_FAILED, reason)
