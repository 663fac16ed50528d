"""The registry of agents over HTTP, its cache, and conversations with an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec import UNSET

from protocol import keys
from workers.agents.registry import Registry

if TYPE_CHECKING:
    from tests.workers.seeding import Rest
    from workers.broker import Broker
    from workers.store import Store

pytestmark = pytest.mark.anyio

ECHO: dict[str, Any] = {"name": "Echo", "kind": "python", "handler": "echo", "capabilities": ["echo", "test"]}
HOOK: dict[str, Any] = {"name": "Weather", "kind": "webhook", "url": "http://127.0.0.1:9/ask"}


async def register(rest: Rest, **fields: object) -> dict[str, Any]:
    answer = await rest.call("POST", "/v1/agents", rest.admin_token, {**ECHO, **fields})
    assert answer.status_code == 201, answer.text
    created: dict[str, Any] = answer.json()["agent"]
    return created


async def test_an_agent_has_an_account_and_is_found_by_what_it_can_do(rest: Rest) -> None:
    echo = await register(rest, description="Says what it was told")
    hook = (await rest.call("POST", "/v1/agents", rest.admin_token, HOOK)).json()
    assert echo["_id"].startswith("agt_")
    assert hook["secret"].startswith("whsec_")
    _, token = await rest.user("Ann")
    profile = await rest.call("GET", f"/v1/users/{echo['_id']}", token)
    assert profile.json()["name"] == "Echo"

    async def found(query: str) -> list[str]:
        answer = await rest.call("GET", f"/v1/agents?{query}", token)
        assert answer.status_code == 200, answer.text
        return [agent["_id"] for agent in answer.json()["items"]]

    assert await found("capability=echo") == [echo["_id"]]
    assert await found("text=TOLD") == [echo["_id"]]
    assert await found("text=weath") == [hook["agent"]["_id"]]
    assert await found("text=.*") == []
    assert await found("status=disabled") == []
    assert (await rest.call("GET", "/v1/agents?text=%00", token)).status_code == 400
    assert await found("") == [echo["_id"], hook["agent"]["_id"]]
    page = (await rest.call("GET", "/v1/agents?limit=1", token)).json()
    assert await found(f"cursor={page['next_cursor']}") == [hook["agent"]["_id"]]


async def test_users_are_not_shown_where_an_agent_runs_and_nobody_its_secret(rest: Rest) -> None:
    hook = (await rest.call("POST", "/v1/agents", rest.admin_token, HOOK)).json()["agent"]
    _, token = await rest.user("Ann")
    path = f"/v1/agents/{hook['_id']}"
    shown = (await rest.call("GET", path, token)).json()
    assert "url" not in shown
    assert "secret" not in shown
    kept = await rest.call("GET", path, rest.admin_token)
    assert kept.json()["url"] == HOOK["url"]
    assert "whsec_" not in kept.text
    renewed = await rest.call("POST", f"{path}/secret", rest.admin_token)
    assert renewed.json()["secret"].startswith("whsec_")
    for method in ("PATCH", "DELETE"):
        assert (await rest.call(method, path, token, {} if method == "PATCH" else None)).status_code == 401


@pytest.mark.parametrize(
    "fields",
    [
        {"handler": "nobody"},
        {"url": "https://weather.example/"},
        {"kind": "webhook"},
        {"kind": "webhook", "handler": "echo", "url": "http://127.0.0.1:9/"},
        {"kind": "webhook", "handler": UNSET, "url": "ftp://weather.example/"},
        {"kind": "webhook", "handler": UNSET, "url": "http://169.254.169.254/latest/meta-data"},
        {"kind": "webhook", "handler": UNSET, "url": "https://10.0.0.1/"},
        {"kind": "webhook", "handler": UNSET, "url": "https://user:secret@127.0.0.1/"},
        {"kind": "websocket"},
        {"capabilities": ["has spaces"]},
        {"concurrency": 0},
        {"timeout_seconds": 301},
        {"name": ""},
    ],
)
async def test_an_agent_that_says_no_way_to_reach_it_is_refused(rest: Rest, fields: dict[str, Any]) -> None:
    body = {name: value for name, value in {**ECHO, **fields}.items() if value is not UNSET}
    answer = await rest.call("POST", "/v1/agents", rest.admin_token, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "validation_failed")


async def test_one_agent_is_the_default_and_another_takes_its_place(rest: Rest, store: Store) -> None:
    first = await register(rest, is_default=True)
    second = await register(rest, name="Other", is_default=True)
    default = await store.agents.default()
    assert default is not None
    assert default.agent_id == second["_id"]
    changed = await rest.call("PATCH", f"/v1/agents/{first['_id']}", rest.admin_token, {"is_default": True})
    assert changed.json()["is_default"] is True
    assert await store.db["agents"].count_documents({"is_default": True}) == 1


async def test_a_change_is_seen_at_once_though_agents_are_cached(rest: Rest, store: Store, broker: Broker) -> None:
    agent_id = (await register(rest))["_id"]
    registry = Registry(store, broker)
    seen = await registry.get(agent_id)
    assert seen is not None
    assert 0 < await broker.client.ttl(keys.agent(agent_id)) <= 300
    await store.db["agents"].update_one({"_id": agent_id}, {"$set": {"name": "behind its back"}})
    cached = await registry.get(agent_id)
    assert cached is not None
    assert cached.name == "Echo", "from the cache"
    answer = await rest.call("PATCH", f"/v1/agents/{agent_id}", rest.admin_token, {"status": "disabled"})
    assert answer.status_code == 200
    changed = await registry.get(agent_id)
    assert changed is not None
    assert (changed.status, changed.name) == ("disabled", "behind its back")


async def test_a_reader_that_was_late_caches_nothing_from_before_a_change(
    rest: Rest, store: Store, broker: Broker
) -> None:
    agent_id = (await register(rest))["_id"]
    old = await store.agents.get(agent_id)
    assert old is not None
    registry = Registry(store, broker)
    await rest.call("PATCH", f"/v1/agents/{agent_id}", rest.admin_token, {"name": "New"})
    await registry._fill(old)  # what it read before
    found = await registry.get(agent_id)
    assert found is not None
    assert found.name == "New"


async def test_a_deleted_agent_is_gone_with_its_account(rest: Rest) -> None:
    agent_id = (await register(rest))["_id"]
    assert (await rest.call("DELETE", f"/v1/agents/{agent_id}", rest.admin_token)).status_code == 202
    assert (await rest.call("GET", f"/v1/agents/{agent_id}", rest.admin_token)).status_code == 404
    assert (await rest.call("DELETE", f"/v1/agents/{agent_id}", rest.admin_token)).status_code == 404
    _, token = await rest.user("Ann")
    body = {"type": "1:1", "participants": [agent_id]}
    assert (await rest.call("POST", "/v1/conversations", token, body)).status_code == 400


# --- conversations with an agent -------------------------------------------------------------------------------------


async def test_a_conversation_is_with_the_agent_that_was_asked_for(rest: Rest) -> None:
    agent_id = (await register(rest))["_id"]
    ann, token = await rest.user("Ann")
    body: dict[str, Any] = {"type": "1:1", "participants": [], "agent_id": agent_id, "plaintext": True}
    made = await rest.call("POST", "/v1/conversations", token, body)
    assert made.status_code == 201, made.text
    conversation = made.json()
    assert (conversation["user_id"], conversation["agent_id"]) == (ann, agent_id)
    assert sorted(conversation["participants"]) == sorted([ann, agent_id])
    assert conversation["plaintext"] is True
    again = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": [agent_id]})
    assert (again.status_code, again.json()["_id"]) == (200, conversation["_id"])


async def test_who_names_an_agent_as_participant_has_a_conversation_with_it(rest: Rest) -> None:
    agent_id = (await register(rest))["_id"]
    _, token = await rest.user("Ann")
    made = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": [agent_id]})
    assert made.json()["agent_id"] == agent_id


async def test_who_names_nobody_talks_to_the_default_agent(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    alone: dict[str, Any] = {"type": "1:1", "participants": []}
    assert (await rest.call("POST", "/v1/conversations", token, alone)).status_code == 400
    agent_id = (await register(rest, is_default=True))["_id"]
    made = await rest.call("POST", "/v1/conversations", token, alone)
    assert (made.status_code, made.json()["agent_id"]) == (201, agent_id)


async def test_a_group_has_its_agent_among_its_members(rest: Rest) -> None:
    agent_id = (await register(rest))["_id"]
    (ann, token), (bob, _) = await rest.user("Ann"), await rest.user("Bob")
    body = {"type": "group", "participants": [bob], "agent_id": agent_id}
    made = (await rest.call("POST", "/v1/conversations", token, body)).json()
    assert set(made["participants"]) == {ann, bob, agent_id}


@pytest.mark.parametrize("agent_id", ["agt_none", "usr_none", "x", "$ne"])
async def test_an_unknown_agent_is_refused(rest: Rest, agent_id: str) -> None:
    _, token = await rest.user("Ann")
    body = {"type": "1:1", "participants": [], "agent_id": agent_id}
    answer = await rest.call("POST", "/v1/conversations", token, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "validation_failed")


async def test_a_disabled_agent_begins_no_conversation(rest: Rest) -> None:
    agent_id = (await register(rest, status="disabled"))["_id"]
    _, token = await rest.user("Ann")
    body = {"type": "1:1", "participants": [], "agent_id": agent_id}
    assert (await rest.call("POST", "/v1/conversations", token, body)).status_code == 400
