"""One key, one outcome: what had its ack keeps it whatever its sender may do by now, and a key stands for one thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import records
from protocol.errors import ErrorCode
from protocol.models import ConversationType, Role
from tests.workers.lanes import INSTANCE, crashing_lane, eventually, run_lane, settled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.workers.lanes import Yard
    from workers.store.messages import Key

pytestmark = pytest.mark.anyio

FAR = 4_000_000_000_000


async def group_of(yard: Yard, *members: str) -> str:
    group = await yard.create(*members, kind=ConversationType.GROUP)
    await yard.next_down(records.CommandOutcome, 1)
    return group


async def repeated(yard: Yard, conversation_id: str, sender_id: str, key: str, **changes: Any) -> dict[str, Any]:
    """Send it again to an owner that remembers no keys: the payload of its answer."""
    async with run_lane(yard):
        await yard.send(conversation_id, sender_id, key, **changes)
        (answer,) = await yard.acks(1)
    payload: dict[str, Any] = answer["payload"]
    return payload


async def test_a_message_that_had_its_ack_is_acked_again_after_its_sender_was_silenced(yard: Yard) -> None:
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
        message_id = await yard.said(group, "bob", "k1")
        await yard.decided(group, "ann", records.Silence("bob", FAR), "s1")
    again = await repeated(yard, group, "bob", "k1")
    new = await repeated(yard, group, "bob", "k2")
    other = await repeated(yard, group, "bob", "k1", content="something else")
    assert (again.get("code"), again.get("message_id"), again.get("duplicate")) == (None, message_id, True)
    assert (new["code"], other["code"]) == ("muted", "idempotency_conflict")


async def test_a_message_that_had_its_ack_is_acked_again_after_a_block(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        message_id = await yard.said(conv, "ann", "k1")
        await yard.block("bob", "ann")
        await yard.send(conv, "ann", "k2")
        (refused,) = await yard.acks(1)
    again = await repeated(yard, conv, "ann", "k1")
    assert refused["payload"]["code"] == "blocked"
    assert (again.get("code"), again.get("message_id")) == (None, message_id)


async def test_a_reply_that_had_its_ack_is_acked_again_after_its_target_was_deleted(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        target = await yard.said(conv, "ann", "k1")
        reply = await yard.said(conv, "bob", "k2", reply_to_message_id=target)
        await yard.changed(conv, "ann", "d1", target, records.Delete(for_all=True))
    again = await repeated(yard, conv, "bob", "k2", reply_to_message_id=target)
    new = await repeated(yard, conv, "bob", "k3", reply_to_message_id=target)
    assert (again.get("code"), again.get("message_id")) == (None, reply)
    assert new["code"] == "validation_failed"


async def test_a_message_that_had_its_ack_is_acked_again_after_its_sender_was_removed(yard: Yard) -> None:
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
        message_id = await yard.said(group, "bob", "k1")
        await yard.remove(group, "ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
    again = await repeated(yard, group, "bob", "k1")
    new = await repeated(yard, group, "bob", "k2")
    assert (again.get("code"), again.get("message_id")) == (None, message_id)
    assert new["code"] == "conversation_not_found"


async def test_refused_messages_cost_one_look_up_a_batch_and_accepted_ones_none(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
        await yard.said(group, "bob", "k0")
        await yard.decided(group, "ann", records.Silence("bob", FAR), "s1")
    find_keys = yard.store.messages.find_keys
    looked_up: list[int] = []

    async def count(wanted: Iterable[Key]) -> Any:
        keys = list(wanted)
        looked_up.append(len(keys))
        return await find_keys(keys)

    monkeypatch.setattr(yard.store.messages, "find_keys", count)
    for number in range(50):
        await yard.send(group, "ann", f"a{number}")
    async with run_lane(yard):
        await yard.acks(50)
        assert looked_up == []
    for number in range(200):
        await yard.send(group, "bob", f"b{number}")
    await yard.send(group, "bob", "k0")
    async with run_lane(yard):
        answers = await yard.acks(201)
    assert [answer["payload"].get("code") for answer in answers].count("muted") == 200
    assert sum(looked_up) == 201
    assert len(looked_up) <= 3, looked_up


async def test_a_key_sent_twice_around_the_end_of_a_silence_has_one_outcome(yard: Yard) -> None:
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
        await yard.decided(group, "ann", records.Silence("bob", FAR), "s1")
    await yard.send(group, "bob", "k1")
    await yard.command(group, "ann", records.Silence("bob", 0), "s2")
    await yard.send(group, "bob", "k1")
    async with run_lane(yard):
        answers = [answer["payload"] for answer in await yard.acks(2)]
    assert len({answer.get("message_id", answer.get("code")) for answer in answers}) == 1, answers


async def test_a_repeat_is_not_sent_to_who_came_back_after_the_message(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob", "cat")
        await yard.said(group, "ann", "k1")
        await yard.remove(group, "ann", "cat")
        await yard.add(group, "ann", "cat")
        await yard.next_down(records.CommandOutcome, 2)
        await eventually(lambda: settled(yard))
        yard.down.clear()
        await yard.said(group, "ann", "k1")
        deliveries = await yard.next_down(records.Delivery, 1)
    assert [(delivery.from_sequence, delivery.users) for delivery in deliveries] == [(2, ["ann", "bob"])]


# --- one key, one thing ----------------------------------------------------------------------------------------------


async def test_a_key_that_was_used_for_another_command_conflicts(yard: Yard) -> None:
    """Each pair asks for different things under one key: the second has no effect, and says so."""
    pairs: list[tuple[Any, Any]] = [
        (records.Rename("Boat"), records.Rename("Ship")),
        (records.Silence("bob", FAR), records.Silence("bob", FAR + 1)),
        (records.SetRole("cat", Role.ADMIN), records.SetRole("cat", Role.MEMBER)),
        (records.SetDisappearing(60), records.SetDisappearing(61)),
        (records.Ban("eve"), records.Ban("fay")),
    ]
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob", "cat")
        await yard.add(group, "ann", "dan", request="a1")
        await yard.add(group, "ann", "dan", "gil", request="a1")
        await yard.remove(group, "ann", "dan", request="r1")
        await yard.remove(group, "ann", "bob", request="r1")
        codes = [outcome.code for outcome in await yard.next_down(records.CommandOutcome, 4)]
        for number, (first, second) in enumerate(pairs):
            codes += [await yard.decided(group, "ann", step, f"s{number}") for step in (first, second)]
        length = len(await yard.log(group))
    async with run_lane(yard):  # the next owner knows it from the store
        for number, (first, second) in enumerate(pairs):
            codes += [await yard.decided(group, "ann", step, f"s{number}") for step in (first, second)]
        await yard.add(group, "ann", "dan", "gil", request="a1")
        await yard.add(group, "ann", "dan", request="a1")
        codes += [outcome.code for outcome in await yard.next_down(records.CommandOutcome, 2)][::-1]
    assert codes == [None, ErrorCode.IDEMPOTENCY_CONFLICT] * 13
    assert len(await yard.log(group)) == length == 8


async def test_a_key_that_made_a_group_makes_no_other(yard: Yard) -> None:
    def create(*participants: str, title: str = "", agent_id: str = "") -> records.CreateConversation:
        return records.CreateConversation(
            INSTANCE, "r", "k", "conv_g", ConversationType.GROUP, "ann", ["ann", *participants], agent_id, title
        )

    wanted = create("bob", title="Boat")
    asked = [wanted, create("bob"), create("cat", title="Boat"), create("bob", title="Boat", agent_id="x"), wanted]
    for _ in range(2):
        for record in asked:
            await yard.put(record, "conv_g")
        async with run_lane(yard):
            codes = [outcome.code for outcome in await yard.next_down(records.CommandOutcome, len(asked))]
        assert codes == [None, *[ErrorCode.IDEMPOTENCY_CONFLICT] * 3, None]
    assert len(await yard.log("conv_g")) == 1


# --- what has no entry is decided once -------------------------------------------------------------------------------


async def test_a_refusal_that_was_told_is_not_taken_back_by_the_next_owner(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner dies between telling and acknowledging; meanwhile its sender may speak again."""
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob", "cat")
        await yard.decided(group, "ann", records.Silence("bob", FAR), "s1")
    await yard.send(group, "bob", "k1")
    await yard.add(group, "ann", "cat", request="a1")
    await yard.command(group, "ann", records.Silence("bob", 0), "s2")
    await yard.remove(group, "ann", "cat", request="r1")
    told = anyio.Event()
    settle = yard.broker._settle

    async def never(**_: Any) -> None:
        told.set()

    with monkeypatch.context() as patched:
        patched.setattr(yard.broker, "_settle", never)
        async with crashing_lane(yard):
            (refused,) = await yard.acks(1)
            outcomes = await yard.next_down(records.CommandOutcome, 3)
    assert settle is yard.broker._settle
    async with run_lane(yard):
        await eventually(lambda: settled(yard))
        stored = await yard.log(group)
        document = await yard.store.db["conversations"].find_one({"_id": group})
    assert told.is_set()
    assert refused["payload"]["code"] == "muted"
    assert [outcome.code for outcome in outcomes] == [None] * 3
    assert [m["idempotency_key"] for m in stored[2:]] == ["cmd-s2", "cmd-r1"], "neither was decided again"
    assert document is not None
    assert document["participants"] == ["ann", "bob"]
