"""A history sorted by conversation, on disk: so that one share of the conversations is in memory at a time.

Lines go into temporary files without a name, by a hash of their conversation; nothing is left behind.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Final
from zlib import crc32

from workers.audit.evidence import conversation_of
from workers.audit.history import AnyEvent, BadLine, decode_event, encode_event

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Set

    from workers.audit.timeline import Timeline

SHARES: Final = 64
"""A run of a million messages then needs the memory of sixteen thousand at a time."""


class Spool:
    """`fill` it once; then each share can be read as often as wanted. Close it: it is a context manager."""

    def __init__(self) -> None:
        self._exits = ExitStack()
        self._files: list[IO[bytes]] = [
            self._exits.enter_context(tempfile.TemporaryFile(prefix="trireme-audit-"))  # noqa: SIM115 - it is closed there
            for _ in range(SHARES)
        ]
        self.conversation_ids: set[str] = set()
        self.events = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def fill(self, events: Iterable[AnyEvent | BadLine], timeline: Timeline) -> list[BadLine]:
        """Take a whole history in; returns the lines that are none of it."""
        bad = []
        for event in events:
            if isinstance(event, BadLine):
                bad.append(event)
                continue
            self.events += 1
            timeline.take(event)
            name = conversation_of(event)
            if name:
                self.conversation_ids.add(name)
                self._files[share_of(name)].write(encode_event(event) + b"\n")
        return bad

    def share(self, number: int, only: Set[str] | None = None) -> Iterator[AnyEvent]:
        """The events of one share of the conversations, in order; `only` some of them."""
        file = self._files[number]
        file.seek(0)
        for line in file:
            event = decode_event(line)
            if only is None or conversation_of(event) in only:
                yield event


def share_of(conversation_id: str) -> int:
    """Which share a conversation belongs to."""
    return crc32(conversation_id.encode()) % SHARES
