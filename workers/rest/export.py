"""An account's export: everything it may see, as its devices would be shown it, one JSON object a line.

Memory holds one page of one conversation, however much there is. A stream that ends without its `end` line was cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from protocol.models import Conversation, StoredMessage
from workers.store.blocks import Block
from workers.store.devices import Device
from workers.store.logs import NotVisible
from workers.store.memberships import OwnSettings
from workers.store.push_tokens import PushToken
from workers.store.users import Account

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.store import Store
    from workers.store.stays import Stay

NDJSON: Final = "application/x-ndjson"
_PAGE: Final = 100
_encode = msgspec.json.Encoder().encode


class AccountLine(msgspec.Struct, frozen=True, tag="account"):
    """The first line."""

    account: Account


class DeviceLine(msgspec.Struct, frozen=True, tag="device"):
    device: Device


class PushLine(msgspec.Struct, frozen=True, tag="push"):
    """How one of its devices is reached without a connection."""

    push: PushToken


class BlockLine(msgspec.Struct, frozen=True, tag="block"):
    block: Block


class ConversationLine(msgspec.Struct, frozen=True, tag="conversation"):
    """Its messages follow. `left`: the account is not in it any more, and sees nothing of how it stands now."""

    conversation: Conversation
    settings: OwnSettings
    role: str
    left: bool


class MessageLine(msgspec.Struct, frozen=True, tag="message"):
    message: StoredMessage


class EndLine(msgspec.Struct, frozen=True, tag="end"):
    """The last line: nothing is missing before it."""

    conversations: int
    messages: int


Line = AccountLine | DeviceLine | PushLine | BlockLine | ConversationLine | MessageLine | EndLine


async def export_lines(store: Store, account: Account) -> AsyncIterator[bytes]:
    """The lines, several at a time. Raises StoreUnavailable, which cuts the stream off."""
    user_id = str(account.user_id)
    yield _lines([AccountLine(account)])
    after: str | None = ""
    while after is not None:
        devices, after = await store.devices.listed(user_id, after, _PAGE)
        yield _lines([DeviceLine(device) for device in devices])
    yield _lines([PushLine(token) for token in await store.push_tokens.listed(user_id)])
    after = ""
    while after is not None:
        blocks, after = await store.blocks.listed(user_id, after, _PAGE)
        yield _lines([BlockLine(block) for block in blocks])
    conversations = messages = 0
    async for page in store.stays.stays(user_id, live=False):
        for stay in page:
            conversations += 1
            yield _lines([_conversation_line(stay)])
            async for shown in _messages(store, user_id, stay):
                messages += len(shown)
                yield _lines([MessageLine(message) for message in shown])
    yield _lines([EndLine(conversations, messages)])


async def _messages(store: Store, user_id: str, stay: Stay) -> AsyncIterator[list[StoredMessage]]:
    after = 0
    while True:
        page = await store.logs.page(user_id, stay.membership.conversation_id, after, _PAGE)
        if isinstance(page, NotVisible):
            return
        yield page.messages
        if not page.has_more:
            return
        after = page.to_sequence


def _conversation_line(stay: Stay) -> ConversationLine:
    membership = stay.membership
    muted_until = membership.muted_until
    settings = OwnSettings(
        membership.archived is True,
        membership.pinned_at is not msgspec.UNSET,
        None if muted_until is msgspec.UNSET else muted_until,
    )
    conversation = stay.conversation
    left_at = membership.leave_seq
    if left_at is not msgspec.UNSET:
        # How it stands now is not theirs to know.
        conversation = msgspec.structs.replace(
            conversation,
            participants=[membership.user_id],
            last_sequence_number=left_at,
            last_message_at=msgspec.UNSET,
            title=msgspec.UNSET,
            disappearing_seconds=msgspec.UNSET,
        )
    return ConversationLine(conversation, settings, membership.role.value, left_at is not msgspec.UNSET)


def _lines(lines: list[Line]) -> bytes:
    return b"".join(_encode(line) + b"\n" for line in lines)
