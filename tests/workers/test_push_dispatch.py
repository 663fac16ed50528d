"""Tries, breakers and bounds between a job and its providers; the operator's webhook on a real socket."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio
import httpx2
import msgspec
import pytest

from protocol.records import PushJob
from protocol.webhooks import FAILURES_TO_OPEN, OPEN_SECONDS
from tests.workers.push_office import FakeProvider
from tests.workers.receiver import HANG, answer, receiving
from workers.push import dispatch
from workers.push.adapters import Delivered, Gone, Outcome, Refused, Retry, retry_after
from workers.push.dispatch import Dispatch
from workers.push.webhook import WebhookAdapter
from workers.store.push_tokens import PushToken

if TYPE_CHECKING:
    from tests.workers.receiver import Receiver

pytestmark = pytest.mark.anyio

JOB = PushJob("conv_1", "msg_1", 7, 3)
KEY = b"k" * 24
SECRET = "whsec_" + base64.b64encode(KEY).decode()


def token(kind: str = "log", address: str = "address") -> PushToken:
    now = datetime.now(UTC)
    return PushToken(user_id="bob", device_id="phone", kind=kind, address=address, registered_at=now, expires_at=now)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "quick_retry_seconds", lambda _: 0.01)
    monkeypatch.setattr(dispatch, "TRY_SECONDS", 0.2)


# --- tries and breakers ----------------------------------------------------------------------------------------------


async def test_what_passes_is_tried_three_times_at_once() -> None:
    answers: list[Outcome] = [Delivered(), Retry("status 503"), Retry("status 503")]
    provider = FakeProvider(lambda _: answers.pop())
    assert await Dispatch({"log": provider}).send(token(), JOB, 60) == Delivered()
    assert len(provider.sent) == 3


async def test_a_provider_that_names_a_time_is_not_asked_before() -> None:
    provider = FakeProvider(lambda _: Retry("status 429", 30.0))
    assert await Dispatch({"log": provider}).send(token(), JOB, 60) == Retry("status 429", 30.0)
    assert len(provider.sent) == 1


@pytest.mark.parametrize("said", [Gone(), Refused("status 400")])
async def test_what_is_final_is_not_tried_again(said: Outcome) -> None:
    provider = FakeProvider(lambda _: said)
    assert await Dispatch({"log": provider}).send(token(), JOB, 60) == said
    assert len(provider.sent) == 1


async def test_a_provider_that_is_away_is_spared_and_no_other() -> None:
    provider = FakeProvider(lambda told: Retry("away") if told.address == "away" else Delivered())
    office = Dispatch({"log": provider})
    for _ in range(FAILURES_TO_OPEN):
        await office.send(token(address="away"), JOB, 60)
    asked = len(provider.sent)
    match await office.send(token(address="away"), JOB, 60):
        case Retry(after_seconds=seconds):
            assert 50 < seconds <= OPEN_SECONDS
        case other:
            pytest.fail(str(other))
    assert len(provider.sent) == asked
    assert await office.send(token(address="there"), JOB, 60) == Delivered()


async def test_a_kind_without_an_adapter_is_refused() -> None:
    assert isinstance(await Dispatch({}).send(token(), JOB, 60), Refused)


async def test_no_more_requests_at_once_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SENDS_AT_ONCE", 2)
    under_way, most = 0, 0

    class Slow(FakeProvider):
        async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await anyio.sleep(0.02)
            under_way -= 1
            return Delivered()

    office = Dispatch({"log": Slow()})
    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(office.send, token(), JOB, 60)
    assert most == 2


async def test_providers_are_remembered_in_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PROVIDERS", 2)
    office = Dispatch({"log": FakeProvider(lambda _: Retry("away"))})
    for name in ("a", "a", "a", "b"):
        await office.send(token(address=name), JOB, 60)
    assert "lately" in str(await office.send(token(address="a"), JOB, 60)), "both are remembered"
    await office.send(token(address="c"), JOB, 60)
    assert "lately" in str(await office.send(token(address="a"), JOB, 60)), "the one used longest ago went"
    await office.send(token(address="d"), JOB, 60)
    await office.send(token(address="e"), JOB, 60)
    assert await office.send(token(address="a"), JOB, 60) == Retry("away")


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 0), ("7", 7), ("999999", 3600), ("-1", 0), ("Fri, 31 Dec 1999", 0), ("²", 0)]
)
def test_what_retry_after_says(text: str, seconds: float) -> None:
    assert retry_after({"retry-after": text} if text else {}) == seconds


# --- the operator's webhook ------------------------------------------------------------------------------------------


async def posted(receiver: Receiver) -> Outcome:
    async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
        office = Dispatch({"webhook": WebhookAdapter(client, receiver.url, SECRET)})
        return await office.send(token("webhook"), JOB, 60)


async def test_the_webhook_gets_ids_and_a_badge_signed() -> None:
    async with receiving() as receiver:
        assert await posted(receiver) == Delivered()
    (request,) = receiver.requests
    assert msgspec.json.decode(request.body) == {
        "type": "push.job",
        "data": {
            "conversation_id": "conv_1",
            "message_id": "msg_1",
            "sequence_number": 7,
            "badge": 3,
            "user_id": "bob",
            "device_id": "phone",
            "token": "address",
            "ttl_seconds": 60,
        },
    }
    signed = b".".join(
        (request.headers["webhook-id"].encode(), request.headers["webhook-timestamp"].encode(), request.body)
    )
    wanted = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert request.headers["webhook-signature"] == f"v1,{wanted}"


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (answer(200), Delivered()),
        (answer(410), Gone()),
        (answer(404), Gone()),
        (answer(429, retry_after="9"), Retry("status 429", 9.0)),
        (answer(503), Retry("status 503")),
        (answer(400), Refused("status 400")),
        (answer(307, location="http://127.0.0.1:1/"), Refused("status 307")),
        (HANG, Retry("no answer")),
        (b"nonsense\r\n\r\n", Retry("RemoteProtocolError")),
    ],
)
async def test_what_the_webhook_answers(said: bytes, outcome: Outcome) -> None:
    async with receiving(said) as receiver:
        assert await posted(receiver) == outcome
