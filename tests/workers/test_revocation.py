"""Revocation: which tokens are good, what the cache may keep, and that Redis is not needed for the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from litestar import Request

from bench.services import free_port
from protocol import codec, keys, records
from protocol.errors import AuthErrorCode
from protocol.models import User, UserStatus
from workers.broker import BrokerUnavailable, open_broker
from workers.codes import Codes
from workers.egress import open_egress
from workers.instances import Instance
from workers.query import QueryRole
from workers.rest import upkeep
from workers.rest.allowances import address_of
from workers.rest.desk import Desk
from workers.revocation import is_good, moment, revoke_device, revoke_others
from workers.senders import NoSender
from workers.store.devices import NewSession
from workers.tokens import Tokens

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

T0 = 1_800_000_000_000


async def log_in(store: Store, device_id: str, at: int = T0, user_id: str = "ann") -> int:
    """Log a device in; when its token was made."""
    session = NewSession(f"ses_{device_id}", b"hash", moment(at + 10**9))
    issued = await store.devices.log_in(user_id, device_id, "web", "", session, moment(at))
    return int(issued.timestamp() * 1000)


async def test_a_revoked_device_is_out_and_comes_back_by_a_new_login(store: Store, broker: Broker) -> None:
    first = await log_in(store, "phone")
    await log_in(store, "laptop")
    assert await is_good(store, broker, "ann", "phone", first)
    assert await revoke_device(store, broker, "ann", "phone", T0 + 5)
    assert not await is_good(store, broker, "ann", "phone", first)
    assert not await is_good(store, broker, "ann", "phone", T0 + 5), "made in the same millisecond"
    assert await is_good(store, broker, "ann", "laptop", first)
    assert await store.devices.session("ses_phone") is None
    again = await log_in(store, "phone", T0 + 6)
    assert await is_good(store, broker, "ann", "phone", again)
    assert not await revoke_device(store, broker, "ann", "teapot", T0)
    assert await revoke_device(store, broker, "ann", "phone", T0 + 7)
    assert await revoke_device(store, broker, "ann", "phone", T0 + 7), "whoever got no answer asks again"


async def test_clocks_that_differ_neither_save_a_token_nor_spoil_a_login(store: Store, broker: Broker) -> None:
    ahead = await log_in(store, "phone", T0 + 900)
    assert await revoke_device(store, broker, "ann", "phone", T0)
    assert not await is_good(store, broker, "ann", "phone", ahead)
    behind = await log_in(store, "phone", T0 - 900)
    assert await is_good(store, broker, "ann", "phone", behind)


async def test_all_others_are_revoked_known_or_not(store: Store, broker: Broker) -> None:
    await store.users.create(
        User(user_id="ann", phone=None, email=None, name="Ann", created_at=moment(T0), status=UserStatus.OFFLINE)
    )
    for device_id in ("phone", "laptop", "tablet"):
        await log_in(store, device_id)
    await revoke_others(store, broker, "ann", "phone", T0 + 5)
    assert await is_good(store, broker, "ann", "phone", T0)
    others: tuple[str | None, ...] = ("laptop", "tablet", "never-seen", None)
    for other in others:
        assert not await is_good(store, broker, "ann", other, T0), other
        assert await is_good(store, broker, "ann", other, T0 + 100), other
    assert [device.device_id for device in (await store.devices.listed("ann", "", 10))[0]] == ["phone"]
    await revoke_others(store, broker, "ann", None, T0 + 7)
    assert not await is_good(store, broker, "ann", "phone", T0)


async def test_all_means_those_revoked_before_too(store: Store, broker: Broker) -> None:
    """The administrator makes tokens for any device, also for one that was revoked."""
    await log_in(store, "phone")
    await revoke_device(store, broker, "ann", "phone", T0 + 5)
    assert await is_good(store, broker, "ann", "phone", T0 + 10), "made by the administrator since"
    await revoke_others(store, broker, "ann", None, T0 + 20)
    assert not await is_good(store, broker, "ann", "phone", T0 + 10)


async def test_what_was_read_before_a_change_is_not_cached_after_it(store: Store, broker: Broker) -> None:
    await log_in(store, "phone")
    assert await broker.look_session("ann", "claim 1") is None
    stale = codec.encode_value({"deleted": False, "valid_from": 0, "devices": {}})
    await revoke_device(store, broker, "ann", "phone", T0 + 5)
    await broker.fill_session("ann", "claim 1", stale)
    assert not await is_good(store, broker, "ann", "phone", T0)
    # While a writer holds it, nobody fills it; and who finds the hold reads the truth.
    await broker.hold_session("ann")
    assert not await is_good(store, broker, "ann", "phone", T0)
    assert await broker.client.get(keys.session("ann")) == b"hold"
    await broker.drop_session("ann")
    assert not await is_good(store, broker, "ann", "phone", T0)
    assert str(await broker.client.get(keys.session("ann"))).startswith("b'{")
    assert 3500 < await broker.client.ttl(keys.session("ann")) <= 3600


async def test_without_redis_the_truth_is_read_and_changed(store: Store) -> None:
    await log_in(store, "phone")
    async with open_broker(f"redis://127.0.0.1:{free_port()}/0") as away:
        assert await is_good(store, away, "ann", "phone", T0)
        with pytest.raises(BrokerUnavailable):
            await revoke_device(store, away, "ann", "phone", T0 + 5)
        assert not await is_good(store, away, "ann", "phone", T0)


async def test_what_was_revoked_while_redis_was_away_is_said_by_upkeep(
    settings: Settings, store: Store, broker: Broker
) -> None:
    """A refresh token was used twice: nobody repeats that request, and the thief's connection stayed for an hour."""
    await log_in(store, "phone")
    assert await is_good(store, broker, "ann", "phone", T0), "the copy says so for an hour"
    async with open_broker(f"redis://127.0.0.1:{free_port()}/0") as away:
        with pytest.raises(BrokerUnavailable):
            await revoke_device(store, away, "ann", "phone", T0 + 5)
    instance = Instance(broker, "rest_1", records.InstanceInfo("rest", "http://one", 0, False))
    codes = Codes(settings, store, NoSender())
    async with open_egress("") as egress:
        desk = Desk(settings, store, broker, instance, Tokens(settings.jwt_private_key), codes, None, egress)
        async with broker.client.pubsub() as heard:
            await heard.subscribe(keys.user_channel("ann"))
            while await upkeep.finish_one(desk, -(10**9)):
                pass
            while (message := await heard.get_message(timeout=5)) is None or message["type"] != "message":
                continue
            assert codec.decode_signal(message["data"]) == records.Revoked("phone", T0 + 6)
        assert not await is_good(store, broker, "ann", "phone", T0)
        await log_in(store, "laptop")
        await log_in(store, "tablet")
        await revoke_device(store, broker, "ann", "laptop", T0 + 7)
        await revoke_others(store, broker, "ann", "tablet", T0 + 8)
        await revoke_others(store, broker, "ann", None, T0 + 9)
        assert not await upkeep.finish_one(desk, -(10**9)), "what was said is not said again"


async def test_gateways_hear_which_tokens_are_void(store: Store, broker: Broker) -> None:
    await log_in(store, "phone")
    async with broker.client.pubsub() as heard:
        await heard.subscribe(keys.user_channel("ann"))
        await revoke_device(store, broker, "ann", "phone", T0 + 5)
        while (message := await heard.get_message(timeout=5)) is None or message["type"] != "message":
            continue
        assert codec.decode_signal(message["data"]) == records.Revoked("phone", T0 + 6)


async def test_the_others_of_a_device_hear_it_whatever_their_clocks_said(store: Store, broker: Broker) -> None:
    for device_id, at in (("phone", T0), ("laptop", T0 + 900), ("tablet", T0)):
        await log_in(store, device_id, at)
    await broker.client.hset(keys.connection("ann"), "television", b"{}")
    async with broker.client.pubsub() as heard:
        await heard.subscribe(keys.user_channel("ann"))
        await revoke_others(store, broker, "ann", "phone", T0 + 5)
        told: dict[str, int] = {}
        with anyio.fail_after(5):
            while len(told) < 3:
                message = await heard.get_message(timeout=1)
                if message is not None and message["type"] == "message":
                    signal = codec.decode_signal(message["data"])
                    assert isinstance(signal, records.Revoked)
                    told[signal.device_id] = signal.before_ms
        assert told == {"laptop": T0 + 901, "tablet": T0 + 6, "television": T0 + 6}


async def test_the_query_role_refuses_a_revoked_device_and_notes_the_others(store: Store, broker: Broker) -> None:
    role = QueryRole(store, broker, 4)
    query = records.OpenQuery("gw", 1, "ann", "phone", {}, T0)
    item, outcome = await role._item(query)
    assert (outcome, item) == ("answered", records.OpenAnswer(1, 0, []))
    for _ in range(2):
        await role._note_device(query)
    device = await store.devices.get("ann", "phone")
    assert device is not None
    await store.db["devices"].update_one({}, {"$set": {"last_seen": moment(T0)}})
    await role._note_device(query)
    device = await store.devices.get("ann", "phone")
    assert device is not None
    assert device.last_seen == moment(T0), "once an hour is enough"
    await revoke_device(store, broker, "ann", "phone", T0 + 5)
    item, outcome = await role._item(query)
    assert item == records.OpenAnswer(1, 0, [], AuthErrorCode.REVOKED)
    assert outcome == "revoked"


async def test_an_account_has_so_many_devices_and_the_one_seen_longest_ago_goes_first(store: Store) -> None:
    for number, device_id in enumerate(("a", "b", "c", "d")):
        await log_in(store, device_id, T0 + number)
    assert await store.devices.surplus("ann", "d", 4) == []
    assert await store.devices.surplus("ann", "d", 2) == ["b", "a"]
    await store.devices.seen("ann", "a", 4, moment(T0), moment(T0 + 9))
    shown = {device.device_id: device.last_seen for device in (await store.devices.listed("ann", "", 10))[0]}
    assert shown == {"a": moment(T0 + 9), "b": moment(T0 + 1), "c": moment(T0 + 2), "d": moment(T0 + 3)}
    assert await store.devices.surplus("ann", "d", 2) == ["c", "b"]


async def shown_devices(store: Store) -> list[str]:
    return [device.device_id for device in (await store.devices.listed("ann", "", 100))[0]]


async def test_a_device_that_connects_is_listed_however_many_were_before_it(store: Store, broker: Broker) -> None:
    """With the administrator's tokens: none of these has logged in."""
    for number in range(40):
        await store.devices.seen("ann", f"d{number:02}", 4, moment(T0 + number), moment(T0 + number))
    assert await shown_devices(store) == ["d36", "d37", "d38", "d39"], "those seen last"
    for name in ("d36", "d37", "d38", "d39"):
        await revoke_device(store, broker, "ann", name, T0 + 100)
    await store.devices.seen("ann", "new", 4, moment(T0 + 200), moment(T0 + 200))
    assert await shown_devices(store) == ["new"], "those that were revoked take no place"


async def test_devices_that_logged_in_or_were_revoked_once_make_no_room(store: Store, broker: Broker) -> None:
    """To forget them would end a session, or make a void token good again."""
    await log_in(store, "session", T0)
    await store.devices.seen("ann", "back", 2, moment(T0), moment(T0))
    await revoke_device(store, broker, "ann", "back", T0 + 1)
    await store.devices.seen("ann", "back", 2, moment(T0 + 9), moment(T0 + 9))
    for number in range(5):
        await store.devices.seen("ann", f"d{number}", 2, moment(T0 + 20 + number), moment(T0 + 20 + number))
    assert await shown_devices(store) == ["back", "d4", "session"]
    assert not await is_good(store, broker, "ann", "back", T0)
    assert await store.devices.session("ses_session") is not None


async def test_what_is_remembered_of_an_account_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.store.devices.REMEMBERED", 5)
    for number in range(9):
        await store.devices.seen("ann", f"d{number}", 2, moment(T0), moment(T0 + number))
        await store.devices.revoke("ann", f"d{number}", moment(T0 + number))
    assert await store.db["devices"].count_documents({"user_id": "ann"}) == 5


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("not an address", "not an address"),
        (None, ""),
    ],
)
def test_whom_an_address_counts_as(host: str | None, counted: str) -> None:
    scope = {"type": "http", "client": None if host is None else (host, 1)}
    request: Request[Any, Any, Any] = Request(scope)  # type: ignore[arg-type] # of a scope, only this is read
    assert address_of(request) == counted
