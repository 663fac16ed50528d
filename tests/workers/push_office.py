"""The push role at work on the tests' own seams: what it told, and a provider that says what it is told to."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from protocol import codec, keys, records
from workers.push import repair
from workers.push.adapters import Delivered, Outcome
from workers.push.dispatch import Dispatch
from workers.push.role import Office
from workers.store.push_tokens import PushToken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.workers.lanes import Yard
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

AFTER_SECONDS = 1.5
"""In place of 3 s, so that tests do not wait; longer than the look (1 s) of the conversation's owner."""


class FakeProvider:
    """An adapter that answers as `answer` says, and remembers what it was given."""

    kind = "log"

    def __init__(self, answer: Callable[[PushToken], Outcome] = lambda _: Delivered()) -> None:
        self.answer = answer
        self.sent: list[tuple[str, str, records.PushJob, int]] = []
        """(user, device, job, ttl)."""

    def provider(self, token: PushToken) -> str:
        return token.address

    async def send(self, token: PushToken, job: records.PushJob, ttl_seconds: int) -> Outcome:
        self.sent.append((token.user_id, token.device_id, job, ttl_seconds))
        return self.answer(token)


def push_settings(settings: Settings, **changes: object) -> Settings:
    return msgspec.structs.replace(settings, push_after_seconds=AFTER_SECONDS, **changes)


@asynccontextmanager
async def running(
    settings: Settings, store: Store, broker: Broker, provider: FakeProvider, *, repairs: bool = False
) -> AsyncIterator[Office]:
    """The role until the block ends, then stopped cleanly."""
    office = Office(settings, store, broker, Dispatch({provider.kind: provider}))
    stopping = anyio.Event()
    async with anyio.create_task_group() as upkeep:
        if repairs:
            upkeep.start_soon(repair.keep_whole, store, broker)
        async with anyio.create_task_group() as group:
            group.start_soon(office.serve, stopping)
            yield office
            stopping.set()
        upkeep.cancel_scope.cancel()


async def register(store: Store, user_id: str, device_id: str = "phone", kind: str = FakeProvider.kind) -> PushToken:
    now = datetime.now(UTC)
    token = PushToken(
        user_id=user_id,
        device_id=device_id,
        kind=kind,
        address=f"{user_id} {device_id}",
        registered_at=now,
        expires_at=now + timedelta(days=1),
    )
    assert await store.push_tokens.put(token, 32)
    return token


async def jobs(broker: Broker) -> list[tuple[str, records.PushJob]]:
    """(user, job) of all that is in the stream."""
    entries: Any = await broker.client.xrange(keys.NOTIFICATIONS)
    found = []
    for _, (field, value, user_field, user_id) in entries:
        assert (field, user_field) == (keys.FIELD, keys.NOTIFICATION_USER_FIELD)
        found.append((user_id.decode(), codec.decode_push_job(value)))
    return found


async def next_jobs(broker: Broker, count: int, seconds: float = 8.0) -> list[tuple[str, records.PushJob]]:
    """Once there are so many, and no more within the time that another would take."""
    with anyio.fail_after(seconds):
        while len(await jobs(broker)) < count:  # noqa: ASYNC110 - the server tells nobody
            await anyio.sleep(0.05)
    await quiet(broker)
    found = await jobs(broker)
    assert len(found) == count, found
    return found


async def quiet(broker: Broker) -> None:
    """Until nothing is due or in hand, and nothing can become due."""
    await anyio.sleep(AFTER_SECONDS)
    with anyio.fail_after(10):
        while await broker.client.zcard(keys.PUSH_DUE) + await broker.client.zcard(keys.PUSH_CLAIMED):  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def sends(yard: Yard, *contents: str, sender: str = "ann", receiver: str = "bob") -> tuple[str, list[str]]:
    """A 1:1 conversation with these messages, committed: its id and theirs."""
    conversation_id = await yard.create(sender, receiver)
    return conversation_id, [await yard.said(conversation_id, sender, f"k-{text}", text) for text in contents]
