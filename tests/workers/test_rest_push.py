"""Push tokens over HTTP: registered, shown, taken away, and gone with what they belong to."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.workers.seeding import Rest, refusal
from tests.workers.subscriber import Subscriber

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

PHONE = "/v1/devices/phone/push"
WEBHOOK = {"kind": "webhook", "token": "opaque"}
BROWSER = Subscriber()


def subscription(endpoint: str = "https://127.0.0.1:1/x", **keys: str) -> dict[str, object]:
    return {"endpoint": endpoint, "expirationTime": None, "keys": BROWSER.keys | keys}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return msgspec.structs.replace(
        settings,
        push_webhook_url="http://127.0.0.1:9/push",
        push_webhook_secret="whsec_" + "A" * 32,
        devices_per_account=2,
        push_token_days=3,
    )


async def device_token(rest: Rest, user_id: str, device_id: str = "phone") -> str:
    """An access token that is bound to a device."""
    issued = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": user_id, "device_id": device_id})
    token: str = issued.json()["access_token"]
    return token


async def test_a_device_is_registered_shown_moved_and_taken_away(rest: Rest, store: Store) -> None:
    user_id, _ = await rest.user("Ann")
    token = await device_token(rest, user_id)
    offered = await rest.call("GET", "/v1/push", token)
    assert offered.json()["kinds"] == ["log", "web_push", "webhook"]
    assert len(offered.json()["application_server_key"]) == 87
    assert refusal(await rest.call("GET", PHONE, token)) == (404, "not_found")
    put = await rest.call("PUT", PHONE, token, WEBHOOK)
    assert put.status_code == 200, put.text
    shown = put.json()
    assert (shown["device_id"], shown["kind"]) == ("phone", "webhook")
    assert "opaque" not in put.text
    times = [datetime.fromisoformat(shown[name]) for name in ("registered_at", "expires_at")]
    assert times[1] - times[0] == timedelta(days=3)
    assert (await rest.call("GET", PHONE, token)).json() == shown
    await rest.call("PUT", PHONE, token, {"kind": "log"})
    assert [found.kind for found in await store.push_tokens.listed(user_id)] == ["log"]
    assert (await rest.call("DELETE", PHONE, token)).status_code == 204
    assert refusal(await rest.call("DELETE", PHONE, token)) == (404, "not_found")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "kind"),
        ({"kind": "pigeon"}, "pigeon"),
        ({"kind": 7}, "kind"),
        ({"kind": "webhook"}, "token"),
        ({"kind": "webhook", "token": ""}, "token"),
        ({"kind": "webhook", "token": "x" * 4097}, "token"),
        ({"kind": "webhook", "token": "a b"}, "token"),
        ({"kind": "webhook", "token": {"$ne": None}}, "token"),
        ([], "object"),
        ({"kind": "fcm", "token": "abc"}, "fcm is not configured here; there are: log, web_push, webhook"),
        ({"kind": "apns", "token": "abc"}, "token"),
        ({"kind": "web_push"}, "subscription"),
        ({"kind": "web_push", "subscription": subscription(endpoint="")}, "endpoint"),
        ({"kind": "web_push", "subscription": subscription(endpoint="x" * 2049)}, "endpoint"),
        ({"kind": "web_push", "subscription": subscription(endpoint="https://10.0.0.1/")}, "endpoint: 10.0.0.1"),
        ({"kind": "web_push", "subscription": subscription(endpoint="https://a:b@127.0.0.1/")}, "endpoint"),
        ({"kind": "web_push", "subscription": subscription(p256dh="AAAA")}, "keys.p256dh"),
        ({"kind": "web_push", "subscription": subscription(auth="AAAA")}, "keys.auth"),
        ({"kind": "web_push", "subscription": subscription(auth="!")}, "Base64url"),
    ],
)
async def test_what_is_no_token_is_refused_in_words(rest: Rest, store: Store, body: object, said: str) -> None:
    user_id, token = await rest.user("Ann")
    answer = await rest.call("PUT", PHONE, token, body)
    assert refusal(answer) == (400, "validation_failed")
    assert said in answer.json()["error"]["message"]
    assert await store.push_tokens.listed(user_id) == []


async def test_a_device_speaks_for_itself_alone(rest: Rest) -> None:
    user_id, _ = await rest.user("Ann")
    other = await device_token(rest, user_id, "tablet")
    for method, body in (("PUT", WEBHOOK), ("GET", None), ("DELETE", None)):
        assert refusal(await rest.call(method, PHONE, other, body)) == (403, "forbidden")


async def test_one_device_too_many_is_refused(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    for name in ("a", "b"):
        body = {"kind": "webhook", "token": name}
        assert (await rest.call("PUT", f"/v1/devices/{name}/push", token, body)).status_code == 200
    answer = await rest.call("PUT", "/v1/devices/c/push", token, WEBHOOK)
    assert refusal(answer) == (409, "conflict")
    assert (await rest.call("PUT", "/v1/devices/b/push", token, WEBHOOK)).status_code == 200, "it is there already"


async def test_an_address_belongs_to_whoever_registered_it_last(rest: Rest) -> None:
    first, _ = await rest.user("Ann")
    second, _ = await rest.user("Bob")
    tokens = [await device_token(rest, user) for user in (first, second)]
    for token in tokens:
        assert (await rest.call("PUT", PHONE, token, WEBHOOK)).status_code == 200
    assert (await rest.call("GET", PHONE, tokens[0])).status_code == 404
    assert (await rest.call("GET", PHONE, tokens[1])).status_code == 200


@pytest.mark.parametrize("path", ["/v1/sessions/current", "/v1/devices/phone", "/v1/devices?keep=none"])
async def test_logging_out_or_revoking_ends_the_pushes(rest: Rest, store: Store, path: str) -> None:
    user_id, _ = await rest.user("Ann")
    token = await device_token(rest, user_id)
    await rest.call("PUT", PHONE, token, WEBHOOK)
    assert (await rest.call("DELETE", path, token)).status_code == 204
    assert await store.push_tokens.listed(user_id) == []


async def test_revoking_all_others_leaves_ones_own(rest: Rest, store: Store) -> None:
    user_id, _ = await rest.user("Ann")
    for name in ("phone", "tablet"):
        body = {"kind": "webhook", "token": name}
        await rest.call("PUT", f"/v1/devices/{name}/push", await device_token(rest, user_id, name), body)
    mine = await device_token(rest, user_id)
    assert (await rest.call("DELETE", "/v1/devices?keep=current", mine)).status_code == 204
    assert [token.device_id for token in await store.push_tokens.listed(user_id)] == ["phone"]


async def test_a_deleted_account_keeps_no_token(rest: Rest, store: Store) -> None:
    user_id, token = await rest.user("Ann")
    await rest.call("PUT", PHONE, token, WEBHOOK)
    answer = await rest.call("DELETE", f"/v1/users/{user_id}", rest.admin_token)
    assert answer.json()["finished"] is True
    assert await store.push_tokens.listed(user_id) == []


async def test_the_export_says_how_devices_are_told(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    await rest.call("PUT", PHONE, token, WEBHOOK)
    export = await rest.call("GET", "/v1/users/me/export", token)
    lines = [msgspec.json.decode(line) for line in export.content.splitlines()]
    (push,) = [line["push"] for line in lines if line["type"] == "push"]
    assert (push["device_id"], push["kind"], push["address"]) == ("phone", "webhook", "opaque")


async def test_a_browser_registers_as_its_push_api_says(rest: Rest, store: Store) -> None:
    user_id, token = await rest.user("Ann")
    put = await rest.call("PUT", PHONE, token, {"kind": "web_push", "subscription": subscription()})
    assert put.status_code == 200, put.text
    (kept,) = await store.push_tokens.listed(user_id)
    assert (kept.kind, kept.address) == ("web_push", "https://127.0.0.1:1/x")
    assert {"p256dh": kept.p256dh, "auth": kept.auth} == BROWSER.keys
