"""The two bounded buffers a connection may have, and the deadlines all connections share.

`Outbox`: what the peer has not taken yet. `Held`: data messages its link is not ready for. Both exist only while they
hold something, so an idle connection pays for neither. `Deadlines`: one kind of deadline (handshake, close, …); since
a kind has one constant delay, the order of starting is the order of ending and a dict is a queue.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from gateway.transport import TransportLimits

T = TypeVar("T")

HELD_OVERHEAD_BYTES: Final = 64
"""Counted for each held message besides its payload: what the object costs, so that empty messages are bounded too."""

GATHERED: Final = 64
"""Chunks given to one sendmsg call; far below IOV_MAX (1,024)."""


class Outbox:
    """Chunks in order, the oldest possibly cut. `full` is true from passing the bound until half of it is free.

    The bound is a promise to the link, told once when it is passed and once when half of it is free again, not a
    reason to drop what was taken. Past twice the bound (`hopeless`) the peer is given up: the link did not listen, or
    the peer makes us answer without reading.
    """

    __slots__ = ("_chunks", "_limits", "full", "size_bytes")

    def __init__(self, limits: TransportLimits) -> None:
        self._chunks: deque[bytes | memoryview] = deque()
        self._limits = limits
        self.size_bytes = 0
        self.full = False

    def __len__(self) -> int:
        return len(self._chunks)

    def append(self, chunk: bytes | memoryview) -> bool:
        """Take a chunk. True: this one passed the bound."""
        self._chunks.append(chunk)
        self.size_bytes += len(chunk)
        limits = self._limits
        if self.full or (self.size_bytes <= limits.outbox_bytes and len(self._chunks) <= limits.outbox_frames):
            return False
        self.full = True
        return True

    @property
    def hopeless(self) -> bool:
        """Twice the bound."""
        limits = self._limits
        return self.size_bytes > 2 * limits.outbox_bytes or len(self._chunks) > 2 * limits.outbox_frames

    def oldest(self) -> list[bytes | memoryview]:
        """What to write next, at most `GATHERED` chunks."""
        return list(islice(self._chunks, GATHERED))

    def written(self, count: int) -> bool:
        """`count` bytes of the oldest chunks are gone. True: a full outbox has fallen below half its bound."""
        self.size_bytes -= count
        chunks = self._chunks
        while count:
            chunk = chunks.popleft()
            if count < len(chunk):
                chunks.appendleft(memoryview(chunk)[count:])
                break
            count -= len(chunk)
        return self._relieved()

    def pop(self) -> tuple[bytes | memoryview, bool]:
        """Take the oldest chunk out, for a transport that writes whole ones. Then as for `written`."""
        chunk = self._chunks.popleft()
        self.size_bytes -= len(chunk)
        return chunk, self._relieved()

    def _relieved(self) -> bool:
        limits = self._limits
        if not self.full or 2 * self.size_bytes > limits.outbox_bytes or 2 * len(self._chunks) > limits.outbox_frames:
            return False
        self.full = False
        return True


class Held:
    """Data messages that came while the link was blocked, oldest first."""

    __slots__ = ("_messages", "size_bytes")

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._messages)

    def append(self, payload: bytes, bound_bytes: int) -> bool:
        """Keep one message. True: the bound is reached, read no further."""
        self._messages.append(payload)
        self.size_bytes += len(payload) + HELD_OVERHEAD_BYTES
        return self.size_bytes >= bound_bytes

    def pop(self) -> bytes:
        """The oldest message."""
        payload = self._messages.popleft()
        self.size_bytes -= len(payload) + HELD_OVERHEAD_BYTES
        return payload


class Deadlines(Generic[T]):
    """One kind of deadline over many connections. Every call is O(1) but for what `expired` returns."""

    __slots__ = ("_due", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[T, float] = {}

    def __len__(self) -> int:
        return len(self._due)

    def start(self, owner: T, now: float) -> None:
        """(Re)start the deadline of `owner`."""
        self._due.pop(owner, None)
        self._due[owner] = now + self._seconds

    def clear(self, owner: T) -> None:
        """Forget it, if there is one."""
        self._due.pop(owner, None)

    def expired(self, now: float) -> list[T]:
        """Take out those that are past."""
        past: list[T] = []
        for owner, due in self._due.items():
            if due > now:
                break
            past.append(owner)
        for owner in past:
            del self._due[owner]
        return past
