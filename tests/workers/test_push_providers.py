"""FCM and APNs against servers that the test runs: what they get, who we say we are, what their answers mean."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import anyio
import anyio.abc
import h2.config
import h2.connection
import h2.events
import httpx2
import msgspec
import pytest
import trustme
from anyio.streams.tls import TLSListener
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from protocol.records import PushJob
from tests.workers.receiver import Request, answer, receiving
from workers.push.adapters import Delivered, Gone, KeyUnfit, Outcome, Refused, Retry
from workers.push.apns import LOC_KEY, ApnsAdapter
from workers.push.fcm import FcmAdapter
from workers.push.providers import kinds, open_adapters
from workers.push.web_push import topic_of
from workers.settings import SettingError, load_settings
from workers.store.push_tokens import PushToken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

JOB = PushJob("conv_1", "msg_1", 7, 3)
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def token(kind: str) -> PushToken:
    now = datetime.now(UTC)
    return PushToken(user_id="bob", device_id="phone", kind=kind, address="abcdef", registered_at=now, expires_at=now)


# --- FCM -------------------------------------------------------------------------------------------------------------


def credentials(url: str) -> str:
    account = {
        "type": "service_account",
        "project_id": "our-project",
        "private_key": pem(RSA_KEY),
        "client_email": "push@our-project.example.com",
        "token_uri": f"{url}/token",
    }
    return msgspec.json.encode(account).decode()


class Firebase:
    """Sells access tokens to whoever proves to be the account, and takes messages of whoever has one."""

    def __init__(self) -> None:
        self.said = answer(200, b'{"name":"projects/our-project/messages/1"}')
        self.messages: list[Any] = []
        self.sold = 0

    async def decide(self, request: Request) -> bytes:
        if request.target == "/token":
            form = parse_qs(request.body.decode())
            assert form["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
            claims = jwt.decode(
                form["assertion"][0], RSAKey.import_key(public_pem(RSA_KEY)), algorithms=["RS256"]
            ).claims
            assert claims["iss"] == "push@our-project.example.com"
            assert claims["aud"].endswith("/token")
            assert claims["scope"] == "https://www.googleapis.com/auth/firebase.messaging"
            self.sold += 1
            return answer(200, b'{"access_token":"bought","expires_in":3599,"token_type":"Bearer"}')
        assert request.target == "/v1/projects/our-project/messages:send"
        if request.headers["authorization"] != "Bearer bought":
            return answer(401)
        self.messages.append(msgspec.json.decode(request.body)["message"])
        return self.said


@asynccontextmanager
async def firebase() -> AsyncIterator[tuple[Firebase, FcmAdapter]]:
    there = Firebase()
    async with receiving() as receiver, httpx2.AsyncClient(timeout=None, trust_env=False) as client:
        receiver.decide = there.decide
        url = f"http://127.0.0.1:{receiver.port}"
        yield there, FcmAdapter(client, credentials(url), url)


async def test_fcm_gets_a_data_message_collapsed_by_conversation_for_one_access_token() -> None:
    async with firebase() as (there, adapter):
        assert await adapter.send(token("fcm"), JOB, 60) == Delivered()
        assert await adapter.send(token("fcm"), JOB, 60) == Delivered()
    assert there.sold == 1
    assert there.messages[0] == {
        "token": "abcdef",
        "data": {"conversation_id": "conv_1", "message_id": "msg_1", "sequence_number": "7", "badge": "3"},
        "android": {"collapse_key": "conv_1", "priority": "high", "ttl": "60s"},
    }


def failure(status: int, code: str, **headers: str) -> bytes:
    detail = {"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": code}
    return answer(status, msgspec.json.encode({"error": {"code": status, "details": [detail]}}), **headers)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (failure(404, "UNREGISTERED"), Gone()),
        (failure(404, ""), Refused("status 404")),
        (failure(400, "INVALID_ARGUMENT"), Refused("status 400 INVALID_ARGUMENT")),
        (failure(403, "SENDER_ID_MISMATCH"), Refused("status 403 SENDER_ID_MISMATCH")),
        (failure(429, "QUOTA_EXCEEDED", retry_after="60"), Retry("status 429", 60.0)),
        (failure(503, "UNAVAILABLE"), Retry("status 503")),
        (answer(500, b"<html>"), Retry("status 500")),
        (answer(401), Retry("status 401")),
    ],
)
async def test_what_fcm_answers(said: bytes, outcome: Outcome) -> None:
    async with firebase() as (there, adapter):
        there.said = said
        assert await adapter.send(token("fcm"), JOB, 60) == outcome


async def test_an_access_token_that_fcm_does_not_take_any_more_is_bought_anew() -> None:
    async with firebase() as (there, adapter):
        there.said = answer(401)
        await adapter.send(token("fcm"), JOB, 60)
        there.said = answer(200)
        assert await adapter.send(token("fcm"), JOB, 60) == Delivered()
    assert there.sold == 2


@pytest.mark.parametrize("text", ["", "{}", '{"client_email":"a","private_key":"b","project_id":"c"}', "[]"])
async def test_what_is_no_service_account(text: str) -> None:
    async with httpx2.AsyncClient() as client:
        with pytest.raises(KeyUnfit):
            FcmAdapter(client, text)


# --- APNs ------------------------------------------------------------------------------------------------------------


class Apple:
    """HTTP/2 over TLS, a status and a reason for every request."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], Any]] = []
        self.status, self.body = 200, b""

    async def converse(self, client: anyio.abc.ByteStream) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        heads: dict[int, dict[str, str]] = {}
        bodies: dict[int, bytes] = {}
        async with client:
            await client.send(connection.data_to_send())
            while True:
                try:
                    data = await client.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        heads[event.stream_id] = {str(name): str(value) for name, value in event.headers}
                        bodies[event.stream_id] = b""
                    elif isinstance(event, h2.events.DataReceived):
                        bodies[event.stream_id] += event.data
                    elif isinstance(event, h2.events.StreamEnded):
                        stream = event.stream_id
                        self.requests.append((heads[stream], msgspec.json.decode(bodies[stream])))
                        connection.send_headers(stream, [(":status", str(self.status))])
                        connection.send_data(stream, self.body, end_stream=True)
                await client.send(connection.data_to_send())


@asynccontextmanager
async def apple() -> AsyncIterator[tuple[Apple, ApnsAdapter]]:
    authority = trustme.CA()
    here = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    here.set_alpn_protocols(["h2"])
    authority.issue_cert("127.0.0.1").configure_cert(here)
    there = ssl.create_default_context()
    authority.configure_trust(there)
    service = Apple()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(TLSListener(listener, here).serve, service.converse)
        async with httpx2.AsyncClient(timeout=None, trust_env=False, http2=True, verify=there) as client:
            url = f"https://127.0.0.1:{port}"
            yield service, ApnsAdapter(client, pem(EC_KEY), "KEY1234567", "TEAM123456", "com.example.app", url)
        group.cancel_scope.cancel()


async def test_apns_gets_an_alert_without_a_word_over_http_2() -> None:
    async with apple() as (there, adapter):
        assert await adapter.send(token("apns"), JOB, 60) == Delivered()
        assert await adapter.send(token("apns"), JOB, 60) == Delivered()
    (headers, body), (later, _) = there.requests
    assert (headers[":method"], headers[":path"]) == ("POST", "/3/device/abcdef")
    wanted = {
        "apns-topic": "com.example.app",
        "apns-push-type": "alert",
        "apns-priority": "10",
        "apns-collapse-id": topic_of("conv_1"),
    }
    assert wanted.items() <= headers.items()
    proof = headers["authorization"].removeprefix("bearer ")
    decoded = jwt.decode(proof, ECKey.import_key(public_pem(EC_KEY)), algorithms=["ES256"])
    assert decoded.header["kid"] == "KEY1234567"
    assert decoded.claims["iss"] == "TEAM123456"
    assert 0 <= int(headers["apns-expiration"]) - decoded.claims["iat"] - 60 <= 5
    assert later["authorization"] == headers["authorization"], "Apple wants it used again"
    aps = body.pop("aps")
    assert body == {"conversation_id": "conv_1", "message_id": "msg_1", "sequence_number": 7, "badge": 3}
    assert (aps["alert"], aps["badge"]) == ({"loc-key": LOC_KEY}, 3)


@pytest.mark.parametrize(
    ("status", "reason", "outcome"),
    [
        (410, "Unregistered", Gone()),
        (400, "BadDeviceToken", Refused("status 400 BadDeviceToken")),
        (400, "DeviceTokenNotForTopic", Refused("status 400 DeviceTokenNotForTopic")),
        (404, "BadPath", Refused("status 404 BadPath")),
        (403, "ExpiredProviderToken", Retry("ExpiredProviderToken")),
        (429, "TooManyRequests", Retry("status 429")),
        (503, "ServiceUnavailable", Retry("status 503")),
    ],
)
async def test_what_apns_answers(status: int, reason: str, outcome: Outcome) -> None:
    async with apple() as (there, adapter):
        there.status, there.body = status, msgspec.json.encode({"reason": reason})
        assert await adapter.send(token("apns"), JOB, 60) == outcome


@pytest.mark.parametrize("text", ["", "nonsense", pem(RSA_KEY), public_pem(EC_KEY).decode()])
async def test_what_is_no_apns_key(text: str) -> None:
    async with httpx2.AsyncClient() as client:
        with pytest.raises(KeyUnfit):
            ApnsAdapter(client, text, "KEY", "TEAM", "topic")


# --- what is configured ----------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "TRIREME_ENV": "dev",
    "TRIREME_PUSH_FCM_CREDENTIALS": credentials("http://127.0.0.1:1"),
    "TRIREME_PUSH_APNS_KEY": pem(EC_KEY),
    "TRIREME_PUSH_APNS_KEY_ID": "KEY",
    "TRIREME_PUSH_APNS_TEAM_ID": "TEAM",
    "TRIREME_PUSH_APNS_TOPIC": "com.example.app",
    "TRIREME_PUSH_WEBHOOK_URL": "http://127.0.0.1:1/",
    "TRIREME_PUSH_WEBHOOK_SECRET": "whsec_" + "A" * 32,
}


async def test_what_is_configured_has_an_adapter() -> None:
    settings = load_settings(ENVIRONMENT, ["push"])
    async with open_adapters(settings) as adapters:
        assert list(adapters) == kinds(settings) == ["log", "web_push", "fcm", "apns", "webhook"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRIREME_PUSH_FCM_CREDENTIALS", "{}"),
        ("TRIREME_PUSH_APNS_KEY", "x"),
        ("TRIREME_PUSH_VAPID_PRIVATE_KEY", "A" * 43),
    ],
)
async def test_a_key_that_is_none_is_one_line_that_names_the_setting(name: str, value: str) -> None:
    settings = load_settings(ENVIRONMENT | {name: value}, ["push"])
    with pytest.raises(SettingError, match=name):
        async with open_adapters(settings):
            pass


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("TRIREME_PUSH_APNS_TOPIC", "TRIREME_PUSH_APNS_TOPIC is not set"),
        ("TRIREME_PUSH_WEBHOOK_SECRET", "TRIREME_PUSH_WEBHOOK_SECRET is not set"),
    ],
)
def test_half_a_provider_is_none(gone: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        load_settings({name: value for name, value in ENVIRONMENT.items() if name != gone}, ["push"])
