"""Webhooks over HTTP: registered, changed, tried out, disabled and replayed by the administrator; hidden from users."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import webhooks
from protocol.webhooks import DeliveryStatus, Mode, key_of
from tests.workers.apps import FIRST, App, Talk, couriers, heard, now, verified
from tests.workers.receiver import HANG, answer, receiving
from tests.workers.seeding import Rest, refusal

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

UNKNOWN = "whk_" + "0" * 27


class Office:
    """The administrator's calls about webhooks."""

    def __init__(self, rest: Rest, store: Store) -> None:
        self.rest = rest
        self.store = store

    async def call(self, method: str, path: str = "", body: Any = None, token: str = "") -> Any:
        return await self.rest.call(method, f"/v1/webhooks{path}", token or self.rest.admin_token, body)

    async def register(self, url: str, **fields: Any) -> App:
        created = await self.call("POST", "", {"app": "crm", "url": url, **fields})
        assert created.status_code == 201, created.text
        body = created.json()
        webhook = await self.store.webhooks.get(body["webhook"]["_id"])
        assert webhook is not None
        return App(self.store, webhook, key_of(body["secret"]))


@pytest.fixture
def office(rest: Rest, store: Store) -> Office:
    return Office(rest, store)


async def test_a_webhook_is_registered_and_its_secret_is_shown_once(office: Office) -> None:
    created = await office.call(
        "POST", "", {"app": "crm", "url": "http://127.0.0.1:9/hook", "mode": "binary", "conversation_ids": ["c", "c"]}
    )
    assert created.status_code == 201
    webhook, secret = created.json()["webhook"], created.json()["secret"]
    assert len(key_of(secret)) == webhooks.SECRET_BYTES
    assert (webhook["app"], webhook["mode"], webhook["status"]) == ("crm", "binary", "enabled")
    assert (webhook["types"], webhook["conversation_ids"], webhook["agent_ids"]) == ([], ["c"], [])
    read = await office.call("GET", f"/{webhook['_id']}")
    assert read.json() == {"webhook": webhook, "waiting": 0, "dead_letters": 0}
    listed = await office.call("GET")
    assert listed.json() == {"items": [webhook], "next_cursor": None}
    for shown in (read.text, listed.text):
        assert "whsec" not in shown
        assert "secret" not in shown.replace("old_secret_until", "")


@pytest.mark.parametrize(
    "url",
    [
        "https://10.0.0.1/", "https://169.254.169.254/latest/meta-data/", "https://[fd00:ec2::254]/", "http://1.1.1.1/",
        "https://2886729729/", "ftp://127.0.0.1/", "https://user@127.0.0.1/", "https://nowhere.invalid/", "x",
    ],
)  # fmt: skip
async def test_h20_a_url_that_leads_where_nobody_goes_is_refused(office: Office, url: str) -> None:
    refused = await office.call("POST", "", {"app": "crm", "url": url})
    assert refusal(refused) == (400, "validation_failed")
    assert refused.json()["error"]["message"].startswith("url: ")
    app = await office.register("http://127.0.0.1:9/")
    assert refusal(await office.call("PATCH", f"/{app.webhook_id}", {"url": url})) == (400, "validation_failed")
    assert (await app.stored()).url == "http://127.0.0.1:9/"


async def test_pages_and_apps(office: Office) -> None:
    names = [(await office.register("http://127.0.0.1:9/", app=app)).webhook_id for app in ("a", "b", "a")]
    first = (await office.call("GET", "?limit=2")).json()
    assert [item["_id"] for item in first["items"]] == sorted(names)[:2]
    rest = (await office.call("GET", f"?cursor={first['next_cursor']}")).json()
    assert [item["_id"] for item in rest["items"]] == sorted(names)[2:]
    assert rest["next_cursor"] is None
    assert {item["_id"] for item in (await office.call("GET", "?app=a")).json()["items"]} == {names[0], names[2]}


async def test_what_is_changed_changes_and_the_rest_stays(office: Office) -> None:
    app = await office.register("http://127.0.0.1:9/", types=["trireme.agent.response.v1"])
    changed = await office.call("PATCH", f"/{app.webhook_id}", {"mode": "binary", "agent_ids": ["bot"]})
    assert changed.status_code == 200
    stored = await app.stored()
    assert (stored.mode, stored.agent_ids, len(stored.types)) == (Mode.BINARY, ["bot"], 1)
    assert (await office.call("PATCH", f"/{app.webhook_id}", {})).json() == changed.json()


async def test_a_rotation_shows_a_new_secret_and_says_how_long_the_old_one_signs(office: Office) -> None:
    app = await office.register("http://127.0.0.1:9/")
    rotated = (await office.call("POST", f"/{app.webhook_id}/rotate-secret")).json()
    assert key_of(rotated["secret"]) != app.key
    until = datetime.fromisoformat(rotated["webhook"]["old_secret_until"])
    assert timedelta(hours=23) < until - now() <= timedelta(hours=24)
    signing = await office.store.webhooks.signing(app.webhook_id, now())
    assert signing is not None
    assert signing.keys == (key_of(rotated["secret"]), app.key)


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_test_event_is_sent_at_once_and_the_answer_is_shown(office: Office, mode: Mode) -> None:
    async with receiving(answer(200), answer(500)) as receiver:
        app = await office.register(receiver.url, mode=mode)
        await office.call("POST", f"/{app.webhook_id}/disable")
        tried = await office.call("POST", f"/{app.webhook_id}/test")
        assert tried.json() == {"delivered": True, "status": 200, "reason": ""}
        event = verified(receiver.requests[0], app.key)
        assert (event.get_type(), event.get_data()["webhook_id"]) == ("trireme.webhook.test.v1", app.webhook_id)
        again = await office.call("POST", f"/{app.webhook_id}/test")
        assert again.json() == {"delivered": False, "status": 500, "reason": "status 500"}
        assert await app.deliveries() == []


async def test_a_test_of_a_webhook_that_hangs_ends(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.webhooks.call.CALL_SECONDS", 0.3)
    async with receiving(HANG) as receiver:
        app = await office.register(receiver.url)
        with anyio.fail_after(3):
            tried = await office.call("POST", f"/{app.webhook_id}/test")
        assert tried.json() == {"delivered": False, "status": None, "reason": "no answer within 0.3 s"}


async def test_disabled_by_hand_and_enabled_again(office: Office) -> None:
    app = await office.register("http://127.0.0.1:9/")
    disabled = await office.call("POST", f"/{app.webhook_id}/disable")
    assert (disabled.json()["status"], disabled.json()["status_reason"]) == ("disabled", "by_hand")
    assert refusal(await office.call("POST", f"/{app.webhook_id}/disable")) == (409, "conflict")
    assert len(await office.store.webhooks.notices()) == 1
    enabled = await office.call("POST", f"/{app.webhook_id}/enable")
    assert (enabled.status_code, enabled.json()["status"], enabled.json()["status_reason"]) == (200, "enabled", None)
    assert await office.store.webhooks.notices() == []


async def test_dead_letters_are_listed_without_contents_and_replayed(office: Office, settings: Settings) -> None:
    talk = await Talk(office.store).open()
    async with receiving(answer(400), answer(400), answer(200)) as receiver, couriers(office.store, settings):
        app = await office.register(receiver.url)
        await office.store.db["webhooks"].update_one({"_id": app.webhook_id}, {"$set": {"created_at": FIRST}})
        said = await talk.say("what ann wrote", "what bob wrote", "fine")
        await app.until(1, DeliveryStatus.DELIVERED)
        state = (await office.call("GET", f"/{app.webhook_id}")).json()
        assert (state["waiting"], state["dead_letters"]) == (0, 2)
        path = f"/{app.webhook_id}/deliveries"
        first = await office.call("GET", f"{path}?status=failed&limit=1")
        second = await office.call("GET", f"{path}?status=failed&limit=1&cursor={first.json()['next_cursor']}")
        assert {page.json()["items"][0]["event_id"] for page in (first, second)} == set(said[:2])
        assert second.json()["next_cursor"] is None
        (item,) = first.json()["items"]
        assert (item["tries"], item["last_status"], item["last_error"]) == (1, 400, "status 400")
        assert len((await office.call("GET", path)).json()["items"]) == 3
        assert "wrote" not in (await office.call("GET", path)).text
        replayed = await office.call("POST", f"{path}/{said[0]}/replay")
        assert (replayed.status_code, replayed.json()["status"]) == (202, "pending")
        await app.until(2, DeliveryStatus.DELIVERED)
        assert heard(receiver, app) == [*said, said[0]]
        assert refusal(await office.call("POST", f"{path}/{said[0]}/replay")) == (404, "not_found")


async def test_a_span_is_replayed_once_at_a_time(office: Office, settings: Settings) -> None:
    talk = await Talk(office.store).open()
    said = await talk.say("a", "b")
    async with receiving() as receiver:
        app = await office.register(receiver.url)
        path = f"/{app.webhook_id}/replay"
        span = {"since": "1969-01-01T00:00:00Z", "until": "9999-12-31T23:59:59Z"}
        begun = await office.call("POST", path, span)
        assert begun.status_code == 202
        assert begun.json()["replay"]["since"] == "1970-01-01T00:00:00Z"
        assert datetime.fromisoformat(begun.json()["replay"]["until"]) <= now()
        assert refusal(await office.call("POST", path, span)) == (409, "conflict")
        async with couriers(office.store, settings):
            await app.until(2, DeliveryStatus.DELIVERED)
        assert heard(receiver, app) == said
        assert (await app.stored()).replay is None
        for bad in (
            {"since": "2026-01-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"},
            {"since": "2500-01-01T00:00:00Z", "until": "2600-01-01T00:00:00Z"},
            {"since": "2026-01-01T00:00:00", "until": "2026-01-02T00:00:00"},
            {"since": 1, "until": 2},
        ):
            assert refusal(await office.call("POST", path, bad)) == (400, "validation_failed")


async def test_what_is_deleted_is_gone_with_its_queue(office: Office) -> None:
    talk = await Talk(office.store).open()
    app = await office.register("http://127.0.0.1:9/")
    await talk.say("x")
    assert (await office.call("DELETE", f"/{app.webhook_id}")).status_code == 204
    assert await office.store.db["webhook_deliveries"].count_documents({}) == 0
    assert refusal(await office.call("DELETE", f"/{app.webhook_id}")) == (404, "not_found")


async def test_no_more_webhooks_than_may_be(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LIMIT", 1)
    await office.register("http://127.0.0.1:9/")
    body = {"app": "crm", "url": "http://127.0.0.1:9/"}
    assert refusal(await office.call("POST", "", body)) == (409, "conflict")


ROUTES = [
    ("GET", "", None),
    ("POST", "", {"app": "crm", "url": "http://127.0.0.1:9/"}),
    ("GET", f"/{UNKNOWN}", None),
    ("PATCH", f"/{UNKNOWN}", {"mode": "binary"}),
    ("DELETE", f"/{UNKNOWN}", None),
    ("POST", f"/{UNKNOWN}/enable", None),
    ("POST", f"/{UNKNOWN}/disable", None),
    ("POST", f"/{UNKNOWN}/rotate-secret", None),
    ("POST", f"/{UNKNOWN}/test", None),
    ("POST", f"/{UNKNOWN}/replay", {"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T00:00:00Z"}),
    ("GET", f"/{UNKNOWN}/deliveries", None),
    ("POST", f"/{UNKNOWN}/deliveries/msg_1/replay", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_to_a_user_there_is_no_such_route_and_to_a_stranger_nothing(
    office: Office, method: str, path: str, body: Any
) -> None:
    _, token = await office.rest.user("Ann")
    assert refusal(await office.call(method, path, body, token)) == (404, "not_found")
    assert refusal(await office.call(method, path, body, "no token")) == (401, "unauthorized")
    if path:
        assert refusal(await office.call(method, path, body)) == (404, "not_found")


@pytest.mark.parametrize(
    "fields",
    [
        {"app": ""}, {"app": "a b"}, {"app": 1}, {"url": 1}, {"url": "https://h.example/" + "x" * 2048},
        {"mode": "carrier pigeon"}, {"types": ["trireme.unknown.v1"]}, {"types": "all"}, {"conversation_ids": [""]},
        {"agent_ids": ["x" * 65]}, {"agent_ids": ["a"] * 101}, {"url": "http://127.0.0.1:9/\x00"},
    ],
)  # fmt: skip
async def test_a_body_that_does_not_fit_is_refused(office: Office, fields: dict[str, Any]) -> None:
    body = {"app": "crm", "url": "http://127.0.0.1:9/", **fields}
    assert refusal(await office.call("POST", "", body)) == (400, "validation_failed")
    assert await office.store.webhooks.page(None, "", 10) == ([], None)
