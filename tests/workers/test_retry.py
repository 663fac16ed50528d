"""The role that tries dead letters again: any number of it, whatever is away meanwhile, gone when it is told to go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from prometheus_client import REGISTRY

from tests.workers.lanes import eventually, run_lane
from tests.workers.letters import POISON, letters, refusing
from workers import replay, retry
from workers.broker import BrokerUnavailable
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from tests.workers.lanes import Yard
    from workers.settings import Settings

pytestmark = pytest.mark.anyio


async def bury(yard: Yard, *keys: str) -> str:
    """Messages that become letters; their conversation's id."""
    async with refusing(yard.store):
        conv = await yard.create("ann", "bob")
        for key in keys:
            await yard.send(conv, "ann", key, POISON)
        await yard.acks(len(keys))
    return conv


async def test_several_of_the_role_try_each_letter_once(yard: Yard, settings: Settings) -> None:
    stopping = anyio.Event()
    async with run_lane(yard):
        names = [f"k{number}" for number in range(12)]
        conv = await bury(yard, *names)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(retry.run, settings, yard.store, yard.broker, stopping)
            await yard.acks(len(names))

            async def all_resolved() -> bool:
                return {letter["status"] for letter in await letters(yard.store)} == {"resolved"}

            await eventually(all_resolved)
            stopping.set()
        stored = await yard.log(conv)
    assert [message["sequence_number"] for message in stored] == list(range(1, len(names) + 1))
    assert {message["idempotency_key"] for message in stored} == set(names)
    assert {letter["retry_count"] for letter in await letters(yard.store)} == {1}


async def test_it_goes_on_when_what_was_away_is_back_and_counts_no_try(
    yard: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(replay, "BROKER_AWAY_SECONDS", 0.05)
    stopping = anyio.Event()
    append, claim = yard.broker.append_replay, yard.store.dead_letters.claim_due
    failures = 0

    async def append_later(shard: int, payload: bytes, letter_id: str) -> None:
        nonlocal failures
        if failures < 3:
            failures += 1
            raise BrokerUnavailable("away")
        await append(shard, payload, letter_id)

    async def claim_later(*when: object) -> object:
        nonlocal failures
        if failures == 1:
            failures += 1
            raise StoreUnavailable("away")
        return await claim(*when)  # type: ignore[arg-type]

    async with run_lane(yard):
        await bury(yard, "k1")
        monkeypatch.setattr(yard.broker, "append_replay", append_later)
        monkeypatch.setattr(yard.store.dead_letters, "claim_due", claim_later)
        async with anyio.create_task_group() as group:
            group.start_soon(retry.run, settings, yard.store, yard.broker, stopping)
            (ack,) = await yard.acks(1)
            stopping.set()
    assert failures == 3
    assert ack["payload"]["sequence_number"] == 1
    (letter,) = await letters(yard.store)
    assert letter["retry_count"] == 1


async def test_it_ends_as_soon_as_it_is_told_to(yard: Yard, settings: Settings) -> None:
    stopping = anyio.Event()
    with anyio.fail_after(2):
        async with anyio.create_task_group() as group:
            group.start_soon(retry.run, settings, yard.store, yard.broker, stopping)
            await anyio.sleep(0.3)
            stopping.set()


async def test_the_letters_of_each_status_are_counted(yard: Yard, settings: Settings) -> None:
    stopping = anyio.Event()
    async with run_lane(yard):
        await bury(yard, "k1", "k2")
    await yard.store.db["dead_letter_queue"].update_many({}, {"$set": {"status": "failed", "next_retry_at": None}})
    async with anyio.create_task_group() as group:
        group.start_soon(retry.run, settings, yard.store, yard.broker, stopping)

        async def counted() -> bool:
            seen = {
                status: REGISTRY.get_sample_value("trireme_dead_letters", {"status": status})
                for status in ("pending", "failed")
            }
            return seen == {"pending": 0, "failed": 2}

        await eventually(counted)
        stopping.set()
