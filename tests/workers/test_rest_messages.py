"""Messages over HTTP, decided by the real shard owner: the same rules as over the WebSocket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest

from protocol import keys, records
from tests.workers.conftest import serving
from tests.workers.seeding import Rest, refusal

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio


def text(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"content": content, "type": "text", "timestamp": 1_700_000_000_000, **more}


async def test_a_message_is_sent_once_and_checked_as_on_the_websocket(rest: Rest) -> None:
    (ann, token), (bob, reader), (_, stranger) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    created = await rest.call("POST", "/v1/conversations", token, {"type": "1:1", "participants": [bob]})
    path = f"/v1/conversations/{created.json()['_id']}/messages"
    sent = await rest.call("POST", path, token, text(forwarded=True), Idempotency_Key="k1")
    assert sent.status_code == 201
    ack = sent.json()
    assert (ack["sequence_number"], ack["status"], ack["idempotency_key"]) == (1, "sent", "k1")
    again = await rest.call("POST", path, token, text(forwarded=True), Idempotency_Key="k1")
    assert (again.json()["message_id"], again.json()["duplicate"]) == (ack["message_id"], True)
    answered = await rest.call(
        "POST", path, reader, text("hi", reply_to_message_id=ack["message_id"]), Idempotency_Key="k1"
    )
    assert answered.json()["sequence_number"] == 2, "a key belongs to its sender"
    refusals: list[Any] = [
        (token, text("other"), "k1", (409, "idempotency_conflict")),
        (token, text(""), "k2", (400, "validation_failed")),
        (token, text("x" * 50_000), "k2", (413, "too_large")),
        (token, text(type="system"), "k2", (403, "forbidden")),
        (token, text(type="image", content=""), "k2", (400, "validation_failed")),
        (token, text(receiver_id="usr_other"), "k2", (400, "validation_failed")),
        (token, text(reply_to_message_id="msg_unknown"), "k2", (400, "validation_failed")),
        (token, text(timestamp=-1), "k2", (400, "validation_failed")),
        (token, text(), "not a key", (400, "validation_failed")),
        (stranger, text(), "k2", (404, "conversation_not_found")),
    ]
    for caller, body, key, wanted in refusals:
        assert refusal(await rest.call("POST", path, caller, body, Idempotency_Key=key)) == wanted, body
    assert refusal(await rest.call("POST", path, token, text())) == (400, "validation_failed"), "without a key"
    items = (await rest.call("GET", path, reader)).json()["items"]
    assert [(item["content"], item["sender_id"]) for item in items] == [("hi", bob), ("hello", ann)]
    assert items[1]["forwarded"] is True
    assert "idempotency_key" not in items[1]


async def test_a_message_is_edited_reacted_to_hidden_and_deleted(rest: Rest) -> None:
    (_, token), (bob, reader), (_, stranger) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    group = await rest.group(token, bob)
    messages = f"/v1/conversations/{group}/messages"
    sent = (await rest.call("POST", messages, token, text(), Idempotency_Key="k1")).json()
    path = f"{messages}/{sent['message_id']}"

    assert refusal(await rest.call("PATCH", path, reader, {"content": "mine now"})) == (403, "forbidden")
    edited = await rest.call("PATCH", path, token, {"content": "better"}, Idempotency_Key="e1")
    assert (edited.status_code, edited.json()["sequence_number"]) == (200, 3)
    repeated = await rest.call("PATCH", path, token, {"content": "better"}, Idempotency_Key="e1")
    assert (repeated.json()["message_id"], repeated.json()["duplicate"]) == (edited.json()["message_id"], True)
    assert refusal(await rest.call("PATCH", path, token, {"content": ""})) == (400, "validation_failed")

    assert (await rest.call("PUT", f"{path}/reactions/%F0%9F%9A%A3", reader)).status_code == 200
    assert (await rest.call("PUT", f"{path}/reactions/ok", reader)).status_code == 200
    assert (await rest.call("DELETE", f"{path}/reactions/ok", reader)).status_code == 200
    seen = await shown(rest, path, token)
    assert (seen["content"], seen["reactions"]) == ("better", [{"user_id": bob, "emoji": "🚣"}])
    assert "edited_at" in seen
    assert refusal(await rest.call("PUT", f"{path}/reactions/{'x' * 65}", reader)) == (400, "validation_failed")

    assert (await rest.call("DELETE", f"{path}?scope=me", reader)).status_code == 200
    hidden = await shown(rest, path, reader)
    assert (hidden["content"], "deleted_at" in hidden) == ("", True)
    assert (await shown(rest, path, token))["content"] == "better"
    overview = (await rest.call("GET", f"/v1/conversations/{group}", token)).json()
    assert overview["last_message"]["_id"] == sent["message_id"], "a change is no last message"

    assert refusal(await rest.call("DELETE", f"{path}?scope=all", reader)) == (403, "forbidden")
    for query in ("", "?scope=everybody"):
        assert refusal(await rest.call("DELETE", f"{path}{query}", token)) == (400, "validation_failed")
    assert (await rest.call("DELETE", f"{path}?scope=all", token)).status_code == 200
    gone = await shown(rest, path, token)
    assert (gone["content"], "deleted_at" in gone, "content_hash" in gone) == ("", True, True)

    for method, where, body in (
        ("GET", path, None),
        ("PATCH", path, {"content": "x"}),
        ("GET", f"{path}/receipts", None),
    ):
        assert refusal(await rest.call(method, where, stranger, body)) == (404, "conversation_not_found")
        unknown = where.replace(sent["message_id"], sent["message_id"][:-5] + "00000")
        assert refusal(await rest.call(method, unknown, token, body)) == (404, "not_found"), method
    assert [event["event"] for event in await events(rest, messages, token)] == [
        "deleted", "hidden", "unreacted", "reacted", "reacted", "edited", "created"
    ]  # fmt: skip


async def shown(rest: Rest, path: str, token: str) -> Any:
    found = await rest.call("GET", path, token)
    assert found.status_code == 200, found.text
    return found.json()


async def events(rest: Rest, path: str, token: str) -> list[dict[str, Any]]:
    """Contents of the system messages that still say something, newest first."""
    items = (await rest.call("GET", path, token)).json()["items"]
    return [
        json.loads(item["content"]) if item["content"] else {"event": "edited"}
        for item in items
        if item["type"] == "system"
    ]


async def test_only_the_author_is_told_who_has_a_message(rest: Rest, broker: Broker) -> None:
    (_, token), (bob, reader), (cat, hider) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    group = await rest.group(token, bob, cat)
    messages = f"/v1/conversations/{group}/messages"
    message_id = (await rest.call("POST", messages, token, text(), Idempotency_Key="k1")).json()["message_id"]
    path = f"{messages}/{message_id}/receipts"
    assert refusal(await rest.call("GET", path, reader)) == (403, "forbidden")
    hidden = await rest.call("PATCH", "/v1/users/me", hider, {"privacy": {"read_receipts": False}})
    assert hidden.status_code == 200, hidden.text
    shard = keys.shard_of(group, 4)
    marks = [records.ReadMark(name, "d1", [message_id]) for name in (bob, cat)]
    await broker.append_ingest(shard, records.Receipts([], marks))
    wanted = {bob: (True, True), cat: (True, False)}
    with anyio.fail_after(5):
        while await standing(rest, path, token) != wanted:  # noqa: ASYNC110 - receipts are told with a tick
            await anyio.sleep(0.05)
    first = (await rest.call("GET", f"{path}?limit=1", token)).json()
    assert [receipt["user_id"] for receipt in first["items"]] == [first["next_cursor"]] == sorted([bob, cat])[:1]


async def standing(rest: Rest, path: str, token: str) -> dict[str, tuple[bool, bool]]:
    items = (await rest.call("GET", path, token)).json()["items"]
    return {receipt["user_id"]: (receipt["delivered"], receipt["read"]) for receipt in items}


async def test_sends_have_the_rate_of_the_websocket(settings: Settings, store: Store, broker: Broker) -> None:
    slow = msgspec.structs.replace(settings, message_rate=0.1, message_burst=2)
    async with serving(slow, store, broker, owner=True) as rest:
        _, token = await rest.user("Ann")
        path = f"/v1/conversations/{await rest.group(token)}/messages"
        answers = [await rest.call("POST", path, token, text(), Idempotency_Key=f"k{n}") for n in range(3)]
        assert [answer.status_code for answer in answers] == [201, 201, 429]
        assert refusal(answers[2]) == (429, "rate_limited")
        assert "retry-after" in answers[2].headers
