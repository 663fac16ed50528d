"""Roles, names, silences, bans, disappearing messages, members' settings: who may, what it does, what it survives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import codec, records
from protocol.errors import ErrorCode
from protocol.models import ConversationType, MessageStatus, Role
from tests.workers.lanes import INSTANCE, crashing_lane, eventually, lose_its_lease, run_lane, settled
from workers.groups import LONGEST_DISAPPEARING_SECONDS

if TYPE_CHECKING:
    from tests.workers.lanes import Yard

pytestmark = pytest.mark.anyio

FAR = 4_000_000_000_000
FORBIDDEN, CONFLICT, UNFIT = ErrorCode.FORBIDDEN, ErrorCode.CONFLICT, ErrorCode.VALIDATION_FAILED
NOT_FOUND = ErrorCode.NOT_FOUND


async def group_of(yard: Yard, *users: str, admins: tuple[str, ...] = ()) -> str:
    """A group; the first is its owner."""
    group = await yard.create(*users, kind=ConversationType.GROUP)
    await yard.next_down(records.CommandOutcome, 1)
    for admin in admins:
        assert await yard.decided(group, users[0], records.SetRole(admin, Role.ADMIN), f"admin-{admin}") is None
    return group


async def membership(yard: Yard, conversation_id: str, user_id: str) -> dict[str, Any]:
    document = await yard.store.db["memberships"].find_one({"_id": f"{conversation_id}:{user_id}"})
    assert document is not None
    return document


async def conversation(yard: Yard, conversation_id: str) -> dict[str, Any]:
    document = await yard.store.db["conversations"].find_one({"_id": conversation_id})
    assert document is not None
    return document


async def test_who_may_do_what_to_whom(yard: Yard) -> None:
    """Owner > admin > member: the table of the hierarchy, one row after the other in one group."""
    rows: list[tuple[str, Any, ErrorCode | None]] = [
        ("adm", records.SetRole("mem", Role.ADMIN), FORBIDDEN),
        ("mem", records.Rename("mine"), FORBIDDEN),
        ("mem", records.Silence("adm", FAR), FORBIDDEN),
        ("adm", records.Silence("own", FAR), FORBIDDEN),
        ("adm", records.Silence("adm", FAR), FORBIDDEN),
        ("adm", records.Silence("adm2", FAR), FORBIDDEN),
        ("own", records.Silence("own", FAR), FORBIDDEN),
        ("own", records.Silence("adm", FAR), None),
        ("adm", records.Silence("mem", FAR), None),
        ("adm", records.Silence("mem", -1), UNFIT),
        ("adm", records.Silence("nobody", FAR), NOT_FOUND),
        ("adm", records.Ban("adm2"), FORBIDDEN),
        ("own", records.Ban("own"), FORBIDDEN),
        ("mem", records.Ban("stranger"), FORBIDDEN),
        ("mem", records.Unban("stranger"), FORBIDDEN),
        ("mem", records.SetDisappearing(60), FORBIDDEN),
        ("adm", records.SetDisappearing(-1), UNFIT),
        ("adm", records.SetDisappearing(LONGEST_DISAPPEARING_SECONDS + 1), UNFIT),
        ("adm", records.Rename("a\nb"), UNFIT),
        ("adm", records.Rename("x" * 129), UNFIT),
        ("adm", records.Rename("x" * 128), None),
        ("own", records.SetRole("own", Role.MEMBER), CONFLICT),
        ("own", records.SetRole("nobody", Role.ADMIN), NOT_FOUND),
        ("own", records.SetRole("adm", Role.OWNER), None),
        ("adm", records.Ban("own"), FORBIDDEN),
        ("own", records.SetRole("own", Role.MEMBER), None),
        ("eve", records.Rename("hers"), ErrorCode.CONVERSATION_NOT_FOUND),
    ]
    async with run_lane(yard):
        group = await group_of(yard, "own", "adm", "adm2", "mem", admins=("adm", "adm2"))
        codes = [await yard.decided(group, who, change, f"r{n}") for n, (who, change, _) in enumerate(rows)]
        await yard.remove(group, "mem", "adm2", request="m1")
        await yard.remove(group, "adm2", "adm", request="m2")
        await yard.remove(group, "adm2", "mem", request="m3")
        removals = [outcome.code for outcome in await yard.next_down(records.CommandOutcome, 3)]
        adm, own = await membership(yard, group, "adm"), await membership(yard, group, "own")
        document = await conversation(yard, group)
    assert [(row[0], row[1], code) for row, code in zip(rows, codes, strict=True)] == rows
    assert removals == [FORBIDDEN, FORBIDDEN, None]
    assert (adm["role"], own["role"]) == ("owner", "member")
    assert document["title"] == "x" * 128
    assert document["participants"] == ["own", "adm", "adm2"]


async def test_a_pair_has_nothing_to_manage_but_disappearing(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        codes = [
            await yard.decided(conv, "ann", change, f"r{number}")
            for number, change in enumerate(
                [
                    records.Rename("us"),
                    records.Ban("bob"),
                    records.SetRole("bob", Role.OWNER),
                    records.Silence("bob", FAR),
                ]
            )
        ]
        stranger = await yard.decided(conv, "eve", records.SetDisappearing(5), "r5")
        on = await yard.decided(conv, "bob", records.SetDisappearing(5), "r6")
        switched_on = await conversation(yard, conv)
        off = await yard.decided(conv, "ann", records.SetDisappearing(0), "r7")
        same = await yard.decided(conv, "ann", records.SetDisappearing(0), "r8")
        stored = await yard.log(conv)
    assert codes == [FORBIDDEN] * 4
    assert stranger is ErrorCode.CONVERSATION_NOT_FOUND
    assert (on, off, same) == (None, None, None)
    assert switched_on["disappearing_seconds"] == 5
    assert "disappearing_seconds" not in await conversation(yard, conv)
    assert [codec.decode_system_event(m["content"]).seconds for m in stored] == [5, 0]


async def test_the_silenced_are_refused_until_their_time_is_over(yard: Yard) -> None:
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
        target = await yard.said(group, "bob", "k1")
        await yard.decided(group, "ann", records.Silence("bob", FAR), "s1")
    async with run_lane(yard):  # the next owner knows it from the store
        await yard.send(group, "bob", "k2")
        (muted,) = await yard.acks(1)
        edit = await yard.changed(group, "bob", "e1", target, records.Edit("x"))
        reaction = await yard.changed(group, "bob", "r1", target, records.React("x", add=True))
        deletion = await yard.changed(group, "bob", "d1", target, records.Delete(for_all=True))
        await yard.decided(group, "ann", records.Silence("bob", 1000), "s2")
        await yard.said(group, "bob", "k3")
        await yard.decided(group, "ann", records.Silence("bob", 0), "s3")
        await yard.said(group, "bob", "k4")
    assert [muted["payload"]["code"], edit["code"], reaction["code"]] == ["muted"] * 3
    assert "sequence_number" in deletion
    assert "silenced_until" not in await membership(yard, group, "bob")


async def test_who_is_banned_is_out_and_stays_out(yard: Yard) -> None:
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob", "cat")
        assert await yard.decided(group, "ann", records.Ban("bob"), "b1") is None
        assert await yard.decided(group, "ann", records.Ban("eve"), "b2") is None
        assert await yard.decided(group, "ann", records.Ban("eve"), "b3") is None
        bob = await membership(yard, group, "bob")
    async with run_lane(yard):
        await yard.add(group, "ann", "dan", "bob", request="a1")
        await yard.add(group, "ann", "eve", request="a2")
        refused = [outcome.code for outcome in await yard.next_down(records.CommandOutcome, 2)]
        assert await yard.decided(group, "ann", records.Unban("bob"), "u1") is None
        await yard.add(group, "ann", "bob", request="a3")
        (added,) = await yard.next_down(records.CommandOutcome, 1)
        stored = await yard.log(group)
        document = await conversation(yard, group)
        again = await membership(yard, group, "bob")
    events = [codec.decode_system_event(m["content"]).event for m in stored]
    assert events == ["created", "banned", "banned", "unbanned", "added"]
    assert (bob["leave_seq"], again["join_seq"]) == (2, 5)
    assert bob["left_at"] == stored[1]["created_at"]
    assert "left_at" not in again
    assert "leave_seq" not in again
    assert refused == [ErrorCode.BANNED] * 2
    assert added.code is None
    assert (document["banned"], document["participants"]) == (["eve"], ["ann", "cat", "bob"])


async def test_nothing_is_committed_behind_a_ban_before_memberships_show_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = yard.store.messages.append
    ends: list[str] = []

    async def note_the_end(documents: Any) -> None:
        ends.append(documents[-1]["type"])
        await append(documents)

    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
    monkeypatch.setattr(yard.store.messages, "append", note_the_end)
    await yard.send(group, "ann", "k1")
    await yard.command(group, "ann", records.Ban("bob"), "b1")
    await yard.send(group, "ann", "k2")
    async with run_lane(yard):
        await yard.acks(2)
    assert ends == ["system", "text"]


async def test_a_title_is_there_from_the_first_entry_and_changes_with_later_ones(yard: Yard) -> None:
    def create(conversation_id: str, kind: ConversationType, title: str) -> records.CreateConversation:
        return records.CreateConversation(
            INSTANCE, "create", "create", conversation_id, kind, "ann", ["ann", "bob"], "", title
        )

    async with run_lane(yard):
        await yard.put(create("conv_g", ConversationType.GROUP, "Boat"), "conv_g")
        await yard.put(create("conv_bad", ConversationType.GROUP, "B\0"), "conv_bad")
        await yard.put(create("conv_pair", ConversationType.ONE_TO_ONE, "Us"), "conv_pair")
        outcomes = await yard.next_down(records.CommandOutcome, 3)
        first = await conversation(yard, "conv_g")
        await yard.decided("conv_g", "ann", records.Rename(""), "n1")
        second = await conversation(yard, "conv_g")
        created, renamed = [codec.decode_system_event(m["content"]) for m in await yard.log("conv_g")]
    assert sorted(str(outcome.code) for outcome in outcomes) == ["None", "validation_failed", "validation_failed"]
    assert (first["title"], created.title, renamed.title) == ("Boat", "Boat", "")
    assert "title" not in second


async def test_the_members_hear_what_their_conversation_became(yard: Yard) -> None:
    await yard.connect("ann", "bob", "cat")
    async with run_lane(yard):
        pair = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        group = await group_of(yard, "ann", "bob")
        await yard.decided(group, "ann", records.Rename("Boat"), "n1")
        await yard.add(group, "ann", "cat", request="a1")
        await yard.next_down(records.CommandOutcome, 1)
        await yard.decided(group, "ann", records.Ban("bob"), "b1")
        await yard.decided(group, "ann", records.Ban("eve"), "b2")
        await eventually(lambda: settled(yard))
        await yard.said(group, "ann", "k1")
    heard = [
        (users, str(payload.event), payload.conversation_id, payload.version, payload.conversation.participants)
        for users, payload in yard.updates
    ]
    assert heard == [
        (["ann", "bob"], "created", pair, 0, ["ann", "bob"]),
        (["ann", "bob"], "created", group, 1, ["ann", "bob"]),
        (["ann", "bob"], "updated", group, 2, ["ann", "bob"]),
        (["cat"], "created", group, 3, ["ann", "bob", "cat"]),
        (["ann", "bob"], "updated", group, 3, ["ann", "bob", "cat"]),
        (["bob"], "removed", group, 4, ["ann", "cat"]),
        (["ann", "cat"], "updated", group, 4, ["ann", "cat"]),
    ]
    assert {payload.conversation.title for _, payload in yard.updates[2:]} == {"Boat"}


# --- members' settings -----------------------------------------------------------------------------------------------


async def test_who_is_blocked_is_refused_both_ways_until_it_ends(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.next_down(records.CommandOutcome, 1)
        target = await yard.said(conv, "ann", "k1")
        await yard.block("bob", "ann")
        await yard.send(conv, "ann", "k2")
        await yard.send(conv, "bob", "k3")
        await yard.send(conv, "ann", "k1")
        refused = [answer["payload"] for answer in await yard.acks(3)]
    async with run_lane(yard):  # the next owner knows it from the store
        edit = await yard.changed(conv, "ann", "e1", target, records.Edit("x"))
        reaction = await yard.changed(conv, "bob", "r1", target, records.React("x", add=True))
        deletion = await yard.changed(conv, "ann", "d1", target, records.Delete(for_all=True))
        vanishing = await yard.decided(conv, "ann", records.SetDisappearing(60), "vanish")
        await yard.block("bob", "ann", blocks=False)
        await yard.said(conv, "ann", "k4")
        await eventually(lambda: settled(yard))
        stored = await yard.log(conv)
    assert [answer.get("code") for answer in refused] == ["blocked", "blocked", None]
    assert refused[2]["duplicate"] is True, "what had its ack keeps it"
    assert [edit["code"], reaction["code"], vanishing] == ["blocked"] * 3
    assert deletion["sequence_number"] == 2
    assert [m["sequence_number"] for m in stored] == [1, 2, 3], "settings are no entries"


async def test_the_account_of_somebody_who_is_not_there_means_nothing(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.hide("eve", conv, "conv_nowhere")
        await yard.said(conv, "ann", "k1")
        await eventually(lambda: settled(yard))
    assert await yard.store.db["memberships"].find_one({"_id": f"{conv}:eve"}) is None


async def test_who_hides_what_they_read_has_got_it_for_all_that_others_know(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        await yard.hide("bob", conv)
        target = await yard.said(conv, "ann", "k1")
        await yard.read(target, "bob")
        await eventually(lambda: settled(yard))
        await yard.send(conv, "ann", "k1")
        (ack,) = await yard.acks(1)
        hidden = (await yard.seen("ann", conv))[target].status
        await yard.hide("bob", conv, hides=False)
        await eventually(lambda: settled(yard))
        later = (await yard.seen("ann", conv))[target].status
    assert (ack["payload"]["status"], hidden, later) == ("delivered", MessageStatus.DELIVERED, MessageStatus.DELIVERED)


async def test_who_joins_hides_what_they_read_as_their_account_says(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Created, added, and folded after a crash: the account's word holds from the first message on."""
    for user_id in ("bob", "cat"):
        await yard.hide(user_id)
    async with run_lane(yard):
        pair = await yard.create("ann", "bob")
        group = await yard.create("ann", "bob", kind=ConversationType.GROUP)
        await yard.add(group, "ann", "cat", "dan", request="a1")
        await yard.next_down(records.CommandOutcome, 3)
        for name, reader in ((pair, "bob"), (group, "bob"), (group, "cat")):
            await yard.read(await yard.said(name, "ann", f"k-{name}-{reader}"), reader)
        await eventually(lambda: settled(yard))
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    other = await yard.create("dan", "cat", kind=ConversationType.GROUP)
    with monkeypatch.context() as patched:
        patched.setattr(yard.store.conversations, "apply", never)
        async with crashing_lane(yard):
            with anyio.fail_after(5):
                await reached.wait()
    async with run_lane(yard):
        await yard.next_down(records.CommandOutcome, 1)
        await yard.read(await yard.said(other, "dan", "k9"), "cat")
        await eventually(lambda: settled(yard))
    stays = await yard.store.db["memberships"].find({"shown_read_seq": {"$exists": True}}).to_list()
    assert {(stay["conversation_id"], stay["user_id"]): stay["shown_read_seq"] for stay in stays} == {
        (pair, "bob"): 0,
        (group, "bob"): 0,
        (group, "cat"): 1,
        (other, "cat"): 0,
    }
    assert all(stay["read_seq"] > stay["shown_read_seq"] for stay in stays)


async def test_a_change_of_a_message_is_no_activity_to_order_conversations_by(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        target = await yard.said(conv, "ann", "k1")
        sent_at = (await yard.stored(target))["created_at"]
        await anyio.sleep(0.002)
        await yard.changed(conv, "bob", "h1", target, records.Delete(for_all=False))

    async def flushed(sequence: int) -> bool:
        last: int = (await conversation(yard, conv))["last_sequence_number"]
        return last == sequence

    await eventually(lambda: flushed(2))
    first = (await conversation(yard, conv))["last_message_at"]
    async with run_lane(yard):
        await yard.changed(conv, "bob", "r1", target, records.Delete(for_all=False))
        await yard.changed(conv, "ann", "r2", target, records.React("x", add=True))
    await eventually(lambda: flushed(3))
    assert first == (await conversation(yard, conv))["last_message_at"] == sent_at


# --- crashes and late owners -----------------------------------------------------------------------------------------


async def test_every_step_without_its_projection_is_repaired_from_the_log(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps committed, none projected, Redis empty: the next owner folds them."""
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob", "cat")
    reached = anyio.Event()

    async def never(*_: object) -> None:
        reached.set()
        await anyio.sleep_forever()

    steps: list[Any] = [
        records.Rename("Boat"),
        records.SetDisappearing(60),
        records.SetRole("bob", Role.ADMIN),
        records.Silence("bob", FAR),
        records.Ban("cat"),
    ]
    for number, step in enumerate(steps):
        await yard.command(group, "ann", step, f"s{number}")
    with monkeypatch.context() as patched:
        patched.setattr(yard.store.conversations, "apply", never)
        async with crashing_lane(yard):
            with anyio.fail_after(5):
                await reached.wait()
    before = await conversation(yard, group)
    await yard.broker.client.flushall()
    await yard.open()
    async with run_lane(yard):
        await yard.send(group, "bob", "k1")
        (muted,) = await yard.acks(1)
        shown = await yard.said(group, "ann", "k2")
        document = await conversation(yard, group)
        bob, cat = await membership(yard, group, "bob"), await membership(yard, group, "cat")
        message = await yard.stored(shown)
    assert before["membership_seq"] == 1
    assert muted["payload"]["code"] == "muted"
    wanted = {"title": "Boat", "disappearing_seconds": 60, "banned": ["cat"], "membership_seq": 6}
    assert wanted.items() <= document.items()
    assert document["participants"] == ["ann", "bob"]
    assert (bob["role"], cat["leave_seq"]) == ("admin", 6)
    assert int(bob["silenced_until"].timestamp() * 1000) == FAR
    assert (message["expires_at"] - message["created_at"]).total_seconds() == 60


async def test_an_owner_that_comes_too_late_brings_nobody_back(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two owners: the first is held up before it writes a stay that the second has ended meanwhile."""
    async with run_lane(yard):
        group = await group_of(yard, "ann", "bob")
    apply = yard.store.conversations.apply
    reached, go_on = anyio.Event(), anyio.Event()

    async def held_up(projected: Any) -> None:
        if not reached.is_set():
            reached.set()
            await go_on.wait()
        await apply(projected)

    monkeypatch.setattr(yard.store.conversations, "apply", held_up)
    async with run_lane(yard) as late:
        await yard.add(group, "ann", "cat", request="a1")
        with anyio.fail_after(5):
            await reached.wait()
        await lose_its_lease(late)
        async with run_lane(yard):
            await yard.command(group, "ann", records.Ban("cat"), "b1")
            outcomes = await yard.next_down(records.CommandOutcome, 2)
            go_on.set()
            await eventually(lambda: settled(yard))
    assert [outcome.code for outcome in outcomes] == [None, None]
    assert (await membership(yard, group, "cat"))["leave_seq"] == 3
    document = await conversation(yard, group)
    assert (document["participants"], document["banned"]) == (["ann", "bob"], ["cat"])
    assert msgspec.json.decode(outcomes[-1].body)["participants"] == ["ann", "bob"]
