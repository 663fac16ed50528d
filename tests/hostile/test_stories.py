"""W-61 to W-84, the rows with a story: what a session may do with conversations, its own and those of others."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
import trio
import trio_websocket
from msgspec import UNSET

from bench.http_api import Refusal
from protocol import codec, frames, keys
from protocol.errors import CloseCode
from protocol.limits import Limits
from protocol.models import GROUP_LIMIT
from tests.gateway.peers import CLOSE, PING, PONG, TEXT, frame
from tests.hostile.answers import answer
from tests.hostile.rows import BOTH, PATIENT, Row, by_row, judge
from tests.system.crowd import eventually, message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.scene import Scene
    from tests.system.crowd import Talker
    from tests.system.house import House

pytestmark = pytest.mark.trio

# --- W-61 to W-66: ranges and keys -----------------------------------------------------------------------------------


async def logged(scene: Scene, count: int) -> tuple[str, str]:
    """A conversation of two with so many messages, and its first member, who sent them."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    async with scene.talk(transport=PATIENT) as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for number in range(count):
            await talk.send(message(conversation_id, f"k{number}"))
        for _ in range(count):
            await talk.expect(frames.MessageAck)
    return conversation_id, user_id


async def ranges(scene: Scene, user_id: str, *wanted: tuple[str, int, int]) -> list[Any]:
    """The answer to each range: the numbers in it and what it accounts for, or the whole error."""
    got: list[Any] = []
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for name, first, last in wanted:
            await talk.send(frames.Retransmit(conversation_id=name, from_sequence=first, to_sequence=last))
            while True:
                frame = await talk.receive()
                if isinstance(frame, frames.Error):
                    told = msgspec.structs.replace(frame.payload, conversation_id=UNSET)
                    got.append(msgspec.json.encode(told))
                    break
                if isinstance(frame, frames.Messages) and frame.payload.origin == "retransmit":
                    numbers = [stored.sequence_number for stored in frame.payload.messages]
                    body = frame.payload
                    got.append((numbers, body.from_sequence, body.to_sequence, body.expired_through, body.has_more))
                    break
    return got


async def below_the_floor(scene: Scene) -> tuple[list[int], object]:
    """The first 3 of 5 messages have expired."""
    conversation_id, user_id = await logged(scene, 5)
    with scene.house.database() as database:
        database["messages"].delete_many({"conversation_id": conversation_id, "sequence_number": {"$lte": 3}})
    ((numbers, _, _, expired_through, _),) = await ranges(scene, user_id, (conversation_id, 1, 5))
    return numbers, expired_through


async def above_the_end(scene: Scene) -> list[int]:
    conversation_id, user_id = await logged(scene, 3)
    ((numbers, *_),) = await ranges(scene, user_id, (conversation_id, 2, 400))
    return list(numbers)


async def foreign_or_unknown(scene: Scene) -> tuple[int, str]:
    """(How many different answers, the code)."""
    conversation_id, _ = await logged(scene, 1)
    stranger = await scene.people.user()
    got = await ranges(scene, stranger, (conversation_id, 1, 2), ("conv_" + "0" * 28, 1, 2))
    return len(set(got)), json.loads(got[0])["code"]


async def a_billion(scene: Scene) -> tuple[int, object, object]:
    """Of 520 messages: (how many come, through where, is there more)."""
    conversation_id, user_id = await logged(scene, 520)
    ((numbers, _, last, _, more),) = await ranges(scene, user_id, (conversation_id, 1, 1_000_000_000))
    return len(numbers), last, more


async def thousand_times(scene: Scene) -> tuple[int, int, int]:
    """One key, a thousand times, over every gateway: (documents, different acks, how many say duplicate)."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    acks: list[frames.MessageAckPayload] = []
    sent = message(conversation_id, "k")

    async def repeat(transport: str, device_id: str, count: int) -> None:
        token = await scene.people.api.create_token(user_id, device_id)
        async with scene.talk(transport=transport) as talk:
            await talk.log_in(user_id, token, device_id)
            for _ in range(count):
                await talk.send(sent)
            acks.extend([(await talk.expect(frames.MessageAck)).payload for _ in range(count)])

    async with trio.open_nursery() as nursery:
        for transport, count in REPEATS.items():
            nursery.start_soon(repeat, transport, f"on-{transport}", count)
    places = {(ack.message_id, ack.sequence_number) for ack in acks}
    return (
        len(scene.house.sequences(conversation_id)),
        len(places),
        len(acks) - sum(ack.duplicate is True for ack in acks),
    )


REPEATS: Final = {"epoll": 60, "trio-websocket": 60, PATIENT: 880}
"""A user's burst is 60."""


async def same_key(scene: Scene) -> tuple[list[str | int], list[int], list[int]]:
    """Another payload, then another conversation: (answers, what is stored here and there)."""
    user_id, others = await scene.people.user(), [await scene.people.user() for _ in range(2)]
    here, there = [await scene.people.direct(user_id, other) for other in others]
    got: list[str | int] = []
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for name, content in ((here, "one"), (here, "two"), (there, "one")):
            await talk.send(message(name, "k", content))
            got.append(await answer(talk, scene))
    return got, scene.house.sequences(here), scene.house.sequences(there)


async def key_of_another(scene: Scene) -> tuple[list[str | int], list[int]]:
    users = [await scene.people.user() for _ in range(2)]
    conversation_id = await scene.people.direct(*users)
    got: list[str | int] = []
    for user_id in users:
        async with scene.talk() as talk:
            await talk.log_in(user_id, scene.people.tokens[user_id])
            await talk.send(message(conversation_id, "k", f"of {user_id}"))
            got.append(await answer(talk, scene))
    return got, scene.house.sequences(conversation_id)


# --- W-70 to W-73: who may say what where -----------------------------------------------------------------------------


async def addressed(scene: Scene) -> list[str | int]:
    """In a pair to a third; in a group to somebody; in a pair to the other."""
    users = [await scene.people.user() for _ in range(3)]
    pair = await scene.people.direct(*users[:2])
    group = await scene.people.api.create_conversation("group", users[:2], scene.people.tokens[users[0]])
    got: list[str | int] = []
    async with scene.talk() as talk:
        await talk.log_in(users[0], scene.people.tokens[users[0]])
        for name, receiver_id in ((pair, users[2]), (group, users[1]), (group, users[2]), (pair, users[1])):
            await talk.send(message(name, f"k{len(got)}", receiver_id=receiver_id))
            got.append(await answer(talk, scene))
    return got


async def others_conversation(scene: Scene) -> tuple[list[str], bool, dict[str, Any], list[int]]:
    """Everything a stranger can say about it: (codes, are they as for an unknown one, what sync shows, the log)."""
    conversation_id, author = await logged(scene, 1)
    await eventually(lambda: marks(scene, conversation_id, author) == (1, 1), "the author's own marks")
    with scene.house.database() as database:
        message_id = database["messages"].find_one({"conversation_id": conversation_id})["_id"]
        before = list(database["memberships"].find({"conversation_id": conversation_id}))
    stranger = await scene.people.user()
    told: list[list[bytes]] = []
    async with scene.talk() as talk:
        await talk.log_in(stranger, scene.people.tokens[stranger])
        for name in (conversation_id, "conv_" + "0" * 28):
            errors = []
            history = frames.HistoryPayload(conversation_id=name, before_sequence=9)
            for asking in (
                message(name, "k"),
                frames.Retransmit(conversation_id=name, from_sequence=1, to_sequence=9),
                frames.History(payload=history),
            ):
                await talk.send(asking)
                error: frames.Error = await talk.expect(frames.Error)
                errors.append(msgspec.json.encode(msgspec.structs.replace(error.payload, conversation_id=UNSET)))
            told.append(errors)
            typing = frames.TypingPayload(conversation_id=name, state=frames.TypingState.START)
            await talk.send(frames.Typing(payload=typing))
        await talk.send(frames.DeliveryAck(message_id=message_id, timestamp=1))
        await talk.send(frames.ReadReceipt(message_ids=[message_id], timestamp=1))
        await talk.send(frames.Sync(payload=frames.SyncPayload(cursors={conversation_id: 0})))
        complete: frames.SyncComplete = await talk.expect(frames.SyncComplete)
    await trio.sleep(0.5)  # receipts and typing are told within 100 ms
    with scene.house.database() as database:
        assert list(database["memberships"].find({"conversation_id": conversation_id})) == before
    codes = [json.loads(error)["code"] for error in told[0]]
    return codes, told[0] == told[1], complete.payload.heads, scene.house.sequences(conversation_id)


async def timed(scene: Scene) -> bool:
    """Do refusals for a foreign and for an unknown conversation take as long, in turns?"""
    conversation_id, _ = await logged(scene, 1)
    stranger = await scene.people.user()
    times: dict[str, list[float]] = {conversation_id: [], "conv_" + "0" * 28: []}
    async with scene.talk(transport=PATIENT) as talk:
        await talk.log_in(stranger, scene.people.tokens[stranger])
        for number in range(25):
            for name, taken in times.items():
                began = trio.current_time()
                await talk.send(message(name, f"k{number}"))
                await talk.expect(frames.Error)
                taken.append(trio.current_time() - began)
    foreign, unknown = (statistics.median(taken) for taken in times.values())
    return max(foreign, unknown) < 1.5 * min(foreign, unknown) + 0.002


async def removed(scene: Scene) -> tuple[str | int, list[int], int]:
    """(The answer to a message after the removal, the numbers pushed to the removed device, the removal's)."""
    conversation_id, users = await scene.people.group(3)
    owner, leaver = users[0], users[2]
    async with scene.talk() as talk, scene.talk() as other:
        await talk.log_in(leaver, scene.people.tokens[leaver])
        await other.log_in(owner, scene.people.tokens[owner])
        assert await scene.people.api.remove_participant(conversation_id, leaver, scene.people.tokens[owner]) is None
        await other.send(message(conversation_id, "k1", "not for everybody"))
        await other.expect(frames.MessageAck)
        end = scene.house.sequences(conversation_id)[-2]
        await talk.send(message(conversation_id, "k2"))
        await talk.send(frames.Retransmit(conversation_id=conversation_id, from_sequence=1, to_sequence=9))
        await talk.send(frames.Heartbeat(timestamp=1))
        numbers: set[int] = set()
        codes: list[str] = []
        while len(codes) < 1 or not numbers:
            told = await talk.receive()
            if isinstance(told, frames.Messages):
                numbers |= {stored.sequence_number for stored in told.payload.messages}
            elif isinstance(told, frames.Error):
                codes.append(told.payload.code.value)
    return codes[0], sorted(number for number in numbers if number > end), end


async def foreign_reply(scene: Scene) -> tuple[str | int, list[int]]:
    users = [await scene.people.user() for _ in range(3)]
    here, there = [await scene.people.direct(users[0], other) for other in users[1:]]
    async with scene.talk() as talk:
        await talk.log_in(users[0], scene.people.tokens[users[0]])
        await talk.send(message(there, "k1"))
        ack: frames.MessageAck = await talk.expect(frames.MessageAck)
        await talk.send(message(here, "k2", reply_to_message_id=ack.payload.message_id))
        return await answer(talk, scene), scene.house.sequences(here)


# --- W-76, W-77: receipts ---------------------------------------------------------------------------------------------


def marks(scene: Scene, conversation_id: str, user_id: str) -> tuple[int, int]:
    """(delivered, read) as stored."""
    with scene.house.database() as database:
        found = database["memberships"].find_one({"conversation_id": conversation_id, "user_id": user_id})
    return found["delivered_seq"], found["read_seq"]


async def receipts(scene: Scene) -> tuple[str | int, list[tuple[int, int]], bool]:
    """501 ids; then none, foreign and unknown ones, ones of two conversations together.

    (The answer to 501, where the two own conversations stand, did the foreign one stay as it was).
    """
    reader = await scene.people.user()
    own = []
    ids = []
    async with scene.talk(transport=PATIENT) as talk:
        for _ in range(2):
            author = await scene.people.user()
            own.append(await scene.people.direct(reader, author))
            async with scene.talk() as writing:
                await writing.log_in(author, scene.people.tokens[author])
                await writing.send(message(own[-1], "k"))
                ids.append((await writing.expect(frames.MessageAck)).payload.message_id)
        foreign, sender = await logged(scene, 1)
        theirs = {"conversation_id": foreign, "user_id": {"$ne": sender}}  # whose own marks are flushed a second later
        with scene.house.database() as database:
            secret = database["messages"].find_one({"conversation_id": foreign})["_id"]
            before = list(database["memberships"].find(theirs))
        await talk.log_in(reader, scene.people.tokens[reader])
        await talk.send_bytes(
            codec.JSON.encode({"type": "read_receipt", "message_ids": [ids[0]] * 501, "timestamp": 1})
        )
        refused = await answer(talk, scene)
        for several in ([], [secret], ["msg_nobody", "$where"], [*ids, secret]):
            await talk.send(frames.ReadReceipt(message_ids=several, timestamp=1))
        await eventually(lambda: [marks(scene, name, reader) for name in own] == [(1, 1), (1, 1)], "read")
        with scene.house.database() as database:
            unmoved = list(database["memberships"].find(theirs)) == before
        return refused, [marks(scene, name, reader) for name in own], unmoved


async def never_pushed(scene: Scene) -> tuple[str | int, tuple[int, int]]:
    """Acks of messages that are not there yet: (the session lives, where the marks stand)."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for message_id in ("msg_nobody", "msg_" + "f" * 30, keys.new_message_id(2**42, 1, 3)):
            await talk.send(
                frames.DeliveryAck(
                    message_id=message_id, timestamp=1, conversation_id=conversation_id, sequence_number=99
                )
            )
        await talk.send(frames.Heartbeat(timestamp=1))
        alive = await answer(talk, scene)
    await trio.sleep(0.5)  # receipts are flushed within 250 ms
    return alive, marks(scene, conversation_id, user_id)


# --- W-78 to W-80: too much -------------------------------------------------------------------------------------------


async def too_fast(scene: Scene) -> tuple[set[str], bool, bool, str | int]:
    """(Codes of the refusals, were 60 taken, are all told how long, one of their keys a second later)."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        refusals: list[frames.ErrorPayload] = []
        acks = 0
        for number in range(90):
            await talk.send(message(conversation_id, f"k{number}"))
        while acks + len(refusals) < 90:
            told = await talk.receive()
            if isinstance(told, frames.MessageAck):
                acks += 1
            elif isinstance(told, frames.Error):
                refusals.append(told.payload)
        codes = {refused.code.value for refused in refusals}
        waits = [refused.retry_after_ms for refused in refusals]
        key = refusals[0].idempotency_key
        await trio.sleep(1.0)
        await talk.send(message(conversation_id, str(key)))
        last = await answer(talk, scene)
    return codes, 60 <= acks < 90, all(isinstance(wait, int) and 0 < wait <= 1000 for wait in waits), last


async def much_too_fast(scene: Scene) -> str | int:
    """More than a hundred refusals within a minute."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for number in range(260):
            try:
                await talk.send(message(conversation_id, f"k{number}"))
            except trio_websocket.ConnectionClosed:
                break
        return await talk.close_code()


async def bad_without_end(scene: Scene) -> tuple[int, int]:
    """(Errors told, close code)."""
    user_id = await scene.people.user()
    peer = await scene.enter(user_id)
    await peer.send(frame(TEXT, b"{") * 10)
    errors = 0
    while True:
        opcode, payload = await peer.receive()
        if opcode == CLOSE:
            return errors, int.from_bytes(payload[:2])
        errors += b'"error"' in payload


async def full_window(scene: Scene) -> tuple[int, bool, int]:
    """Nobody acknowledges: (messages taken of 40, is a ping answered, messages stored once somebody does)."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    peer = await scene.enter(user_id)
    scene.house.pause("worker-1")
    scene.house.pause("worker-2")
    try:
        sent = b"".join(frame(TEXT, codec.JSON.encode(message(conversation_id, f"k{number}"))) for number in range(40))
        await peer.send(sent + frame(PING, b"there?"))
        opcode, _ = await peer.receive()
        await trio.sleep(0.3)
        taken = await scene.metric("gateway_in_flight")
    finally:
        scene.house.resume("worker-1")
        scene.house.resume("worker-2")
    await eventually(lambda: len(scene.house.sequences(conversation_id)) == 40, "stored")
    return taken, opcode == PONG, len(scene.house.sequences(conversation_id))


async def chatter(scene: Scene) -> tuple[int, int, int]:
    """(Heartbeats answered of 5, times the other heard of 10 that one is typing, strangers whose presence is told)."""
    user_id, other, stranger = [await scene.people.user() for _ in range(3)]
    conversation_id = await scene.people.direct(user_id, other)
    async with scene.talk() as talk, scene.talk() as listening:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        await listening.log_in(other, scene.people.tokens[other])
        await talk.send(frames.PresenceSubscribe(payload=frames.PeoplePayload(user_ids=[stranger])))
        start = frames.TypingPayload(conversation_id=conversation_id, state=frames.TypingState.START)
        for _ in range(10):
            await talk.send(frames.Typing(payload=start))
        for _ in range(5):
            await talk.send(frames.Heartbeat(timestamp=1))
        own: list[object] = []
        heard: list[object] = []
        with trio.move_on_after(1.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(collect, talk, own)
                nursery.start_soon(collect, listening, heard)
    beats = sum(isinstance(told, frames.HeartbeatAck) for told in own)
    typing = sum(isinstance(told, frames.TypingNotice) for told in heard)
    return beats, typing, sum(isinstance(told, frames.PresenceNotice) for told in own)


async def collect(talk: Talker, into: list[object]) -> None:
    while True:
        into.append(await talk.receive())


# --- W-81 to W-84: groups and blocks ----------------------------------------------------------------------------------


async def groups(scene: Scene) -> tuple[str, int, str, str]:
    """(101 members, how many of 3 with two twins, only oneself, somebody unknown)."""
    users = [await scene.people.user() for _ in range(3)]
    token = scene.people.tokens[users[0]]

    async def create(participants: list[str]) -> dict[str, Any] | Refusal:
        body = {"type": "group", "participants": participants}
        return await scene.people.api.call("POST", "/v1/conversations", token, body)

    def code(answered: dict[str, Any] | Refusal) -> str:
        return answered.code.value if isinstance(answered, Refusal) else "made"

    twins = await create([*users, *users])
    assert isinstance(twins, dict)
    crowd = [users[0], *(f"usr_{number:028}" for number in range(100))]
    return (
        code(await create(crowd)),
        len(twins["participants"]),
        code(await create(users[:1])),
        code(await create(["usr_" + "0" * 28])),
    )


async def two_at_99(scene: Scene) -> tuple[list[str], int]:
    """(What became of the two, members)."""
    conversation_id, users = await scene.people.group(99)
    token = scene.people.tokens[users[0]]
    late = [await scene.people.user() for _ in range(2)]
    got: list[str] = []

    async def add(user_id: str) -> None:
        refusal = await scene.people.api.add_participants(conversation_id, [user_id], token)
        got.append("in" if refusal is None else refusal.code.value)

    async with trio.open_nursery() as nursery:
        for user_id in late:
            nursery.start_soon(add, user_id)
    return sorted(got), len((await scene.people.api.overview(conversation_id, token))["participants"])


async def all_away(scene: Scene) -> tuple[str | int, bool]:
    """(The answer, is every inbox bounded and none empty)."""
    conversation_id, users = await scene.people.group(GROUP_LIMIT)
    async with scene.talk() as talk:
        await talk.log_in(users[0], scene.people.tokens[users[0]])
        await talk.send(message(conversation_id, "k"))
        sent = await answer(talk, scene)
    with scene.house.redis() as client:

        def lengths() -> list[int]:
            return [int(str(client.llen(keys.inbox(user_id)))) for user_id in users[1:]]

        await eventually(lambda: min(lengths()) > 0, "in every inbox")
        return sent, max(lengths()) <= keys.INBOX_LIMIT


async def blocked(scene: Scene) -> tuple[str | int, list[int]]:
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    assert (await scene.ask("PUT", f"/v1/blocks/{user_id}", scene.people.tokens[other])).status_code in (200, 204)
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        got: str | int = "ack"
        for number in range(20):  # owners hear of a block within moments
            await talk.send(message(conversation_id, f"k{number}"))
            got = await answer(talk, scene)
            if got != "ack":
                break
            await trio.sleep(0.1)
    return got, scene.house.sequences(conversation_id)[:0]


NOT_FOUND: Final = "conversation_not_found"
VALIDATION: Final = "validation_failed"
ROWS: Final = [
    Row("W-61", "a range below the floor", ([4, 5], 3), below_the_floor),
    Row("W-61", "a range above the end", [2, 3], above_the_end),
    Row("W-61", "ranges of a foreign and of an unknown conversation", (1, NOT_FOUND), foreign_or_unknown),
    Row("W-62", "a range of a billion", (500, 500, True), a_billion),
    Row("W-64", "one message a thousand times over three gateways", (1, 1, 1), thousand_times),
    Row(
        "W-65",
        "one key: another payload, another conversation",
        (["ack", "idempotency_conflict", "ack"], [1], [1]),
        same_key,
    ),
    Row("W-66", "another user's key", (["ack", "ack"], [1, 2]), key_of_another),
    Row("W-70", "receivers who are not the other", [VALIDATION, VALIDATION, VALIDATION, "ack"], addressed),
    Row(
        "W-71",
        "all one can say about a foreign conversation",
        ([NOT_FOUND] * 3, True, {}, [1]),
        others_conversation,
        BOTH,
    ),
    Row(
        "W-71", "the time of a refusal", True, timed, because="within a half of each other and 2 ms: machines are busy"
    ),
    Row(
        "W-72",
        "messages and ranges of a removed member",
        (NOT_FOUND, [], 2),
        removed,
        because="a removed member learns no more than a stranger: the same code, the same words",
    ),
    Row("W-73", "a reply to a message of another conversation", (VALIDATION, []), foreign_reply),
    Row(
        "W-76", "receipts: 501 ids, none, foreign, of two conversations", (VALIDATION, [(1, 1), (1, 1)], True), receipts
    ),
    Row("W-77", "acks of messages that were never pushed", ("heartbeat_ack", (0, 0)), never_pushed),
    Row("W-78", "90 messages at once", ({"rate_limited"}, True, True, "ack"), too_fast),
    Row("W-78", "over a hundred refusals", int(CloseCode.RATE), much_too_fast),
    Row("W-78", "ten bad frames", (10, int(CloseCode.BAD_FRAME)), bad_without_end, BOTH),
    Row("W-79", "40 messages that nobody acknowledges", (Limits().window, True, 40), full_window, BOTH),
    Row(
        "W-80",
        "heartbeats, typing, strangers' presence",
        (5, 1, 0),
        chatter,
        because="protocol.md: every heartbeat is answered; what is capped are the control frames of WebSocket",
    ),
    Row(
        "W-81",
        "groups of 101, with twins, of oneself, with nobody",
        ("group_full", 3, "made", VALIDATION),
        groups,
        because="a group may begin with its owner alone",
    ),
    Row("W-82", "two are added at once to 99", (["group_full", "in"], GROUP_LIMIT), two_at_99),
    Row("W-83", "a message to a hundred who are all away", ("ack", True), all_away),
    Row(
        "W-84",
        "a message to somebody who blocks one",
        ("blocked", []),
        blocked,
        because="`blocked` says what to do about it; it is 403 over HTTP",
    ),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
