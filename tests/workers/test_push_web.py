"""Web Push against a push service that the test runs: it checks who sends and keeps what it gets; devices decrypt."""

from __future__ import annotations

import base64
import re
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest
import trustme
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from protocol import codec
from protocol.records import PushJob
from tests.workers.receiver import answer, receiving
from tests.workers.subscriber import Subscriber, base64url, proven
from workers.egress import open_egress
from workers.push.adapters import Delivered, Gone, KeyUnfit, Outcome, Refused, Retry
from workers.push.web_push import Vapid, WebPushAdapter, check_keys, new_vapid_key, topic_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.workers.receiver import Receiver

pytestmark = pytest.mark.anyio

JOB = PushJob("conv_1", "msg_1", 7, 3)
SUBJECT = "mailto:operator@example.com"
LOOPBACK = "127.0.0.0/8"


class Service(NamedTuple):
    """A push service, and who sends to it."""

    receiver: Receiver
    adapter: WebPushAdapter
    vapid: Vapid
    url: str


@asynccontextmanager
async def service(*answers: bytes) -> AsyncIterator[Service]:
    """Over TLS, as all are."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    here, there = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    certificate.configure_cert(here)
    authority.configure_trust(there)
    private, _ = new_vapid_key()
    vapid = Vapid(private, SUBJECT)
    async with (
        receiving(*(answers or (answer(201),)), tls=here) as receiver,
        open_egress(LOOPBACK, tls=there) as egress,
    ):
        url = f"https://127.0.0.1:{receiver.port}/send/abc?x=1"
        yield Service(receiver, WebPushAdapter(egress, vapid), vapid, url)


async def test_a_job_reaches_the_device_through_a_push_service_that_reads_nothing() -> None:
    device = Subscriber()
    async with service() as there:
        assert await there.adapter.send(device.token(there.url), JOB, 60) == Delivered()
        (request,) = there.receiver.requests
        assert request.target == "/send/abc?x=1"
        assert proven(request.headers["authorization"], there.vapid.public_key, there.url)["sub"] == SUBJECT
        wanted = {"ttl": "60", "content-encoding": "aes128gcm", "urgency": "high", "topic": topic_of("conv_1")}
        assert wanted.items() <= request.headers.items()
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,32}", request.headers["topic"])
        assert b"conv_1" not in request.body
        assert device.decrypt(request.body) == codec.encode_value(JOB)
        await there.adapter.send(device.token(there.url), JOB, 60)
        assert there.receiver.requests[1].body != request.body, "each has keys of its own"


async def test_another_device_cannot_read_it() -> None:
    async with service() as there:
        await there.adapter.send(Subscriber().token(there.url), JOB, 60)
        with pytest.raises(InvalidTag):
            Subscriber().decrypt(there.receiver.requests[0].body)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (answer(200), Delivered()),
        (answer(202), Delivered()),
        (answer(404), Gone()),
        (answer(410), Gone()),
        (answer(429, retry_after="120"), Retry("status 429", 120.0)),
        (answer(500), Retry("status 500")),
        (answer(403), Refused("status 403")),
        (answer(413), Refused("status 413")),
        (answer(301, location="https://127.0.0.1/"), Refused("status 301")),
    ],
)
async def test_what_a_push_service_answers(said: bytes, outcome: Outcome) -> None:
    async with service(said) as there:
        assert await there.adapter.send(Subscriber().token(there.url), JOB, 60) == outcome


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/x", "http://169.254.169.254/x", "https://[::1]/x"])
async def test_h20_a_subscription_leads_to_no_private_address(url: str) -> None:
    private, _ = new_vapid_key()
    async with open_egress("") as egress:
        outcome = await WebPushAdapter(egress, Vapid(private, SUBJECT)).send(Subscriber().token(url), JOB, 60)
    assert isinstance(outcome, Refused)


async def test_each_push_service_has_a_breaker_of_its_own() -> None:
    async with service() as there:
        names = {
            there.adapter.provider(Subscriber().token(f"https://{host}/x")) for host in ("a.example", "b.example:8443")
        }
    assert names == {"https://a.example", "https://b.example:8443"}


def test_the_example_of_rfc_8291_decrypts() -> None:
    """Appendix A: that what decrypts here is what the RFC means."""
    device = Subscriber()
    scalar = base64.urlsafe_b64decode("q1dXpw3UpT5VOmu_cf_v6ih07Aems3njxI-JWgLcM94=")
    device.private = ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP256R1())
    device.public = device.private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    device.auth = base64.urlsafe_b64decode("BTBZMqHH6r4Tts7J_aSIgg==")
    body = (
        "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_"
        "yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
    )
    assert device.decrypt(base64.urlsafe_b64decode(body)) == b"When I grow up, I want to be a watermelon"


@pytest.mark.parametrize(
    ("p256dh", "auth", "said"),
    [
        ("", "", "auth"),
        ("!!", "AAAAAAAAAAAAAAAAAAAAAA", "Base64url"),
        (base64url(b"\x04" + b"\0" * 64), "AAAAAAAAAAAAAAAAAAAAAA", "p256dh"),
        (base64url(b"\x02" + b"\1" * 32), "AAAAAAAAAAAAAAAAAAAAAA", "p256dh"),
        (base64url(Subscriber().public), "AAAA", "auth"),
    ],
    ids=["empty", "no base64url", "no point", "a short point", "a short secret"],
)
def test_what_is_no_subscription(p256dh: str, auth: str, said: str) -> None:
    assert said in check_keys(p256dh, auth)


def test_keys_of_a_browser_pass() -> None:
    device = Subscriber()
    assert check_keys(base64url(device.public), base64url(device.auth)) == ""
    assert check_keys(base64.urlsafe_b64encode(device.public).decode(), base64url(device.auth)) == ""


@pytest.mark.parametrize("text", ["", "A" * 43, "A" * 42, "!" * 43])
def test_what_is_no_vapid_key(text: str) -> None:
    with pytest.raises(KeyUnfit):
        Vapid(text, SUBJECT)
