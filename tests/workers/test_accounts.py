"""Accounts over HTTP: logging in, refreshing, devices, the public keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from tests.workers.conftest import serving
from tests.workers.residents import code_for, log_in
from tests.workers.seeding import Rest, refusal
from workers.rest.desk import now_ms
from workers.tokens import Tokens, new_key

if TYPE_CHECKING:
    import httpx2

    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

PHONE = "+49 30 1234567"


async def at_once(rest: Rest, path: str, bodies: list[dict[str, Any]]) -> list[httpx2.Response]:
    """POST all of them together."""
    answers: list[httpx2.Response] = []

    async def post(body: dict[str, Any]) -> None:
        answers.append(await rest.call("POST", path, None, body))

    async with anyio.create_task_group() as group:
        for body in bodies:
            group.start_soon(post, body)
    return answers


async def test_a_code_opens_an_account_and_later_the_same_one(rest: Rest, store: Store) -> None:
    proof = await code_for(rest, phone=PHONE)
    login = {**proof, "device_id": "phone-1", "platform": "android", "device_name": "Ann's"}
    unnamed = await rest.call("POST", "/v1/sessions", None, login)
    assert refusal(unnamed) == (400, "validation_failed")
    answers = await at_once(rest, "/v1/sessions", [{**login, "name": "Ann"}] * 4)
    assert sorted(answer.status_code for answer in answers) == [201, 403, 403, 403]
    (first,) = [answer.json() for answer in answers if answer.status_code == 201]
    assert (first["user"]["phone"], first["user"]["name"]) == ("+49301234567", "Ann")
    assert {refusal(answer)[1] for answer in answers if answer.status_code == 403} == {"code_refused"}
    again = await log_in(rest, "laptop", "Somebody", phone="0049 (30) 123-45-67")
    assert again.user_id == first["user"]["_id"]
    listed = await rest.call("GET", "/v1/devices?limit=1", again.access_token)
    assert [(item["device_id"], item["current"]) for item in listed.json()["items"]] == [("laptop", True)]
    more = await rest.call("GET", f"/v1/devices?cursor={listed.json()['next_cursor']}", again.access_token)
    (item,) = more.json()["items"]
    assert (item["device_id"], item["platform"], item["name"]) == ("phone-1", "android", "Ann's")
    assert more.json()["next_cursor"] is None
    assert await store.db["users"].count_documents({}) == 1
    stored = str(await store.db["devices"].find().to_list())
    assert again.refresh_token.rpartition(".")[2] not in stored, "the refresh token is not written down"


async def test_nobody_learns_whether_an_account_exists_or_why_a_code_is_refused(rest: Rest) -> None:
    await log_in(rest, email="Ann@Example.ORG")
    with capture_logs():
        known, unknown = await at_once(
            rest, "/v1/verifications", [{"email": "Ann@example.org"}, {"email": "bob@example.org"}]
        )
    assert (known.status_code, unknown.status_code) == (202, 202)
    assert set(known.json()) == set(unknown.json()) == {"verification_id", "expires_at"}
    proof = await code_for(rest, email="Ann@example.org")
    wrong = f"{(int(proof['code']) + 1) % 1_000_000:06d}"
    bodies = set()
    for changed in ({"code": wrong}, {"verification_id": "ver_" + "0" * 32}, {"verification_id": "x"}):
        refused = await rest.call("POST", "/v1/sessions", None, {**proof, "device_id": "d", "name": "B", **changed})
        assert refusal(refused) == (403, "code_refused")
        bodies.add(refused.content)
    assert len(bodies) == 1
    for body in ({}, {"phone": PHONE, "email": "a@b.c"}, {"phone": "030 1234"}, {"email": "@"}):
        assert refusal(await rest.call("POST", "/v1/verifications", None, body)) == (400, "validation_failed")
    taken = await rest.call("POST", "/v1/users", rest.admin_token, {"name": "A", "email": "Ann@EXAMPLE.org"})
    assert refusal(taken) == (409, "conflict")


async def test_codes_to_one_place_are_limited_and_the_wait_is_told(rest: Rest) -> None:
    for _ in range(5):
        await code_for(rest, phone=PHONE)
    refused = await rest.call("POST", "/v1/verifications", None, {"phone": "+49301234567"})
    assert refusal(refused) == (429, "rate_limited")
    assert 3500 < int(refused.headers["retry-after"]) <= 3600
    await code_for(rest, phone="+49309999999")


async def test_a_refresh_token_is_good_once_and_a_second_use_ends_the_session(rest: Rest) -> None:
    first = await log_in(rest, phone=PHONE)
    other = await log_in(rest, "laptop", phone=PHONE)
    refreshed = await rest.call("POST", "/v1/tokens/refresh", None, {"refresh_token": first.refresh_token})
    assert refreshed.status_code == 200, refreshed.text
    pair = refreshed.json()
    assert pair["refresh_token"] != first.refresh_token
    assert (await rest.call("GET", "/v1/devices", pair["access_token"])).status_code == 200
    for forged in ("", "rt_", "rt_x.y", "x" * 300):
        refused = await rest.call("POST", "/v1/tokens/refresh", None, {"refresh_token": forged})
        assert refused.status_code in (400, 401)
    with capture_logs() as lines:
        reused = await rest.call("POST", "/v1/tokens/refresh", None, {"refresh_token": first.refresh_token})
    assert refusal(reused) == (401, "revoked")
    assert [line["device_id"] for line in lines if line["event"] == "refresh_token_reused"] == ["phone-1"]
    for token in (first.access_token, pair["access_token"]):
        assert refusal(await rest.call("GET", "/v1/devices", token)) == (401, "revoked")
    dead = await rest.call("POST", "/v1/tokens/refresh", None, {"refresh_token": pair["refresh_token"]})
    assert refusal(dead) == (401, "unauthorized")
    assert (await rest.call("GET", "/v1/devices", other.access_token)).status_code == 200
    # Two uses at once: one wins, and that there were two is noticed.
    answers = await at_once(rest, "/v1/tokens/refresh", [{"refresh_token": other.refresh_token}] * 2)
    assert sorted(answer.status_code for answer in answers) == [200, 401]
    (won,) = [answer.json() for answer in answers if answer.status_code == 200]
    assert refusal(await rest.call("GET", "/v1/devices", won["access_token"])) == (401, "revoked")


async def test_devices_are_revoked_one_by_one_all_others_and_by_logging_out(rest: Rest) -> None:
    devices = {name: await log_in(rest, name, phone=PHONE) for name in ("a", "b", "c")}
    unbound = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": devices["a"].user_id})
    unbound_token = unbound.json()["access_token"]
    a, b, c = (devices[name].access_token for name in "abc")

    async def good(token: str) -> bool:
        answer = await rest.call("GET", "/v1/users/me", token)
        return answer.status_code == 200 or refusal(answer) != (401, "revoked")

    assert (await rest.call("DELETE", "/v1/devices/b", a)).status_code == 204
    assert [await good(token) for token in (a, b, c, unbound_token)] == [True, False, True, True]
    assert refusal(await rest.call("DELETE", "/v1/devices/teapot", a)) == (404, "not_found")
    for path, code in (("/v1/devices", 400), ("/v1/devices?keep=mine", 400)):
        assert (await rest.call("DELETE", path, a)).status_code == code
    assert refusal(await rest.call("DELETE", "/v1/devices?keep=current", unbound_token)) == (403, "forbidden")
    assert refusal(await rest.call("DELETE", "/v1/sessions/current", unbound_token)) == (403, "forbidden")
    assert (await rest.call("DELETE", "/v1/devices?keep=current", a)).status_code == 204
    assert [await good(token) for token in (a, b, c, unbound_token)] == [True, False, False, False]
    assert (await rest.call("DELETE", "/v1/sessions/current", a)).status_code == 204
    assert not await good(a)
    back = await log_in(rest, "a", phone=PHONE)
    listed = await rest.call("GET", "/v1/devices", back.access_token)
    assert [item["device_id"] for item in listed.json()["items"]] == ["a"]


async def test_a_device_that_never_connected_logs_out_for_good_and_may_keep_itself(rest: Rest, store: Store) -> None:
    """Its token is the administrator's; no device is written down before it connects or logs in."""
    user_id, _ = await rest.user("Ann")

    async def issue(device_id: str) -> str:
        body = {"user_id": user_id, "device_id": device_id}
        token: str = (await rest.call("POST", "/v1/tokens", rest.admin_token, body)).json()["access_token"]
        return token

    async def status(token: str) -> int:
        return (await rest.call("GET", "/v1/users/me", token)).status_code

    phone, laptop, tablet = [await issue(name) for name in ("phone", "laptop", "tablet")]
    assert (await rest.call("DELETE", "/v1/sessions/current", phone)).status_code == 204
    assert [await status(token) for token in (phone, laptop, tablet)] == [401, 200, 200]
    assert (await rest.call("DELETE", "/v1/devices/laptop", laptop)).status_code == 204
    assert [await status(token) for token in (phone, laptop, tablet)] == [401, 401, 200]
    assert (await rest.call("DELETE", "/v1/devices?keep=current", tablet)).status_code == 204
    assert await status(tablet) == 200
    assert [device.device_id for device in (await store.devices.listed(user_id, "", 10))[0]] == ["tablet"]
    assert refusal(await rest.call("DELETE", "/v1/devices/teapot", tablet)) == (404, "not_found")
    assert await status(await issue("phone")) == 200


async def test_the_public_keys_are_open_and_may_be_kept(rest: Rest) -> None:
    found = await rest.client.get("/.well-known/jwks.json")
    assert found.status_code == 200
    assert found.headers.get_list("cache-control") == ["public, max-age=300"]
    (key,) = found.json()["keys"]
    assert (key["kid"], key["kty"], key["crv"], key["use"], "d" in key) == ("dev", "OKP", "Ed25519", "sig", False)


async def test_a_changed_key_is_the_old_ones_neighbour_first_and_its_heir_later(
    settings: Settings, store: Store, broker: Broker
) -> None:
    old, (new, _) = settings.jwt_private_key, new_key()
    token, _ = Tokens(old).sign("usr_ann", "phone", now_ms(), 60, "tok_1")
    for keys, status, shown in ((f"[{new},{old}]", 200, 2), (f"[{new}]", 401, 1)):
        changed = msgspec.structs.replace(settings, jwt_private_key=f'{{"keys":{keys}}}')
        async with serving(changed, store, broker, owner=False) as rest:
            assert (await rest.call("GET", "/v1/devices", token)).status_code == status
            assert len((await rest.client.get("/.well-known/jwks.json")).json()["keys"]) == shown
            _, fresh = await rest.user("Bob")
            assert Tokens(new).verify(fresh, now_ms()) is not None
            assert (await rest.call("GET", "/v1/devices", fresh)).status_code == 200
