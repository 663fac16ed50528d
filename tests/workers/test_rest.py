"""The HTTP API through real HTTP, with the real shard owner behind it: every route, every refusal, no oracle."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import msgspec
import pytest
from joserfc import jwt
from joserfc.jwk import OKPKey

from protocol import dev_keys, keys
from tests.workers.conftest import serving
from tests.workers.relay import open_relay
from tests.workers.seeding import Rest, refusal
from workers.rest import app
from workers.settings import SettingError, Settings
from workers.store import open_store

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.store import Store

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:EdDSA is deprecated")]

UNKNOWN = "conv_" + "0" * 28


# --- users and tokens ------------------------------------------------------------------------------------------------


async def test_a_user_is_created_as_the_seed_shows_it(rest: Rest) -> None:
    created = await rest.call("POST", "/v1/users", rest.admin_token, {"name": "Ann", "phone": "+49 30 1"})
    assert created.status_code == 201
    user = created.json()
    assert user.pop("_id").startswith("usr_")
    assert user.pop("created_at").endswith("Z")
    assert user == {"phone": "+49 30 1", "email": None, "name": "Ann", "status": "offline"}


async def test_a_phone_or_email_belongs_to_one_account(rest: Rest) -> None:
    body = {"name": "Ann", "phone": "+491", "email": "ann@example.org"}
    assert (await rest.call("POST", "/v1/users", rest.admin_token, body)).status_code == 201
    for field in ("phone", "email"):
        again = await rest.call("POST", "/v1/users", rest.admin_token, {"name": "Bob", field: body[field]})
        assert refusal(again) == (409, "conflict")
        assert field in again.json()["error"]["message"]


async def test_a_token_verifies_with_the_public_key_and_opens_the_api(rest: Rest) -> None:
    user_id, _ = await rest.user("Ann")
    issued = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": user_id, "device_id": "phone-1"})
    assert issued.status_code == 201
    assert set(issued.json()) == {"access_token", "expires_at"}
    token = issued.json()["access_token"]
    claims = jwt.decode(token, OKPKey.import_key(json.loads(dev_keys.PUBLIC_JWK)), algorithms=["EdDSA"]).claims
    assert (claims["sub"], claims["device_id"], claims["exp"] - claims["iat"]) == (user_id, "phone-1", 86_400)
    assert (await rest.call("GET", "/v1/conversations", token)).status_code == 200


async def test_no_token_for_an_unknown_user(rest: Rest) -> None:
    refused = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": "usr_nobody"})
    assert refusal(refused) == (404, "not_found")


# --- who may call ----------------------------------------------------------------------------------------------------

ROUTES = [
    ("POST", "/v1/users", {"name": "x"}),
    ("POST", "/v1/tokens", {"user_id": "x"}),
    ("POST", "/v1/conversations", {"type": "group", "participants": ["x"]}),
    ("GET", "/v1/conversations", None),
    ("GET", f"/v1/conversations/{UNKNOWN}", None),
    ("GET", f"/v1/conversations/{UNKNOWN}/messages", None),
    ("POST", f"/v1/conversations/{UNKNOWN}/participants", {"user_ids": ["x"]}),
    ("DELETE", f"/v1/conversations/{UNKNOWN}/participants/x", None),
]


async def test_without_a_good_token_every_route_answers_the_same_401(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    head, payload, signature = token.split(".")
    forged = f"{head}.{payload}.{signature[:-4]}AAAA"
    bodies = set()
    for method, path, body in ROUTES:
        for bad in (None, "non sense", "nonsense", forged, "x" * 5000):
            refused = await rest.call(method, path, bad, body)
            assert refusal(refused) == (401, "unauthorized"), (method, path, bad)
            assert refused.headers["www-authenticate"] == "Bearer"
            bodies.add(refused.content)
    assert len(bodies) == 1


async def test_users_do_not_administrate_and_the_administrator_is_no_user(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    for method, path, body in ROUTES[:2]:
        assert refusal(await rest.call(method, path, token, body)) == (401, "unauthorized")
    for method, path, body in ROUTES[3:]:
        assert refusal(await rest.call(method, path, rest.admin_token, body)) == (401, "unauthorized")


# --- 1:1 conversations -----------------------------------------------------------------------------------------------


async def test_two_people_have_one_conversation_whoever_asks(rest: Rest) -> None:
    ann, ann_token = await rest.user("Ann")
    bob, bob_token = await rest.user("Bob")
    created = await rest.call("POST", "/v1/conversations", ann_token, {"type": "1:1", "participants": [bob]})
    assert created.status_code == 201
    body = created.json()
    assert body["_id"] == keys.direct_conversation_id(ann, bob)
    assert (body["type"], body["user_id"], body["agent_id"]) == ("1:1", ann, "")
    assert sorted(body["participants"]) == sorted([ann, bob])
    again = await rest.call("POST", "/v1/conversations", bob_token, {"type": "1:1", "participants": [bob, ann]})
    assert again.status_code == 200
    assert again.json()["_id"] == body["_id"]
    for token in (ann_token, bob_token):
        listed = (await rest.call("GET", "/v1/conversations", token)).json()
        assert [(item["_id"], item["unread_count"], item["last_sequence_number"]) for item in listed["items"]] == [
            (body["_id"], 0, 0)
        ]
        assert listed["next_cursor"] is None


async def test_a_one_to_one_conversation_keeps_its_two(rest: Rest) -> None:
    ann, token = await rest.user("Ann")
    bob, _ = await rest.user("Bob")
    cat, _ = await rest.user("Cat")
    for participants in ([ann], [bob, cat], [ann, bob, cat]):
        refused = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": participants})
        assert refusal(refused) == (400, "validation_failed")
    created = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": [bob]})
    path = f"/v1/conversations/{created.json()['_id']}/participants"
    assert refusal(await rest.call("POST", path, token, {"user_ids": [cat]})) == (403, "forbidden")
    assert refusal(await rest.call("DELETE", f"{path}/{bob}", token)) == (403, "forbidden")


async def test_unknown_users_cannot_be_named(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    for kind in ("1:1", "group"):
        refused = await rest.call("POST", "/v1/conversations", token, {"type": kind, "participants": ["usr_nobody"]})
        assert refusal(refused) == (400, "validation_failed")
    group = await rest.group(token)
    refused = await rest.call("POST", f"/v1/conversations/{group}/participants", token, {"user_ids": ["usr_nobody"]})
    assert refusal(refused) == (400, "validation_failed")


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_a_group_is_made_grown_and_left(rest: Rest) -> None:
    ann, ann_token = await rest.user("Ann")
    bob, bob_token = await rest.user("Bob")
    cat, cat_token = await rest.user("Cat")
    group = await rest.group(ann_token, bob, bob)
    path = f"/v1/conversations/{group}"
    seen = (await rest.call("GET", path, bob_token)).json()
    assert seen["participants"] == [ann, bob]
    assert (seen["last_sequence_number"], seen["unread_count"]) == (1, 0)
    assert refusal(await rest.call("GET", path, cat_token)) == (404, "conversation_not_found")

    refused = await rest.call("POST", f"{path}/participants", bob_token, {"user_ids": [cat]})
    assert refusal(refused) == (403, "forbidden")
    added = await rest.call("POST", f"{path}/participants", ann_token, {"user_ids": [cat, cat]})
    assert added.status_code == 200
    assert added.json()["participants"] == [ann, bob, cat]
    messages = (await rest.call("GET", f"{path}/messages", cat_token)).json()["items"]
    assert [(item["sequence_number"], json.loads(item["content"])["event"]) for item in messages] == [(2, "added")]

    left = await rest.call("DELETE", f"{path}/participants/{cat}", cat_token)
    assert left.status_code == 200
    assert left.json()["participants"] == [ann, bob]
    assert refusal(await rest.call("GET", path, cat_token)) == (404, "conversation_not_found")
    assert (await rest.call("GET", "/v1/conversations", cat_token)).json()["items"] == []
    # Who has left still reads up to there.
    events = (await rest.call("GET", f"{path}/messages", cat_token)).json()["items"]
    assert [json.loads(item["content"])["event"] for item in events] == ["left", "added"]

    removed = await rest.call("DELETE", f"{path}/participants/{bob}", ann_token)
    assert removed.json()["participants"] == [ann]
    assert refusal(await rest.call("DELETE", f"{path}/participants/{bob}", ann_token)) == (404, "not_found")


async def test_a_group_has_at_most_a_hundred(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    others = [
        (await rest.call("POST", "/v1/users", rest.admin_token, {"name": f"u{n}"})).json()["_id"] for n in range(100)
    ]
    full = await rest.call("POST", "/v1/conversations", token, {"type": "group", "participants": others})
    assert refusal(full) == (409, "group_full")
    group = await rest.group(token, *others[:99])
    path = f"/v1/conversations/{group}/participants"
    assert refusal(await rest.call("POST", path, token, {"user_ids": others[99:]})) == (409, "group_full")
    assert (await rest.call("DELETE", f"{path}/{others[0]}", token)).status_code == 200
    assert (await rest.call("POST", path, token, {"user_ids": others[99:]})).status_code == 200


async def test_the_administrator_creates_for_the_first_participant(rest: Rest) -> None:
    ann, token = await rest.user("Ann")
    bob, _ = await rest.user("Bob")
    created = await rest.call(
        "POST", "/v1/conversations", rest.admin_token, {"type": "group", "participants": [ann, bob]}
    )
    assert created.status_code == 201
    assert created.json()["user_id"] == ann
    added = await rest.call("DELETE", f"/v1/conversations/{created.json()['_id']}/participants/{bob}", token)
    assert added.status_code == 200


async def test_a_repeated_request_with_its_key_makes_one_group(rest: Rest) -> None:
    _, ann = await rest.user("Ann")
    _, bob = await rest.user("Bob")
    body: dict[str, Any] = {"type": "group", "participants": [(await rest.user("Cat"))[0]]}
    made = [await rest.call("POST", "/v1/conversations", ann, body, Idempotency_Key="k1") for _ in range(2)]
    other = await rest.call("POST", "/v1/conversations", bob, body, Idempotency_Key="k1")
    assert [response.status_code for response in (*made, other)] == [201, 201, 201]
    assert made[0].json()["_id"] == made[1].json()["_id"] != other.json()["_id"]
    assert len((await rest.call("GET", "/v1/conversations", ann)).json()["items"]) == 1
    refused = await rest.call("POST", "/v1/conversations", ann, body, Idempotency_Key="not a key")
    assert refusal(refused) == (400, "validation_failed")


async def test_lists_are_paged_newest_activity_first(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    groups = [await rest.group(token) for _ in range(5)]
    bob, _ = await rest.user("Bob")
    await anyio.sleep(0.05)
    await rest.call("POST", f"/v1/conversations/{groups[1]}/participants", token, {"user_ids": [bob]})
    wanted = [groups[1], *reversed([group for group in groups if group != groups[1]])]
    with anyio.fail_after(5):
        while await _all_pages(rest, token) != wanted:  # noqa: ASYNC110 - the activity is flushed within a second
            await anyio.sleep(0.1)


async def _all_pages(rest: Rest, token: str) -> list[str]:
    found: list[str] = []
    query = "limit=2"
    while True:
        page = (await rest.call("GET", f"/v1/conversations?{query}", token)).json()
        assert len(page["items"]) <= 2
        found += [item["_id"] for item in page["items"]]
        if page["next_cursor"] is None:
            return found
        query = f"limit=2&cursor={page['next_cursor']}"


async def test_messages_are_paged_newest_first(rest: Rest) -> None:
    ann, token = await rest.user("Ann")
    bob, _ = await rest.user("Bob")
    group = await rest.group(token)
    path = f"/v1/conversations/{group}"
    for _ in range(2):
        assert (await rest.call("POST", f"{path}/participants", token, {"user_ids": [bob]})).status_code == 200
        assert (await rest.call("DELETE", f"{path}/participants/{bob}", token)).status_code == 200
    newest = (await rest.call("GET", f"{path}/messages?limit=3", token)).json()
    assert [item["sequence_number"] for item in newest["items"]] == [5, 4, 3]
    assert {"_id", "conversation_id", "sender_id", "type", "content", "timestamp", "status", "created_at"} <= set(
        newest["items"][0]
    )
    assert not {"digest", "countable", "idempotency_key"} & set(newest["items"][0])
    for name in ("cursor", "before_sequence"):
        rest_of_it = (await rest.call("GET", f"{path}/messages?limit=3&{name}={newest['next_cursor']}", token)).json()
        assert [item["sequence_number"] for item in rest_of_it["items"]] == [2, 1]
        assert rest_of_it["next_cursor"] is None
    assert ann


async def test_foreign_and_unknown_conversations_answer_the_same(rest: Rest) -> None:
    _, ann = await rest.user("Ann")
    bob, bob_token = await rest.user("Bob")
    foreign = await rest.group(ann)
    for method, suffix, body in (
        ("GET", "", None),
        ("GET", "/messages", None),
        ("POST", "/participants", {"user_ids": [bob]}),
        ("DELETE", f"/participants/{bob}", None),
    ):
        answers = [
            await rest.call(method, f"/v1/conversations/{name}{suffix}", bob_token, body) for name in (foreign, UNKNOWN)
        ]
        assert [refusal(answer) for answer in answers] == [(404, "conversation_not_found")] * 2, (method, suffix)
        assert answers[0].content == answers[1].content


# --- bad input -------------------------------------------------------------------------------------------------------


WRONG_SHAPES: list[Any] = [
    ("/v1/users", {}),
    ("/v1/users", []),
    ("/v1/users", "x"),
    ("/v1/users", {"name": ""}),
    ("/v1/users", {"name": 7}),
    ("/v1/users", {"name": "x" * 129}),
    ("/v1/users", {"name": "x", "email": "nobody"}),
    ("/v1/users", {"name": "x", "phone": "$ne"}),
    ("/v1/users", {"name": "x", "phone": {"$ne": None}}),
    ("/v1/tokens", {"user_id": {"$gt": ""}}),
    ("/v1/tokens", {"user_id": "u", "device_id": "a b"}),
    ("/v1/conversations", {"type": "party", "participants": ["x"]}),
    ("/v1/conversations", {"type": "group", "participants": []}),
    ("/v1/conversations", {"type": "group", "participants": ["x" * 65]}),
    ("/v1/conversations", {"type": "group", "participants": "x"}),
]


async def test_a_body_of_another_shape_is_validation_failed(rest: Rest) -> None:
    for path, body in WRONG_SHAPES:
        refused = await rest.call("POST", path, rest.admin_token, body)
        assert refusal(refused) == (400, "validation_failed"), (path, body)


NO_JSON: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"name":"\\ud800"}',
    b'{"name":"x"}trailing',
    b"[" * 10_000,
    b'{"name":1' + b"0" * 100_000 + b"}",
]


async def test_a_body_that_is_no_json_is_a_400(rest: Rest) -> None:
    headers = {"Authorization": f"Bearer {rest.admin_token}", "Content-Type": "application/json"}
    for content in NO_JSON:
        refused = await rest.client.post("/v1/users", content=content, headers=headers)
        assert refusal(refused) == (400, "validation_failed"), content[:20]


async def test_bodies_are_small_plain_json(rest: Rest) -> None:
    headers = {"Authorization": f"Bearer {rest.admin_token}", "Content-Type": "application/json"}
    big = json.dumps({"name": "x" * (1024 * 1024)}).encode()
    assert refusal(await rest.client.post("/v1/users", content=big, headers=headers)) == (413, "too_large")
    text = await rest.client.post(
        "/v1/users", content=b'{"name":"x"}', headers=headers | {"Content-Type": "text/plain"}
    )
    assert refusal(text) == (415, "validation_failed")
    zipped = await rest.client.post("/v1/users", content=b"\x1f\x8b", headers=headers | {"Content-Encoding": "gzip"})
    assert refusal(zipped) == (415, "validation_failed")
    twin = await rest.client.post("/v1/users", content=b'{"name":"x","more":1}', headers=headers)
    assert twin.status_code == 201


WRONG_QUERIES: list[Any] = [
    "limit=0",
    "limit=-1",
    "limit=101",
    "limit=1e9",
    "limit=a",
    "limit=1&limit=2",
    "before[$gt]=",
    "cursor=x",
    "cursor=1e3.x",
    "cursor=" + "9" * 80 + ".x",
]


async def test_a_query_parameter_out_of_bounds_is_a_400(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    for query in WRONG_QUERIES:
        refused = await rest.call("GET", f"/v1/conversations?{query}", token)
        assert refusal(refused) == (400, "validation_failed"), query


ODD_IDS: list[Any] = ["a$b", "x" * 65, "a%00b", "a%2Fb", "a b", "%F0%9F%9A%A3"]


async def test_an_id_with_odd_characters_is_refused(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    for name in ODD_IDS:
        refused = await rest.call("GET", f"/v1/conversations/{name}", token)
        assert refusal(refused)[0] == (404 if "%2F" in name else 400), name


async def test_wrong_paths_and_methods_have_the_same_error_shape(rest: Rest) -> None:
    assert refusal(await rest.call("GET", "/nowhere", None)) == (404, "not_found")
    refused = await rest.call("PUT", "/v1/conversations", None, {})
    assert refusal(refused) == (405, "method_not_allowed")
    assert "GET" in refused.headers["allow"]
    assert refusal(await rest.call("TRACE", "/v1/users", None)) == (405, "method_not_allowed")


async def test_no_foreign_origin_is_let_in(rest: Rest) -> None:
    asked = await rest.client.options(
        "/v1/conversations", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    )
    assert "access-control-allow-origin" not in asked.headers


async def test_a_body_that_never_ends_is_cut_off(settings: Settings, store: Store, broker: Broker) -> None:
    hurried = msgspec.structs.replace(settings, body_seconds=0.2)
    async with (
        serving(hurried, store, broker, owner=False) as rest,
        await anyio.connect_tcp("127.0.0.1", settings.rest_port) as stream,
    ):
        await stream.send(
            f"POST /v1/users HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {rest.admin_token}\r\n"
            'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"na'.encode()
        )
        with anyio.fail_after(5):
            answer = await stream.receive()
    assert answer.startswith(b"HTTP/1.1 408 ")


# --- when things are away --------------------------------------------------------------------------------------------


async def test_a_command_nobody_decides_is_a_retryable_503(rest_without_owner: Rest) -> None:
    _, token = await rest_without_owner.user("Ann")
    refused = await rest_without_owner.call(
        "POST", "/v1/conversations", token, {"type": "group", "participants": ["x"]}
    )
    assert refusal(refused) == (400, "validation_failed")
    bob, _ = await rest_without_owner.user("Bob")
    refused = await rest_without_owner.call(
        "POST", "/v1/conversations", token, {"type": "group", "participants": [bob]}
    )
    assert refusal(refused) == (503, "storage_unavailable")
    assert refused.headers["retry-after"] == "1"


async def test_a_store_that_is_away_is_a_503_without_detail(settings: Settings, broker: Broker) -> None:
    server = urlsplit(settings.mongodb_url)
    assert server.port is not None
    async with open_relay(server.port) as relay:
        url = f"mongodb://127.0.0.1:{relay.port}{server.path}?directConnection=true"
        async with open_store(url) as store, serving(settings, store, broker, owner=False) as rest:
            _, token = await rest.user("Ann")
            relay.cut()
            refused = await rest.call("GET", "/v1/conversations", token)
            ready = await rest.client.get("/health/ready")
            live = await rest.client.get("/health/live")
    assert refusal(refused) == (503, "storage_unavailable")
    assert "retry-after" in refused.headers
    assert "127.0.0.1" not in refused.text
    assert (ready.status_code, live.status_code) == (503, 200)
    assert ready.json() == {"status": "not_ready", "missing": ["mongodb"]}


async def test_a_bug_is_a_500_without_detail(rest: Rest, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr(store.users, "create", broken)
    refused = await rest.call("POST", "/v1/users", rest.admin_token, {"name": "x"})
    assert refusal(refused) == (500, "internal")
    assert "secret" not in refused.text


# --- what operators ask ----------------------------------------------------------------------------------------------


async def test_health_and_metrics(rest: Rest) -> None:
    for path in ("/health/live", "/health/ready"):
        assert (await rest.client.get(path)).json() == {"status": "ok"}
    metrics = await rest.client.get("/metrics")
    assert 'trireme_rest_requests_total{method="GET",status="200"}' in metrics.text


def test_a_port_in_use_is_one_line_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"TRIREME_REST_PORT {port} cannot be opened") as caught:
            app.open_listener("127.0.0.1", port)
    assert "\n" not in str(caught.value)
