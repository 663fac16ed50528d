"""Webhooks on real processes: whoever is killed, an event arrives exactly when its message was committed."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio

from protocol.webhooks import key_of
from tests.system.crowd import PATIENCE_SECONDS, crowd, eventually
from tests.system.mortal import LAST_WORDS
from tests.workers.apps import verified
from tests.workers.receiver import HANG, answer, receiving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.system.house import House
    from tests.workers.receiver import Receiver, Request

pytestmark = [pytest.mark.trio, pytest.mark.slow]

WORKERS = ("worker-1", "worker-2")
MORTAL = [sys.executable, "-m", "tests.system.mortal", "ingest", "query", "retry"]
HEARD_OF_SECONDS = 3.0
"""`workers.interest.EVERY_SECONDS`, and a second."""


class Apps:
    """Two webhooks of one receiver, one in each mode."""

    def __init__(self, house: House, receiver: Receiver) -> None:
        self.house = house
        self.receiver = receiver
        self.keys: dict[str, bytes] = {}

    async def register(self) -> None:
        for mode in ("structured", "binary"):
            url = self.receiver.url.replace("/hook", f"/{mode}")
            registered = await self.call("POST", "", {"app": "test", "url": url, "mode": mode})
            self.keys[f"/{mode}"] = key_of(registered["secret"])
        await trio.sleep(HEARD_OF_SECONDS)

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self.house.stack.admin_token}"}
        async with httpx2.AsyncClient(base_url=self.house.rest_url, headers=headers, timeout=20) as client:
            done = await client.request(method, f"/v1/webhooks{path}", json=body)
        assert done.status_code < 300, done.text
        return done.json() if done.content else None

    async def end(self) -> None:
        for webhook in (await self.call("GET", ""))["items"]:
            await self.call("DELETE", f"/{webhook['_id']}")

    def heard(self, path: str, conversation_id: str) -> list[str]:
        """Ids of the events of this conversation that came there, each verified and read by both libraries. What a
        worker took for events, before it was asked who listens, comes from the outbox too."""
        stored = set(self.stored(conversation_id))
        came = [verified(request, self.keys[path]) for request in self.receiver.requests if request.target == path]
        return [event.get_id() for event in came if event.get_id() in stored]

    def stored(self, conversation_id: str) -> list[str]:
        """Ids of the committed messages, in order."""
        with self.house.database() as database:
            found = database["messages"].find({"conversation_id": conversation_id, "type": {"$ne": "system"}})
            return [document["_id"] for document in found.sort("sequence_number", 1)]

    def queued(self, conversation_id: str) -> int:
        with self.house.database() as database:
            return int(database["webhook_deliveries"].count_documents({"conversation_id": conversation_id}))

    def have_all(self, conversation_id: str) -> bool:
        stored = set(self.stored(conversation_id))
        return all(stored == set(self.heard(path, conversation_id)) for path in self.keys)


@asynccontextmanager
async def apps(house: House) -> AsyncIterator[Apps]:
    """With an events role beside the others, for as long as the block lasts."""
    house.add_worker("events", "events")
    try:
        async with receiving() as receiver:
            opened = Apps(house, receiver)
            await opened.register()
            yield opened
            await opened.end()
    finally:
        house.remove("events")


async def keep_alive(house: House, *names: str) -> None:
    """What a service manager does."""
    while True:
        for name in names:
            if not house.is_alive(name):
                house.start(name)
        await trio.sleep(0.2)


async def test_a_worker_killed_between_a_message_and_its_event(house: House) -> None:
    """It dies right after the insert: the message is there, and nobody was told. The outbox knows."""
    mortals = {name: house.exchange(name, MORTAL) for name in WORKERS}
    try:
        async with crowd(house) as people, apps(house) as listening, trio.open_nursery() as nursery:
            conversation_id, ann, _ = await people.pair()
            nursery.start_soon(keep_alive, house, *WORKERS)
            for text in ("one", LAST_WORDS, "two"):
                await ann.send_nowait(conversation_id, text)
            await eventually(lambda: len(house.sequences(conversation_id)) == 3, "the messages", PATIENCE_SECONDS)
            await eventually(lambda: listening.have_all(conversation_id), "the events", PATIENCE_SECONDS)
            await people.settle(conversation_id)
            for path in listening.keys:
                assert len(listening.heard(path, conversation_id)) == 3, "once each"
            nursery.cancel_scope.cancel()
    finally:
        for name, arguments in mortals.items():
            house.exchange(name, arguments)


async def test_the_events_role_killed_between_an_event_and_its_delivery(house: House) -> None:
    """It dies with requests under way and others queued; what is said meanwhile waits in the outbox."""
    hanging = trio.Event()

    async def hang(_: Request) -> bytes:
        hanging.set()
        return HANG

    async with crowd(house) as people, apps(house) as listening:
        conversation_id, ann, _ = await people.pair()
        await ann.send_nowait(conversation_id, "before")
        await eventually(lambda: listening.have_all(conversation_id), "the first", PATIENCE_SECONDS)
        listening.receiver.decide = hang
        for number in range(5):
            await ann.send_nowait(conversation_id, f"under way {number}")
        with trio.fail_after(PATIENCE_SECONDS):
            await hanging.wait()
        await eventually(lambda: listening.queued(conversation_id) == 12, "the queues", PATIENCE_SECONDS)
        house.kill("events")
        for number in range(5):
            await ann.send_nowait(conversation_id, f"while it is dead {number}")
        await eventually(lambda: len(house.sequences(conversation_id)) == 11, "the messages", PATIENCE_SECONDS)
        listening.receiver.decide = None
        listening.receiver.answers = [answer(200)]
        house.start("events")
        await eventually(lambda: listening.have_all(conversation_id), "the events", PATIENCE_SECONDS)
        await people.settle(conversation_id)
        for path in listening.keys:
            came = listening.heard(path, conversation_id)
            under_way = {message_id for message_id in came if came.count(message_id) > 1}
            assert len(under_way) <= 1, "of a conversation one request is under way, and only that comes again"
            assert list(dict.fromkeys(came)) == listening.stored(conversation_id), "in order for all that"
