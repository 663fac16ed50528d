"""`python -m workers dlq`: dead letters on the command line: list, show, count, replay, resolve.

The same rules as the HTTP API (`rest/dead_letters.py`), from the same code (`replay.py`), for who can reach the
servers. What a message says is printed only to who asks for it (`--raw`). Exit status: 0 when what was asked for was
done, 1 when a letter refused it or did not come through, 2 for a line or a setting that needs the operator.
"""

from __future__ import annotations

import argparse
import base64
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec
from msgspec import UNSET

from protocol.models import DeadLetterQueueEntry, DLQErrorType, DLQStatus, to_document
from workers import replay
from workers.commands import Table, open_seams, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workers.broker import Broker
    from workers.store import Store

PAGE: Final = 100
ALL_LIMIT: Final = 10_000
"""Letters that one `replay --all` takes."""
_LOOK_SECONDS: Final = 0.2
_encode = msgspec.json.Encoder().encode


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m workers dlq", description="Dead letters: what could not be committed."
    )
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="newest first")
    _add_filters(listing)
    listing.add_argument("--limit", type=int, default=PAGE, help="at most so many (%(default)s)")
    listing.add_argument("--json", action="store_true", help="a JSON object a line")
    show = actions.add_parser("show", help="one letter as JSON")
    show.add_argument("letter")
    show.add_argument("--raw", action="store_true", help="with what its message says and its record's bytes (Base64)")
    again = actions.add_parser("replay", help="bring letters into their streams again, with their original keys")
    which = again.add_mutually_exclusive_group(required=True)
    which.add_argument("letter", nargs="*", default=[])
    which.add_argument("--all", action="store_true", help="all that the filters let through and that are not resolved")
    _add_filters(again)
    again.add_argument("--dry-run", action="store_true", help="only say what would happen")
    again.add_argument(
        "--wait", type=float, default=10.0, metavar="SECONDS", help="for what becomes of them (%(default)s)"
    )
    close = actions.add_parser("resolve", help="nothing more is to be done about a letter")
    close.add_argument("letter")
    close.add_argument("--reason", required=True)
    stats = actions.add_parser("stats", help="how many of each kind")
    stats.add_argument("--json", action="store_true")
    return top


def _add_filters(to: argparse.ArgumentParser) -> None:
    to.add_argument("--status", type=DLQStatus, choices=list(DLQStatus), metavar="|".join(DLQStatus))
    to.add_argument("--error-type", type=DLQErrorType, choices=list(DLQErrorType), metavar="KIND")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Do what the line says; returns the exit status."""
    args = parser().parse_args(arguments)
    return open_seams(environ, lambda store, broker: _act(args, store, broker))


async def _act(args: argparse.Namespace, store: Store, broker: Broker) -> int:
    match args.action:
        case "list":
            return await _list(args, store)
        case "show":
            return await _show(args, store)
        case "replay":
            return await _replay(args, store, broker)
        case "resolve":
            return _answer(args.letter, await replay.resolve(store, args.letter, args.reason, _now()), "resolved")
        case _:
            return await _count(args, store)


async def _list(args: argparse.Namespace, store: Store) -> int:
    table = Table("letter", "status", "error type", "retries", "written", "next try", "conversation", "error")
    for letter in await _found(args, store, args.limit):
        if args.json:
            say(_json(letter))
            continue
        table.add(
            letter.id,
            letter.status,
            letter.error_type,
            f"{letter.retry_count}/{letter.max_retries}",
            _short(letter.created_at),
            "" if letter.next_retry_at is None else _short(letter.next_retry_at),
            "" if letter.conversation_id is UNSET else letter.conversation_id,
            letter.error.splitlines()[0][:60] if letter.error else "",
        )
    if not args.json:
        say(str(table) if table.rows else "no dead letters")
    return 0


async def _found(args: argparse.Namespace, store: Store, limit: int) -> list[DeadLetterQueueEntry]:
    found: list[DeadLetterQueueEntry] = []
    place = None
    while len(found) < limit:
        letters, place = await store.dead_letters.page(
            args.status, args.error_type, place, min(PAGE, limit - len(found))
        )
        found += letters
        if place is None:
            break
    return found


async def _show(args: argparse.Namespace, store: Store) -> int:
    letter = await store.dead_letters.get(args.letter)
    if letter is None:
        return _answer(args.letter, replay.Unknown(), "")
    say(_json(letter, raw=args.raw, indented=True))
    return 0


async def _replay(args: argparse.Namespace, store: Store, broker: Broker) -> int:
    names = list(args.letter)
    if args.all:
        wanted = await _found(args, store, ALL_LIMIT)
        names = [str(letter.id) for letter in wanted if letter.status is not DLQStatus.RESOLVED]
    status = 0
    waiting: list[str] = []
    for name in names:
        if args.dry_run:
            status |= await _foresee(store, name)
            continue
        outcome = await replay.replay(store, broker, name, _now())
        status |= _answer(
            name, outcome, "is resolved: its message was in the log" if _was_there(outcome) else "replayed"
        )
        if isinstance(outcome, replay.Replayed) and not outcome.is_resolved:
            waiting.append(name)
    return status | await _await_outcomes(store, waiting, args.wait)


def _was_there(outcome: object) -> bool:
    return isinstance(outcome, replay.Replayed) and outcome.is_resolved


async def _foresee(store: Store, name: str) -> int:
    letter = await store.dead_letters.get(name)
    if letter is None:
        return _answer(name, replay.Unknown(), "")
    foreseen = await replay.foresee(store, letter, _now())
    where = "" if foreseen.shard is None else f" {foreseen.size_bytes} bytes to shard {foreseen.shard}"
    say(f"{name}: would {foreseen.would}{where}: {foreseen.because}")
    return int(foreseen.would == "refuse")


async def _await_outcomes(store: Store, names: list[str], seconds: float) -> int:
    """Say what became of these; 1 where one of them did not come through."""
    waiting = set(names)
    status = 0
    with anyio.move_on_after(seconds):
        while waiting:
            for name, letter in (await store.dead_letters.by_ids(waiting)).items():
                if letter.status is DLQStatus.RETRYING:
                    continue
                waiting.discard(name)
                is_done = letter.status is DLQStatus.RESOLVED
                status |= int(not is_done)
                say(f"{name}: {letter.status}: {letter.resolved_reason if is_done else letter.error}")
            if waiting:
                await anyio.sleep(_LOOK_SECONDS)
    for name in sorted(waiting):
        say(f"{name}: not decided within {seconds:g} s (is a worker with the role ingest running?)")
    return status | int(bool(waiting))


def _answer(name: str, outcome: object, done: str) -> int:
    match outcome:
        case replay.Unknown():
            say(f"{name}: no such dead letter")
            return 1
        case replay.Refused(reason):
            say(f"{name}: refused: {reason}")
            return 1
        case _:
            say(f"{name}: {done}")
            return 0


async def _count(args: argparse.Namespace, store: Store) -> int:
    counts = await store.dead_letters.counts()
    if args.json:
        say(_encode(counts).decode())
        return 0
    table = Table("status", "error type", "letters", "oldest")
    for count in counts:
        table.add(count.status, count.error_type, str(count.letters), _short(count.oldest_at))
    say(str(table) if table.rows else "no dead letters")
    return 0


def _json(letter: DeadLetterQueueEntry, *, raw: bool = False, indented: bool = False) -> str:
    document: dict[str, Any] = to_document(letter)
    if raw:
        if "raw" in document:
            document["raw"] = base64.b64encode(document["raw"]).decode()
    else:
        document.pop("raw", None)
        if "message" in document:
            del document["message"]["content"]
    encoded = _encode(document)
    return (msgspec.json.format(encoded) if indented else encoded).decode()


def _short(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def _now() -> datetime:
    """The one place where this command reads the clock."""
    return datetime.fromtimestamp(time.time_ns() // 1_000_000 / 1000, UTC)
