"""An account from its profile to its end: privacy, export, deletion, and what a dying process leaves to the next."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from protocol import codec, keys, records
from protocol.models import EventKind
from protocol.prekeys import SignedKey
from tests.workers.residents import code_for, log_in
from tests.workers.seeding import Rest, membership, refusal
from workers.rest import export, upkeep
from workers.rest.desk import Desk, now_ms
from workers.rest.shapes import moment_at
from workers.store.device_keys import Identity
from workers.store.devices import NewSession
from workers.store.users import DELETION

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio


async def patch(rest: Rest, token: str, **change: Any) -> dict[str, Any]:
    answer = await rest.call("PATCH", "/v1/users/me", token, change)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def profile(rest: Rest, token: str, user_id: str) -> dict[str, Any]:
    answer = await rest.call("GET", f"/v1/users/{user_id}", token)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def send(rest: Rest, token: str, conversation_id: str, content: str) -> str:
    body = {"content": content, "type": "text", "timestamp": 1}
    sent = await rest.call(
        "POST", f"/v1/conversations/{conversation_id}/messages", token, body, Idempotency_Key=f"k-{content}"
    )
    assert sent.status_code == 201, sent.text
    message_id: str = sent.json()["message_id"]
    return message_id


async def test_a_profile_is_changed_and_shown_as_privacy_allows(
    rest: Rest, store: Store, broker: Broker, settings: Settings
) -> None:
    ann = await log_in(rest, phone="+49301234567")
    bob_id, bob = await rest.user("Bob")
    own = await patch(rest, ann.access_token, name="Anna", avatar_url="https://example.org/a.png")
    assert (own["name"], own["privacy"]) == ("Anna", {"last_seen": "everyone", "read_receipts": True})
    for bad in ({"name": ""}, {"name": None}, {"privacy": {"last_seen": "friends"}}, {"avatar_url": 7}):
        assert refusal(await rest.call("PATCH", "/v1/users/me", ann.access_token, bad)) == (400, "validation_failed")
    await store.users.seen(ann.user_id, moment_at(1_800_000_000_000))
    seen = {"last_seen": "2027-01-15T08:00:00Z"}
    public = {"_id": ann.user_id, "name": "Anna", "avatar_url": "https://example.org/a.png"}
    assert await profile(rest, bob, ann.user_id) == public | seen
    assert "avatar_url" not in await patch(rest, ann.access_token, avatar_url=None)
    del public["avatar_url"]
    await patch(rest, ann.access_token, privacy={"last_seen": "contacts"})
    assert await profile(rest, bob, ann.user_id) == public
    group_id = await rest.group(ann.access_token, bob_id)
    assert await profile(rest, bob, ann.user_id) == public | seen
    await patch(rest, ann.access_token, privacy={"last_seen": "nobody"})
    assert await profile(rest, bob, ann.user_id) == public
    assert await profile(rest, ann.access_token, ann.user_id) == public | seen
    await patch(rest, ann.access_token, privacy={"last_seen": "everyone"})
    assert await profile(rest, bob, ann.user_id) == public | seen
    blocked = await rest.call("PUT", f"/v1/blocks/{bob_id}", ann.access_token)
    assert blocked.status_code == 204, blocked.text
    assert await profile(rest, bob, ann.user_id) == public
    assert refusal(await rest.call("GET", "/v1/users/usr_nobody", bob)) == (404, "not_found")
    await patch(rest, ann.access_token, privacy={"read_receipts": False})
    stay = await membership(store, group_id, ann.user_id)
    assert stay.shown_read_seq == stay.read_seq
    assert await store.db["users"].count_documents({"unfinished": {"$exists": True}}) == 0
    await rest.call("DELETE", f"/v1/blocks/{bob_id}", ann.access_token)
    joined = [await rest.group(bob, ann.user_id), await rest.group(bob)]
    added = await rest.call("POST", f"/v1/conversations/{joined[1]}/participants", bob, {"user_ids": [ann.user_id]})
    assert added.status_code == 200
    for later in joined:
        sent = await send(rest, bob, later, "hello")
        shard = keys.shard_of(later, settings.shards)
        await broker.append_ingest(shard, records.Receipts([], [records.ReadMark(ann.user_id, "d1", [sent])]))
        listed = f"/v1/conversations/{later}/messages/{sent}/receipts"
        with anyio.fail_after(5):
            while True:
                receipt = (await rest.call("GET", listed, bob)).json()["items"][0]
                if receipt["delivered"]:
                    break
                await anyio.sleep(0.02)
        assert not receipt["read"]


async def test_who_hides_is_hidden_from_those_who_watch(rest: Rest, broker: Broker) -> None:
    ann = await log_in(rest, phone="+49301234567")
    async with broker.client.pubsub() as heard:
        await heard.subscribe(keys.presence(ann.user_id))
        await patch(rest, ann.access_token, privacy={"last_seen": "nobody"})
        with anyio.fail_after(5):
            while (message := await heard.get_message(timeout=1)) is None or message["type"] != "message":
                continue
    assert codec.decode_presence_change(message["data"]).hidden_from == "*"


async def test_an_export_holds_everything_the_account_may_see(rest: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PAGE", 10)
    ann = await log_in(rest, phone="+49301234567")
    bob_id, bob = await rest.user("Bob")
    await rest.call("PUT", "/v1/blocks/usr_x", ann.access_token)
    group_id = await rest.group(bob)
    await send(rest, bob, group_id, "before-Ann")
    added = await rest.call("POST", f"/v1/conversations/{group_id}/participants", bob, {"user_ids": [ann.user_id]})
    assert added.status_code == 200, added.text
    for number in range(24):
        await send(rest, bob if number % 2 else ann.access_token, group_id, f"message-{number}")
    exported = await rest.call("GET", "/v1/users/me/export", ann.access_token)
    assert exported.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in exported.text.splitlines()]
    assert [line["type"] for line in lines[:3]] == ["account", "device", "conversation"]
    assert lines[0]["account"]["phone"] == "+49301234567"
    assert lines[2]["settings"] == {"archived": False, "pinned": False, "muted_until": None}
    messages = [line["message"] for line in lines if line["type"] == "message"]
    assert [message["sequence_number"] for message in messages] == list(range(3, 28)), "from where Ann joined"
    assert [message["content"] for message in messages[1:]] == [f"message-{number}" for number in range(24)]
    assert {message.get("idempotency_key") is None for message in messages[1:] if message["sender_id"] == bob_id} == {
        True
    }
    assert lines[-1] == {"type": "end", "conversations": 1, "messages": 25}
    for _ in range(4):
        await rest.call("GET", "/v1/users/me/export", ann.access_token)
    assert refusal(await rest.call("GET", "/v1/users/me/export", ann.access_token)) == (429, "rate_limited")


async def test_an_export_shows_nothing_of_how_a_group_went_on_without_the_account(rest: Rest) -> None:
    ann = await log_in(rest, phone="+49301234567")
    _, bob = await rest.user("Bob")
    cat_id, _ = await rest.user("Cat")
    group_id = await rest.group(bob, ann.user_id)
    people = f"/v1/conversations/{group_id}/participants"
    assert (await rest.call("DELETE", f"{people}/{ann.user_id}", bob)).status_code == 200
    assert (await rest.call("POST", people, bob, {"user_ids": [cat_id]})).status_code == 200
    renamed = await rest.call("PATCH", f"/v1/conversations/{group_id}", bob, {"title": "Without Ann"})
    assert renamed.status_code == 200, renamed.text
    exported = await rest.call("GET", "/v1/users/me/export", ann.access_token)
    (line,) = [json.loads(line) for line in exported.text.splitlines() if '"type":"conversation"' in line]
    assert (line["left"], line["conversation"]["participants"]) == (True, [ann.user_id])
    assert line["conversation"]["last_sequence_number"] == 2, "where Ann left"
    assert cat_id not in exported.text
    assert "Without Ann" not in exported.text


async def test_a_deleted_account_is_gone_and_its_phone_begins_anew(rest: Rest, store: Store) -> None:
    ann = await log_in(rest, phone="+49301234567")
    bob_id, bob = await rest.user("Bob")
    group_id = await rest.group(ann.access_token, bob_id)
    direct = await rest.call("POST", "/v1/conversations", bob, {"type": "1:1", "participants": [ann.user_id]})
    await send(rest, ann.access_token, direct.json()["_id"], "hello")
    foreign = await code_for(rest, email="mallory@example.org")
    own = await code_for(rest, phone="+49301234567")
    for proof in (foreign, {**own, "code": f"{(int(own['code']) + 1) % 1_000_000:06d}"}):
        refused = await rest.call("POST", "/v1/users/me/deletion", ann.access_token, proof)
        assert refusal(refused) == (403, "code_refused")
    begun = await rest.call("POST", "/v1/users/me/deletion", ann.access_token, own)
    assert (begun.status_code, begun.json()) == (202, {"user_id": ann.user_id, "finished": True})
    assert refusal(await rest.call("GET", "/v1/users/me", ann.access_token)) == (401, "revoked")
    issued = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": ann.user_id})
    assert refusal(issued) == (404, "not_found")
    assert await profile(rest, bob, ann.user_id) == {"_id": ann.user_id, "name": "Deleted account"}
    kept = await rest.call("GET", f"/v1/conversations/{direct.json()['_id']}/messages", bob)
    assert [message["content"] for message in kept.json()["items"]] == ["hello"]
    group = await rest.call("GET", f"/v1/conversations/{group_id}", bob)
    assert group.json()["participants"] == [bob_id]
    assert "301234567" not in str(await store.db["users"].find().to_list())
    again = await log_in(rest, phone="+49301234567")
    assert again.user_id != ann.user_id


async def test_a_deletion_uncovers_nothing_of_what_was_read_in_hiding(
    rest: Rest, store: Store, broker: Broker, settings: Settings
) -> None:
    (ann, token), (_, bob) = [await rest.user(name) for name in ("Ann", "Bob")]
    direct = (await rest.call("POST", "/v1/conversations", bob, {"type": "1:1", "participants": [ann]})).json()["_id"]
    await patch(rest, token, privacy={"read_receipts": False})
    sent = await send(rest, bob, direct, "hello")
    mark = records.Receipts([], [records.ReadMark(ann, "d1", [sent])])
    await broker.append_ingest(keys.shard_of(direct, settings.shards), mark)
    with anyio.fail_after(5):
        while (await membership(store, direct, ann)).read_seq == 0:  # noqa: ASYNC110 - the owner's flush
            await anyio.sleep(0.02)
    assert (await rest.call("DELETE", f"/v1/users/{ann}", rest.admin_token)).json()["finished"] is True
    # What a change of the account has its conversations' owners do.
    shard = keys.shard_of(direct, settings.shards)
    await broker.append_ingest(shard, records.LookAtAccount("rest_x", "req_x", direct, ann))
    await send(rest, bob, direct, "again")
    receipts = await rest.call("GET", f"/v1/conversations/{direct}/messages/{sent}/receipts", bob)
    assert [(item["delivered"], item["read"]) for item in receipts.json()["items"]] == [(True, False)]


async def test_an_account_without_phone_and_email_is_deleted_by_the_administrator(
    rest: Rest, store: Store, desk: Desk
) -> None:
    (ann, token), (bob_id, bob) = [await rest.user(name) for name in ("Ann", "Bob")]
    group_id = await rest.group(token, bob_id)
    path = f"/v1/users/{ann}"
    assert refusal(await rest.call("DELETE", path, bob)) == (401, "unauthorized")
    assert refusal(await rest.call("DELETE", path, None)) == (401, "unauthorized")
    assert refusal(await rest.call("DELETE", "/v1/users/usr_nobody", rest.admin_token)) == (404, "not_found")
    for _ in range(2):
        begun = await rest.call("DELETE", path, rest.admin_token)
        assert (begun.status_code, begun.json()) == (202, {"user_id": ann, "finished": True})
    assert refusal(await rest.call("GET", "/v1/users/me", token)) == (401, "revoked")
    group = await rest.call("GET", f"/v1/conversations/{group_id}", bob)
    assert group.json()["participants"] == [bob_id]
    assert not await upkeep.finish_one(desk, -1), "the second deletion has looked for what was left"


async def test_what_outlasts_a_deletion_is_refused_and_what_slipped_in_is_gone_a_minute_later(
    rest: Rest, store: Store, desk: Desk
) -> None:
    ann = await log_in(rest, phone="+49301234567")
    bob_id, _ = await rest.user("Bob")

    async def delete() -> None:
        proof = await code_for(rest, phone="+49301234567")
        begun = await rest.call("POST", "/v1/users/me/deletion", ann.access_token, proof)
        assert begun.json()["finished"] is True

    body = {"type": "1:1", "participants": [bob_id]}
    held = await rest.hold("POST", "/v1/conversations", ann.access_token, body, delete)
    assert refusal(held) == (401, "revoked")
    assert await store.db["memberships"].count_documents({"user_id": ann.user_id}) == 0
    # Requests that were past every look: a login, a block, an upload.
    now = moment_at(now_ms())
    await store.devices.log_in(ann.user_id, "phone-2", "", "", NewSession("ses_late", b"hash", now), now)
    await store.blocks.block(ann.user_id, bob_id, now)
    signed = SignedKey("fallback", "A" * 43, "A" * 86)
    await store.device_keys.put(ann.user_id, "phone-2", Identity("A" * 43, "A" * 43, signed), now, 10)
    assert not await upkeep.finish_one(desk, 60), "requests may still be under way"
    while await upkeep.finish_one(desk, -1):
        pass
    for collection in ("devices", "blocks", "device_keys"):
        assert await store.db[collection].count_documents({"user_id": ann.user_id}) == 0, collection


async def test_a_deletion_that_dies_after_any_step_is_finished_by_another_process(
    rest: Rest, store: Store, desk: Desk
) -> None:
    bob_id, bob = await rest.user("Bob")
    for done in range(len(upkeep.STEPS[DELETION]) + 1):
        ann = await log_in(rest, phone=f"+4930123456{done}")
        group_id = await rest.group(ann.access_token, bob_id)
        await rest.call("PUT", f"/v1/blocks/{bob_id}", ann.access_token)
        await store.users.begin_deletion(ann.user_id, moment_at(now_ms()))
        for step in upkeep.STEPS[DELETION][:done]:
            await step(desk, ann.user_id)
        assert not await upkeep.finish_one(desk, 60), "its process may be at it still"
        assert await upkeep.finish_one(desk, -1)
        assert await upkeep.finish_one(desk, -1), "once more, for what was under way"
        assert not await upkeep.finish_one(desk, -1)
        assert refusal(await rest.call("GET", "/v1/users/me", ann.access_token)) == (401, "revoked")
        for collection in ("devices", "blocks", "device_keys"):
            assert await store.db[collection].count_documents({"user_id": ann.user_id}) == 0, collection
        log = (await rest.call("GET", f"/v1/conversations/{group_id}/messages", bob)).json()["items"]
        events = [json.loads(message["content"])["event"] for message in log if message["type"] == "system"]
        assert events.count(EventKind.LEFT) == 1, done
