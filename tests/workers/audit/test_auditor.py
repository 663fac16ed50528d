"""One thing of a clean run is broken at a time, and the auditor names exactly the invariant it breaks."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from protocol.watermarks import chain_digest
from tests.workers.audit.scenes import ANN, BEN, CID, GROUP, PAIR, START, Scene, quiet_run, sha
from workers.audit import history
from workers.audit.auditor import audit, examine
from workers.audit.report import INVARIANTS
from workers.audit.snapshot import Amount, Queues, ShardQueue, Shown

if TYPE_CHECKING:
    from collections.abc import Callable


def broken(scene: Scene) -> set[str]:
    violations = audit(scene.events, scene.snapshot())
    assert all(violation.evidence for violation in violations)
    return {violation.invariant for violation in violations}


def test_a_clean_run_is_clean() -> None:
    scene = quiet_run()
    assert audit(scene.events, scene.snapshot()) == []
    assert audit(None, scene.snapshot()) == []
    counts = examine(scene.events, scene.snapshot()).counts
    assert (counts["conversations"], counts["messages"], counts["acks"]) == (2, 13, 10)


def lose_an_acked_message(scene: Scene) -> None:
    """The last one, with its counters: nothing but the ack remembers it."""
    document = scene.collections["messages"].pop(4)
    assert document["conversation_id"] == PAIR
    before = scene.message(PAIR, 4)
    for name in ("sequence_numbers", "conversations"):
        scene.only(name, PAIR)["last_sequence_number"] = 4
    scene.only("sequence_numbers", PAIR).update(countable=before["countable"], digest=before["digest"])
    scene.collections["idempotency_keys"] = [
        record for record in scene.collections["idempotency_keys"] if record["message_id"] != document["_id"]
    ]
    for user in (ANN, BEN):
        member = scene.membership(PAIR, user)
        member.update(devices={}, delivered_seq=min(member["delivered_seq"], 4), read_seq=min(member["read_seq"], 4))
        member["read_countable"] = member["read_seq"]
    scene.events = [
        event
        for event in scene.events
        if not (isinstance(event, history.Push | history.Dack) and event.conv == PAIR and _sequence(event) == 5)
    ]


def _sequence(event: Any) -> int:
    return event.seq if isinstance(event, history.Dack) else event.rows[0].seq


def store_it_twice(scene: Scene) -> None:
    """No unique key index: a retry got a document of its own."""
    scene.add(history.Send(t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, key="p5", payload_sha=sha("pair 5")))
    scene.append(PAIR, ANN, "p5", "pair 5")
    scene.collections["idempotency_keys"].pop()
    row = history.Row(seq=6, mid=scene.message(PAIR, 6)["_id"], sha=sha("pair 5"))
    for user in (ANN, BEN):
        scene.add(history.Push(t=scene.tick(), user=user, dev="d1", conn=1, conv=PAIR, rows=[row], first=6, last=6))


def leave_a_gap(scene: Scene) -> None:
    """Number 3 of the pair was burnt; nobody ever had it."""
    for document in list(scene.documents("messages", PAIR)):
        if document["sequence_number"] == 3:
            scene.collections["messages"].remove(document)
    gone = {"p3"}
    scene.events = [
        event
        for event in scene.events
        if getattr(event, "key", "") not in gone
        and not (isinstance(event, history.Push | history.Dack) and event.conv == PAIR and _sequence(event) == 3)
    ]
    scene.collections["idempotency_keys"] = [
        r for r in scene.collections["idempotency_keys"] if not r["_id"].endswith(":p3")
    ]


def repeat_a_number(scene: Scene) -> None:
    scene.collections["messages"].append(scene.message(PAIR, 5) | {"_id": "msg_twin", "idempotency_key": "twin"})


def begin_late(scene: Scene) -> None:
    """The first messages are gone, and nothing is old enough for that."""
    scene.collections["messages"] = [
        d for d in scene.collections["messages"] if d["conversation_id"] != PAIR or d["sequence_number"] > 2
    ]
    scene.collections["idempotency_keys"] = []
    scene.events = []


def forget_the_counter(scene: Scene) -> None:
    scene.only("sequence_numbers", PAIR).update(
        last_sequence_number=4, countable=4, digest=scene.message(PAIR, 4)["digest"]
    )


def show_two_things(scene: Scene) -> None:
    """A page of the API shows another id at a sequence."""
    row = history.Row(seq=2, mid="msg_other", sha=sha("pair 2"))
    scene.add(history.Push(t=scene.tick(), user=ANN, dev="api", conv=PAIR, rows=[row], origin="rest", first=2, last=2))


def lose_a_push(scene: Scene) -> None:
    """The backlog came after it, without it."""
    scene.drop(history.Push, 0)
    scene.add(history.Connect(t=scene.tick(), user=BEN, dev="d1", conn=2, opened=scene.clock))
    scene.add(history.Synced(t=scene.tick(), user=BEN, dev="d1", conn=2))


def push_backwards(scene: Scene) -> None:
    pushes = [
        index
        for index, event in enumerate(scene.events)
        if isinstance(event, history.Push) and event.user == BEN and event.conv == PAIR
    ]
    first, second = pushes[0], pushes[1]
    scene.events[first], scene.events[second] = scene.events[second], scene.events[first]


def ack_twice_otherwise(scene: Scene) -> None:
    scene.add(
        history.Ack(
            t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, key="p1", mid="msg_new", seq=1, duplicate=True
        ),
    )


def show_to_a_stranger(scene: Scene) -> None:
    row = history.Row(seq=2, mid=scene.message(GROUP, 2)["_id"], sha=sha("group 2"), canary="g2")
    scene.add(history.Push(t=scene.tick(), user=CID, dev="d2", conn=1, conv=GROUP, rows=[row], first=2, last=2))


def show_a_canary_of_elsewhere(scene: Scene) -> None:
    index = next(i for i, event in enumerate(scene.events) if isinstance(event, history.Push) and event.conv == PAIR)
    push = scene.events[index]
    assert isinstance(push, history.Push)
    scene.events[index] = msgspec.structs.replace(push, rows=[msgspec.structs.replace(push.rows[0], canary="g2")])


def answer_somebody_else(scene: Scene) -> None:
    scene.add(history.Ack(t=scene.tick(), user=BEN, dev="d1", conn=1, conv=PAIR, key="p1", mid="msg_x", seq=1))


def count_unread_wrong(scene: Scene) -> None:
    scene.membership(PAIR, ANN)["read_countable"] -= 1


def tell_unread_wrong(scene: Scene) -> None:
    scene.tick(10)
    scene.add(history.Unread(t=scene.tick(), user=BEN, dev="d1", conn=1, value=3, conv=PAIR))


def tell_all_unread_wrong(scene: Scene) -> None:
    scene.tick(10)
    scene.add(history.Unread(t=scene.tick(), user=BEN, dev="d1", conn=1, value=9))


def order_wrong(scene: Scene) -> None:
    """The ack of p3 had come before p5 was sent; now p5 says it was sent by then and has the smaller place."""
    sends = [event for event in scene.events if isinstance(event, history.Send)]
    late = next(event for event in sends if event.key == "p1")
    scene.events.remove(late)
    ack = next(event for event in scene.events if isinstance(event, history.Ack) and event.key == "p1")
    scene.events.remove(ack)
    at = next(i for i, event in enumerate(scene.events) if isinstance(event, history.Ack) and event.key == "p3")
    scene.events[at + 1 : at + 1] = [late, ack]


def order_wrong_on_one_connection(scene: Scene) -> None:
    """Both sent, then both acknowledged, the later one with the smaller place."""
    first = next(event for event in scene.events if isinstance(event, history.Send) and event.key == "p1")
    later = next(event for event in scene.events if isinstance(event, history.Send) and event.key == "p3")
    scene.events.remove(later)
    scene.events.insert(scene.events.index(first), later)


def store_what_nobody_sent(scene: Scene) -> None:
    document = scene.append(PAIR, BEN, "phantom", "nobody said this")
    row = history.Row(seq=6, mid=document["_id"], sha=sha("nobody said this"))
    scene.add(history.Push(t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, rows=[row], first=6, last=6))
    scene.add(history.Push(t=scene.tick(), user=BEN, dev="d1", conn=1, conv=PAIR, rows=[row], first=6, last=6))


def speak_from_outside(scene: Scene) -> None:
    scene.events = []
    scene.collections["messages"][-1]["sender_id"] = BEN
    last = scene.collections["messages"][-1]
    hashed = bytes.fromhex(sha(last["content"]))
    last["digest"] = chain_digest(scene.message(GROUP, 7)["digest"], last["_id"], BEN, 8, hashed)
    scene.only("sequence_numbers", GROUP)["digest"] = last["digest"]
    scene.collections["idempotency_keys"].pop()


def tell_receipts_backwards(scene: Scene) -> None:
    for delivered in (4, 2):
        scene.add(history.Receipt(t=scene.tick(), user=BEN, dev="d1", conn=1, conv=PAIR, of=ANN, delivered=delivered))


def deliver_unconfirmed(scene: Scene) -> None:
    scene.membership(GROUP, CID)["delivered_seq"] = 8
    scene.events = [
        event
        for event in scene.events
        if not (isinstance(event, history.Dack) and event.user == CID and event.seq == 8)
    ]


def mark_beyond_the_end(scene: Scene) -> None:
    scene.events = []
    scene.membership(PAIR, BEN)["delivered_seq"] = 99


def refuse_what_was_acked(scene: Scene) -> None:
    scene.add(
        history.Error(
            t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, key="p1", code="forbidden", retryable=False
        ),
    )


def answer_no_retransmit(scene: Scene) -> None:
    scene.add(history.Ask(t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, first=1, last=2))


def answer_a_retransmit_with_a_hole(scene: Scene) -> None:
    scene.add(history.Ask(t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, first=1, last=3))
    rows = [history.Row(seq=n, mid=scene.message(PAIR, n)["_id"], sha=sha(f"pair {n}")) for n in (1, 3)]
    scene.add(
        history.Push(
            t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, rows=rows, origin="retransmit", first=1, last=3
        ),
    )


def answer_a_retransmit_twice(scene: Scene) -> None:
    at = scene.tick()
    scene.add(history.Ask(t=at, user=ANN, dev="d1", conn=1, conv=PAIR, first=1, last=1))
    rows = [history.Row(seq=1, mid=scene.message(PAIR, 1)["_id"], sha=sha("pair 1"))]
    for _ in range(2):
        scene.add(
            history.Push(t=at, user=ANN, dev="d1", conn=1, conv=PAIR, rows=rows, origin="retransmit", first=1, last=1)
        )


def leave_pending(scene: Scene) -> None:
    scene.queues = Queues(shards=[ShardQueue(shard=3, length=9, pending=2, unread=0, consumers=1)])


def bury_what_is_stored(scene: Scene) -> None:
    scene.collections["dead_letter_queue"].append(_letter(scene.message(PAIR, 1), status="pending"))


def resolve_what_is_not_stored(scene: Scene) -> None:
    message = scene.message(PAIR, 1) | {"idempotency_key": "nowhere"}
    scene.collections["dead_letter_queue"].append(
        _letter(message, status="resolved", resolved_reason="committed as msg_9, number 9")
    )


def bury_a_change_that_is_stored(scene: Scene) -> None:
    letter = _letter({}, status="failed", conversation_id=GROUP, sender_id=BEN, idempotency_key="e5")
    del letter["message"]
    scene.collections["dead_letter_queue"].append(letter)


def retry_for_ever(scene: Scene) -> None:
    message = scene.message(PAIR, 1) | {"idempotency_key": "nowhere"}
    scene.collections["dead_letter_queue"].append(_letter(message, status="retrying", last_retry_at=START))


def retry_too_often(scene: Scene) -> None:
    message = scene.message(PAIR, 1) | {"idempotency_key": "nowhere"}
    scene.collections["dead_letter_queue"].append(_letter(message, status="failed", retry_count=6))


def _letter(message: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "_id": "dlq_1",
        "message": message,
        "error": "e",
        "retry_count": 0,
        "max_retries": 5,
        "created_at": START,
    } | fields


def leave_a_key_open(scene: Scene) -> None:
    scene.add(history.Send(t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, key="lost", payload_sha=sha("?")))


def leave_an_online_device_behind(scene: Scene) -> None:
    """Ben is connected to the end, and the last message never came."""
    at = [
        i
        for i, event in enumerate(scene.events)
        if isinstance(event, history.Push) and event.user == BEN and event.conv == PAIR
    ][-1]
    del scene.events[at : at + 2]
    scene.membership(PAIR, BEN).update(delivered_seq=4, devices={"d1": 3})


def migrate_twice(scene: Scene) -> None:
    for user, conn in ((ANN, 2), (BEN, 2)):
        scene.add(history.Connect(t=scene.tick(), user=user, dev="d1", conn=conn, ticket="mig_1"))


def leave_clients_behind(scene: Scene) -> None:
    scene.add(history.Migrate(t=scene.tick(), user=ANN, dev="d1", conn=1, ticket="mig_2", seconds=5))


def let_a_buffer_grow(scene: Scene) -> None:
    scene.add(history.Sample(t=scene.tick(), what="tasks of the gateway", value=900, limit=350))


def let_a_stream_grow(scene: Scene) -> None:
    scene.queues = Queues(amounts=[Amount(what="query", value=99_000, limit=11_000)])


def name_two_consumers(scene: Scene) -> None:
    scene.queues = Queues(shards=[ShardQueue(shard=1, length=0, pending=0, unread=0, consumers=2)])


def take_the_second_payload(scene: Scene) -> None:
    at = next(i for i, event in enumerate(scene.events) if isinstance(event, history.Ack) and event.key == "p1")
    again = history.Send(t=scene.tick(), user=ANN, dev="d1", conn=1, conv=PAIR, key="p1", payload_sha=sha("other"))
    ack = scene.events[at]
    scene.events[at + 1 : at + 1] = [again, ack]


def push_after_logout(scene: Scene) -> None:
    at = next(i for i, event in enumerate(scene.events) if isinstance(event, history.Synced) and event.user == CID)
    scene.events.insert(at + 1, history.Revoked(t=scene.events[at].t, user=CID, dev="d1"))


def push_after_removal(scene: Scene) -> None:
    """What Ben was shown while he was in comes live again, long after he has left."""
    scene.add(history.Revoked(t=scene.tick(), user=BEN, dev="", conv=GROUP))
    row = history.Row(seq=7, mid=scene.message(GROUP, 7)["_id"], sha=sha(scene.message(GROUP, 7)["content"]))
    scene.add(history.Push(t=scene.tick(9), user=BEN, dev="d9", conn=1, conv=GROUP, rows=[row], first=7, last=7))


def show_a_ghost(scene: Scene) -> None:
    scene.queues = Queues(ghosts=[Shown(user_id=CID, seconds=25.0)])


def tell_of_a_ghost(scene: Scene) -> None:
    scene.add(history.Presence(t=scene.tick(), user=ANN, dev="d1", conn=1, of=CID, online=True))
    scene.add(history.Close(t=scene.tick(), user=CID, dev="d1", conn=1))


def turn_back_the_clock(scene: Scene) -> None:
    scene.message(PAIR, 4)["created_at"] = START - timedelta(hours=1)


def alter_a_content(scene: Scene) -> None:
    scene.events = []
    scene.message(PAIR, 2)["content"] = "altered"


def alter_a_digest(scene: Scene) -> None:
    scene.message(PAIR, 2)["digest"] = bytes(16)


def alter_a_hash(scene: Scene) -> None:
    """The content of a message that keeps its hash."""
    entry = scene.message(GROUP, 5)
    entry["content"] = entry["content"].replace("better", "worse")
    scene.message(GROUP, 3)["content"] = "group 3, worse"
    scene.events = []


def count_wrong(scene: Scene) -> None:
    scene.message(PAIR, 2)["countable"] = 7


def keep_a_role(scene: Scene) -> None:
    scene.membership(GROUP, CID)["role"] = "owner"


def keep_a_member(scene: Scene) -> None:
    del scene.membership(GROUP, BEN)["leave_seq"]
    scene.only("conversations", GROUP)["participants"].append(BEN)


def lose_a_membership(scene: Scene) -> None:
    scene.collections["memberships"].remove(scene.membership(GROUP, CID))
    scene.only("conversations", GROUP)["participants"] = [ANN]


def leave_it_unprojected(scene: Scene) -> None:
    scene.only("conversations", GROUP)["membership_seq"] = 5


def rename_behind_its_back(scene: Scene) -> None:
    scene.only("conversations", GROUP)["title"] = "mine"


def alter_an_edit(scene: Scene) -> None:
    scene.message(GROUP, 3)["content"] = "not what Ben says now"


def delete_behind_its_back(scene: Scene) -> None:
    scene.message(GROUP, 6).update(content="", content_hash=sha("group 6"), deleted_at=START)


def lose_an_effect(scene: Scene) -> None:
    target = scene.message(GROUP, 3)
    for name in ("edited_at", "edited_seq", "changed_seq", "content_hash"):
        del target[name]
    target["content"] = "group 3"


def react_behind_its_back(scene: Scene) -> None:
    scene.message(GROUP, 2)["reactions"] = [{"user_id": BEN, "emoji": "+"}]


def flush_another_digest(scene: Scene) -> None:
    scene.only("sequence_numbers", PAIR)["digest"] = bytes(16)


def flush_too_far(scene: Scene) -> None:
    scene.only("conversations", PAIR)["last_sequence_number"] = 6


def name_another_message(scene: Scene) -> None:
    scene.collections["idempotency_keys"][0]["message_id"] = scene.message(PAIR, 2)["_id"]


def name_no_message(scene: Scene) -> None:
    scene.collections["idempotency_keys"][0]["message_id"] = "msg_gone"


def store_nonsense(scene: Scene) -> None:
    scene.message(PAIR, 5)["countable"] = "five"
    scene.events = []


def store_a_membership_that_is_none(scene: Scene) -> None:
    scene.collections["memberships"].append({"_id": f"{GROUP}:x", "conversation_id": GROUP, "user_id": "x"})


SEEDED: list[tuple[Callable[[Scene], None], set[str]]] = [
    (lose_an_acked_message, {"I1"}),
    (store_it_twice, {"I1"}),
    (leave_a_gap, {"I2"}),
    (repeat_a_number, {"I2"}),
    (begin_late, {"I2"}),
    (forget_the_counter, {"I2"}),
    (show_two_things, {"I2b"}),
    (lose_a_push, {"I3"}),
    (push_backwards, {"I3"}),
    (ack_twice_otherwise, {"I4"}),
    (show_to_a_stranger, {"I5"}),
    (show_a_canary_of_elsewhere, {"I5"}),
    (answer_somebody_else, {"I5b"}),
    (count_unread_wrong, {"I6"}),
    (tell_unread_wrong, {"I6"}),
    (tell_all_unread_wrong, {"I6"}),
    (order_wrong, {"I7"}),
    (order_wrong_on_one_connection, {"I7"}),
    (store_what_nobody_sent, {"I8"}),
    (speak_from_outside, {"I8"}),
    (tell_receipts_backwards, {"I9"}),
    (deliver_unconfirmed, {"I9"}),
    (mark_beyond_the_end, {"I9"}),
    (refuse_what_was_acked, {"I10"}),
    (answer_no_retransmit, {"I11"}),
    (answer_a_retransmit_with_a_hole, {"I11"}),
    (answer_a_retransmit_twice, {"I5b"}),
    (leave_pending, {"I12"}),
    (bury_what_is_stored, {"I13"}),
    (resolve_what_is_not_stored, {"I13"}),
    (bury_a_change_that_is_stored, {"I13"}),
    (retry_for_ever, {"I13"}),
    (retry_too_often, {"I13"}),
    (leave_a_key_open, {"I14"}),
    (leave_an_online_device_behind, {"I14"}),
    (migrate_twice, {"I15"}),
    (leave_clients_behind, {"I15"}),
    (let_a_buffer_grow, {"I16"}),
    (let_a_stream_grow, {"I16"}),
    (name_two_consumers, {"I16"}),
    (take_the_second_payload, {"I17"}),
    (push_after_logout, {"I18"}),
    (push_after_removal, {"I18"}),
    (show_a_ghost, {"I19"}),
    (tell_of_a_ghost, {"I19"}),
    (turn_back_the_clock, {"I20"}),
    (alter_a_content, {"digest"}),
    (alter_a_digest, {"digest"}),
    (alter_a_hash, {"digest"}),
    (count_wrong, {"countable"}),
    (keep_a_role, {"projection"}),
    (keep_a_member, {"projection"}),
    (lose_a_membership, {"projection"}),
    (leave_it_unprojected, {"projection"}),
    (rename_behind_its_back, {"projection"}),
    (alter_an_edit, {"effects"}),
    (delete_behind_its_back, {"effects"}),
    (lose_an_effect, {"effects"}),
    (react_behind_its_back, {"effects"}),
    (flush_another_digest, {"counters"}),
    (flush_too_far, {"counters"}),
    (name_another_message, {"keys"}),
    (name_no_message, {"keys"}),
    (store_nonsense, {"shape"}),
    (store_a_membership_that_is_none, {"shape"}),
]


@pytest.mark.parametrize(("seed", "expected"), SEEDED, ids=[seed.__name__ for seed, _ in SEEDED])
def test_a_seeded_violation_is_named(seed: Callable[[Scene], None], expected: set[str]) -> None:
    scene = quiet_run()
    seed(scene)
    assert broken(scene) == expected


def test_a_history_that_ends_in_the_middle_of_a_running_system_is_no_violation() -> None:
    """The clients write on while the history is read, and the database is read after it."""
    scene = quiet_run()
    scene.setting = msgspec.structs.replace(scene.setting, settled=False)
    for length in range(len(scene.events)):
        assert audit(scene.events[:length], scene.snapshot()) == [], scene.events[length]


def test_a_question_that_was_read_twice_in_an_outage_may_be_answered_twice() -> None:
    scene = quiet_run()
    at = scene.tick()
    scene.add(history.Fault(t=at, what="Valkey came back with what it had before", since=at, until=at + 600))
    answer_a_retransmit_twice(scene)
    assert broken(scene) == set()


def test_a_letter_that_somebody_has_closed_needs_no_message() -> None:
    scene = quiet_run()
    message = scene.message(PAIR, 1) | {"idempotency_key": "nowhere"}
    closed = _letter(message, status="resolved", resolved_reason="sent again by phone")
    waiting = _letter(message, status="pending") | {"_id": "dlq_2"}
    unread = {"_id": "dlq_3", "raw": b"?", "status": "pending", "retry_count": 0, "max_retries": 5, "created_at": START}
    scene.collections["dead_letter_queue"] += [closed, waiting, unread]
    assert audit(scene.events, scene.snapshot()) == []


def test_every_invariant_has_its_seed() -> None:
    seeded = set().union(*(expected for _, expected in SEEDED))
    assert set(INVARIANTS) - seeded == {"indexes"}, "the indexes are broken in a real database"
