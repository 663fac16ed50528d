"""The collections' indexes: the seed's, with each correction of design.md section 6."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError

from protocol.models import User, UserStatus
from tests.workers.seeding import START, Log
from workers.store import Store, StoreUnfit, open_store
from workers.store.users import Taken

if TYPE_CHECKING:
    from bench.services import Services

pytestmark = pytest.mark.anyio


@pytest.fixture
def mongodb_url(new_mongodb_url: str) -> str:
    """Without the indexes of the tests before."""
    return new_mongodb_url


async def indexes(store: Store, collection: str) -> dict[str, dict[str, Any]]:
    """Index name → its document, without `_id_`."""
    found = await (await store.db[collection].list_indexes()).to_list()
    return {index["name"]: dict(index, key=list(index["key"].items())) for index in found if index["name"] != "_id_"}


async def test_no_index_repeats_the_id(store: Store) -> None:
    for collection in await store.db.list_collection_names():
        for index in (await indexes(store, collection)).values():
            fields = [field for field, _ in index["key"]]
            assert fields[0] not in ("_id", "message_id") or fields == ["message._id"], index
            if len(fields) == 1:
                unique = ("phone", "email", "address_hash", "is_default")
                assert not index.get("unique") or fields[0].removesuffix("_key") in unique, index


async def test_messages_are_fenced_by_sequence_and_by_scoped_key(store: Store) -> None:
    found = await indexes(store, "messages")
    unique = {name for name, index in found.items() if index.get("unique")}
    assert {tuple(field for field, _ in found[name]["key"]) for name in unique} == {
        ("conversation_id", "sequence_number"),
        ("conversation_id", "sender_id", "idempotency_key"),
    }
    assert [("conversation_id", 1), ("timestamp", -1)] in [index["key"] for index in found.values()]


async def test_the_same_key_of_another_sender_or_conversation_is_another_message(store: Store) -> None:
    message = {"conversation_id": "c", "sequence_number": 1, "sender_id": "a", "idempotency_key": "k"}
    messages = store.db["messages"]
    await messages.insert_one({"_id": "m1"} | message)
    await messages.insert_one({"_id": "m2"} | message | {"sequence_number": 2, "sender_id": "b"})
    await messages.insert_one({"_id": "m3"} | message | {"conversation_id": "d"})
    with pytest.raises(DuplicateKeyError):
        await messages.insert_one({"_id": "m4"} | message | {"sequence_number": 3})
    with pytest.raises(DuplicateKeyError):
        await messages.insert_one({"_id": "m5"} | message | {"idempotency_key": "other"})


async def test_system_messages_have_a_partial_index_of_their_own(store: Store) -> None:
    index = (await indexes(store, "messages"))["system_messages"]
    assert index["partialFilterExpression"] == {"type": "system"}
    assert index["key"] == [("conversation_id", 1), ("sequence_number", 1)]


async def test_plain_messages_are_in_no_index_of_changes_or_disappearing(store: Store) -> None:
    found = await indexes(store, "messages")
    for name, field in [("target_message", "target_message_id"), ("disappearing", "erase_at")]:
        assert found[name]["key"] == [(field, 1)]
        assert found[name]["partialFilterExpression"] == {field: {"$exists": True}}


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({"target_message_id": "m", "content_hash": {"$exists": True}, "content": {"$ne": ""}}, "target_message"),
        ({"erase_at": {"$lte": START}}, "disappearing"),
    ],
)
async def test_what_is_erased_is_found_by_its_index(store: Store, wanted: dict[str, Any], index: str) -> None:
    plan = await store.db["messages"].find(wanted).explain()
    assert f"'indexName': '{index}'" in str(plan["queryPlanner"]["winningPlan"])


@pytest.mark.parametrize(
    ("collection", "field", "seconds"),
    [
        ("messages", "created_at", 90 * 86_400),
        ("idempotency_keys", "created_at", 86_400),
        ("dead_letter_queue", "expires_at", 0),
    ],
)
async def test_what_has_a_lifetime_has_its_ttl_index(store: Store, collection: str, field: str, seconds: int) -> None:
    lifetimes = [
        (index["key"], index["expireAfterSeconds"])
        for index in (await indexes(store, collection)).values()
        if "expireAfterSeconds" in index
    ]
    assert lifetimes == [([(field, 1)], seconds)]


async def test_dates_are_bson_dates_so_that_ttl_indexes_fire(store: Store) -> None:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append("a")
    assert await store.db["messages"].count_documents({"created_at": {"$type": "date"}}) == 1
    document = await store.db["messages"].find_one({})
    assert document is not None
    assert document["created_at"] == START + timedelta(seconds=1)
    assert document["created_at"].tzinfo is not None


async def test_the_dead_letter_queue_has_its_five_indexes(store: Store) -> None:
    keys = [index["key"] for index in (await indexes(store, "dead_letter_queue")).values()]
    assert sorted(keys) == sorted(
        [
            [("status", 1), ("next_retry_at", 1)],
            [("created_at", -1)],
            [("message._id", 1)],
            [("shard", 1)],
            [("expires_at", 1)],
        ]
    )


async def test_phone_and_email_are_unique_only_where_they_are_strings(store: Store) -> None:
    def user(name: str, phone: str | None, email: str | None) -> User:
        now = datetime(2026, 11, 22, tzinfo=UTC)
        return User(user_id=name, phone=phone, email=email, name=name, created_at=now, status=UserStatus.OFFLINE)

    assert isinstance(await store.users.create(user("u1", None, None)), User)
    assert isinstance(await store.users.create(user("u2", None, None)), User)
    assert isinstance(await store.users.create(user("u3", "+1", "a@x")), User)
    assert await store.users.create(user("u4", "+1", None)) == Taken("phone")
    assert await store.users.create(user("u5", None, "a@x")) == Taken("email")
    stored = await store.db["users"].find_one({"_id": "u1"})
    assert stored is not None
    assert stored["phone"] is None
    assert "avatar_url" not in stored
    assert await store.users.get("u3") == user("u3", "+1", "a@x")
    assert await store.users.unknown(["u1", "u9", "u4"]) == {"u4", "u9"}


async def test_opening_twice_changes_nothing(store: Store, mongodb_url: str) -> None:
    before = await indexes(store, "messages")
    async with open_store(mongodb_url) as again:
        assert await indexes(again, "messages") == before


async def test_another_retention_changes_the_ttl_index_in_place(store: Store, mongodb_url: str) -> None:
    async with open_store(mongodb_url, retention_days=7) as again:
        assert (await indexes(again, "messages"))["retention"]["expireAfterSeconds"] == 7 * 86_400


async def test_every_handle_writes_journalled_majority_and_reads_majority(store: Store) -> None:
    assert store.db.write_concern.document == {"w": "majority", "j": True, "wtimeout": 5000}
    assert store.db.read_concern.document == {"level": "majority"}


async def test_a_malformed_url_is_one_line() -> None:
    with pytest.raises(StoreUnfit, match="TRIREME_MONGODB_URL is malformed") as caught:
        async with open_store("mongodb://127.0.0.1:99999/x"):
            pass
    assert "\n" not in str(caught.value)


async def test_the_database_is_the_path_of_the_url(services: Services) -> None:
    server = services.mongodb_url.rsplit("/", 1)[0]
    async with open_store(f"{server}/named") as opened:
        assert opened.db.name == "named"
    with MongoClient[dict[str, Any]](server) as client:
        client.drop_database("named")
