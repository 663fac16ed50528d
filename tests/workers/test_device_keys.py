"""Keys of devices: what is stored once, what is claimed once, who hears of a change; over MongoDB and over HTTP."""

from __future__ import annotations

from base64 import b64encode
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol import codec, frames, keys, records
from protocol.prekeys import Purpose, SignedKey, signed_bytes
from tests.workers.conftest import serving
from tests.workers.seeding import Log, Rest, refusal
from workers.rest import device_keys
from workers.store.device_keys import (
    LOW,
    Added,
    AnotherKey,
    DeviceKeyStore,
    Full,
    Identity,
    IdentityMoved,
    KeyDevice,
    Stored,
    TooManyDevices,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def base64(data: bytes) -> str:
    return b64encode(data).decode().rstrip("=")


def some_key(seed: str) -> str:
    return base64(blake2b(seed.encode(), digest_size=32).digest())


def signed(name: str, key: str = "") -> SignedKey:
    return SignedKey(name, some_key(key or name), "A" * 86)


def some(first: int, count: int) -> list[SignedKey]:
    return [signed(f"k{number:03}") for number in range(first, first + count)]


def identity(name: str) -> Identity:
    return Identity(f"identity-{name}", f"signing-{name}", signed(f"fallback-{name}"))


async def device(store: Store, user_id: str = "usr_a", device_id: str = "phone", name: str = "1") -> KeyDevice:
    """A device with this identity, as it is stored."""
    assert isinstance(await store.device_keys.put(user_id, device_id, identity(name), NOW, 8), Stored)
    return (await store.device_keys.find([(user_id, device_id)]))[user_id, device_id]


# --- the store -------------------------------------------------------------------------------------------------------


async def test_the_version_grows_with_a_device_another_identity_and_a_removal_only(store: Store) -> None:
    put = partial(store.device_keys.put, limit=8)
    assert await put("usr_a", "phone", identity("1"), NOW) == Stored(1, True, 0)
    assert await put("usr_a", "phone", identity("1"), NOW) == Stored(1, False, 0)
    assert await put("usr_a", "tablet", identity("2"), NOW) == Stored(2, True, 0)
    renewed = identity("1")._replace(fallback_key=signed("other"))
    assert await put("usr_a", "phone", renewed, NOW) == Stored(2, False, 0)
    assert await put("usr_a", "phone", identity("3"), NOW) == Stored(3, True, 0)
    assert await put("usr_b", "phone", identity("4"), NOW) == Stored(1, True, 0)
    assert await store.device_keys.forget("usr_a", "tablet") == 4
    assert await store.device_keys.forget("usr_a", "tablet") is None
    assert await store.device_keys.version("usr_a") == 4


async def test_another_identity_takes_the_one_time_keys_of_the_last_with_it(store: Store) -> None:
    old = await device(store, name="1")
    assert await store.device_keys.add_one_time(old, some(0, 3), NOW) == Added(3)
    new = await device(store, name="2")
    assert await store.device_keys.claim(new, NOW) is None
    assert await store.device_keys.claim(old, NOW) is None
    assert await store.device_keys.add_one_time(old, some(3, 1), NOW) == IdentityMoved()
    # A new identity may count its keys from the beginning again.
    assert await store.device_keys.add_one_time(new, [signed("k000", "other")], NOW) == Added(1)


async def test_a_repeated_upload_stores_nothing_twice_and_never_again_what_was_claimed(store: Store) -> None:
    phone = await device(store)
    for _ in range(2):
        assert await store.device_keys.add_one_time(phone, some(0, 3), NOW) == Added(3)
    assert await store.device_keys.claim(phone, NOW) == signed("k000")
    assert await store.device_keys.add_one_time(phone, some(0, 4), NOW) == Added(3)
    assert [await store.device_keys.claim(phone, NOW) for _ in range(4)] == [*some(1, 3), None]


async def test_an_id_keeps_its_key(store: Store) -> None:
    phone = await device(store)
    await store.device_keys.add_one_time(phone, some(0, 1), NOW)
    refused = await store.device_keys.add_one_time(phone, [signed("new"), signed("k000", "other")], NOW)
    assert refused == AnotherKey("k000")
    twice = [signed("k001"), signed("k001", "other")]
    assert await store.device_keys.add_one_time(phone, twice, NOW) == AnotherKey("k001")
    assert await store.device_keys.counts([phone]) == [1]


async def test_no_more_than_the_limit_is_stored_however_many_upload_at_once(store: Store) -> None:
    phone = await device(store)
    answers: list[object] = []

    async def upload(first: int) -> None:
        answers.append(await store.device_keys.add_one_time(phone, some(first, 10), NOW, limit=35))

    async with anyio.create_task_group() as group:
        for first in range(0, 60, 10):
            group.start_soon(upload, first)
    assert sum(isinstance(answer, Added) for answer in answers) == 3
    assert answers.count(Full(30)) == 3
    assert await store.device_keys.counts([phone]) == [30]


async def test_no_more_devices_than_the_limit_however_many_come_at_once(store: Store) -> None:
    answers: list[object] = []

    async def put(number: int) -> None:
        answers.append(await store.device_keys.put("usr_a", f"d{number}", identity(str(number)), NOW, limit=3))

    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(put, number)
    assert answers.count(TooManyDevices(3)) == 3
    assert await store.device_keys.version("usr_a") == 3
    listed, more = await store.device_keys.listed("usr_a", "", 2)
    assert more == listed[-1].device_id
    assert len((await store.device_keys.listed("usr_a", more, 2))[0]) == 1


async def test_claims_at_once_get_every_key_once_and_one_after_another_in_upload_order(store: Store) -> None:
    phone = await device(store)
    await store.device_keys.add_one_time(phone, some(0, 30), NOW)
    await store.device_keys.add_one_time(phone, [signed("a-later-one")], NOW)
    assert await store.device_keys.claim(phone, NOW) == signed("k000")
    claimed: list[SignedKey | None] = []

    async def claim() -> None:
        claimed.append(await store.device_keys.claim(phone, NOW))

    async with anyio.create_task_group() as group:
        for _ in range(40):
            group.start_soon(claim)
    assert claimed.count(None) == 10
    assert sorted(key.key_id for key in claimed if key) == ["a-later-one", *(key.key_id for key in some(1, 29))]


async def test_one_caller_learns_that_keys_run_low_and_after_an_upload_one_again(store: Store) -> None:
    phone = await device(store)
    await store.device_keys.add_one_time(phone, some(0, LOW), NOW)
    assert await store.device_keys.running_low(phone) is None
    await store.device_keys.claim(phone, NOW)
    told: list[int | None] = []

    async def ask() -> None:
        told.append(await store.device_keys.running_low(phone))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(ask)
    assert sorted(told, key=str) == [LOW - 1, None, None, None, None]
    await store.device_keys.add_one_time(phone, some(LOW, 1), NOW)
    await store.device_keys.claim(phone, NOW)
    assert await store.device_keys.running_low(phone) == LOW - 1


async def test_what_is_forgotten_is_gone(store: Store) -> None:
    phone, tablet = await device(store), await device(store, device_id="tablet", name="2")
    other = await device(store, user_id="usr_b", name="3")
    for each in (phone, tablet, other):
        await store.device_keys.add_one_time(each, some(0, 1), NOW)
    assert await store.device_keys.forget("usr_a", "phone") == 3
    assert list(await store.device_keys.find([("usr_a", "phone"), ("usr_a", "tablet")])) == [("usr_a", "tablet")]
    assert await store.device_keys.claim(phone, NOW) is None
    await store.device_keys.forget_user("usr_a")
    assert await store.device_keys.listed("usr_a", "", 10) == ([], None)
    assert await store.db["one_time_keys"].distinct("device") == [other.name]


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Owner:
    """One device of somebody, as its owner speaks for it: real signatures."""

    def __init__(self, rest: Rest, user_id: str, token: str, device_id: str = "phone", name: str = "1") -> None:
        self.rest = rest
        self.user_id = user_id
        self.token = token
        self.device_id = device_id
        self.path = f"/v1/keys/{device_id}"
        self.signer = Ed25519PrivateKey.from_private_bytes(blake2b(name.encode(), digest_size=32).digest())
        self.identity_key = some_key(f"{user_id} {device_id} {name}")
        self.signing_key = base64(self.signer.public_key().public_bytes_raw())

    def sign(self, purpose: Purpose, name: str, key: str = "") -> dict[str, str]:
        public = some_key(key or name)
        text = signed_bytes(self.user_id, self.device_id, self.identity_key, purpose, name, public)
        return {"key_id": name, "key": public, "signature": base64(self.signer.sign(text))}

    def body(self) -> dict[str, Any]:
        fallback = self.sign(Purpose.FALLBACK, "fallback")
        return {"identity_key": self.identity_key, "signing_key": self.signing_key, "fallback_key": fallback}

    async def put(self) -> int:
        """The version of the device list then."""
        answer = await self.rest.call("PUT", self.path, self.token, self.body())
        assert answer.status_code == 200, answer.text
        stored = answer.json()
        assert stored["device"] == {
            "device_id": self.device_id,
            "identity_key": self.identity_key,
            "signing_key": self.signing_key,
            "fallback_key_id": "fallback",
            "one_time_keys": stored["device"]["one_time_keys"],
        }
        version: int = stored["version"]
        return version

    async def upload(self, first: int, count: int) -> int:
        body = {"keys": [self.sign(Purpose.ONE_TIME, f"k{number:03}") for number in range(first, first + count)]}
        answer = await self.rest.call("POST", f"{self.path}/one-time", self.token, body)
        assert answer.status_code == 200, answer.text
        left: int = answer.json()["count"]
        return left

    @property
    def named(self) -> dict[str, str]:
        return {"user_id": self.user_id, "device_id": self.device_id}


@pytest.fixture
async def rest(settings: Settings, store: Store, broker: Broker) -> AsyncIterator[Rest]:
    """Keys need no shard owner."""
    async with serving(settings, store, broker, owner=False) as running:
        yield running


async def owner(rest: Rest, name: str) -> Owner:
    """A new user with one device that has an identity."""
    device = Owner(rest, *await rest.user(name))
    await device.put()
    return device


async def claim(rest: Rest, token: str, *devices: dict[str, str]) -> list[dict[str, Any]]:
    answer = await rest.call("POST", "/v1/keys/claim", token, {"devices": list(devices)})
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


@asynccontextmanager
async def listening(broker: Broker, *user_ids: str) -> AsyncIterator[list[tuple[str, str, frames.ServerFrame]]]:
    """What these users' devices are told while the block runs: (user, device, frame)."""
    heard: list[tuple[str, str, frames.ServerFrame]] = []
    async with broker.client.pubsub() as pubsub, anyio.create_task_group() as group:
        await pubsub.subscribe(*(keys.notification_channel(user_id) for user_id in user_ids))

        async def listen() -> None:
            async for message in pubsub.listen():
                if message["type"] == "message":
                    signal = msgspec.json.decode(message["data"], type=records.UserSignal)
                    assert isinstance(signal, records.Tell)
                    user_id = message["channel"].decode().removeprefix(keys.NOTIFICATION_PREFIX)
                    heard.append((user_id, signal.device_id, codec.JSON.decode_server(bytes(signal.frame))))

        group.start_soon(listen)
        yield heard
        group.cancel_scope.cancel()


async def hear(heard: list[Any], count: int) -> None:
    with anyio.fail_after(5):
        while len(heard) < count:  # noqa: ASYNC110 - another task listens
            await anyio.sleep(0.01)


async def test_keys_whose_upload_outlasts_a_revocation_are_not_there_afterwards(rest: Rest, store: Store) -> None:
    """The token was good when the request began; its body came after the device was revoked."""
    user_id, admin_made = await rest.user("Ann")
    await store.devices.seen(user_id, "phone", 32, NOW, NOW)
    bound = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": user_id, "device_id": "phone"})
    thief = Owner(rest, user_id, bound.json()["access_token"])
    revoke = lambda: rest.call("DELETE", "/v1/devices/phone", admin_made)  # noqa: E731
    held = await rest.hold("PUT", thief.path, thief.token, thief.body(), revoke)
    assert refusal(held) == (401, "revoked")
    assert await store.device_keys.listed(user_id, "", 10) == ([], None)


async def test_keys_stored_in_the_moment_of_a_revocation_go_again(
    rest: Rest, store: Store, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revocation is over between the look at the token and the write."""
    user_id, admin_made = await rest.user("Ann")
    await store.devices.seen(user_id, "phone", 32, NOW, NOW)
    bound = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": user_id, "device_id": "phone"})
    device = Owner(rest, user_id, bound.json()["access_token"])
    put = DeviceKeyStore.put

    async def late(self: DeviceKeyStore, *arguments: Any) -> Any:
        assert (await rest.call("DELETE", "/v1/devices/phone", admin_made)).status_code == 204
        return await put(self, *arguments)

    monkeypatch.setattr(DeviceKeyStore, "put", late)
    assert refusal(await rest.call("PUT", device.path, device.token, device.body())) == (401, "revoked")
    assert await store.device_keys.listed(user_id, "", 10) == ([], None)


async def test_keys_are_claimed_in_upload_order_and_then_the_fallback(rest: Rest) -> None:
    ann, bob = await owner(rest, "Ann"), await owner(rest, "Bob")
    assert await ann.upload(0, 2) == 2
    assert await ann.upload(0, 2) == 2
    for name, fallback in (("k000", False), ("k001", False), ("fallback", True), ("fallback", True)):
        [item] = await claim(rest, bob.token, ann.named)
        purpose = Purpose.FALLBACK if fallback else Purpose.ONE_TIME
        assert item == {
            **ann.named,
            "identity_key": ann.identity_key,
            "signing_key": ann.signing_key,
            "key": ann.sign(purpose, name),
            "fallback": fallback,
        }
    assert await ann.upload(0, 3) == 1


async def test_a_claim_answers_in_the_asked_order_and_who_is_not_there_looks_unknown(rest: Rest, store: Store) -> None:
    ann, bob, cat = await owner(rest, "Ann"), await owner(rest, "Bob"), await owner(rest, "Cat")
    await store.blocks.block(cat.user_id, bob.user_id, NOW)
    missing = [{"user_id": "usr_nobody", "device_id": "phone"}, {"user_id": ann.user_id, "device_id": "none"}]
    items = await claim(rest, bob.token, missing[0], ann.named, cat.named, missing[1], bob.named)
    assert [(item["user_id"], item["device_id"]) for item in items] == [
        (name["user_id"], name["device_id"]) for name in (missing[0], ann.named, cat.named, missing[1], bob.named)
    ]
    assert [item.get("error", {}).get("code") for item in items] == ["not_found", None, "not_found", "not_found", None]
    assert {item["error"]["message"] for item in items if "error" in item} == {"no such device with keys"}
    unknown = await rest.call("GET", "/v1/users/usr_nobody/keys", bob.token)
    blocked = await rest.call("GET", f"/v1/users/{cat.user_id}/keys", bob.token)
    assert (refusal(unknown), unknown.content) == ((404, "not_found"), blocked.content)
    # Whom one blocks oneself is still there: a group may hold both.
    assert "error" not in (await claim(rest, cat.token, bob.named))[0]


async def test_device_lists_are_paged_and_carry_their_version(rest: Rest) -> None:
    ann = await owner(rest, "Ann")
    _, reader = await rest.user("Bob")
    for number in range(2):
        await Owner(rest, ann.user_id, ann.token, f"tablet-{number}").put()
    await ann.upload(0, 3)
    own = (await rest.call("GET", "/v1/keys", ann.token)).json()
    assert (own["version"], own["next_cursor"]) == (3, None)
    assert [(item["device_id"], item["one_time_keys"]) for item in own["items"]] == [
        ("phone", 3),
        ("tablet-0", 0),
        ("tablet-1", 0),
    ]
    path = f"/v1/users/{ann.user_id}/keys"
    first = (await rest.call("GET", f"{path}?limit=2", reader)).json()
    rest_of_it = (await rest.call("GET", f"{path}?limit=2&cursor={first['next_cursor']}", reader)).json()
    items = [*first["items"], *rest_of_it["items"]]
    assert [(first["version"], len(first["items"])), rest_of_it["next_cursor"]] == [(3, 2), None]
    assert items[0] == {"device_id": "phone", "identity_key": ann.identity_key, "signing_key": ann.signing_key}
    assert [item["device_id"] for item in items] == ["phone", "tablet-0", "tablet-1"]
    assert (await rest.call("GET", "/v1/keys", reader)).json() == {"version": 0, "items": [], "next_cursor": None}


async def test_only_what_the_device_itself_signed_is_stored(rest: Rest) -> None:
    ann = Owner(rest, *await rest.user("Ann"))
    good = ann.sign(Purpose.ONE_TIME, "k1")
    one_time = f"{ann.path}/one-time"
    assert refusal(await rest.call("POST", one_time, ann.token, {"keys": [good]})) == (404, "not_found")
    wrong = {**ann.body(), "fallback_key": ann.sign(Purpose.ONE_TIME, "fallback")}
    assert refusal(await rest.call("PUT", ann.path, ann.token, wrong)) == (400, "validation_failed")
    await ann.put()
    twin = Owner(rest, ann.user_id, ann.token, "tablet")
    for bad in (
        ann.sign(Purpose.FALLBACK, "k2"),
        twin.sign(Purpose.ONE_TIME, "k2"),
        {**good, "key_id": "k2"},
        {**good, "key": some_key("other")},
        {**good, "signature": "A" * 86},
        {**good, "signature": good["signature"][:-1] + "B"},
        {**good, "key": good["key"] + "="},
        {**good, "key_id": "k\n"},
    ):
        refused = await rest.call("POST", one_time, ann.token, {"keys": [good, bad]})
        assert refusal(refused) == (400, "validation_failed"), bad
    assert (await rest.call("GET", "/v1/keys", ann.token)).json()["items"][0]["one_time_keys"] == 0
    assert await ann.upload(0, 1) == 1
    other = {"keys": [ann.sign(Purpose.ONE_TIME, "k000", "another key")]}
    assert refusal(await rest.call("POST", one_time, ann.token, other)) == (409, "conflict")


async def test_a_token_of_another_device_uploads_nothing(rest: Rest) -> None:
    user_id, _ = await rest.user("Ann")
    issued = await rest.call("POST", "/v1/tokens", rest.admin_token, {"user_id": user_id, "device_id": "phone"})
    phone = Owner(rest, user_id, issued.json()["access_token"])
    tablet = Owner(rest, user_id, phone.token, "tablet")
    await phone.put()
    assert refusal(await rest.call("PUT", tablet.path, phone.token, tablet.body())) == (403, "forbidden")
    keys_body = {"keys": [tablet.sign(Purpose.ONE_TIME, "k1")]}
    assert refusal(await rest.call("POST", f"{tablet.path}/one-time", phone.token, keys_body)) == (403, "forbidden")


async def test_nobody_drains_a_device(settings: Settings, store: Store, broker: Broker) -> None:
    few = msgspec.structs.replace(settings, key_claims_per_pair_per_hour=2, key_claims_per_device_per_hour=5)
    async with serving(few, store, broker, owner=False) as rest:
        ann = await owner(rest, "Ann")
        await ann.upload(0, 10)
        given = []
        for _ in range(4):
            _, token = await rest.user("somebody")
            given.append([(await claim(rest, token, ann.named))[0]["fallback"] for _ in range(3)])
        taken = [[False, False, True], [False, False, True], [False, True, True], [True, True, True]]
        assert given == taken
        assert await ann.upload(0, 1) == 5


async def test_who_claims_or_changes_too_often_has_to_wait(settings: Settings, store: Store, broker: Broker) -> None:
    few = msgspec.structs.replace(settings, key_claims_per_minute=2, key_uploads_per_hour=2)
    async with serving(few, store, broker, owner=False) as rest:
        ann, bob = await owner(rest, "Ann"), await owner(rest, "Bob")
        for _ in range(2):
            await claim(rest, bob.token, ann.named)
        body = {"devices": [ann.named]}
        refused = await rest.call("POST", "/v1/keys/claim", bob.token, body)
        assert refusal(refused) == (429, "rate_limited")
        await claim(rest, ann.token, bob.named)
        await bob.put()
        assert refusal(await rest.call("PUT", bob.path, bob.token, bob.body())) == (429, "rate_limited")
        for _ in range(2):
            await bob.upload(0, 1)
        keys_body = {"keys": [bob.sign(Purpose.ONE_TIME, "k000")]}
        assert refusal(await rest.call("POST", f"{bob.path}/one-time", bob.token, keys_body)) == (429, "rate_limited")


async def test_the_device_is_told_once_that_its_keys_run_low(rest: Rest, broker: Broker) -> None:
    ann, bob = await owner(rest, "Ann"), await owner(rest, "Bob")
    await ann.upload(0, LOW)
    async with listening(broker, ann.user_id) as heard:
        for _ in range(3):
            await claim(rest, bob.token, ann.named)
        await ann.upload(LOW, 3)
        await claim(rest, bob.token, ann.named)
        await hear(heard, 2)
    payload = frames.KeysLowPayload(device_id="phone", remaining=LOW - 1)
    assert heard == [(ann.user_id, "phone", frames.KeysLow(payload=payload))] * 2


async def test_a_changed_device_list_is_told_to_those_one_talks_to_and_to_ones_other_devices(
    rest: Rest, broker: Broker, store: Store
) -> None:
    ann, bob, cat, dan = [await owner(rest, name) for name in ("Ann", "Bob", "Cat", "Dan")]
    await Log(store, "conv_1", [ann.user_id, bob.user_id, cat.user_id]).create()
    await Log(store, "conv_2", [ann.user_id, bob.user_id, dan.user_id]).create()
    await store.db["memberships"].update_one({"_id": f"conv_2:{dan.user_id}"}, {"$set": {"leave_seq": 1}})
    people = [person.user_id for person in (ann, bob, cat, dan)]
    async with listening(broker, *people) as heard:
        assert await Owner(rest, ann.user_id, ann.token, "tablet").put() == 2
        await hear(heard, 3)
        assert await ann.put() == 2
        assert await Owner(rest, ann.user_id, ann.token, name="another").put() == 3
        await hear(heard, 6)
        await device_keys.retire(store, broker, ann.user_id, "tablet")
        await device_keys.retire(store, broker, ann.user_id, "tablet")
        await hear(heard, 9)

    def changed(device_id: str, version: int) -> frames.IdentityChanged:
        payload = frames.IdentityChangedPayload(user_id=ann.user_id, device_id=device_id, version=version)
        return frames.IdentityChanged(payload=payload)

    others = sorted([bob.user_id, cat.user_id])
    for device_id, version, own in (("tablet", 2, "phone"), ("phone", 3, "tablet"), ("tablet", 4, "phone")):
        frame = changed(device_id, version)
        told = [(ann.user_id, own, frame), *((other, "", frame) for other in others)]
        assert heard[3 * version - 6 : 3 * version - 3] == told
    assert len(heard) == 9


async def test_a_hundred_devices_are_claimed_by_one_request_and_never_one_key_twice(rest: Rest) -> None:
    ann, bob = await owner(rest, "Ann"), await owner(rest, "Bob")
    await ann.upload(0, 8)
    items: list[dict[str, Any]] = []

    async def take() -> None:
        items.extend(await claim(rest, bob.token, ann.named))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(take)
    one_time = [item["key"]["key_id"] for item in items if not item["fallback"]]
    assert sorted(one_time) == [f"k{number:03}" for number in range(8)]
    many = [{"user_id": ann.user_id, "device_id": f"d{number}"} for number in range(100)]
    assert {item["error"]["code"] for item in await claim(rest, bob.token, *many)} == {"not_found"}
    for wrong in ([ann.named, ann.named], [], [*many, ann.named]):
        refused = await rest.call("POST", "/v1/keys/claim", bob.token, {"devices": wrong})
        assert refusal(refused) == (400, "validation_failed")
