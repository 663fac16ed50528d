"""An event exists exactly when its message does: whoever dies between the two, and whatever Redis loses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import codec, events, keys
from tests.workers.lanes import crashing_lane, eventually, run_lane, settled
from workers import events as events_role
from workers.broker import Broker, BrokerUnavailable
from workers.events import run, sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.workers.lanes import Yard
    from workers.settings import Settings

pytestmark = pytest.mark.anyio

LATER = timedelta(minutes=1)


class Listener:
    """A sink that remembers, and fails for as long as it is told to."""

    def __init__(self) -> None:
        self.heard: list[events.Event] = []

    async def take(self, batch: Sequence[events.Event]) -> None:
        self.heard += batch

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.heard]


async def in_stream(yard: Yard) -> list[events.Event]:
    entries: Any = await yard.broker.client.xrange(keys.EVENTS)
    return [codec.decode_event(fields[1]) for _, fields in entries]


async def due(yard: Yard) -> list[str]:
    """Messages whose events nobody has confirmed."""
    return [item.message_id for item in await yard.store.events.due(datetime.now(UTC) + LATER, 100)]


async def found_again(yard: Yard, listener: Listener) -> int:
    return await sweep(yard.store, yard.broker, [listener], datetime.now(UTC) + LATER)


async def test_messages_to_and_from_an_agent_are_events_and_others_are_not(yard: Yard) -> None:
    async with run_lane(yard):
        talk = await yard.create("ann", "agent", agent_id="agent")
        plain = await yard.create("ann", "bob")
        asked = await yard.said(talk, "ann", "k1", "what time is it")
        answered = await yard.said(talk, "agent", "reply:1", "late")
        await yard.said(plain, "ann", "k2")
        await yard.said(talk, "ann", "k1", "what time is it")  # a repeat is no second event
        received, response = await in_stream(yard)
    assert isinstance(received.data, events.MessageReceivedEvent)
    assert (received.id, received.data.content, received.data.sequence_number) == (asked, "what time is it", 1)
    assert isinstance(response.data, events.AgentResponseEvent)
    assert (response.id, response.data.response, response.data.user_id) == (answered, "late", "ann")
    assert await due(yard) == [asked, answered]


async def test_an_app_that_listens_hears_of_every_conversation(yard: Yard) -> None:
    await yard.store.db["webhooks"].insert_one({"_id": "wh_1", "status": "enabled"})
    await yard.interest.look(yard.store)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        said = await yard.said(conv, "ann", "k1")
        assert [event.id for event in await in_stream(yard)] == [said]


async def test_events_are_handed_over_and_confirmed(yard: Yard, settings: Settings) -> None:
    stopping = anyio.Event()
    async with anyio.create_task_group() as group, run_lane(yard):
        group.start_soon(run, settings, yard.store, yard.broker, stopping)
        conv = await yard.create("ann", "agent", agent_id="agent")
        await yard.said(conv, "ann", "k1")
        await eventually(lambda: _nothing_due(yard))
        stopping.set()


async def _nothing_due(yard: Yard) -> bool:
    return await due(yard) == []


async def test_a_worker_killed_between_commit_and_publish_loses_and_doubles_no_event(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    publish = Broker.publish_and_settle
    committed = anyio.Event()

    async def never(*_: object) -> None:
        committed.set()
        raise BrokerUnavailable("cut")

    async with run_lane(yard):
        conv = await yard.create("ann", "agent", agent_id="agent")
        await yard.said(conv, "ann", "k0", "before")
    monkeypatch.setattr(Broker, "publish_and_settle", never)
    async with crashing_lane(yard):
        await yard.send(conv, "ann", "k1", "in between")
        with anyio.fail_after(5):
            await committed.wait()
    monkeypatch.setattr(Broker, "publish_and_settle", publish)
    log = [document["_id"] for document in await yard.log(conv)]
    assert len(log) == 2
    assert [event.id for event in await in_stream(yard)] == log[:1]
    async with run_lane(yard):
        await eventually(lambda: settled(yard))
    assert await found_again(yard, listener) == 2
    assert listener.ids == log
    assert await found_again(yard, listener) == 0, "confirmed once and for all"


async def test_an_emptied_redis_loses_no_event(yard: Yard) -> None:
    listener = Listener()
    async with run_lane(yard):
        conv = await yard.create("ann", "agent", agent_id="agent")
        said = [await yard.said(conv, "ann", f"k{number}") for number in range(3)]
    await yard.broker.client.flushall()
    assert await found_again(yard, listener) == 3
    assert listener.ids == said
    assert [event.id for event in await in_stream(yard)] == said, "for those who read the stream, too"


async def test_a_message_that_was_never_committed_is_no_event(yard: Yard) -> None:
    async with run_lane(yard):
        conv = await yard.create("ann", "agent", agent_id="agent")
        await yard.send(conv, "stranger", "k1")
        (error,) = await yard.acks(1)
        assert error["payload"]["code"] == "conversation_not_found"
        assert await in_stream(yard) == []
    assert await due(yard) == []


async def test_what_a_sink_refuses_stays_in_the_outbox(yard: Yard) -> None:
    class Broken(Listener):
        async def take(self, batch: Sequence[events.Event]) -> None:
            raise BrokerUnavailable("not now")

    async with run_lane(yard):
        conv = await yard.create("ann", "agent", agent_id="agent")
        said = await yard.said(conv, "ann", "k1")
    with pytest.raises(BrokerUnavailable):
        await found_again(yard, Broken())
    assert await due(yard) == [said]


async def test_an_edited_or_deleted_message_is_found_again_as_it_is_now(yard: Yard) -> None:
    listener = Listener()
    async with run_lane(yard):
        conv = await yard.create("ann", "agent", agent_id="agent")
        said = await yard.said(conv, "ann", "k1", "first")
    await yard.store.db["messages"].update_one({"_id": said}, {"$set": {"content": ""}})
    assert await found_again(yard, listener) == 1
    assert msgspec.to_builtins(listener.heard[0].data)["content"] == ""


async def test_batches_that_the_outbox_does_not_know_of_are_bounded(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    monkeypatch.setattr(events_role, "BATCH", 1)
    monkeypatch.setattr(events_role, "UNCONFIRMED", 2)
    hangs = anyio.Event()

    async def never(_: object) -> None:
        await hangs.wait()

    monkeypatch.setattr(yard.store.events, "confirm", never)
    async with run_lane(yard):
        conv = await yard.create("ann", "agent", agent_id="agent")
        for number in range(8):
            await yard.said(conv, "ann", f"k{number}")
    async with anyio.create_task_group() as group:
        group.start_soon(events_role.follow, yard.store, yard.broker, [listener])
        await anyio.sleep(0.5)
        # One at the outbox, two that wait, one in the reader's hand.
        assert len(listener.heard) == 4
        hangs.set()
        await eventually(lambda: _heard(listener, 8))
        group.cancel_scope.cancel()


async def _heard(listener: Listener, number: int) -> bool:
    return len(listener.heard) == number
