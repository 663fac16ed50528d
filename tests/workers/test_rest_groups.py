"""Groups, own settings and blocks over HTTP, decided by the real shard owner."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import codec, keys, records
from tests.workers.conftest import serving
from tests.workers.seeding import Rest, refusal

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

HELLO = {"content": "hello", "type": "text", "timestamp": 1_700_000_000_000}


async def test_owners_and_admins_rule_a_group(rest: Rest) -> None:
    (ann, owner), (bob, admin), (cat, member) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    body = {"type": "group", "participants": [bob, cat], "title": "rowers"}
    created = (await rest.call("POST", "/v1/conversations", owner, body)).json()
    assert created["title"] == "rowers"
    path = f"/v1/conversations/{created['_id']}"
    assert refusal(await rest.call("PATCH", path, member, {"title": "x"})) == (403, "forbidden")
    promoted = await rest.call("PATCH", f"{path}/participants/{bob}", owner, {"role": "admin"})
    assert promoted.json() == {"user_id": bob, "name": "Bob", "role": "admin", "joined_sequence": 1}
    renamed = await rest.call("PATCH", path, admin, {"title": "steerers", "disappearing_seconds": 60})
    assert (renamed.json()["title"], renamed.json()["disappearing_seconds"]) == ("steerers", 60)
    nothing = await rest.call("PATCH", path, admin, {})
    assert (nothing.status_code, nothing.json()["last_sequence_number"]) == (
        200,
        renamed.json()["last_sequence_number"],
    )
    kept = await rest.call("PATCH", path, admin, {"disappearing_seconds": 0})
    assert "disappearing_seconds" not in kept.json()
    until = "2999-01-01T00:00:00Z"
    silenced = await rest.call("PATCH", f"{path}/participants/{cat}", admin, {"silenced_until": until})
    assert silenced.json()["silenced_until"] == until
    refused = await rest.call("PATCH", f"{path}/participants/{ann}", admin, {"silenced_until": until})
    assert refusal(refused) == (403, "forbidden")
    heard = await rest.call("PATCH", f"{path}/participants/{cat}", admin, {"silenced_until": None})
    assert "silenced_until" not in heard.json()
    first = (await rest.call("GET", f"{path}/participants?limit=2", member)).json()
    rest_of_it = (await rest.call("GET", f"{path}/participants?limit=2&cursor={first['next_cursor']}", member)).json()
    people = [*first["items"], *rest_of_it["items"]]
    assert rest_of_it["next_cursor"] is None
    assert [(who["user_id"], who["name"], who["role"]) for who in people] == sorted(
        [(ann, "Ann", "owner"), (bob, "Bob", "admin"), (cat, "Cat", "member")]
    )


async def test_who_is_banned_is_out_and_stays_out_until_the_ban_ends(rest: Rest) -> None:
    (_, owner), (bob, bob_token), (cat, stranger) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    path = f"/v1/conversations/{await rest.group(owner, bob)}"
    bans = f"{path}/bans"
    assert refusal(await rest.call("PUT", f"{bans}/{cat}", bob_token)) == (403, "forbidden")
    assert refusal(await rest.call("GET", bans, bob_token)) == (403, "forbidden")
    for method, where in (("GET", bans), ("PUT", f"{bans}/{bob}"), ("GET", f"{path}/participants")):
        assert refusal(await rest.call(method, where, stranger)) == (404, "conversation_not_found")
    assert refusal(await rest.call("PUT", f"{bans}/usr_nobody", owner)) == (404, "not_found")
    for _ in range(2):
        assert bob not in (await rest.call("PUT", f"{bans}/{bob}", owner)).json()["participants"]
    assert (await rest.call("PUT", f"{bans}/{cat}", owner)).status_code == 200, "also who was never in"
    listed = (await rest.call("GET", bans, owner)).json()
    assert listed == {
        "items": sorted(
            [{"user_id": bob, "name": "Bob"}, {"user_id": cat, "name": "Cat"}], key=lambda who: who["user_id"]
        ),
        "next_cursor": None,
    }
    added = await rest.call("POST", f"{path}/participants", owner, {"user_ids": [bob]})
    assert refusal(added) == (403, "banned")
    assert (await rest.call("DELETE", f"{bans}/{bob}", owner)).status_code == 200
    again = await rest.call("POST", f"{path}/participants", owner, {"user_ids": [bob]})
    assert bob in again.json()["participants"]


async def test_a_key_tells_nothing_of_a_group_that_one_has_left(rest: Rest) -> None:
    (ann, token), (bob, _), (_, late) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    body = {"type": "group", "participants": [bob]}
    made = await rest.call("POST", "/v1/conversations", token, body, Idempotency_Key="k1")
    path = f"/v1/conversations/{made.json()['_id']}"
    added = {"user_ids": [(await rest.user("Dan"))[0]]}
    assert (await rest.call("POST", f"{path}/participants", token, added, Idempotency_Key="k2")).status_code == 200
    assert (await rest.call("DELETE", f"{path}/participants/{ann}", token)).status_code == 200
    again = await rest.call("POST", "/v1/conversations", token, body, Idempotency_Key="k1")
    assert refusal(again) == (409, "conflict")
    for caller in (token, late):
        repeated = await rest.call("POST", f"{path}/participants", caller, added, Idempotency_Key="k2")
        assert refusal(repeated) == (404, "conversation_not_found")


async def test_the_same_key_for_something_else_is_a_conflict_and_changes_nothing(rest: Rest) -> None:
    """Each row twice: the same again is answered as it was; another payload under the same key is refused."""
    (_, token), (bob, _), (cat, _), (dan, _) = [await rest.user(name) for name in ("Ann", "Bob", "Cat", "Dan")]
    body: Any = {"type": "group", "participants": [bob], "title": "Boat"}
    path = "/v1/conversations"
    made = await rest.call("POST", path, token, body, Idempotency_Key="k0")
    group = f"{path}/{made.json()['_id']}"
    sent = await rest.call("POST", f"{group}/messages", token, HELLO, Idempotency_Key="m1")
    message = f"{group}/messages/{sent.json()['message_id']}"

    async def shown() -> dict[str, Any]:
        """The conversation, without what is flushed a second later."""
        body: dict[str, Any] = (await rest.call("GET", group, token)).json()
        return {name: value for name, value in body.items() if name != "last_message_at"}

    rows: list[tuple[str, str, Any, str, Any]] = [
        ("POST", path, body, path, body | {"title": "Ship"}),
        ("POST", path, body, path, body | {"participants": [bob, cat]}),
        ("POST", f"{group}/participants", {"user_ids": [cat]}, f"{group}/participants", {"user_ids": [dan]}),
        ("PATCH", f"{group}/participants/{bob}", {"role": "admin"}, f"{group}/participants/{bob}", {"role": "member"}),
        ("PATCH", group, {"title": "Ship"}, group, {"title": "Raft"}),
        ("PATCH", group, {"disappearing_seconds": 60}, group, {"disappearing_seconds": 61}),
        ("PATCH", message, {"content": "better"}, message, {"content": "best"}),
        ("PUT", f"{message}/reactions/x", None, f"{message}/reactions/y", None),
        ("DELETE", f"{group}/participants/{cat}", None, f"{group}/participants/{bob}", None),
    ]
    for number, (method, where, asked, elsewhere, other) in enumerate(rows):
        key = "k0" if where == path else f"k{number}"
        for _ in range(2):
            answer = await rest.call(method, where, token, asked, Idempotency_Key=key)
            assert answer.status_code in (200, 201), (where, answer.text)
        before = await shown()
        refused = await rest.call(method, elsewhere, token, other, Idempotency_Key=key)
        assert refusal(refused) == (409, "idempotency_conflict"), where
        assert await shown() == before
    assert len((await rest.call("GET", path, token)).json()["items"]) == 1


async def test_what_a_key_has_done_is_not_refused_when_somebody_blocks_the_caller_later(rest: Rest) -> None:
    (ann, token), (bob, blocker), (cat, other) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    body = {"type": "group", "participants": [bob]}
    made = await rest.call("POST", "/v1/conversations", token, body, Idempotency_Key="k1")
    path = f"/v1/conversations/{made.json()['_id']}/participants"
    added = await rest.call("POST", path, token, {"user_ids": [cat]}, Idempotency_Key="k2")
    for who in (blocker, other):
        assert (await rest.call("PUT", f"/v1/blocks/{ann}", who)).status_code == 204
    again = await rest.call("POST", "/v1/conversations", token, body, Idempotency_Key="k1")
    added_again = await rest.call("POST", path, token, {"user_ids": [cat]}, Idempotency_Key="k2")
    assert (again.status_code, again.json()["_id"]) == (201, made.json()["_id"])
    assert (added.status_code, added_again.status_code) == (200, 200)
    new = await rest.call("POST", "/v1/conversations", token, body, Idempotency_Key="k3")
    assert refusal(new) == (403, "blocked")


async def test_a_member_arranges_conversations_for_themselves(rest: Rest, broker: Broker) -> None:
    (ann, token), (bob, other) = [await rest.user(name) for name in ("Ann", "Bob")]
    groups = [await rest.group(token, bob) for _ in range(2)]
    path = f"/v1/conversations/{groups[0]}"
    muted_until = "2999-01-01T00:00:00Z"
    async with broker.client.pubsub() as listener:
        await listener.subscribe(keys.user_channel(ann))
        changed = await rest.call("PATCH", f"{path}/settings", token, {"archived": True, "muted_until": muted_until})
        assert changed.json() == {"archived": True, "pinned": False, "muted_until": muted_until}
        told = [await told_to(listener) for _ in range(2)]
    assert [payload.event for payload in told] == ["archived", "muted"]
    assert (told[1].archived, told[1].pinned, told[1].muted_until) == (True, False, 32_472_144_000_000)
    pinned = await rest.call("PATCH", f"{path}/settings", token, {"pinned": True, "muted_until": None})
    assert pinned.json() == {"archived": True, "pinned": True, "muted_until": None}
    seen = (await rest.call("GET", path, token)).json()
    assert (seen["archived"], seen["pinned"], seen["muted_until"]) == (True, True, None)
    assert json.loads(seen["last_message"]["content"])["event"] == "created"
    for query, wanted in (("true", groups[:1]), ("false", groups[1:])):
        listed = (await rest.call("GET", f"/v1/conversations?archived={query}", token)).json()
        assert [item["_id"] for item in listed["items"]] == wanted
    assert not (await rest.call("GET", path, other)).json()["archived"], "nobody else's"
    assert (await rest.call("PATCH", f"{path}/settings", token, {})).json() == pinned.json()
    (_, stranger) = await rest.user("Cat")
    refused = await rest.call("PATCH", f"{path}/settings", stranger, {"archived": True})
    assert refusal(refused) == (404, "conversation_not_found")
    wrong: list[Any] = [
        {"muted_until": "2999-01-01T00:00:00"},
        {"muted_until": 7},
        {"pinned": None},
        {"archived": "yes"},
    ]
    for body in wrong:
        assert refusal(await rest.call("PATCH", f"{path}/settings", token, body)) == (400, "validation_failed"), body
    extreme = await rest.call("PATCH", f"{path}/settings", token, {"muted_until": "9999-12-31T23:59:59-23:59"})
    assert extreme.json()["muted_until"] == "9999-12-31T23:59:59.999000Z"


async def test_a_block_while_the_conversation_is_made_counts(
    rest: Rest, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ann, token), (bob, blocked) = [await rest.user(name) for name in ("Ann", "Bob")]

    async def block_now(*_: str) -> bool:
        assert (await rest.call("PUT", f"/v1/blocks/{bob}", token)).status_code == 204
        return False

    monkeypatch.setattr(store.blocks, "between", block_now)
    begun = await rest.call("POST", "/v1/conversations", blocked, {"type": "1:1", "participants": [ann]})
    assert begun.status_code == 201
    path = f"/v1/conversations/{begun.json()['_id']}/messages"
    hello = {"content": "hello", "type": "text", "timestamp": 1}
    assert refusal(await rest.call("POST", path, blocked, hello, Idempotency_Key="k1")) == (403, "blocked")


async def told_to(listener: Any) -> Any:
    with anyio.fail_after(5):
        while (heard := await listener.get_message(ignore_subscribe_messages=True, timeout=1.0)) is None:
            pass
    signal = codec.decode_signal(heard["data"])
    assert isinstance(signal, records.Tell)
    frame: Any = codec.JSON.decode_server(bytes(signal.frame))
    return frame.payload


async def test_who_is_blocked_writes_adds_and_begins_nothing(rest: Rest) -> None:
    (ann, token), (bob, blocked), (cat, _) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    begun = await rest.call("POST", "/v1/conversations", blocked, {"type": "1:1", "participants": [ann]})
    messages = f"/v1/conversations/{begun.json()['_id']}/messages"
    for name in (bob, cat, bob):
        assert (await rest.call("PUT", f"/v1/blocks/{name}", token)).status_code == 204
    listed = (await rest.call("GET", "/v1/blocks", token)).json()
    assert [block["user_id"] for block in listed["items"]] == sorted([bob, cat])
    assert refusal(await rest.call("PUT", f"/v1/blocks/{ann}", token)) == (400, "validation_failed")
    assert refusal(await rest.call("PUT", "/v1/blocks/usr_nobody", token)) == (404, "not_found")

    hello = {"content": "hello", "type": "text", "timestamp": 1}
    assert refusal(await rest.call("POST", messages, blocked, hello, Idempotency_Key="k1")) == (403, "blocked")
    for participants in ([ann], [ann, cat]):
        body = {"type": "group", "participants": participants}
        assert refusal(await rest.call("POST", "/v1/conversations", blocked, body)) == (403, "blocked")
    group = await rest.group(blocked, cat)
    added = await rest.call("POST", f"/v1/conversations/{group}/participants", blocked, {"user_ids": [ann]})
    assert refusal(added) == (403, "blocked")
    begins = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": [cat]})
    assert refusal(begins) == (403, "blocked"), "in either direction"

    assert (await rest.call("DELETE", f"/v1/blocks/{bob}", token)).status_code == 204
    sent = await rest.call("POST", messages, blocked, hello, Idempotency_Key="k2")
    assert (sent.status_code, sent.json()["sequence_number"]) == (201, 1)


# --- how often -------------------------------------------------------------------------------------------------------


async def test_groups_and_steps_in_them_are_limited_per_account_and_the_wait_is_told(
    settings: Settings, store: Store, broker: Broker
) -> None:
    slow = msgspec.structs.replace(settings, conversations_per_hour=2, group_steps_per_minute=6)
    async with serving(slow, store, broker, owner=True) as rest:
        (_, owner), (bob, other), (cat, _) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
        group = {"type": "group", "participants": [bob]}
        path = f"/v1/conversations/{await rest.group(owner, bob)}"
        direct = {"type": "1:1", "participants": [bob]}
        assert (await rest.call("POST", "/v1/conversations", owner, direct)).status_code == 201
        assert (await rest.call("POST", "/v1/conversations", owner, direct)).status_code == 200, "it was there"
        refused = await rest.call("POST", "/v1/conversations", owner, group)
        assert refusal(refused) == (429, "rate_limited")
        assert 3500 < int(refused.headers["retry-after"]) <= 3600
        assert (await rest.call("POST", "/v1/conversations", other, group)).status_code == 201
        by_admin = {**group, "participants": [cat, bob]}
        assert (await rest.call("POST", "/v1/conversations", rest.admin_token, by_admin)).status_code == 201
        steps: list[tuple[str, str, Any]] = [
            ("POST", f"{path}/participants", {"user_ids": [cat]}),
            ("PATCH", f"{path}/participants/{cat}", {"role": "admin"}),
            ("DELETE", f"{path}/participants/{cat}", None),
            ("PUT", f"{path}/bans/{cat}", None),
            ("DELETE", f"{path}/bans/{cat}", None),
            ("PATCH", path, {"title": "rowers"}),
        ]
        for method, where, body in steps:
            assert (await rest.call(method, where, owner, body)).status_code == 200, where
        for method, where, body in steps:
            assert refusal(await rest.call(method, where, owner, body)) == (429, "rate_limited"), where


async def test_changes_of_an_account_and_guesses_at_its_code_are_limited(
    settings: Settings, store: Store, broker: Broker
) -> None:
    slow = msgspec.structs.replace(settings, account_changes_per_hour=2, logins_per_address=2)
    async with serving(slow, store, broker, owner=False) as rest:
        _, token = await rest.user("Ann")
        guess = {"verification_id": "ver_1", "code": "123456"}
        answers = [await rest.call("PATCH", "/v1/users/me", token, {"name": "Anna"}) for _ in range(3)]
        answers += [await rest.call("POST", "/v1/users/me/deletion", token, guess) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 403, 403, 429]
