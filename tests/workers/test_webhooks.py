"""Webhooks of apps: every event arrives at least once, signed, in order; and whoever fails harms nobody else."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
import standardwebhooks

from protocol import codec, events, keys, webhooks
from protocol.webhooks import DeliveryStatus, EventType, Mode, Reason, Span, WebhookStatus
from tests.workers.apps import App, Talk, couriers, heard, now, open_app, verified
from tests.workers.lanes import eventually
from tests.workers.receiver import HANG, answer, receiving
from tests.workers.seeding import START
from workers.events import tell
from workers.webhooks import courier
from workers.webhooks import couriers as sharing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.workers.receiver import Request
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

PENDING, DELIVERED, FAILED = DeliveryStatus.PENDING, DeliveryStatus.DELIVERED, DeliveryStatus.FAILED


@pytest.fixture
async def talk(store: Store) -> Talk:
    return await Talk(store).open()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are spared for half a second, and tries are close together."""
    monkeypatch.setattr(webhooks, "OPEN_SECONDS", 0.5)
    monkeypatch.setattr(webhooks, "FIRST_RETRY_SECONDS", 0.01)


# --- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
async def test_both_libraries_read_what_arrives(store: Store, settings: Settings, talk: Talk, mode: Mode) -> None:
    async with receiving() as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url, mode=mode)
        said = await talk.say("one", "zwei ☃")
        deliveries = await app.until(2, DELIVERED)
        assert [delivery.tries for delivery in deliveries] == [1, 1]
        for request, message_id, content, number in zip(
            receiver.requests, said, ("one", "zwei ☃"), (1, 2), strict=True
        ):
            event = verified(request, app.key)
            assert (event.get_id(), event.get_type()) == (message_id, events.MESSAGE_RECEIVED)
            assert (event.get_data()["content"], event.get_data()["sequence_number"]) == (content, number)
            assert event.get_source() == f"/conversations/{talk.log.conversation_id}"
            assert request.headers["webhook-id"] == message_id
            expected = "application/cloudevents+json" if mode is Mode.STRUCTURED else "application/json"
            assert request.headers["content-type"] == expected


async def test_what_was_said_before_it_was_registered_is_not_sent(store: Store, talk: Talk) -> None:
    """The outbox may hold it: of workers that did not know yet who listens, or of an app before this one."""
    old = await open_app(store, "https://app.example/old")
    new = await open_app(store, "https://app.example/new", created_at=now())
    said = await talk.say("one", "two")
    assert [delivery.event_id for delivery in await old.deliveries()] == said
    assert await new.deliveries() == []


async def test_a_wrong_signature_is_told_by_the_library(store: Store, settings: Settings, talk: Talk) -> None:
    async with receiving() as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        await talk.say("one")
        await app.until(1, DELIVERED)
        (request,) = receiver.requests
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            verified(request, b"x" * 32)
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            verified(request._replace(body=request.body.replace(b"one", b"two")), app.key)


async def test_for_a_day_after_a_rotation_both_secrets_sign(store: Store, settings: Settings, talk: Talk) -> None:
    async with receiving() as receiver:
        app = await open_app(store, receiver.url)
        old, app.key = app.key, b"n" * 32
        rotated = await store.webhooks.rotate(app.webhook_id, app.key, now())
        assert rotated is not None
        assert rotated.old_secret_until is not None
        assert timedelta(hours=23) < rotated.old_secret_until - now() <= timedelta(hours=24)
        async with couriers(store, settings):
            await talk.say("one")
            await app.until(1, DELIVERED)
            verified(receiver.requests[0], old)
            verified(receiver.requests[0], app.key)
        await store.webhooks.change(app.webhook_id, {"old_secret_until": now()}, now())
        async with couriers(store, settings):
            await talk.say("two")
            await app.until(2, DELIVERED)
            verified(receiver.requests[1], app.key)
            with pytest.raises(standardwebhooks.WebhookVerificationError):
                verified(receiver.requests[1], old)


async def test_a_message_that_was_erased_meanwhile_is_sent_as_it_is_now_and_one_that_is_gone_not_at_all(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving() as receiver:
        app = await open_app(store, receiver.url)
        erased, gone = await talk.say("secret", "gone")
        await store.db["messages"].update_one({"_id": erased}, {"$set": {"content": ""}})
        await store.db["messages"].delete_one({"_id": gone})
        for document in await store.db["webhook_deliveries"].find().to_list():
            assert "secret" not in str(document), "a queue holds no content"
        async with couriers(store, settings):
            await app.until(1, DELIVERED)
            (failed,) = await app.until(1, FAILED)
        assert (failed.event_id, failed.last_error, failed.next_try_at) == (gone, "its message is no more", None)
        assert [verified(request, app.key).get_data()["content"] for request in receiver.requests] == [""]


async def test_an_event_that_is_handed_over_again_is_not_sent_again(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving() as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        said = await talk.say("one")
        await talk.hand_over(said)
        await app.until(1, DELIVERED)
        await talk.hand_over(said)
        await talk.say("two")
        await app.until(2, DELIVERED)
        assert len(receiver.requests) == 2


async def test_only_what_was_asked_for_is_queued(store: Store, talk: Talk) -> None:
    other = await Talk(store, "conv_2").open()
    everything = await open_app(store, "https://a.example/")
    one = await open_app(store, "https://b.example/", conversation_ids=["conv_2"])
    answers = await open_app(store, "https://c.example/", types=[EventType.AGENT_RESPONSE])
    bots = await open_app(store, "https://d.example/", agent_ids=["bot"])
    await store.db["conversations"].update_one({"_id": "conv_2"}, {"$set": {"agent_id": "bot"}})
    await talk.say("x")
    (said,) = await other.say("y")
    assert len(await everything.deliveries()) == 2
    assert [delivery.event_id for delivery in await one.deliveries()] == [said]
    assert await answers.deliveries() == []
    assert [delivery.event_id for delivery in await bots.deliveries()] == [said]


# --- order -----------------------------------------------------------------------------------------------------------


async def test_a_conversations_events_arrive_in_order_while_others_pass(store: Store, settings: Settings) -> None:
    """A receiver that answers late, and the later the earlier the message, would turn them round."""
    talks = [await Talk(store, f"conv_{number}").open() for number in range(4)]
    at_once = most = 0

    async def decide(request: Request) -> bytes:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        number = codec.decode_event(request.body).data
        assert isinstance(number, events.MessageReceivedEvent)
        await anyio.sleep(0.12 - 0.01 * number.sequence_number)
        at_once -= 1
        return answer(204)

    async with receiving() as receiver:
        receiver.decide = decide
        app = await open_app(store, receiver.url)
        said = {talk.log.conversation_id: await talk.say(*map(str, range(10))) for talk in talks}
        async with couriers(store, settings):
            await app.until(40, DELIVERED, 20)
    came = heard(receiver, app)
    for ids in said.values():
        assert [message_id for message_id in came if message_id in ids] == ids
    assert 1 < most <= len(talks)


async def test_no_more_requests_at_once_than_the_bound(store: Store, settings: Settings) -> None:
    talks = [await Talk(store, f"conv_{number}").open() for number in range(courier.AT_ONCE + 4)]
    async with receiving(HANG) as receiver:
        app = await open_app(store, receiver.url)
        for talk in talks:
            await talk.say("x")
        async with couriers(store, settings):
            await eventually(lambda: _count(receiver.requests, courier.AT_ONCE))
            await anyio.sleep(0.3)
            assert len(receiver.requests) == courier.AT_ONCE
        assert await app.has(len(talks), PENDING)


async def test_a_webhook_that_hangs_has_no_more_in_memory_than_its_window(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    of_messages = store.events.of_messages

    async def counted(message_ids: Sequence[str]) -> dict[str, events.Event]:
        read.append(len(message_ids))
        return await of_messages(message_ids)

    talk = await Talk(store).open()
    async with receiving(HANG) as receiver:
        await open_app(store, receiver.url)
        await talk.say(*map(str, range(courier.WINDOW + 1)))
        monkeypatch.setattr(store.events, "of_messages", counted)
        async with couriers(store, settings):
            await eventually(lambda: _count(receiver.requests, 1))
            await anyio.sleep(1.2)
    assert read == [courier.WINDOW]


async def _count(found: list[Request], count: int) -> bool:
    return len(found) >= count


# --- failures --------------------------------------------------------------------------------------------------------


async def test_three_tries_then_a_dead_letter_which_is_tried_again_when_its_time_has_come(
    store: Store, settings: Settings, talk: Talk, quick: None
) -> None:
    async with receiving(answer(503), answer(503), answer(503), answer(200)) as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        (said,) = await talk.say("x")
        (dead,) = await app.until(1, FAILED)
        assert (dead.tries, dead.last_status, dead.last_error) == (3, 503, "status 503")
        assert dead.next_try_at is not None
        assert timedelta(seconds=55) < dead.next_try_at - now() <= timedelta(seconds=60)
        assert (await app.stored()).failures == 1
        await store.db["webhook_deliveries"].update_one({"_id": dead.delivery_id}, {"$set": {"next_try_at": now()}})
        (arrived,) = await app.until(1, DELIVERED)
        assert (arrived.tries, heard(receiver, app)) == (4, [said] * 4), "one id, however often it is tried"
        stored = await app.stored()
        assert (stored.failures, stored.failing_since) == (0, None)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 501])
async def test_what_another_try_cannot_mend_is_a_dead_letter_at_once(
    store: Store, settings: Settings, talk: Talk, status: int
) -> None:
    async with receiving(answer(status), answer(200)) as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        await talk.say("refused", "taken")
        (dead,) = await app.until(1, FAILED)
        assert (dead.tries, dead.last_status, dead.next_try_at) == (1, status, None)
        await app.until(1, DELIVERED)
        assert len(receiver.requests) == 2


async def test_h20_a_redirect_to_the_metadata_address_or_to_loopback_is_a_dead_letter(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving() as inside, receiving() as receiver, couriers(store, settings):
        receiver.answers = [
            answer(302, Location="http://169.254.169.254/latest/meta-data/"),
            answer(307, Location=inside.url),
            answer(204),
        ]
        app = await open_app(store, receiver.url)
        await talk.say("one", "two", "three")
        dead = await app.until(2, FAILED)
        assert {item.last_error for item in dead} == {
            "status 302: redirects are not followed",
            "status 307: redirects are not followed",
        }
        await app.until(1, DELIVERED)
        assert inside.connections == 0


async def test_h20_a_webhook_that_leads_to_loopback_is_never_connected_to(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving() as receiver, couriers(store, settings, egress_allow="192.0.2.1"):
        app = await open_app(store, receiver.url.replace("127.0.0.1", "localhost"))
        await talk.say("x")
        (dead,) = await app.until(1, FAILED)
        assert "not a public address" in (dead.last_error or "")
        assert (dead.tries, dead.next_try_at) == (1, None)
        assert receiver.connections == 0


@pytest.mark.parametrize("said", [b"garbage\r\n\r\n", answer(503, b"x" * 10 * 2**20)], ids=["garbage", "10 MiB"])
async def test_garbage_and_ten_mebibytes_are_failures_like_others(
    store: Store, settings: Settings, talk: Talk, quick: None, said: bytes
) -> None:
    async with receiving(said) as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        await talk.say("x")
        (dead,) = await app.until(1, FAILED)
        assert dead.tries == 3
        receiver.answers = [answer(200, b"x" * 10 * 2**20)]
        await talk.say("y")
        await app.until(1, DELIVERED)


async def test_a_webhook_that_hangs_holds_up_no_other(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.webhooks.call.CALL_SECONDS", 6.0)
    talks = [await Talk(store, f"conv_{number}").open() for number in range(12)]
    async with receiving(HANG) as hanging, receiving() as prompt, couriers(store, settings):
        slow = await open_app(store, hanging.url)
        swift = await open_app(store, prompt.url)
        await anyio.sleep(1.2)  # both have their couriers
        for talk in talks:
            await talk.say("x")
        await swift.until(12, DELIVERED, 4.0)
        assert await slow.deliveries(DELIVERED) == []
        await eventually(lambda: _count(hanging.requests, courier.AT_ONCE))


async def test_a_host_that_fails_is_spared_and_nothing_of_what_waits_is_lost(
    store: Store, settings: Settings, quick: None
) -> None:
    talks = [await Talk(store, f"conv_{number}").open() for number in range(6)]
    async with receiving(answer(500)) as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        said = [message_id for talk in talks for message_id in await talk.say("a", "b", "c")]
        await anyio.sleep(2.5)
        while_down = len(receiver.requests)
        assert while_down < 3 + courier.AT_ONCE + 6, "a probe in half a second, not 18 times three tries"
        receiver.answers = [answer(200)]
        await app.until(18, DELIVERED, 15)
        assert set(heard(receiver, app)) == set(said)
        assert (await app.stored()).failing_since is None


# --- disabling -------------------------------------------------------------------------------------------------------


async def test_410_disables_and_whoever_asked_hears_of_it(
    store: Store, broker: Broker, settings: Settings, talk: Talk
) -> None:
    async with receiving(answer(410)) as receiver, receiving() as other, couriers(store, settings):
        app = await open_app(store, receiver.url)
        watcher = await open_app(store, other.url, types=[EventType.WEBHOOK_DISABLED])
        await talk.say("x")
        await eventually(lambda: _is_disabled(app))
        stored = await app.stored()
        assert (stored.status, stored.status_reason) == (WebhookStatus.DISABLED, Reason.GONE)
        await tell(store, broker, [talk.sink])
        await tell(store, broker, [talk.sink])
        await watcher.until(1, DELIVERED)
        (request,) = other.requests
        notice = verified(request, watcher.key)
        assert notice.get_type() == events.WEBHOOK_DISABLED
        assert (notice.get_data()["webhook_id"], notice.get_data()["reason"]) == (app.webhook_id, "gone")
        entries: Any = await broker.client.xrange(keys.EVENTS)
        ((_, fields),) = entries
        assert codec.decode_event(fields[1]).id == notice.get_id()
        await talk.say("nobody is told")
        assert len(await app.deliveries()) == 1


async def _is_disabled(app: App) -> bool:
    return (await app.stored()).status is WebhookStatus.DISABLED


async def test_a_notice_that_could_not_be_told_stays_due(store: Store, broker: Broker, talk: Talk) -> None:
    app = await open_app(store, "https://a.example/")
    await store.webhooks.disable(app.webhook_id, Reason.FAILED, now())
    (notice,) = await store.webhooks.notices()
    assert notice.webhook.webhook_id == app.webhook_id
    assert await store.webhooks.disable(app.webhook_id, Reason.GONE, now()) is None, "once"
    await tell(store, broker, [talk.sink])
    assert await store.webhooks.notices() == []


async def test_who_fails_for_too_long_is_disabled_and_gets_what_waited_when_enabled_again(
    store: Store, settings: Settings, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "FAILURES_TO_DISABLE", 3)
    monkeypatch.setattr(webhooks, "OPEN_SECONDS", 0.05)
    talks = [await Talk(store, f"conv_{number}").open() for number in range(9)]
    async with receiving(answer(503)) as receiver, couriers(store, settings, webhook_disable_seconds=1):
        app = await open_app(store, receiver.url)
        for talk in talks:
            await talk.say("x", "y", "z")
        await eventually(lambda: _is_disabled(app), 15)
        assert (await app.stored()).status_reason is Reason.FAILED
        seen = len(receiver.requests)
        await anyio.sleep(1.2)
        assert len(receiver.requests) == seen, "nothing more is sent"
        receiver.answers = [answer(200)]
        await store.webhooks.enable(app.webhook_id, now())
        stored = await app.stored()
        assert (stored.status, stored.failures, stored.failing_since) == (WebhookStatus.ENABLED, 0, None)
        await app.until(0, PENDING, 10)
        await store.deliveries.hasten(app.webhook_id, now())
        await app.until(27, DELIVERED, 15)


async def test_one_event_that_is_refused_now_and_then_disables_nobody(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving(answer(400)) as receiver, couriers(store, settings, webhook_disable_seconds=1):
        app = await open_app(store, receiver.url)
        await talk.say("x")
        await app.until(1, FAILED)
        await anyio.sleep(1.1)
        await talk.say("y")
        await app.until(2, FAILED)
        assert (await app.stored()).status is WebhookStatus.ENABLED


async def test_a_queue_past_its_bound_disables_and_one_at_it_does_not(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving(HANG) as receiver, couriers(store, settings, webhook_backlog=3) as running:
        app = await open_app(store, receiver.url)
        await talk.say("a", "b", "c")
        await eventually(lambda: _count(receiver.requests, 1))
        await running.count()
        assert (await app.stored()).status is WebhookStatus.ENABLED
        await talk.say("d")
        await running.count()
        stored = await app.stored()
        assert (stored.status, stored.status_reason) == (WebhookStatus.DISABLED, Reason.BACKLOG)
        assert await app.has(4, PENDING), "what waits is kept"


# --- replays ---------------------------------------------------------------------------------------------------------


async def test_a_span_of_the_log_is_sent_again_under_the_same_ids(
    store: Store, settings: Settings, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "REPLAY_PAGE", 2)
    said = await talk.say(*"abcdefg")
    async with receiving() as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        # The ids of a seeded log say 1, 2, 3 … ms after 1970.
        epoch = START.fromtimestamp(0, START.tzinfo)
        span = Span(since=epoch + timedelta(milliseconds=2), until=epoch + timedelta(milliseconds=7))
        assert await store.webhooks.begin_replay(app.webhook_id, span) is not None
        assert await store.webhooks.begin_replay(app.webhook_id, span) is None, "one at a time"
        await app.until(5, DELIVERED)
        assert heard(receiver, app) == said[1:6]
        await eventually(lambda: _is_replayed(app))
        assert await store.webhooks.begin_replay(app.webhook_id, span) is not None, "and once more"
        await eventually(lambda: _count(receiver.requests, 10))
        assert heard(receiver, app) == said[1:6] * 2


async def _is_replayed(app: App) -> bool:
    return (await app.stored()).replay is None


async def test_a_replay_waits_behind_a_long_queue(
    store: Store, settings: Settings, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "REPLAY_AHEAD", 3)
    monkeypatch.setattr(courier, "REPLAY_PAGE", 1)
    said = await talk.say(*"abcdefg")
    async with receiving(HANG) as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        epoch = START.fromtimestamp(0, START.tzinfo)
        await store.webhooks.begin_replay(app.webhook_id, Span(since=epoch, until=START))
        await app.until(3, PENDING)
        await anyio.sleep(1.5)
        assert await app.has(3, PENDING)
        assert len(said) == 7
        assert (await app.stored()).replay is not None


async def test_a_dead_letter_is_queued_again_by_hand(store: Store, settings: Settings, talk: Talk) -> None:
    async with receiving(answer(400), answer(200)) as receiver, couriers(store, settings):
        app = await open_app(store, receiver.url)
        (said,) = await talk.say("x")
        await app.until(1, FAILED)
        assert await store.deliveries.requeue(app.webhook_id, said, now(), 1) is not None
        (arrived,) = await app.until(1, DELIVERED)
        assert arrived.tries == 1
        assert await store.deliveries.requeue(app.webhook_id, said, now(), 1) is None, "it has arrived"


# --- who sends -------------------------------------------------------------------------------------------------------


async def test_two_processes_share_the_webhooks_and_send_each_event_once(
    store: Store, settings: Settings, talk: Talk
) -> None:
    async with receiving() as receiver, couriers(store, settings), couriers(store, settings):
        apps = [await open_app(store, f"{receiver.url}/{number}") for number in range(4)]
        await talk.say(*map(str, range(20)))
        for app in apps:
            await app.until(20, DELIVERED)
        assert len(receiver.requests) == 80


async def test_a_dead_process_webhooks_are_anothers_when_its_lease_has_ended(
    store: Store, settings: Settings, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "LEASE_SECONDS", 2.0)
    async with receiving() as receiver:
        app = await open_app(store, receiver.url)
        assert [item.webhook.webhook_id for item in await store.webhooks.claim("dead", 2.0, now())] == [app.webhook_id]
        assert await store.webhooks.claim("other", 2.0, now()) == []
        await talk.say("x")
        with anyio.fail_after(6):
            async with couriers(store, settings):
                await app.until(1, DELIVERED)


async def test_what_was_sent_and_not_written_down_is_sent_again_under_the_same_id(
    store: Store, settings: Settings, talk: Talk
) -> None:
    """A process that dies between the answer and its note of it."""
    async with receiving(HANG) as receiver:
        app = await open_app(store, receiver.url)
        said = await talk.say("x", "y")
        async with couriers(store, settings):
            await eventually(lambda: _count(receiver.requests, 1))
        receiver.answers = [answer(200)]
        async with couriers(store, settings):
            await app.until(2, DELIVERED)
        assert heard(receiver, app) == [said[0], said[0], said[1]]


async def test_a_change_of_the_url_is_heeded(store: Store, settings: Settings, talk: Talk) -> None:
    async with receiving() as first, receiving() as second, couriers(store, settings):
        app = await open_app(store, first.url)
        await talk.say("x")
        await app.until(1, DELIVERED)
        await store.webhooks.change(app.webhook_id, {"url": second.url}, now())
        await anyio.sleep(1.2)
        await talk.say("y")
        await app.until(2, DELIVERED)
        assert (len(first.requests), len(second.requests)) == (1, 1)


async def test_there_are_as_many_webhooks_as_may_be_and_no_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LIMIT", 2)
    apps = [await open_app(store, "https://a.example/") for _ in range(2)]
    webhook = msgspec.structs.replace(await apps[0].stored(), webhook_id="whk_more")
    assert not await store.webhooks.create(webhook, b"k")
    assert await store.webhooks.delete(apps[1].webhook_id)
    assert await store.webhooks.create(webhook, b"k")
