"""What devices note in a run, as the tests of the ledger script it, and the ways to take something out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from bench import journal
from bench.ledger import Ledger
from tests.bench.scripted_log import CONVERSATION, payload

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.models import StoredMessage

Events = list[journal.Event]


def sent(message: StoredMessage) -> journal.Event:
    return journal.Sent(
        at=10.0,
        user_id=message.sender_id,
        device_id="phone-1",
        connection=1,
        conversation_id=CONVERSATION,
        idempotency_key=f"key-{message.sequence_number}",
        content=message.content,
        attempt=1,
    )


def acked(message: StoredMessage, **changes: object) -> journal.Event:
    event = journal.Acked(
        at=10.0,
        user_id=message.sender_id,
        device_id="phone-1",
        connection=1,
        conversation_id=CONVERSATION,
        idempotency_key=f"key-{message.sequence_number}",
        message_id=f"msg_{message.sequence_number}",
        sequence_number=message.sequence_number,
        duplicate=False,
    )
    return msgspec.structs.replace(event, **changes)


def pushed(user_id: str, *messages: StoredMessage, connection: int = 1, origin: str = "live") -> journal.Event:
    return journal.Pushed(
        at=10.0, user_id=user_id, device_id="phone-1", connection=connection, payload=payload(*messages, origin=origin)
    )


def connected(user_id: str, connection: int = 1, opened_at: float = 10.0) -> journal.Event:
    return journal.Connected(
        at=10.0, user_id=user_id, device_id="phone-1", connection=connection, resumed={}, opened_at=opened_at
    )


def closed(user_id: str, at: float) -> journal.Event:
    return journal.Closed(at=at, user_id=user_id, device_id="phone-1", connection=1, code=1006)


def judge(events: Events) -> list[str]:
    ledger = Ledger()
    for event in events:
        ledger.record(event)
    return sorted({violation.kind for violation in ledger.verdict()})


def is_push(event: journal.Event, user_id: str, sequence: int) -> bool:
    return (
        isinstance(event, journal.Pushed)
        and event.user_id == user_id
        and event.payload.messages[0].sequence_number == sequence
    )


def is_ack(event: journal.Event, sequence: int) -> bool:
    return isinstance(event, journal.Acked) and event.sequence_number == sequence


def without(events: Events, unwanted: Callable[[journal.Event], bool]) -> Events:
    kept = [event for event in events if not unwanted(event)]
    assert len(kept) < len(events), "the mutation changes nothing"
    return kept


def replaced(events: Events, wanted: Callable[[journal.Event], bool], by: journal.Event) -> Events:
    assert any(wanted(event) for event in events), "the mutation changes nothing"
    return [by if wanted(event) else event for event in events]
