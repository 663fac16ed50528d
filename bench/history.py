"""What happens to the simulated devices, written down for the auditor: events of the journal in, JSON lines out.

Called by runs beside their ledger; `python -m workers audit --history FILE…` reads it, and `audit` has it read. The
lines are those of `workers.audit.history`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET

from bench import journal
from bench.folds import committed_hash
from bench.ledger import Ledger
from bench.stack import PROJECT
from protocol.watermarks import content_hash
from workers.audit import history

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.stack import Stack
    from protocol.models import StoredMessage

AUDIT_SECONDS: Final = 1800.0
"""A campaign of a million messages is audited in two to four minutes on two cores that do nothing else."""


class History:
    """Appends what `record` is given to a file until `close`."""

    def __init__(self, path: Path) -> None:
        self._writer = history.HistoryWriter(path)

    def record(self, event: journal.Event) -> None:
        """See `journal.Journal`. What the auditor has no use for is left out."""
        for said in events_of(event):
            self._writer.write(said)

    def write(self, event: history.AnyEvent) -> None:
        """An event that is no device's: a fault, the end."""
        self._writer.write(event)

    def close(self) -> None:
        self._writer.close()


class WritingLedger(Ledger):
    """A ledger that writes down what it is told, before it judges it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._history: History | None = History(path)

    def record(self, event: journal.Event) -> None:
        if self._history is not None:
            self._history.record(event)
        super().record(event)

    def fault(self, what: str, since: float, until: float) -> None:
        """Something was broken on purpose."""
        if self._history is not None:
            self._history.write(history.Fault(t=until, what=what, since=since, until=until))

    def end(self, at: float) -> None:
        """All clients have listened until now, and have nothing left to say: how they hang up is no part of it."""
        if self._history is not None:
            self._history.write(history.End(t=at))
            self._history.close()
            self._history = None


def audit(stack: Stack, paths: Sequence[Path]) -> tuple[int, list[str]]:
    """The auditor's word on a stack that still runs, and on the histories of its clients: exit status and report."""
    command = [sys.executable, "-m", "workers", "audit", *(("--history", *map(str, paths)) if paths else ())]
    environment = {**os.environ, **stack.environment} if stack.environment else {"TRIREME_ENV": "dev", **os.environ}
    ended = subprocess.run(
        command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=AUDIT_SECONDS, check=False
    )
    return ended.returncode, [*ended.stdout.splitlines(), *(ended.stderr.splitlines() if ended.returncode else ())]


def events_of(event: journal.Event) -> Sequence[history.AnyEvent]:
    """What the auditor is told of an event of the journal: nothing of those it has no use for."""
    if isinstance(event, journal.Connected) and event.unread is not None:
        return _WRITERS[journal.Connected](event), history.Unread(value=event.unread, **_stamp(event))
    write = _WRITERS.get(type(event))
    return () if write is None else (write(event),)


def _stamp(event: journal.Event) -> dict[str, Any]:
    return {"t": event.at, "user": event.user_id, "dev": event.device_id, "conn": event.connection}


def _sent(event: journal.Sent) -> history.Send:
    return history.Send(
        conv=event.conversation_id,
        key=event.idempotency_key,
        payload_sha=content_hash(event.content).hex(),
        change="" if event.change is None else event.change.value,
        target=event.target,
        **_stamp(event),
    )


def _acked(event: journal.Acked) -> history.Ack:
    return history.Ack(
        conv=event.conversation_id,
        key=event.idempotency_key,
        mid=event.message_id,
        seq=event.sequence_number,
        duplicate=event.duplicate,
        **_stamp(event),
    )


def _refused(event: journal.Refused) -> history.Error:
    return history.Error(
        code=event.code.value,
        retryable=event.retryable,
        conv=event.conversation_id or "",
        key=event.idempotency_key or "",
        **_stamp(event),
    )


def _row(message: StoredMessage) -> history.Row:
    return history.Row(seq=message.sequence_number, mid=str(message.message_id), sha=committed_hash(message))


def _pushed(event: journal.Pushed) -> history.Push:
    payload = event.payload
    return history.Push(
        conv=payload.conversation_id,
        rows=[_row(message) for message in payload.messages],
        origin="live" if payload.origin is UNSET else str(payload.origin),
        first=_number(payload.from_sequence),
        last=_number(payload.to_sequence),
        expired=_number(payload.expired_through),
        more=payload.has_more is True,
        **_stamp(event),
    )


def _looked(event: journal.Looked) -> history.Push:
    rows = [_row(message) for message in event.messages]
    return history.Push(conv=event.conversation_id, rows=rows, origin="rest", **_stamp(event))


def _receipt(event: journal.Receipt) -> history.Receipt:
    payload = event.payload
    return history.Receipt(
        conv=payload.conversation_id,
        of=payload.user_id,
        delivered=_number(payload.delivered_through),
        read=_number(payload.read_through),
        group=isinstance(payload.participant_count, int),
        **_stamp(event),
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


_WRITERS: Final[dict[type, Callable[[Any], history.AnyEvent]]] = {
    journal.Sent: _sent,
    journal.Acked: _acked,
    journal.Refused: _refused,
    journal.Pushed: _pushed,
    journal.Looked: _looked,
    journal.Receipt: _receipt,
    journal.Confirmed: lambda event: history.Dack(
        conv=event.conversation_id, seq=event.sequence_number, mid=event.message_id, **_stamp(event)
    ),
    journal.Read: lambda event: history.Rack(conv=event.conversation_id, seq=event.sequence_number, **_stamp(event)),
    journal.Asked: lambda event: history.Ask(
        conv=event.conversation_id, first=event.from_sequence, last=event.to_sequence, **_stamp(event)
    ),
    journal.Rewound: lambda event: history.Sync(**_stamp(event)),
    journal.Synced: lambda event: history.Synced(**_stamp(event)),
    journal.Connected: lambda event: history.Connect(opened=event.opened_at, ticket=event.ticket, **_stamp(event)),
    journal.Moving: lambda event: history.Migrate(ticket=event.ticket, **_stamp(event)),
    journal.Closed: lambda event: history.Close(code=event.code, **_stamp(event)),
}
