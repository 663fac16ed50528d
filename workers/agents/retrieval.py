"""The retrieval agent: answers questions from old chat logs, word for word, with the line that answered there.

Its index is SQLite's full-text search (FTS5, of the standard library), in memory, built from the directory of
`TRIREME_RETRIEVAL_DIRECTORY` at the first question: files `NAME.raw.txt` with lines `[12:18] <nick> text`, and
`NAME.annotation.txt` beside them with lines `1002 1003 -`, where line 1003 belongs behind line 1002. It quotes, and
makes nothing up.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
import anyio.to_thread
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protocol.events import MessageReceivedEvent
    from workers.agents.classes import Context

RAW_SUFFIX: Final = ".raw.txt"
ANNOTATION_SUFFIX: Final = ".annotation.txt"
HITS: Final = 3
CANDIDATES: Final = 20
WORDS: Final = 32
"""Of a question; more are not looked for."""
_SAID: Final = re.compile(r"\[(\d\d:\d\d)\] <([^>]+)> (.+)")
_WORD: Final = re.compile(r"[^\W_]+")
_SMALL: Final = frozenset(
    _WORD.findall(
        "a about am an and any anybody anyone are as at be but by can could did do does for from get had has have "
        "hello help hey hi how i if in is it its many me my of on one or please say should some somebody someone tell "
        "that the their them then there they this to was we were what when where which who why will with would you your"
    )
)
"""Words that most lines say."""
_NOTHING: Final = "Nobody has said anything about that in the logs that I have."

log = structlog.get_logger(__name__)


class Hit(NamedTuple):
    """One line of a log, as it was said, and what was said to it ("" for nothing)."""

    name: str
    at: str
    nick: str
    text: str
    reply: str


class Index:
    """All lines of a directory. Not for two threads at once."""

    def __init__(self) -> None:
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute(
            "CREATE VIRTUAL TABLE lines USING fts5(text, name UNINDEXED, at UNINDEXED, nick UNINDEXED, "
            "reply UNINDEXED, tokenize='porter unicode61')"
        )

    def fill(self, directory: Path) -> int:
        """Take all logs of a directory; how many lines there are. Raises OSError."""
        for path in sorted(directory.glob(f"*{RAW_SUFFIX}")):
            rows = [(hit.text, hit.name, hit.at, hit.nick, hit.reply) for hit in _read(path)]
            self._database.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?)", rows)
        (count,) = self._database.execute("SELECT count(*) FROM lines").fetchone()
        return int(count)

    def search(self, question: str) -> list[Hit]:
        """The lines that fit best: of the `CANDIDATES` best ones those first that somebody else replied to."""
        words = [word for word in dict.fromkeys(_WORD.findall(question.lower())) if word not in _SMALL][:WORDS]
        if not words:
            return []
        # Quoted, a word is a word and no operator of the query language.
        wanted = " OR ".join(f'"{word}"' for word in words)
        found = self._database.execute(
            "SELECT name, at, nick, text, reply FROM lines WHERE lines MATCH ? ORDER BY bm25(lines), rowid LIMIT ?",
            (wanted, CANDIDATES),
        )
        return sorted((Hit(*row) for row in found), key=lambda hit: hit.reply == "")[:HITS]


def _read(path: Path) -> Iterator[Hit]:
    name = path.name.removesuffix(RAW_SUFFIX)
    lines = path.read_text("utf-8", "replace").splitlines()
    replies: dict[int, int] = {}
    annotation = path.with_name(name + ANNOTATION_SUFFIX)
    if annotation.exists():
        for link in annotation.read_text("utf-8", "replace").splitlines():
            first, _, rest = link.partition(" ")
            second = rest.partition(" ")[0]
            if first.isdigit() and second.isdigit() and int(first) < int(second) < len(lines):
                replies.setdefault(int(first), int(second))
    for number, line in enumerate(lines):
        said = _SAID.fullmatch(line)
        if said is None:
            continue
        reply = _SAID.fullmatch(lines[replies[number]]) if number in replies else None
        is_other = reply is not None and reply[2] != said[2]
        yield Hit(name, said[1], said[2], said[3], f"<{reply[2]}> {reply[3]}" if reply and is_other else "")


def answer_of(hits: list[Hit]) -> str:
    """What the agent says."""
    if not hits:
        return _NOTHING
    parts = []
    for hit in hits:
        parts.append(f"{hit.name} [{hit.at}] <{hit.nick}> {hit.text}")
        if hit.reply:
            parts.append(f"    {hit.reply}")
    return "\n".join(parts)


class Retrieval:
    """See the module."""

    def __init__(self) -> None:
        self._index: Index | None = None
        self._turn = anyio.CapacityLimiter(1)
        """One thread at a time: to build the index, and to search it."""

    async def reply(self, event: MessageReceivedEvent, context: Context) -> str | None:
        """See `classes.PythonAgent.reply`."""
        if not context.settings.retrieval_directory:
            return "I have no logs to look in (TRIREME_RETRIEVAL_DIRECTORY)."
        if self._index is None:
            await context.progress("reading", "the logs")
        directory = Path(context.settings.retrieval_directory)
        return await anyio.to_thread.run_sync(self._answer, directory, event.content, limiter=self._turn)

    def _answer(self, directory: Path, question: str) -> str:
        if self._index is None:
            index = Index()
            log.info("logs_indexed", lines=index.fill(directory))
            self._index = index
        return answer_of(self._index.search(question))
