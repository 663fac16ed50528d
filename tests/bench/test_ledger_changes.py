"""Edits, deletions, reactions, roles, silences and bans: nothing is found in a true run with all of them, and each kind
of violation in a run with exactly that one in it."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec
import pytest

from bench import journal
from bench.folds import MessageView
from bench.ledger import Ledger
from protocol.errors import ErrorCode
from protocol.models import MESSAGE_EVENTS, EventKind, Reaction, Role
from tests.bench.scripted_log import CONVERSATION, changed, edited, erased, stored, system
from tests.bench.scripted_run import (
    Events,
    acked,
    connected,
    is_ack,
    is_push,
    judge,
    pushed,
    replaced,
    sent,
    without,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.models import StoredMessage

OWNER, FRIEND, GUEST = "usr_owner", "usr_friend", "usr_guest"
LATE_MS = 4_000_000_000_000


def commitment(user_id: str, key: str, target: str) -> str:
    return blake2b(f"{user_id}\0{key}\0{target}".encode(), digest_size=16).hexdigest()


HIDES = commitment(FRIEND, "key-10", "msg_2")
LOG: list[StoredMessage] = [
    system(1, "created", OWNER, FRIEND),
    stored(2, OWNER, "hello"),
    stored(3, FRIEND, "hi"),
    system(4, "added", GUEST, actor=OWNER),
    stored(5, GUEST, "what did I miss"),
    changed(6, EventKind.EDITED, GUEST, "msg_5", content="what have I missed"),
    changed(7, EventKind.REACTED, OWNER, "msg_5", emoji="+1"),
    changed(8, EventKind.REACTED, FRIEND, "msg_5", emoji="+1"),
    changed(9, EventKind.UNREACTED, OWNER, "msg_5", emoji="+1"),
    changed(10, EventKind.HIDDEN, FRIEND, "msg_2", commitment=HIDES),
    stored(11, OWNER, "a secret"),
    changed(12, EventKind.EDITED, OWNER, "msg_11", content="a worse secret"),
    changed(13, EventKind.DELETED, OWNER, "msg_11"),
    system(14, "silenced", GUEST, actor=OWNER, until=LATE_MS),
    system(15, "roles", FRIEND, actor=OWNER, roles={FRIEND: Role.ADMIN}),
    stored(16, FRIEND, "thanks"),
    system(17, "renamed", actor=FRIEND, title="us two"),
    system(18, "banned", GUEST, actor=FRIEND),
    stored(19, FRIEND, "the end"),
]
VISIBLE = {OWNER: (1, 19), FRIEND: (1, 19), GUEST: (4, 18)}
AUTHORS = {6: GUEST, 7: OWNER, 8: FRIEND, 9: OWNER, 10: FRIEND, 12: OWNER, 13: OWNER}
HELLO, WHAT, SECRET = LOG[1], LOG[4], LOG[10]
WHAT_NOW = msgspec.structs.replace(edited(WHAT, "what have I missed"), reactions=[Reaction(user_id=FRIEND, emoji="+1")])
VIEWS = {
    "msg_5": MessageView(content="what have I missed", edited=True, reactions=frozenset({(FRIEND, "+1")})),
    "msg_11": MessageView(content="", deleted=True),
}
HIDDEN_VIEW = {"msg_2": MessageView(content="", deleted=True)}


def change_sent(message: StoredMessage) -> journal.Event:
    event = msgspec.json.decode(message.content)
    return journal.Sent(
        at=10.0,
        user_id=AUTHORS[message.sequence_number],
        device_id="phone-1",
        connection=1,
        conversation_id=CONVERSATION,
        idempotency_key=f"key-{message.sequence_number}",
        content=event.get("content", event.get("emoji", "")),
        attempt=1,
        change=EventKind(event["event"]),
        target=str(message.target_message_id),
    )


def shown_to(user_id: str, message: StoredMessage) -> StoredMessage:
    """A `hidden` entry names its target to its actor only."""
    if message.sequence_number == 10 and user_id != AUTHORS[10]:
        return msgspec.structs.replace(message, target_message_id=msgspec.UNSET)
    return message


def viewed(user_id: str, views: dict[str, MessageView]) -> journal.Event:
    return journal.Viewed(
        at=10.0, user_id=user_id, device_id="phone-1", connection=1, conversation_id=CONVERSATION, through=19,
        views=views,
    )  # fmt: skip


def true_run() -> Events:
    """Each message and change sent, acked, and pushed to all who may see it; senders get no copy of messages."""
    events: Events = [connected(user_id) for user_id in VISIBLE]
    for message in LOG:
        author = AUTHORS.get(message.sequence_number)
        if author is not None:
            events += [change_sent(message), acked(message, user_id=author)]
        elif message.sender_id in VISIBLE:
            events += [sent(message), acked(message)]
        for user_id, (first, last) in VISIBLE.items():
            if first <= message.sequence_number <= last and user_id != message.sender_id:
                events.append(pushed(user_id, shown_to(user_id, message)))
    events += [viewed(OWNER, VIEWS), viewed(FRIEND, VIEWS | HIDDEN_VIEW), viewed(GUEST, {})]
    return events


def later(user_id: str, *messages: StoredMessage) -> Events:
    """A page on a connection that was opened when all the rest was known."""
    page = pushed(user_id, *messages, connection=2, origin="backlog")
    assert isinstance(page, journal.Pushed)
    return [connected(user_id, 2, opened_at=11.0), msgspec.structs.replace(page, at=12.0)]


def refused(user_id: str, code: ErrorCode) -> Events:
    speech = sent(stored(30, user_id, "hear me"))
    refusal = journal.Refused(
        at=10.0, user_id=user_id, device_id="phone-1", connection=1, code=code, retryable=False,
        conversation_id=CONVERSATION, idempotency_key="key-30",
    )  # fmt: skip
    return [speech, refusal]


def instead(events: Events, sequence: int, by: StoredMessage) -> Events:
    """Everybody is shown this entry in place of the one with that sequence."""
    assert any(is_push(event, OWNER, sequence) for event in events)
    return [
        msgspec.structs.replace(event, payload=msgspec.structs.replace(event.payload, messages=[by]))
        if isinstance(event, journal.Pushed) and event.payload.messages[0].sequence_number == sequence
        else event
        for event in events
    ]


def inserted(events: Events, message: StoredMessage) -> Events:
    """One more entry at the end, which the owner and the friend are shown; acked where somebody sent it."""
    events = [event for event in events if not isinstance(event, journal.Viewed)]
    spoken: Events = [sent(message), acked(message)] if message.sender_id != "system" else []
    members = [pushed(user_id, message) for user_id in (OWNER, FRIEND) if user_id != message.sender_id]
    return [*events, *spoken, *members]


def test_a_true_run_with_changes_is_ok() -> None:
    assert judge(true_run()) == []


def test_pages_that_show_what_has_become_of_it_are_ok() -> None:
    mine = [HELLO, LOG[2], LOG[3], WHAT_NOW, *LOG[5:9], shown_to(OWNER, LOG[9]), erased(SECRET), erased(LOG[11])]
    hidden = [erased(HELLO), LOG[2], LOG[3], WHAT_NOW]
    assert judge([*true_run(), *later(OWNER, *mine, LOG[12]), *later(FRIEND, *hidden)]) == []


def test_a_page_asked_for_before_a_change_may_show_what_was_before() -> None:
    early = pushed(OWNER, WHAT, edited(SECRET, "a worse secret"), connection=2, origin="backlog")
    assert judge([*true_run(), connected(OWNER, 2, opened_at=9.0), early]) == []


def test_a_silenced_member_is_refused() -> None:
    assert judge([*true_run(), *refused(GUEST, ErrorCode.MUTED)]) == []


def looked(user_id: str, *messages: StoredMessage) -> journal.Event:
    """A page of the HTTP API, asked for when all the rest was known."""
    return journal.Looked(
        at=12.0, user_id=user_id, device_id="api", connection=0, conversation_id=CONVERSATION, asked_at=11.0,
        messages=list(messages),
    )  # fmt: skip


def test_a_page_of_the_api_is_judged_as_any_other() -> None:
    assert judge([*true_run(), looked(OWNER, HELLO, WHAT_NOW, erased(SECRET))]) == []
    assert judge([*true_run(), looked(OWNER, SECRET)]) == ["leak"]
    assert judge([*true_run(), looked(OWNER, stored(3, FRIEND, "forged"))]) == ["altered"]
    assert judge([*true_run(), looked(OWNER, stored(20, FRIEND, "never said"))]) == ["foreign"]


def edited_late(author: str, target: str, content: str) -> tuple[StoredMessage, Events]:
    """One more edit at the end, which the owner and the friend are shown; and the run with it."""
    late = changed(20, EventKind.EDITED, author, target, content=content)
    events = [event for event in true_run() if not isinstance(event, journal.Viewed)]
    asked = msgspec.structs.replace(
        change_sent(LOG[5]), user_id=author, idempotency_key="key-20", content=content, target=target
    )
    return late, [*events, asked, acked(late, user_id=author), *(pushed(name, late) for name in (OWNER, FRIEND))]


def test_who_has_left_sees_nothing_of_what_became_of_a_message_afterwards() -> None:
    """The guest was banned at 18: a later edit is veiled for them, and whoever is still there sees it."""
    _, events = edited_late(FRIEND, "msg_16", "no thanks")
    thanks = LOG[15]
    assert judge([*events, looked(GUEST, erased(thanks))]) == []
    assert judge([*events, looked(OWNER, edited(thanks, "no thanks"))]) == []
    assert judge([*events, looked(OWNER, erased(thanks))]) == ["altered"], "who is still there sees all of it"
    assert judge([*events, looked(GUEST, erased(WHAT))]) == ["altered"], "nobody touched that one after the ban"


def test_who_has_hidden_a_message_is_not_shown_its_edits() -> None:
    """The friend hid the second message at 10."""
    late, events = edited_late(OWNER, "msg_2", "hello, both")
    assert judge([*events, looked(FRIEND, erased(late)), looked(FRIEND, erased(HELLO))]) == []
    assert judge([*events, looked(OWNER, erased(late))]) == ["altered"], "nobody else has hidden it"


def test_what_was_said_to_an_empty_group_is_known_from_its_ack() -> None:
    alone = [system(1, "created", OWNER), stored(2, OWNER, "hello?")]
    events = [pushed(OWNER, alone[0]), sent(alone[1]), acked(alone[1])]
    assert judge([*events, looked(OWNER, *alone)]) == []
    assert judge([*events, looked(OWNER, alone[0], stored(2, OWNER, "forged"))]) == ["altered"]


def needless(message: StoredMessage, target: StoredMessage) -> Events:
    """The same change once more, acked as its target: there was nothing to do."""
    user_id = AUTHORS[message.sequence_number]
    key = f"again-{message.sequence_number}"
    again = msgspec.structs.replace(change_sent(message), idempotency_key=key)
    name = {"message_id": target.message_id, "sequence_number": target.sequence_number}
    return [again, acked(message, user_id=user_id, idempotency_key=key, **name)]


def test_what_was_so_already_is_no_entry() -> None:
    assert judge([*true_run(), *needless(LOG[7], WHAT), *needless(LOG[8], WHAT), *needless(LOG[9], HELLO)]) == []


def test_changes_are_counted_by_kind() -> None:
    ledger = Ledger()
    for event in true_run():
        ledger.record(event)
    counts = {kind.value: ledger.counts[kind.value] for kind in MESSAGE_EVENTS}
    assert counts == {"edited": 2, "deleted": 1, "hidden": 1, "reacted": 2, "unreacted": 1}
    assert ledger.counts["acked"] == 6
    group = ledger.group(CONVERSATION)
    assert group.participants == {OWNER: Role.OWNER, FRIEND: Role.ADMIN}
    assert (group.title, group.banned, group.kinds[EventKind.SILENCED]) == ("us two", {GUEST}, 1)


def entry(event: StoredMessage, **fields: object) -> StoredMessage:
    """The same entry, saying something else."""
    said = msgspec.json.decode(event.content) | fields
    return msgspec.structs.replace(event, content=msgspec.json.encode(said).decode())


MUTATIONS: dict[str, tuple[Callable[[Events], Events], set[str]]] = {
    "the entry of a change did not come": (lambda e: without(e, lambda x: is_push(x, OWNER, 8)), {"lost"}),
    "the entry of one's own change did not come": (lambda e: without(e, lambda x: is_push(x, OWNER, 7)), {"lost"}),
    "an acked change is in no log": (
        lambda e: [*e, msgspec.structs.replace(change_sent(LOG[6]), idempotency_key="key-20"),
                   acked(LOG[6], user_id=OWNER, idempotency_key="key-20", sequence_number=20, message_id="msg_20")],
        {"lost"},
    ),
    "two changes came in the wrong order": (
        lambda e: [*e, pushed(GUEST, LOG[8]), pushed(GUEST, LOG[7])], {"order"},
    ),
    "a change of nobody's is in the log": (
        lambda e: inserted(e, changed(20, EventKind.REACTED, OWNER, "msg_3", emoji="!")), {"invented"},
    ),
    "a change was never answered": (
        lambda e: [*e, msgspec.structs.replace(change_sent(LOG[6]), idempotency_key="key-20")], {"unanswered"},
    ),
    "an edit was acked and left out": (lambda e: [*e, *needless(LOG[5], WHAT)], {"ack"}),
    "a reaction was acked and left out": (
        lambda e: [*e, *(msgspec.structs.replace(x, content="!") if isinstance(x, journal.Sent) else x
                         for x in needless(LOG[7], WHAT))],
        {"ack"},
    ),
    "an edit says something else": (lambda e: instead(e, 6, entry(LOG[5], content="forged")), {"altered", "view"}),
    "an edit is ascribed to another": (lambda e: instead(e, 6, entry(LOG[5], actor=OWNER)), {"altered"}),
    "a commitment does not fit": (lambda e: instead(e, 10, entry(LOG[9], commitment="00" * 16)), {"altered", "leak"}),
    "somebody else was shown what one has hidden": (
        lambda e: replaced(e, lambda x: is_push(x, OWNER, 10), pushed(OWNER, LOG[9])), {"leak"},
    ),
    "everybody can read who has hidden what": (
        lambda e: instead(e, 10, entry(LOG[9], actor=FRIEND, targets=["msg_2"])), {"leak"},
    ),
    "who has hidden something is not told what": (
        lambda e: replaced(
            e, lambda x: is_push(x, FRIEND, 10),
            pushed(FRIEND, msgspec.structs.replace(LOG[9], target_message_id=msgspec.UNSET)),
        ),
        {"altered"},
    ),
    "a page shows what was deleted": (lambda e: [*e, *later(FRIEND, SECRET)], {"leak"}),
    "a page shows what a deleted message was changed to": (lambda e: [*e, *later(FRIEND, LOG[11])], {"leak"}),
    "a page shows the edited text of a deleted message": (
        lambda e: [*e, *later(OWNER, edited(SECRET, "a worse secret"))], {"leak"},
    ),
    "a page shows one what he has hidden": (lambda e: [*e, *later(FRIEND, HELLO)], {"leak"}),
    "a page does not show one what another has hidden": (lambda e: [*e, *later(OWNER, erased(HELLO))], {"altered"}),
    "a page late on the same connection shows what was deleted": (
        lambda e: [*e, msgspec.structs.replace(pushed(FRIEND, SECRET, origin="retransmit"), at=75.0)], {"leak"},
    ),
    "a page does not show the edit": (
        lambda e: [*e, *later(OWNER, msgspec.structs.replace(WHAT, reactions=WHAT_NOW.reactions))], {"altered"},
    ),
    "a page is older than what was told": (lambda e: [*e, *later(OWNER, WHAT)], {"stale"}),
    "a page shows an edit nobody made": (lambda e: [*e, *later(OWNER, edited(LOG[2], "hi!"))], {"altered"}),
    "a page hides that it was edited": (
        lambda e: [*e, *later(OWNER, msgspec.structs.replace(WHAT_NOW, edited_at=msgspec.UNSET))], {"altered"},
    ),
    "a page lacks a reaction": (
        lambda e: [*e, *later(OWNER, msgspec.structs.replace(WHAT_NOW, reactions=[]))], {"stale"},
    ),
    "a page shows a reaction taken back": (
        lambda e: [*e, *later(OWNER, msgspec.structs.replace(
            WHAT_NOW, reactions=[Reaction(user_id=name, emoji="+1") for name in (OWNER, FRIEND)]))],
        {"stale"},
    ),
    "the hash of the original is another": (
        lambda e: [*e, *later(OWNER, msgspec.structs.replace(WHAT_NOW, content_hash="00" * 16))], {"altered"},
    ),
    "one device folds something else": (
        lambda e: [*e, viewed(OWNER, VIEWS | {"msg_5": MessageView(content="else", edited=True)})], {"view"},
    ),
    "one device missed a deletion": (lambda e: [*e, viewed(FRIEND, VIEWS)], {"view"}),
    "a silenced member is in the log": (
        lambda e: [*without(e, lambda x: is_ack(x, 16) or is_push(x, OWNER, 16) or is_push(x, GUEST, 16)
                            or (isinstance(x, journal.Sent) and x.idempotency_key == "key-16")),
                   sent(stored(16, GUEST, "!")), acked(stored(16, GUEST, "!")),
                   pushed(OWNER, stored(16, GUEST, "!"), origin="retransmit"),
                   pushed(FRIEND, stored(16, GUEST, "!"), origin="retransmit")],
        {"muted"},
    ),
    "somebody was refused as silenced who is not": (lambda e: [*e, *refused(OWNER, ErrorCode.MUTED)], {"refusal"}),
    "a refused send is in the log": (
        lambda e: [*inserted(e, stored(20, OWNER, "x")),
                   msgspec.structs.replace(refused(OWNER, ErrorCode.FORBIDDEN)[1], idempotency_key="key-20")],
        {"ack"},
    ),
    "a banned member speaks": (
        lambda e: inserted(e, stored(20, GUEST, "still here")), {"rights", "foreign"},
    ),
    "a banned member is shown more": (lambda e: [*e, pushed(GUEST, LOG[18])], {"foreign"}),
    "a banned member did not see his ban": (lambda e: without(e, lambda x: is_push(x, GUEST, 18)), {"lost"}),
    "a banned member is added": (lambda e: inserted(e, system(20, "added", GUEST, actor=OWNER)), {"rights", "lost"}),
    "a plain member renames the group": (
        lambda e: instead(e, 15, entry(LOG[14], roles={FRIEND: "member"})), {"rights"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_ledger_catches(name: str) -> None:
    mutate, kinds = MUTATIONS[name]
    assert set(judge(mutate(true_run()))) == kinds
