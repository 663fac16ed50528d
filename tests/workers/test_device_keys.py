"""Keys of devices: what is stored once, what is claimed once, who hears of a change; over MongoDB and over HTTP."""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING

import anyio
import pytest

from protocol.prekeys import SignedKey
from workers.store.device_keys import (
    LOW,
    Added,
    AnotherKey,
    Full,
    Identity,
    IdentityMoved,
    KeyDevice,
    Stored,
    TooManyDevices,
)

if TYPE_CHECKING:
    from workers.store import Store

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def signed(name: str, key: str = "") -> SignedKey:
    digest = blake2b((key or name).encode(), digest_size=32).digest()
    return SignedKey(name, b64encode(digest).decode().rstrip("="), "A" * 86)


def some(first: int, count: int) -> list[SignedKey]:
    return [signed(f"k{number:03}") for number in range(first, first + count)]


def identity(name: str) -> Identity:
    return Identity(f"identity-{name}", f"signing-{name}", signed(f"fallback-{name}"))


async def device(store: Store, user_id: str = "usr_a", device_id: str = "phone", name: str = "1") -> KeyDevice:
    """A device with this identity, as it is stored."""
    assert isinstance(await store.device_keys.put(user_id, device_id, identity(name), NOW), Stored)
    return (await store.device_keys.find([(user_id, device_id)]))[user_id, device_id]


# --- the store -------------------------------------------------------------------------------------------------------


async def test_the_version_grows_with_a_device_another_identity_and_a_removal_only(store: Store) -> None:
    put = store.device_keys.put
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
