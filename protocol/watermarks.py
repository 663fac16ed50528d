"""Pure rules over positions in a conversation: status, unread, visibility, the digest chain.

Called by the workers for what viewers see and by the bench to check it. A position is a sequence number; a watermark is
the greatest position a reader has confirmed, and only grows.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from protocol.models import MessageStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)
"""The digest before the first entry."""


def message_status(sequence: int, marks: Iterable[tuple[int, int]]) -> MessageStatus:
    """Status of a message from the (delivered, read) watermarks of those, other than its sender, who could see it.

    In a group all of them must have reached it. Nobody else there: sent.
    """
    delivered = read = None
    for member_delivered, member_read in marks:
        delivered = member_delivered if delivered is None else min(delivered, member_delivered)
        read = member_read if read is None else min(read, member_read)
    if delivered is None or read is None:
        return MessageStatus.SENT
    if read >= sequence:
        return MessageStatus.READ
    return MessageStatus.DELIVERED if max(delivered, read) >= sequence else MessageStatus.SENT


def visible_range(join_seq: int, leave_seq: int | None, last: int) -> tuple[int, int]:
    """First and last sequence a member may see; empty when first > last."""
    return join_seq, last if leave_seq is None else min(leave_seq, last)


def unread(head_countable: int, read_countable: int) -> int:
    """Countable messages behind the read mark; never negative."""
    return max(0, head_countable - read_countable)


def content_hash(content: str) -> bytes:
    """BLAKE2b-128 of a message's content (RFC 7693)."""
    return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def chain_digest(previous: bytes, message_id: str, sender_id: str, sequence: int, hashed: bytes) -> bytes:
    """The next link: BLAKE2b-128 over previous digest, message id, sender, sequence and `content_hash`.

    Two logs have the same digest at a sequence if and only if they hold the same messages up to it, so a
    missing, doubled, reordered or altered entry is visible. The hash of a content stays when the content goes, so
    deleting it breaks no chain.
    """
    link = f"{message_id}\0{sender_id}\0{sequence}\0".encode()
    return blake2b(previous + link + hashed, digest_size=DIGEST_BYTES).digest()
