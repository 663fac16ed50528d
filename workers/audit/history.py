"""What clients saw and did, as JSON lines: the events, the writer of a test client, the reader of the auditor.

Written by whoever plays clients (replay, load, chaos, the simulator); read by `auditor.py`. A client writes an event
before it acts on it, and each line reaches the kernel at once, so what a killed client did is known. `t` is in seconds
of one clock for all files of a run, which only orders and measures: it need not be the servers'. No line holds a
content: `payload_sha` and `sha` are its hash (`watermarks.content_hash`, hexadecimal), `canary` a token that nobody
else's content holds, "" where contents carry none.
"""

from __future__ import annotations

from heapq import merge
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Sha = Annotated[str, Meta(pattern=r"\A([0-9a-f]{32})?\Z")]
SHOWN_CHARACTERS: Final = 80
"""Of a line that is no event, as much is shown."""


class Event(msgspec.Struct, tag_field="event", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Something that happened at `t`."""

    t: float


class ClientEvent(Event, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`conn` counts the connections of this device from 1; 0: not over a WebSocket."""

    user: str
    dev: str
    conn: int = 0


# --- what a client says ----------------------------------------------------------------------------------------------


class Send(ClientEvent, tag="send", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A message, or (`change`: an `EventKind`) a change of the message `target`, whose payload is then the new content
    or the emoji. Once more for every attempt."""

    conv: str
    key: str
    payload_sha: Sha
    canary: str = ""
    change: str = ""
    target: str = ""


class Dack(ClientEvent, tag="dack", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`delivery_ack`: this device has stored everything up to here."""

    conv: str
    seq: int
    mid: str = ""


class Rack(ClientEvent, tag="rack", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`read_receipt`: the user has read up to here."""

    conv: str
    seq: int


class Ask(ClientEvent, tag="ask", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`retransmit` of first..last."""

    conv: str
    first: int
    last: int


class Sync(ClientEvent, tag="sync", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`sync`: a backlog may bring again what this connection had already."""


# --- what a client is told -------------------------------------------------------------------------------------------


class Connect(ClientEvent, tag="connect", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Let in (`auth_success`). `opened`: when it asked to be. `ticket`: by this session token (a name or hash of it)
    of a `migrate`, while the connection before was still there."""

    opened: float = 0.0
    ticket: str = ""


class Synced(ClientEvent, tag="synced", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`sync_complete`: the backlog has come."""


class Close(ClientEvent, tag="close", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The connection has ended, however. `code` 1006: without a goodbye."""

    code: int = 1006


class Ack(ClientEvent, tag="ack", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`message_ack`, or the HTTP answer that is one."""

    conv: str
    key: str
    mid: str
    seq: int
    duplicate: bool = False


class Error(ClientEvent, tag="error", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An `error` frame or answer; without a key it is about something other than a send."""

    code: str
    retryable: bool
    conv: str = ""
    key: str = ""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One message of a page. `sha`: of what was committed here, whatever is shown by now."""

    seq: int
    mid: str
    sha: Sha
    canary: str = ""


class Push(ClientEvent, tag="push", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A `messages` frame as it came, before the client's dedupe; `origin` "rest": a page of the HTTP API.

    first..last is the range it accounts for (0: it does not say), `expired` its `expired_through`."""

    conv: str
    rows: list[Row]
    origin: str = "live"
    first: int = 0
    last: int = 0
    expired: int = 0
    more: bool = False


class Receipt(ClientEvent, tag="receipt", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`receipt_update`: as an author, this user is told how far `of` is (in a group: how far all are). 0: not said."""

    conv: str
    of: str
    delivered: int = 0
    read: int = 0
    group: bool = False


class Unread(ClientEvent, tag="unread", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An unread count, of one conversation or ("") of all the user is in."""

    value: int
    conv: str = ""


class Migrate(ClientEvent, tag="migrate", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`migration`: go elsewhere with this session token (a name or hash of it) within so many seconds."""

    ticket: str
    seconds: float = 30.0


class Revoked(ClientEvent, tag="revoked", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The server confirmed that this device is logged out ("": all of the user), or (`conv`) that this user is in that
    conversation no more."""

    conv: str = ""


class Presence(ClientEvent, tag="presence", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """This user is told that `of` is online or not."""

    of: str
    online: bool


# --- what no client does ---------------------------------------------------------------------------------------------


class Fault(Event, tag="fault", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Something was broken on purpose. `to` 0: for a moment, or not yet over."""

    what: str
    since: float = msgspec.field(name="from", default=0.0)
    until: float = msgspec.field(name="to", default=0.0)


class Sample(Event, tag="sample", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A measured amount of something that has a bound: tasks, file descriptors, entries of a stream."""

    what: str
    value: float
    limit: float


class End(Event, tag="end", frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Until here the clients still listened, with nothing left to say."""


AnyEvent = (
    Send
    | Dack
    | Rack
    | Ask
    | Sync
    | Connect
    | Synced
    | Close
    | Ack
    | Error
    | Push
    | Receipt
    | Unread
    | Migrate
    | Revoked
    | Presence
    | Fault
    | Sample
    | End
)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AnyEvent).decode


class BadLine(NamedTuple):
    """A line that is no event. `torn`: the last one of a file, without its end: its writer was killed."""

    path: str
    number: int
    reason: str
    torn: bool


class HistoryWriter:
    """Appends events to a file, each at once."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: what is written has left the process when `write` returns, so a SIGKILL takes nothing back.
        self._file = path.open("ab", buffering=0)

    def write(self, event: AnyEvent) -> None:
        """One more event, in one write."""
        self._file.write(_encode(event) + b"\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_event(event: AnyEvent) -> bytes:
    """A line of a history, without its end."""
    return _encode(event)


def decode_event(line: bytes) -> AnyEvent:
    """The event of a line. Raises msgspec.DecodeError, also where msgspec lets a lower error through."""
    try:
        event: AnyEvent = _decode(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
    return event


def read_history(path: Path) -> Iterator[AnyEvent | BadLine]:
    """The events of a file as a stream; a line that is none is named and passed over. Raises OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text:
                continue
            try:
                yield decode_event(text)
            except msgspec.DecodeError as error:
                shown = text[:SHOWN_CHARACTERS].decode("utf-8", "replace")
                yield BadLine(str(path), number, f"{error}: {shown}", torn=not line.endswith(b"\n"))


def read_histories(paths: Iterable[Path]) -> Iterator[AnyEvent | BadLine]:
    """Several files of one run as one stream by `t`; the order within a file stays as it is. Raises OSError."""
    streams = [_stamped(read_history(path)) for path in paths]
    return (event for _, event in merge(*streams, key=lambda stamped: stamped[0]))


def _stamped(events: Iterable[AnyEvent | BadLine]) -> Iterator[tuple[float, AnyEvent | BadLine]]:
    latest = 0.0
    for event in events:
        if not isinstance(event, BadLine):
            latest = max(latest, event.t)
        yield latest, event
