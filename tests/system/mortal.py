"""A worker that dies of one message: a process, `python -m tests.system.mortal ROLE…`, to see what happens then.

It is killed where it inserts the message, or right after that, as a crash inside a C extension would: no exception, no
goodbye, no flush.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from workers.__main__ import main
from workers.store.messages import MessageStore

if TYPE_CHECKING:
    from collections.abc import Sequence

POISON = "dies of this"
LAST_WORDS = "dies once this is committed"

_append = MessageStore.append


async def _die_of_poison(self: MessageStore, documents: Sequence[dict[str, Any]]) -> None:
    if any(document["content"] == POISON for document in documents):
        os.kill(os.getpid(), signal.SIGKILL)
    await _append(self, documents)
    if any(document["content"] == LAST_WORDS for document in documents):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    MessageStore.append = _die_of_poison  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
