"""Who is told by push, of what, and who is not: an owner, the push role and the servers; the provider is a fake."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import codec, keys, records
from protocol.models import ConversationType
from tests.workers.lanes import Yard, crashing_lane, eventually, run_lane
from tests.workers.push_office import FakeProvider, jobs, next_jobs, push_settings, quiet, register, running, sends
from workers import push_queue
from workers.push import role
from workers.push.adapters import Delivered, Gone, Outcome, Refused, Retry
from workers.push_queue import Due

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store
    from workers.store.push_tokens import PushToken

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return push_settings(settings)


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


async def test_five_messages_to_somebody_offline_are_one_job_with_the_badge(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    await register(yard.store, "bob")
    async with yard.broker.client.pubsub() as channel, run_lane(yard, push_after_ms=1500):
        await channel.subscribe(keys.notification_channel("bob"))
        async with running(settings, yard.store, yard.broker, provider):
            conversation_id, ids = await sends(yard, *"12345")
            ((user_id, job),) = await next_jobs(yard.broker, 1)
        assert user_id == "bob"
        assert job == records.PushJob(conversation_id, ids[-1], 5, 5)
        assert [(user, device, told) for user, device, told, _ in provider.sent] == [("bob", "phone", job)]
        assert 86_000 < provider.sent[0][3] <= 86_400
        heard = []
        while (message := await channel.get_message(timeout=0.2)) is not None:
            heard.append(message)
        assert [codec.decode_push_job(message["data"]) for message in heard if message["type"] == "message"] == [job]


async def test_the_badge_counts_all_conversations(yard: Yard, settings: Settings, provider: FakeProvider) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        await sends(yard, "1", "2", sender="ann")
        await sends(yard, "3", sender="cid")
        found = await next_jobs(yard.broker, 2)
    assert [(user, job.badge) for user, job in found] == [("bob", 3), ("bob", 3)]


async def test_who_confirms_at_once_is_neither_due_nor_told(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        _, ids = await sends(yard, "1", "2")
        await yard.delivered(ids[-1], "bob")
        for _ in range(25):
            assert await yard.broker.client.zcard(keys.PUSH_DUE) == 0
            await anyio.sleep(0.1)
    assert await jobs(yard.broker) == []


async def test_who_is_online_and_confirms_nothing_is_told(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    await yard.connect("bob")
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        await sends(yard, "1")
        ((user_id, _),) = await next_jobs(yard.broker, 1)
    assert user_id == "bob"


async def test_who_confirms_after_the_look_and_before_the_time_is_not_told(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        _, ids = await sends(yard, "1")

        async def due() -> bool:
            return bool(await yard.broker.client.zcard(keys.PUSH_DUE))

        await eventually(due)
        await yard.delivered(ids[-1], "bob")
        await quiet(yard.broker)
    assert await jobs(yard.broker) == []


async def test_what_is_said_behind_a_confirmed_message_has_its_own_time(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        conversation_id, ids = await sends(yard, "1")
        await anyio.sleep(1.2)
        await yard.delivered(ids[-1], "bob")
        second = await yard.said(conversation_id, "ann", "k-2")
        said_at = anyio.current_time()
        ((_, job),) = await next_jobs(yard.broker, 1)
    assert job.message_id == second
    assert provider.sent == []
    assert anyio.current_time() - said_at > 1.4


async def test_muted_is_silent_and_so_are_leavers_and_the_deleted(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        group = await yard.create("ann", "bob", "cid", "dan", "eve", kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
        until = datetime.now(UTC) + timedelta(hours=1)
        await yard.store.memberships.arrange(group, "bob", {"muted_until": until})
        await yard.store.db["users"].insert_one({"_id": "cid", "deleted_at": until})
        await yard.said(group, "ann", "k1")
        await yard.remove(group, "ann", "dan")
        ((user_id, _),) = await next_jobs(yard.broker, 1)
    assert user_id == "eve"


async def test_a_message_that_was_deleted_meanwhile_wakes_nobody(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        conversation_id, ids = await sends(yard, "1")
        await yard.changed(conversation_id, "ann", "k-gone", ids[0], records.Delete(for_all=True))
        await quiet(yard.broker)
    assert await jobs(yard.broker) == []


async def test_nothing_is_told_twice_a_reaction_or_an_own_message_tells_nothing(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        conversation_id, ids = await sends(yard, "1")
        await next_jobs(yard.broker, 1)
        await yard.changed(conversation_id, "ann", "k-react", ids[0], records.React("+", add=True))
        await yard.said(conversation_id, "bob", "k-own")
        await yard.delivered((await yard.log(conversation_id))[-1]["_id"], "ann")
        await quiet(yard.broker)
        assert len(await jobs(yard.broker)) == 1
        last = await yard.said(conversation_id, "ann", "k-2")
        found = await next_jobs(yard.broker, 2)
    assert found[1][1].message_id == last


# --- providers -------------------------------------------------------------------------------------------------------


async def test_a_token_that_is_gone_is_removed(yard: Yard, settings: Settings, provider: FakeProvider) -> None:
    await register(yard.store, "bob", "old")
    await register(yard.store, "bob", "new")
    provider.answer = lambda token: Gone() if token.device_id == "old" else Refused("payload")
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        await sends(yard, "1")
        await next_jobs(yard.broker, 1)
    assert [token.device_id for token in await yard.store.push_tokens.listed("bob")] == ["new"]
    assert sorted(device for _, device, _, _ in provider.sent) == ["new", "old"]


async def test_a_device_whose_provider_is_away_is_tried_again_alone(
    yard: Yard, settings: Settings, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "SOONEST_AGAIN_SECONDS", 0.5)
    monkeypatch.setattr(role, "LATEST_AGAIN_SECONDS", 0.5)
    await register(yard.store, "bob", "away")
    await register(yard.store, "bob", "there")
    away = Retry("status 503")
    answers = [away, away, away]
    provider.answer = lambda token: answers.pop() if token.device_id == "away" and answers else Refused("taken")
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        await sends(yard, "1")
        await next_jobs(yard.broker, 1)
        assert [device for _, device, _, _ in provider.sent].count("there") == 1
        assert [device for _, device, _, _ in provider.sent].count("away") == 4


async def test_a_revoked_device_is_not_told(
    yard: Yard, settings: Settings, provider: FakeProvider, broker: Broker
) -> None:
    await register(yard.store, "bob", "phone")
    await register(yard.store, "bob", "tablet")
    await yard.store.devices.revoke("bob", "phone", datetime.now(UTC), has_token=True)
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        await sends(yard, "1")
        await next_jobs(broker, 1)
    assert [device for _, device, _, _ in provider.sent] == ["tablet"]
    assert [token.device_id for token in await yard.store.push_tokens.listed("bob")] == ["tablet"]


# --- what dies -------------------------------------------------------------------------------------------------------


async def test_an_owner_that_dies_before_its_look_leaves_it_to_the_next(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with crashing_lane(yard):
        await sends(yard, "1")
    assert await yard.broker.client.zcard(keys.PUSH_DUE) == 0
    async with run_lane(yard, push_after_ms=1500), running(settings, yard.store, yard.broker, provider):
        ((user_id, _),) = await next_jobs(yard.broker, 1)
    assert user_id == "bob"


async def test_a_push_role_that_dies_with_a_claim_leaves_it_to_the_next(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500):
        await sends(yard, "1")

        async def due() -> bool:
            return bool(await yard.broker.client.zcard(keys.PUSH_DUE))

        await eventually(due)
        now_ms = int(datetime.now(UTC).timestamp() * 1000) + 2000
        (claimed,) = await push_queue.claim(yard.broker, now_ms, now_ms + 1000, 10)
        async with running(settings, yard.store, yard.broker, provider):
            await next_jobs(yard.broker, 1)
        # The dead one wakes up: what it lets go is not its own any more.
        await push_queue.claim(yard.broker, now_ms, now_ms + 5000, 10)
        await push_queue.finish(yard.broker, [claimed], now_ms + 1000, {})


async def test_a_redis_that_forgot_what_was_due_has_it_made_again_from_the_log(
    yard: Yard, settings: Settings, provider: FakeProvider
) -> None:
    async with run_lane(yard, push_after_ms=1500):
        await sends(yard, "1")
        await anyio.sleep(1.5)
    await yard.broker.client.delete(keys.PUSH_DUE)
    async with running(settings, yard.store, yard.broker, provider, repairs=True):
        ((user_id, _),) = await next_jobs(yard.broker, 1)
        assert user_id == "bob"
        epoch: Any = await yard.broker.client.get(keys.PUSH_EPOCH)
        assert epoch.decode() == (await yard.broker.client.info("server"))["run_id"]
        # And again: what was told is not told again.
        await yard.broker.client.delete(keys.PUSH_DUE, keys.PUSH_EPOCH)
        await anyio.sleep(2.5)
        assert await yard.broker.client.get(keys.PUSH_EPOCH) == epoch
    assert len(await jobs(yard.broker)) == 1


# --- the queue -------------------------------------------------------------------------------------------------------


async def test_an_entry_waits_once_and_keeps_its_time(broker: Broker) -> None:
    entry = keys.push_entry("bob", "conv")
    await push_queue.add(broker, [(entry, 1000)])
    await push_queue.add(broker, [(entry, 2000)])
    assert await push_queue.claim(broker, 999, 5000, 10) == []
    (due,) = await push_queue.claim(broker, 1000, 5000, 10)
    assert due == Due("bob", "conv")
    # What is said while it is in hand is an entry of its own.
    await push_queue.add(broker, [(entry, 1001)])
    await push_queue.finish(broker, [due], 5000, {Due("bob", "conv", "phone"): 3000})
    assert await push_queue.claim(broker, 3000, 6000, 10) == [Due("bob", "conv"), Due("bob", "conv", "phone")]
    assert await push_queue.claim(broker, 6000, 9000, 10) == [Due("bob", "conv"), Due("bob", "conv", "phone")]
    await push_queue.finish(broker, [Due("bob", "conv")], 6000, {})
    assert await broker.client.zcard(keys.PUSH_CLAIMED) == 2, "another has it by now"


async def test_what_waits_is_bounded_and_the_oldest_go(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_queue, "DUE_LIMIT", 3)
    await push_queue.add(broker, [(keys.push_entry("bob", f"conv{n}"), n) for n in range(3)])
    assert await push_queue.waiting(broker) == 3
    await push_queue.add(broker, [(keys.push_entry("bob", "conv3"), 3)])
    waiting = await push_queue.claim(broker, 10, 20, 10)
    assert [due.conversation_id for due in waiting] == ["conv1", "conv2", "conv3"]


async def test_the_stream_of_jobs_keeps_its_newest(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_queue, "JOBS_LIMIT", 100)
    for number in range(400):
        await push_queue.announce(broker, "bob", records.PushJob("conv", "msg", number, 1))
    kept = await jobs(broker)
    assert 100 <= len(kept) < 300
    assert kept[-1][1].sequence_number == 399


async def test_tokens_change_hands(store: Store) -> None:
    first = await register(store, "bob")
    assert await store.push_tokens.put(msgspec.structs.replace(first, user_id="ann"), 32)
    assert await store.push_tokens.get("bob", "phone") is None
    assert [token.user_id for token in await store.push_tokens.listed("ann")] == ["ann"]


async def test_no_more_jobs_are_in_hand_than_the_bound_and_one_batch(
    yard: Yard, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "IN_HAND", 2)
    monkeypatch.setattr(role, "BATCH", 1)
    under_way = 0
    release = anyio.Event()

    class Hangs(FakeProvider):
        async def send(self, token: PushToken, job: records.PushJob, ttl_seconds: int) -> Outcome:
            nonlocal under_way
            under_way += 1
            await release.wait()
            return Delivered()

    people = [f"user{number}" for number in range(5)]
    async with run_lane(yard, push_after_ms=1500):
        group = await yard.create("ann", *people, kind=ConversationType.GROUP)
        await yard.next_down(records.CommandOutcome, 1)
        for name in people:
            await register(yard.store, name)
        await yard.said(group, "ann", "k1")
        await anyio.sleep(2.5)
        async with running(settings, yard.store, yard.broker, Hangs()):

            async def full() -> bool:
                return under_way == 2

            await eventually(full)
            await anyio.sleep(0.5)
            assert under_way == 2
            assert await yard.broker.client.zcard(keys.PUSH_DUE) == 3
            release.set()
            await next_jobs(yard.broker, 5)
