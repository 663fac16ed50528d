"""Group commands in the stream: membership is part of the log, and its projection survives crashes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import codec, records
from protocol.errors import ErrorCode
from protocol.models import ConversationType
from tests.workers.lanes import crashing_lane, run_lane

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio


async def test_membership_is_part_of_the_log(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.send(group, "bob", "k1")
        await yard.add(group, "ann", "cat")
        await yard.send(group, "cat", "k2")
        await yard.remove(group, "ann", "bob")
        await yard.send(group, "bob", "k3")
        await yard.send(group, "bob", "k1")
        outcomes = await yard.next_down(records.CommandOutcome, 3)
        acks = {a["payload"]["idempotency_key"]: a for a in await yard.acks(3)}
        (late,) = await yard.acks(1) if len(acks) == 3 and "k3" in acks else [None]
        stored = await yard.log(group)
        members = {m["user_id"]: m async for m in yard.store.db["memberships"].find({"conversation_id": group})}
        document = await yard.store.db["conversations"].find_one({"_id": group})
    assert [o.code for o in outcomes] == [None, None, None]
    assert [m["type"] for m in stored] == ["system", "text", "system", "text", "system"]
    assert [m["sequence_number"] for m in stored] == [1, 2, 3, 4, 5]
    events = [codec.decode_system_event(m["content"]) for m in stored if m["type"] == "system"]
    assert [(e.event, e.actor, e.targets) for e in events] == [
        ("created", "ann", ["ann", "bob"]),
        ("added", "ann", ["cat"]),
        ("removed", "ann", ["bob"]),
    ]
    assert (members["cat"]["join_seq"], members["bob"]["leave_seq"]) == (3, 5)
    assert document is not None
    assert document["participants"] == ["ann", "cat"]
    assert acks["k3"]["payload"]["code"] == "conversation_not_found"
    assert late is not None
    assert late["payload"]["duplicate"] is True, "the retry of an acked message keeps its ack"


async def test_the_hundred_and_first_participant_is_refused_under_concurrency(yard: Yard) -> None:
    users = [f"u{number}" for number in range(99)]
    async with run_lane(yard):
        group = await yard.create(*users, kind=ConversationType.GROUP)
        for number in range(10):
            await yard.add(group, "u0", f"late{number}", request=f"r{number}")
        outcomes = await yard.next_down(records.CommandOutcome, 11)
        document = await yard.store.db["conversations"].find_one({"_id": group})
        live = await yard.store.db["memberships"].count_documents(
            {"conversation_id": group, "leave_seq": {"$exists": False}}
        )
    codes = [o.code for o in outcomes[1:]]
    assert codes == [None] + [ErrorCode.GROUP_FULL] * 9
    assert document is not None
    assert len(document["participants"]) == 100 == live


async def test_a_group_of_101_is_never_created(yard: Yard) -> None:
    async with run_lane(yard):
        group = await yard.create(*[f"u{number}" for number in range(101)], kind=ConversationType.GROUP)
        (outcome,) = await yard.next_down(records.CommandOutcome, 1)
    assert outcome.code is ErrorCode.GROUP_FULL
    assert await yard.store.db["conversations"].find_one({"_id": group}) is None


async def test_a_crash_before_the_projection_is_repaired_from_the_log(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system message is committed, memberships are not written, and Redis has lost the entry too."""
    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)

    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.conversations, "apply", never)
        async with crashing_lane(yard):
            await yard.add(group, "ann", "cat")
            with anyio.fail_after(5):
                await reached.wait()
    assert await yard.store.db["memberships"].find_one({"_id": f"{group}:cat"}) is None
    await yard.broker.client.flushall()
    await yard.open()
    async with run_lane(yard):
        await yard.send(group, "cat", "k1")
        (ack,) = await yard.acks(1)
    assert ack["payload"]["sequence_number"] == 3
    stay = await yard.store.db["memberships"].find_one({"_id": f"{group}:cat"})
    assert stay is not None
    assert stay["join_seq"] == 2


async def test_a_crash_between_conversation_and_first_entry_is_repaired(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(yard.store.messages, "append", never)
        async with crashing_lane(yard):
            group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
            with anyio.fail_after(5):
                await reached.wait()
    async with run_lane(yard):
        (outcome,) = await yard.next_down(records.CommandOutcome, 1)
        stored = await yard.log(group)
    assert outcome.code is None
    assert [m["type"] for m in stored] == ["system"]
    assert await yard.store.db["memberships"].count_documents({"conversation_id": group}) == 2


async def test_the_last_owner_leaving_leaves_an_owner(yard: Yard) -> None:
    async with run_lane(yard):
        group = await yard.create("ann", "bob", "cat", kind=ConversationType.GROUP)
        await yard.remove(group, "ann", "ann", request="leave")
        await yard.add(group, "cat", "dan", request="by-cat")
        await yard.add(group, "bob", "dan", request="by-bob")
        outcomes = await yard.next_down(records.CommandOutcome, 4)
    assert [o.code for o in outcomes] == [None, None, ErrorCode.FORBIDDEN, None]


async def test_nothing_is_committed_behind_a_removal_before_memberships_show_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the removed member could page one message too far."""
    append = yard.store.messages.append
    ends: list[str] = []

    async def note_the_end(documents: Any) -> None:
        ends.append(documents[-1]["type"])
        await append(documents)

    async with run_lane(yard):
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
    monkeypatch.setattr(yard.store.messages, "append", note_the_end)
    await yard.send(group, "ann", "k1")
    await yard.remove(group, "ann", "bob")
    await yard.send(group, "ann", "k2")
    async with run_lane(yard):
        acks = await yard.acks(2)
    assert [ack["payload"]["sequence_number"] for ack in acks] == [2, 4]
    assert ends == ["system", "text"]
