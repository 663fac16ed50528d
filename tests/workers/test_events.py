"""An event exists exactly when its message does: whoever dies between the two, and whatever Redis loses."""

from __future__ import annotations

import base64
import hmac
import re
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import codec, events, keys, webhooks
from protocol.models import MessageType
from tests.workers.lanes import crashing_lane, eventually, run_lane, settled
from workers import events as events_role
from workers import listeners
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
    await yard.interest.look(yard.store, yard.broker)
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


# --- apps that read the stream ---------------------------------------------------------------------------------------


async def test_a_consumer_group_on_the_stream_hears_of_every_conversation_until_it_is_destroyed(yard: Yard) -> None:
    redis: Any = yard.broker.client
    await yard.interest.look(yard.store, yard.broker)
    assert not yard.interest.listened, "there is no stream yet"
    await yard.broker.create_group(keys.EVENTS, keys.EVENTS_GROUP)
    await yard.interest.look(yard.store, yard.broker)
    assert not yard.interest.listened, "that group is the system's own"
    await redis.xgroup_create(keys.EVENTS, "crm", id="$")
    await yard.interest.look(yard.store, yard.broker)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        said = [await yard.said(conv, "ann", f"k{number}", f"hello {number}") for number in range(3)]
    (group,) = await listeners.groups(yard.broker)
    assert (group.name, group.lag, group.pending) == ("crm", 3, 0)
    ((_, entries),) = await redis.execute_command(
        "XREADGROUP", "GROUP", "crm", "crm-1", "COUNT", 10, "STREAMS", keys.EVENTS, ">"
    )
    heard = [codec.decode_event(dict(zip(fields[::2], fields[1::2], strict=True))[keys.FIELD]) for _, fields in entries]
    assert [event.id for event in heard] == said
    await redis.xgroup_destroy(keys.EVENTS, "crm")
    await yard.interest.look(yard.store, yard.broker)
    assert not yard.interest.listened


async def test_the_stream_keeps_its_newest_and_drops_what_is_older_than_it_is_kept(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = events.MessageReceivedEvent(
        message_id="msg_1",
        idempotency_key="k",
        conversation_id="c",
        sender_id="a",
        receiver_id="b",
        sequence_number=1,
        message_type=MessageType.TEXT,
        content="x",
        timestamp=datetime.now(UTC),
    )
    item = events.Outgoing("msg_1", events.message_received(message))
    monkeypatch.setattr("workers.broker.EVENTS_LIMIT", 100)
    for _ in range(10):
        await yard.broker.append_events([item] * 100)
    kept = await yard.broker.client.xlen(keys.EVENTS)
    assert 100 <= kept <= 200, "Redis frees whole blocks of 100"
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    await listeners.trim(yard.broker, now_ms)
    assert await yard.broker.client.xlen(keys.EVENTS) == kept
    await listeners.trim(yard.broker, now_ms + listeners.KEPT_SECONDS * 1000 + 1000)
    assert await yard.broker.client.xlen(keys.EVENTS) < 100


async def test_the_example_of_the_documentation_reads_what_was_said_and_goes_on_where_it_was_killed(
    yard: Yard, redis_url: str
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "events.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    assert len(example.strip().splitlines()) <= 20
    program = example.replace("redis://127.0.0.1:6379/0", redis_url).replace(
        'print(event["type"], event["id"])', 'print(event["type"], event["id"], flush=True)'
    )

    async def run_until(last: str) -> list[str]:
        """What it says, until it has said that; then it is killed, acknowledged or not."""
        said = ""
        async with await anyio.open_process([sys.executable, "-c", program]) as process:
            assert process.stdout is not None
            with anyio.fail_after(30):
                async for chunk in process.stdout:
                    said += chunk.decode()
                    if f"{last}\n" in said:
                        break
            process.kill()
        return [line.split()[1] for line in said.splitlines()]

    redis: Any = yard.broker.client
    await redis.xgroup_create(keys.EVENTS, "crm", id="$", mkstream=True)
    await yard.interest.look(yard.store, yard.broker)
    async with run_lane(yard):
        conv = await yard.create("ann", "bob")
        first = [await yard.said(conv, "ann", f"k{number}") for number in range(3)]
        # Given to this consumer before, and not acknowledged when it was killed.
        await redis.execute_command("XREADGROUP", "GROUP", "crm", "crm-1", "COUNT", 2, "STREAMS", keys.EVENTS, ">")
        assert await run_until(first[-1]) == first
        second = await yard.said(conv, "ann", "k3")
        again = await run_until(second)
        assert again[-1] == second
        assert set(again[:-1]) <= set(first), "what it had not acknowledged"


async def test_the_receiver_of_the_documentation_tells_good_signatures_from_bad_ones() -> None:
    page = (Path(__file__).parents[2] / "docs" / "events.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(def verified.*?)```", page, re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    names: dict[str, Any] = {"base64": base64, "hmac": hmac, "time": time, "Mapping": dict}
    exec(example, names)
    now = str(int(datetime.now(UTC).timestamp()))
    old = str(int(now) - 600)
    good, other = b"k" * 32, b"o" * 32

    def verified(key: bytes, timestamp: str, body: bytes) -> bool:
        signature = webhooks.signature([other, good], "msg_1", timestamp, b"{}")
        headers = {"webhook-id": "msg_1", "webhook-timestamp": timestamp, "webhook-signature": signature}
        found: bool = names["verified"](webhooks.secret_of(key), headers, body)
        return found

    assert verified(good, now, b"{}")
    assert not verified(b"x" * 32, now, b"{}")
    assert not verified(good, now, b"[]")
    assert not verified(good, old, b"{}")
