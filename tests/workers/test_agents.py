"""Agents at work, on real servers: asked once, in order, within their bounds, answered for once, whatever dies."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import keys, records
from protocol.models import Agent, AgentKind, AgentStatus, ConversationType
from tests.workers.lanes import eventually, run_lane
from workers import events
from workers.agents import role
from workers.agents.classes import BUILT_IN
from workers.agents.routing import Router

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from protocol.events import MessageReceivedEvent
    from tests.workers.lanes import Yard
    from workers.agents.classes import Context
    from workers.settings import Settings
    from workers.store.agent_tasks import Task

pytestmark = pytest.mark.anyio

AGENT = "agt_1"


class Scripted:
    """An agent that does what a test says, and remembers who asked."""

    asked: list[MessageReceivedEvent]
    at_work = 0
    most = 0
    hold: anyio.Event
    answers: Any

    @classmethod
    def reset(cls) -> None:
        cls.asked = []
        cls.at_work = cls.most = 0
        cls.hold = anyio.Event()
        cls.hold.set()
        cls.answers = lambda event: f"re: {event.content}"

    async def reply(self, event: MessageReceivedEvent, context: Context) -> str | None:
        kind = type(self)
        kind.asked.append(event)
        kind.at_work += 1
        kind.most = max(kind.most, kind.at_work)
        try:
            if event.content == "report":
                await context.progress("reading", "page 1")
            await kind.hold.wait()
        finally:
            kind.at_work -= 1
        answer: str | None = kind.answers(event)
        return answer

    @classmethod
    def contents(cls) -> list[str]:
        return [event.content for event in cls.asked]


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted.reset()
    monkeypatch.setitem(BUILT_IN, "scripted", f"{__name__}:Scripted")


async def register(yard: Yard, agent_id: str = AGENT, **fields: Any) -> None:
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "agent_id": agent_id,
        "name": agent_id,
        "description": "",
        "kind": AgentKind.PYTHON,
        "status": AgentStatus.ENABLED,
        "capabilities": [],
        "is_default": False,
        "handler": "scripted",
        "concurrency": 10,
        "timeout_seconds": 30.0,
        "created_at": now,
        "updated_at": now,
    }
    await yard.store.agents.create(Agent(**{**values, **fields}), "")


@asynccontextmanager
async def agents_at_work(
    yard: Yard, settings: Settings, *, events_too: bool = True
) -> AsyncIterator[anyio.CancelScope]:
    """The roles `events` and `agents`; the scope cuts the latter off where it stands, as by kill -9."""
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        if events_too:
            group.start_soon(events.run, settings, yard.store, yard.broker, stopping)
        async with anyio.create_task_group() as mortal:
            mortal.start_soon(role.run, settings, yard.store, yard.broker, stopping)
            yield mortal.cancel_scope
            stopping.set()


async def talk_of(yard: Yard, user_id: str = "ann", agent_id: str = AGENT, **fields: Any) -> str:
    conversation_id = keys.direct_conversation_id(user_id, agent_id)
    record = records.CreateConversation(
        "gw-test", "create", "create", conversation_id, ConversationType.ONE_TO_ONE, user_id, [user_id, agent_id],
        agent_id, "", **fields,
    )  # fmt: skip
    await yard.put(record, conversation_id)
    return conversation_id


async def said_in(yard: Yard, conversation_id: str) -> list[tuple[str, str]]:
    return [(entry["sender_id"], entry["content"]) for entry in await yard.log(conversation_id)]


async def has(yard: Yard, conversation_id: str, entries: int) -> bool:
    return len(await yard.log(conversation_id)) >= entries


async def all_done(yard: Yard, tasks: int) -> bool:
    return await yard.store.db["agent_tasks"].count_documents({"status": {"$ne": "waiting"}}) == tasks


async def test_a_question_is_answered_once_under_a_key_of_its_own(yard: Yard, settings: Settings) -> None:
    await register(yard)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        asked = await yard.said(conv, "ann", "k1", "what time is it")
        await eventually(lambda: has(yard, conv, 2))
        await yard.said(conv, "ann", "k1", "what time is it")  # a repeat asks nobody
        await eventually(lambda: all_done(yard, 1))
    question, answer = await yard.log(conv)
    assert (answer["sender_id"], answer["content"]) == (AGENT, "re: what time is it")
    assert answer["idempotency_key"] == f"reply:{asked}"
    assert Scripted.contents() == ["what time is it"]
    (event,) = Scripted.asked
    assert (event.message_id, event.sender_id, event.receiver_id) == (question["_id"], "ann", AGENT)
    (task,) = [task async for task in yard.store.db["agent_tasks"].find()]
    assert (task["status"], "event" in task) == ("done", False)


async def test_the_answer_comes_within_a_moment(yard: Yard, settings: Settings) -> None:
    await register(yard)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k0", "warm up")
        await eventually(lambda: has(yard, conv, 2))
        began = anyio.current_time()
        await yard.said(conv, "ann", "k1", "now")
        while len(Scripted.asked) < 2:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.002)
        assert anyio.current_time() - began < 1.0, "not by the sweep"


async def test_messages_of_a_conversation_are_asked_in_its_order_and_one_at_a_time(
    yard: Yard, settings: Settings
) -> None:
    await register(yard)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        Scripted.hold = anyio.Event()
        for number in range(8):
            await yard.send(conv, "ann", f"k{number}", f"{number}")
        await yard.acks(8)
        await eventually(lambda: _asked(1))
        await anyio.sleep(0.3)
        assert Scripted.contents() == ["0"]
        Scripted.hold.set()
        await eventually(lambda: has(yard, conv, 16))
    assert Scripted.contents() == [str(number) for number in range(8)]
    assert Scripted.most == 1


async def test_an_agent_has_no_more_calls_under_way_than_its_bound(yard: Yard, settings: Settings) -> None:
    await register(yard, concurrency=2)
    async with run_lane(yard), agents_at_work(yard, settings):
        rooms = [await talk_of(yard, f"usr_{number}") for number in range(6)]
        Scripted.hold = anyio.Event()
        for number, conv in enumerate(rooms):
            await yard.said(conv, f"usr_{number}", "k1", "hi")
        await eventually(lambda: _asked(2))
        await anyio.sleep(0.3)
        assert len(Scripted.asked) == 2
        Scripted.hold.set()
        for conv in rooms:
            await eventually(lambda conv=conv: has(yard, conv, 2))  # type: ignore[misc]
    assert Scripted.most == 2


async def test_a_bot_on_a_websocket_answers_by_itself(yard: Yard, settings: Settings) -> None:
    await register(yard, kind=AgentKind.WEBSOCKET, handler=msgspec.UNSET)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        asked = await yard.said(conv, "ann", "k1", "sealed")
        await eventually(lambda: all_done(yard, 1))
        answers = [await yard.said(conv, AGENT, f"reply:{asked}", "opened") for _ in range(2)]
    assert Scripted.asked == []
    assert len(set(answers)) == 1, "said twice, it is the same message"
    assert await said_in(yard, conv) == [("ann", "sealed"), (AGENT, "opened")]


async def test_an_agent_has_no_inbox_since_it_has_its_tasks(yard: Yard, settings: Settings) -> None:
    await register(yard)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: has(yard, conv, 2))
        await eventually(lambda: _in_inbox(yard, "ann"))
    assert await yard.broker.read_inbox(AGENT, 10) == []


async def _in_inbox(yard: Yard, user_id: str) -> bool:
    return len(await yard.broker.read_inbox(user_id, 10)) == 1


async def _asked(number: int) -> bool:
    return len(Scripted.asked) >= number


# --- who dies --------------------------------------------------------------------------------------------------------


async def test_an_agents_process_killed_while_it_asks_leaves_one_answer(yard: Yard, settings: Settings) -> None:
    await register(yard)
    async with run_lane(yard):
        conv = await talk_of(yard)
        Scripted.hold = anyio.Event()
        async with agents_at_work(yard, settings) as mortal:
            await yard.said(conv, "ann", "k1", "are you there")
            await eventually(lambda: _asked(1))
            mortal.cancel()
        assert len(await yard.log(conv)) == 1
        Scripted.hold.set()
        await _forget_leases(yard)
        async with agents_at_work(yard, settings):
            await eventually(lambda: all_done(yard, 1), 10)
    assert await said_in(yard, conv) == [("ann", "are you there"), (AGENT, "re: are you there")]
    assert len(Scripted.asked) == 2


async def test_an_agent_that_is_asked_again_and_says_something_else_answers_once(
    yard: Yard, settings: Settings
) -> None:
    """Killed between the answer's commit and its note that the task is done."""
    await register(yard)
    Scripted.answers = lambda _: f"number {len(Scripted.asked)}"
    async with run_lane(yard):
        conv = await talk_of(yard)
        async with agents_at_work(yard, settings):
            await yard.said(conv, "ann", "k1", "how many")
            await eventually(lambda: all_done(yard, 1))
        task = await yard.store.db["agent_tasks"].find_one()
        assert task is not None
        document = (await yard.log(conv))[0]
        (due,) = [await _event_of(yard, document)]
        await yard.store.db["agent_tasks"].update_one(
            {"_id": task["_id"]}, {"$set": {"status": "waiting", "event": due}, "$unset": {"forget_at": ""}}
        )
        await _forget_leases(yard)
        async with agents_at_work(yard, settings):
            await eventually(lambda: all_done(yard, 1), 10)
    assert await said_in(yard, conv) == [("ann", "how many"), (AGENT, "number 1")]
    assert len(Scripted.asked) == 2, "asked again, and not heard again"


async def _event_of(yard: Yard, document: dict[str, Any]) -> dict[str, Any]:
    await yard.store.db["messages"].update_one({"_id": document["_id"]}, {"$set": {"event_due": datetime.now(UTC)}})
    (item,) = await yard.store.events.due(datetime.now(UTC), 10)
    await yard.store.events.confirm([item.message_id])
    event: dict[str, Any] = msgspec.to_builtins(item.event.data, builtin_types=(datetime,))
    return event


async def _forget_leases(yard: Yard) -> None:
    """As if the dead process' leases had ended."""
    names = [keys.agent_lease(partition) for partition in range(keys.AGENT_PARTITIONS)]
    await yard.broker.client.delete(*names)
    for name in await yard.broker.live_instances():
        if name.startswith("agents_"):
            await yard.broker.remove_instance(name)


async def test_a_task_that_redis_lost_is_found(yard: Yard, settings: Settings) -> None:
    await register(yard)
    async with run_lane(yard):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(events.run, settings, yard.store, yard.broker, stopping)
            await eventually(lambda: _tasks(yard, 1))
            stopping.set()
        for partition in range(keys.AGENT_PARTITIONS):
            await yard.broker.client.delete(keys.agent_tasks(partition))
        async with agents_at_work(yard, settings, events_too=False):
            await eventually(lambda: has(yard, conv, 2))


async def _tasks(yard: Yard, number: int) -> bool:
    return await yard.store.db["agent_tasks"].count_documents({}) == number


async def test_an_event_that_comes_twice_asks_once(yard: Yard, settings: Settings) -> None:
    await register(yard)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        asked = await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1))
        await yard.store.db["messages"].update_one({"_id": asked}, {"$set": {"event_due": datetime.now(UTC)}})
        await yard.broker.append_events(await yard.store.events.due(datetime.now(UTC), 10))
        await anyio.sleep(0.5)
    assert len(Scripted.asked) == 1


# --- who is asked ----------------------------------------------------------------------------------------------------


async def test_agents_do_not_answer_each_other(yard: Yard, settings: Settings) -> None:
    await register(yard, "agt_1")
    await register(yard, "agt_2")
    async with run_lane(yard), agents_at_work(yard, settings):
        record = records.CreateConversation(
            "gw-test", "create", "create", "conv_g", ConversationType.GROUP, "ann", ["ann", "agt_1", "agt_2"], "agt_1"
        )
        await yard.put(record, "conv_g")
        await yard.said("conv_g", "ann", "k1", "hello")
        await eventually(lambda: has(yard, "conv_g", 3))
        await yard.said("conv_g", "agt_2", "k1", "so do I")
        await anyio.sleep(0.5)
    assert [event.sender_id for event in Scripted.asked] == ["ann"]
    (answer,) = [entry for entry in await yard.log("conv_g") if entry["sender_id"] == "agt_1"]
    assert answer["reply_to_message_id"] == Scripted.asked[0].message_id


async def test_whoever_is_named_in_a_group_answers(yard: Yard, settings: Settings) -> None:
    await register(yard, "agt_1")
    await register(yard, "agt_2")
    async with run_lane(yard), agents_at_work(yard, settings):
        record = records.CreateConversation(
            "gw-test", "create", "create", "conv_g", ConversationType.GROUP, "ann", ["ann", "bob", "agt_1", "agt_2"],
            "agt_1",
        )  # fmt: skip
        await yard.put(record, "conv_g")
        await yard.said("conv_g", "ann", "k1", "you", receiver_id="agt_2")
        await eventually(lambda: has(yard, "conv_g", 3))
        await yard.send("conv_g", "ann", "k2", "you", receiver_id="bob")
        await yard.send("conv_g", "ann", "k3", "you", receiver_id="agt_3")
        refused = await yard.acks(2)
    assert (await said_in(yard, "conv_g"))[1:] == [("ann", "you"), ("agt_2", "re: you")]
    assert {error["payload"]["code"] for error in refused} == {"validation_failed"}


async def test_the_default_agent_answers_for_one_that_is_disabled(yard: Yard, settings: Settings) -> None:
    await register(yard, status=AgentStatus.DISABLED)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "anybody")
        await eventually(lambda: all_done(yard, 1))
        assert len(await yard.log(conv)) == 1, "nobody answers"
        await register(yard, "agt_default", is_default=True)
        await yard.said(conv, "ann", "k2", "and now")
        await eventually(lambda: has(yard, conv, 3))
    assert (await said_in(yard, conv))[-1] == (AGENT, "re: and now")


async def test_in_plaintext_what_is_said_finds_the_agent_and_elsewhere_nobody_looks(
    yard: Yard, settings: Settings
) -> None:
    await register(yard, "agt_1", capabilities=["chat"])
    await register(yard, "agt_2", capabilities=["weather"])
    members = ["ann", "agt_1", "agt_2"]
    async with run_lane(yard), agents_at_work(yard, settings):
        for name, plaintext in (("conv_plain", True), ("conv_sealed", False)):
            record = records.CreateConversation(
                "gw-test", "create", "create", name, ConversationType.GROUP, "ann", members, "agt_1", "", plaintext
            )
            await yard.put(record, name)
            await yard.said(name, "ann", "k1", "How is the weather?")
            await yard.said(name, "ann", "k2", "Hm")
            await eventually(lambda name=name: has(yard, name, 5))  # type: ignore[misc]
    answers = [entry["sender_id"] for entry in await yard.log("conv_plain") if entry["sender_id"].startswith("agt")]
    assert sorted(answers) == ["agt_1", "agt_2"]
    answers = [entry["sender_id"] for entry in await yard.log("conv_sealed") if entry["sender_id"].startswith("agt")]
    assert answers == ["agt_1", "agt_1"]
    cached = await yard.broker.client.keys("intent:*")
    assert len(cached) == 2, "only what was said in plaintext"
    assert 0 < await yard.broker.client.ttl(cached[0]) <= 3600


# --- what goes wrong -------------------------------------------------------------------------------------------------


async def test_an_agent_that_takes_too_long_is_announced_and_not_asked_again(yard: Yard, settings: Settings) -> None:
    await register(yard, timeout_seconds=0.3)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        Scripted.hold = anyio.Event()
        asked = await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1))
    _, notice = await yard.log(conv)
    assert notice["type"] == "system"
    assert msgspec.json.decode(notice["content"]) == {
        "event": "agent_timeout", "actor": AGENT, "targets": [asked], "version": 1,
    }  # fmt: skip
    (task,) = [task async for task in yard.store.db["agent_tasks"].find()]
    assert (task["status"], task["error"]) == ("failed", "no answer within 0.3 s")
    assert task["event"]["content"] == "hello", "so that somebody can look at it"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"bytes", "the answer is no text but bytes"),
        ("x" * 49_153, "the answer is over 49152 bytes"),
        ("\ud800", "the answer holds a lone surrogate"),
    ],
    ids=["bytes", "too long", "surrogate"],
)
async def test_an_answer_that_cannot_be_said_is_no_answer(
    yard: Yard, settings: Settings, answer: object, error: str
) -> None:
    await register(yard)
    Scripted.answers = lambda _: answer
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1))
    assert "agent_failed" in (await yard.log(conv))[1]["content"]
    (task,) = [task async for task in yard.store.db["agent_tasks"].find()]
    assert task["error"] == error
    assert len(Scripted.asked) == 1


async def test_an_agent_that_raises_is_tried_three_times(yard: Yard, settings: Settings) -> None:
    await register(yard)

    def wrong(_: object) -> str:
        raise ValueError(secrets.token_hex(4))

    Scripted.answers = wrong
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1))
        assert len(Scripted.asked) == 3
        Scripted.answers = lambda _: "better"
        await yard.said(conv, "ann", "k2", "and now")
        await eventually(lambda: has(yard, conv, 4))
    assert (await said_in(yard, conv))[-1] == (AGENT, "better")


async def test_a_task_that_meets_a_bug_fails_alone(
    yard: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await register(yard)
    route = Router.route

    async def trip(router: Router, task: Task) -> Any:
        if task.event.content == "trip":
            raise KeyError("a bug")
        return await route(router, task)

    monkeypatch.setattr(Router, "route", trip)
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "trip")
        await yard.said(conv, "ann", "k2", "walk")
        await eventually(lambda: all_done(yard, 2))
    assert (await said_in(yard, conv))[-1] == (AGENT, "re: walk")
    task = await yard.store.db["agent_tasks"].find_one({"status": "failed"})
    assert task is not None
    assert (task["event"]["content"], task["error"]) == ("trip", "KeyError")


async def test_an_agent_with_nothing_to_say_says_nothing(yard: Yard, settings: Settings) -> None:
    await register(yard)
    Scripted.answers = lambda _: None
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1))
    assert len(await yard.log(conv)) == 1


# --- while it works --------------------------------------------------------------------------------------------------


async def test_an_agent_at_work_types_and_tells_how_far_it_is(yard: Yard, settings: Settings) -> None:
    await register(yard)
    await yard.connect("ann")
    told = yard.broker.client.pubsub(ignore_subscribe_messages=True)
    await told.subscribe(keys.notification_channel("ann"))
    async with run_lane(yard), agents_at_work(yard, settings):
        conv = await talk_of(yard)
        Scripted.hold = anyio.Event()
        asked = await yard.said(conv, "ann", "k1", "report")
        (notice,) = await yard.next_down(records.Notice, 1)
        typing: Any = msgspec.json.decode(notice.frame)
        Scripted.hold.set()
        await eventually(lambda: has(yard, conv, 2))
        signals = []
        with anyio.move_on_after(2):
            async for message in told.listen():
                signals.append(msgspec.json.decode(message["data"]))
                if len(signals) == 2:
                    break
    await told.aclose()  # type: ignore[no-untyped-call]
    assert typing == {
        "type": "typing", "payload": {"conversation_id": conv, "user_id": AGENT, "state": "start"},
    }  # fmt: skip
    base = {"conversation_id": conv, "agent_id": AGENT, "message_id": asked}
    assert [signal["frame"] for signal in signals] == [
        {"type": "agent_progress", "payload": {**base, "stage": "reading", "text": "page 1"}},
        {"type": "agent_progress", "payload": {**base, "stage": "working"}},
    ]
