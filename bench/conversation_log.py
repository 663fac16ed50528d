"""One conversation as a device holds it: what came, what is missing, what is confirmed, the digest chain over it, and
what has become of its messages.

Used by `client.Client`; pure state, no frames.
"""

from __future__ import annotations

import msgspec

from bench.folds import MessageView, is_changed, shown_view, system_event, target_of
from protocol.models import MessageType, StoredMessage
from protocol.watermarks import NO_DIGEST, chain_digest, content_hash

RETRANSMIT_SPAN = 500
"""Most sequences one `retransmit` may ask for."""


class Held(msgspec.Struct, frozen=True, gc=False):
    """What the digest chain needs of a message, and the message itself where it changes something or is changed."""

    message_id: str
    sender_id: str
    hashed: bytes
    """BLAKE2b-128 of what was committed here, also where its content is something else by now."""
    entry: StoredMessage | None = None


class ConversationLog:
    """One conversation as this device holds it: complete through `cursor`, and `ahead` of a hole."""

    __slots__ = (
        "_unfolded",
        "ahead",
        "asked_at",
        "confirm_at",
        "cursor",
        "digest",
        "digests",
        "hole_since",
        "last_id",
        "unconfirmed",
        "views",
        "wants_anchor",
    )

    def __init__(self) -> None:
        self.cursor: int | None = None
        """None until the first frame says where this member's view begins."""
        self.last_id = ""
        self.ahead: dict[int, Held] = {}
        self.unconfirmed = 0
        self.confirm_at: float | None = None
        self.hole_since: float | None = None
        self.asked_at: float | None = None
        self.digest: bytes | None = None
        self.digests: dict[int, bytes] = {}
        self.wants_anchor = False
        """The digest is unknown and the server has not been asked for one yet."""
        self.views: dict[str, MessageView] = {}
        """Message id → what it looks like by now; of those that are not as they were sent."""
        self._unfolded: dict[int, Held] = {}
        """The newest messages while the digest is unknown: a head may be stated for a sequence already passed."""

    def begin(self, first: int) -> None:
        """The view begins at `first`; only from 1 on is the digest before it known."""
        self.cursor = first - 1
        self.digest = NO_DIGEST if first == 1 else None
        self.wants_anchor = first > 1
        for sequence in [sequence for sequence in self.ahead if sequence < first]:
            del self.ahead[sequence]

    def advance(self, accounted: int, digests_kept: int) -> int:
        """Move over what is held, and over what the server accounted for without a message. Returns how many came."""
        moved = 0
        cursor = self.cursor
        if cursor is None:
            return 0
        while True:
            held = self.ahead.pop(cursor + 1, None)
            if held is not None:
                cursor += 1
                moved += 1
                self.last_id = held.message_id
                self._fold(held, cursor, digests_kept)
                if held.entry is not None:
                    self._view(held.entry)
            elif cursor < accounted:
                cursor += 1
                self.digest = None
                self.wants_anchor = True
            else:
                break
        self.cursor = cursor
        if not self.ahead:
            self.hole_since = self.asked_at = None
        return moved

    def _fold(self, held: Held, sequence: int, digests_kept: int) -> None:
        if self.digest is None:
            self._unfolded[sequence] = held
            if len(self._unfolded) > digests_kept:
                del self._unfolded[next(iter(self._unfolded))]
            return
        self.digest = chain_digest(self.digest, held.message_id, held.sender_id, sequence, held.hashed)
        self.digests[sequence] = self.digest
        if len(self.digests) > digests_kept:
            del self.digests[next(iter(self.digests))]

    def _view(self, message: StoredMessage) -> None:
        event = system_event(message)
        if event is None:
            if message.message_type is not MessageType.SYSTEM:
                self.views[message.message_id] = shown_view(message)  # type: ignore[index]  # a held one has an id
        elif target := target_of(message, event):
            self.views.setdefault(target, MessageView()).take(event)

    def anchor(self, sequence: int, digest: bytes, digests_kept: int) -> None:
        """Fold from here on, where the digest was unknown and everything since `sequence` is held."""
        if self.digest is not None or self.cursor is None or sequence > self.cursor:
            return
        since = range(sequence + 1, self.cursor + 1)
        if all(number in self._unfolded for number in since):
            unfolded, self._unfolded = self._unfolded, {}
            self.digest = digest
            for number in since:
                self._fold(unfolded[number], number, digests_kept)

    def hole(self) -> tuple[int, int] | None:
        """First and last missing sequence in front of what is held ahead; at most what one `retransmit` may ask."""
        if not self.ahead or self.cursor is None:
            return None
        return self.cursor + 1, min(min(self.ahead) - 1, self.cursor + RETRANSMIT_SPAN)


def held_message(message: StoredMessage) -> Held:
    message_id = message.message_id if isinstance(message.message_id, str) else ""
    changed = isinstance(message.content_hash, str)
    hashed = bytes.fromhex(message.content_hash) if changed else content_hash(message.content)  # type: ignore[arg-type]
    matters = message.message_type is MessageType.SYSTEM or is_changed(message)
    return Held(message_id, message.sender_id, hashed, message if matters else None)
