"""The ledger finds nothing in a true run, and each kind of violation in a run with exactly that one in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import journal
from bench.ledger import Ledger
from protocol import frames
from protocol.errors import ErrorCode
from tests.bench.scripted_log import CONVERSATION, stored, system
from tests.bench.scripted_run import (
    Events,
    acked,
    closed,
    connected,
    is_ack,
    is_push,
    judge,
    pushed,
    replaced,
    sent,
    without,
)
from workers.audit.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.models import StoredMessage

OWNER, FRIEND, GUEST = "usr_owner", "usr_friend", "usr_guest"

LOG: list[StoredMessage] = [
    system(1, "created", OWNER, FRIEND),
    stored(2, OWNER, "hello"),
    stored(3, FRIEND, "hi"),
    system(4, "added", GUEST, actor=OWNER),
    stored(5, GUEST, "what did I miss"),
    stored(6, OWNER, "nothing"),
    system(7, "left", GUEST),
    stored(8, FRIEND, "gone"),
]
VISIBLE = {OWNER: (1, 8), FRIEND: (1, 8), GUEST: (4, 7)}


def receipt(viewer: str, bearer: str, delivered: int) -> journal.Event:
    return journal.Receipt(
        at=10.0,
        user_id=viewer,
        device_id="phone-1",
        connection=1,
        payload=frames.ReceiptUpdatePayload(
            conversation_id=CONVERSATION, user_id=bearer, delivered_through=delivered, timestamp=0
        ),
    )


def true_run() -> Events:
    """Everybody connected; each message sent, acked, and pushed to all who may see it but its sender."""
    events: Events = [connected(user_id) for user_id in VISIBLE]
    for message in LOG:
        if message.sender_id in VISIBLE:
            events += [sent(message), acked(message)]
        for user_id, (first, last) in VISIBLE.items():
            if first <= message.sequence_number <= last and user_id != message.sender_id:
                events.append(pushed(user_id, message))
    return events


def test_a_true_run_is_ok() -> None:
    assert judge(true_run()) == []


def test_a_retried_send_with_its_duplicate_ack_is_ok() -> None:
    again = msgspec.structs.replace(sent(LOG[1]), attempt=2)
    assert judge([*true_run(), again, acked(LOG[1], duplicate=True)]) == []


def test_a_backlog_after_a_reconnect_may_repeat_what_an_earlier_connection_had() -> None:
    again = pushed(OWNER, LOG[2], LOG[3], connection=2, origin="backlog")
    assert judge([*true_run(), connected(OWNER, 2), again]) == []


def test_a_retransmit_may_come_out_of_order() -> None:
    assert judge([*true_run(), pushed(OWNER, LOG[2], origin="retransmit")]) == []


def rewound(user_id: str) -> journal.Event:
    return journal.Rewound(at=10.0, user_id=user_id, device_id="phone-1", connection=1)


def synced(user_id: str) -> journal.Event:
    return journal.Synced(at=10.0, user_id=user_id, device_id="phone-1", connection=1)


def test_a_sync_may_bring_again_what_was_live_meanwhile() -> None:
    late = stored(9, FRIEND, "one more")
    again = [sent(late), acked(late), rewound(OWNER), pushed(OWNER, late, origin="backlog")]
    again += [pushed(OWNER, LOG[2], LOG[3], origin="backlog"), pushed(OWNER, *LOG[4:], late, origin="backlog")]
    again += [synced(OWNER)]
    assert judge([*true_run(), *again]) == []


def swap_pushes(events: Events) -> Events:
    first = next(index for index, event in enumerate(events) if is_push(event, OWNER, 3))
    second = next(index for index, event in enumerate(events) if is_push(event, OWNER, 5))
    events[first], events[second] = events[second], events[first]
    return events


MUTATIONS: dict[str, tuple[Callable[[Events], Events], set[str]]] = {
    "a push vanished": (lambda e: without(e, lambda x: is_push(x, OWNER, 3)), {"lost"}),
    "the last push vanished": (lambda e: without(e, lambda x: is_push(x, OWNER, 8)), {"lost"}),
    "a leaver did not see the end": (lambda e: without(e, lambda x: is_push(x, GUEST, 7)), {"lost"}),
    "a joiner did not see the join": (lambda e: without(e, lambda x: is_push(x, GUEST, 4)), {"lost"}),
    "two pushes swapped": (swap_pushes, {"order"}),
    "a sync came out of order": (
        lambda e: [
            *e,
            rewound(OWNER),
            pushed(OWNER, LOG[3], origin="backlog"),
            pushed(OWNER, LOG[2], origin="backlog"),
        ],
        {"order"},
    ),
    "a backlog repeats after the sync is over": (
        lambda e: [*e, rewound(OWNER), synced(OWNER), pushed(OWNER, LOG[2], origin="backlog")],
        {"order"},
    ),
    "a push came twice on one connection": (lambda e: [*e, pushed(OWNER, LOG[2])], {"order"}),
    "one message has two sequences": (
        lambda e: [*e, pushed(OWNER, stored(9, FRIEND, "hi", message_id="msg_3"))],
        {"doubled", "invented", "lost"},
    ),
    "an ack contradicts the first one": (
        lambda e: [*e, acked(LOG[1], sequence_number=9, message_id="msg_9", duplicate=True)],
        {"ack", "altered", "lost"},
    ),
    "an ack came for what was never sent": (lambda e: [*e, acked(LOG[1], idempotency_key="other")], {"ack"}),
    "an ack names another message than the log": (
        lambda e: replaced(e, lambda x: is_ack(x, 6), acked(LOG[5], message_id="msg_x")),
        {"altered"},
    ),
    "a send was refused and acked": (
        lambda e: [
            *e,
            journal.Refused(
                at=10.0, user_id=OWNER, device_id="phone-1", connection=1, code=ErrorCode.FORBIDDEN, retryable=False,
                conversation_id=CONVERSATION, idempotency_key="key-2",
            ),
        ],
        {"ack"},
    ),
    "one sequence was given to two sends": (
        lambda e: [*e, sent(stored(9, OWNER, "x")), acked(stored(9, OWNER, "x"), sequence_number=8)],
        {"ack"},
    ),
    "the content changed on the way": (
        lambda e: replaced(e, lambda x: is_push(x, OWNER, 3), pushed(OWNER, stored(3, FRIEND, "HI"))),
        {"altered"},
    ),
    "the content differs for one of two": (
        lambda e: replaced(e, lambda x: is_push(x, FRIEND, 5), pushed(FRIEND, stored(5, GUEST, "forged"))),
        {"altered"},
    ),
    "somebody saw what was before his time": (lambda e: [*e, pushed(GUEST, LOG[2], connection=2)], {"foreign"}),
    "somebody saw what was after his time": (lambda e: [*e, pushed(GUEST, LOG[7])], {"foreign"}),
    "a stranger saw something": (lambda e: [*e, pushed("usr_stranger", LOG[2])], {"foreign"}),
    "a number was burnt": (
        lambda e: [*e, sent(stored(10, OWNER, "x")), acked(stored(10, OWNER, "x"))],
        {"hole", "lost"},
    ),
    "a send was never answered": (lambda e: [*e, sent(stored(9, OWNER, "x"))], {"unanswered"}),
    "a message of nobody's sending is in the log": (
        lambda e: [*e, *(pushed(user_id, stored(9, OWNER, "never said")) for user_id in (OWNER, FRIEND))],
        {"invented"},
    ),
    "a receipt went backwards": (lambda e: [*e, receipt(OWNER, FRIEND, 5), receipt(OWNER, FRIEND, 4)], {"receipt"}),
    "the server's digest is another": (
        lambda e: [
            *e,
            journal.Contradicted(
                at=10.0, user_id=OWNER, device_id="phone-1", connection=1, conversation_id=CONVERSATION,
                sequence_number=8, folded="aa", stated="bb",
            ),
        ],
        {"digest"},
    ),
    "a key was shown to another": (
        lambda e: replaced(
            e,
            lambda x: is_push(x, OWNER, 3),
            pushed(OWNER, msgspec.structs.replace(LOG[2], idempotency_key="key-3")),
        ),
        {"leak"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_ledger_catches(name: str) -> None:
    mutate, kinds = MUTATIONS[name]
    assert set(judge(mutate(true_run()))) == kinds


def test_who_was_away_when_he_left_is_not_owed_the_end() -> None:
    away = [*true_run()]
    before = next(index for index, event in enumerate(away) if is_push(event, OWNER, 6) or is_ack(event, 6))
    away.insert(before, closed(GUEST, at=10.0))
    away = without(away, lambda event: is_push(event, GUEST, 6) or is_push(event, GUEST, 7))
    assert judge(away) == []


def test_who_was_away_when_he_left_is_still_owed_what_is_in_the_middle() -> None:
    away = [*true_run()]
    before = next(index for index, event in enumerate(away) if is_ack(event, 6))
    away.insert(before, closed(GUEST, at=10.0))
    assert judge(without(away, lambda event: is_push(event, GUEST, 4))) == ["lost"]


def direct_run() -> Ledger:
    ledger = Ledger()
    ledger.declare_direct(CONVERSATION, (OWNER, FRIEND))
    message = stored(1, OWNER, "hello")
    for event in (connected(OWNER), connected(FRIEND), sent(message), acked(message), pushed(FRIEND, message)):
        ledger.record(event)
    return ledger


def confirmed(sequence: int) -> journal.Event:
    return journal.Confirmed(
        at=10.0, user_id=FRIEND, device_id="phone-1", connection=1, conversation_id=CONVERSATION,
        message_id=f"msg_{sequence}", sequence_number=sequence,
    )  # fmt: skip


def test_a_direct_receipt_after_its_confirmation_is_ok() -> None:
    ledger = direct_run()
    ledger.record(confirmed(1))
    ledger.record(receipt(OWNER, FRIEND, 1))
    assert ledger.verdict() == []


def test_a_direct_receipt_nobody_gave_is_caught() -> None:
    ledger = direct_run()
    ledger.record(receipt(OWNER, FRIEND, 1))
    assert [violation.kind for violation in ledger.verdict()] == ["receipt"]


def test_the_verdict_can_be_asked_for_twice() -> None:
    ledger = Ledger()
    for event in without(true_run(), lambda x: is_push(x, OWNER, 3)):
        ledger.record(event)
    assert len(ledger.verdict()) == len(ledger.verdict()) == 1


@given(st.lists(st.integers(1, 40)), st.integers(1, 20), st.integers(1, 40))
def test_runs_are_a_set(numbers: list[int], first: int, last: int) -> None:
    runs = Runs()
    for number in numbers:
        runs.add(number)
    expected = {number for number in range(first, last + 1) if number not in numbers}
    assert {n for low, high in runs.missing(first, last) for n in range(low, high + 1)} == expected
    outside = {n for low, high in runs.outside([(first, last)]) for n in range(low, high + 1)}
    assert outside == {number for number in numbers if not first <= number <= last}
