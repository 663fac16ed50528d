"""Bounds of the gateway that no other test meets: at the bound, and one past it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway import broker as brokers
from gateway.admission import Admission, PublicKeys
from gateway.registry import Attachment, RegistryScripts
from gateway.sweep import GRACE_SECONDS, HeadSweep
from gateway.wire import Address, Wire, WireFull
from protocol import dev_keys, keys, records
from protocol.codec import encode_down
from protocol.frames import AuthPayload
from tests.gateway.fakes import WALL_SECONDS, House, eventually, token
from tests.gateway.test_broker import Recorder, make_broker

if TYPE_CHECKING:
    import trio


def test_bytes_that_redis_does_not_take_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.wire.MAX_UNSENT_BYTES", 10)
    wire = Wire(Address.parse("redis://127.0.0.1:1"), "test", max_outstanding=100, deadline_seconds=2)
    wire.connected = True
    for _ in range(3):
        wire.post(b"xxxx", None)
    assert wire.unsent_bytes == 12
    with pytest.raises(WireFull):
        wire.post(b"x", None)


def test_verified_tokens_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.admission.VERIFIED_TOKENS", 3)
    admission = Admission(PublicKeys(dev_keys.PUBLIC_JWK), 10)
    for number in range(4):
        payload = AuthPayload(
            user_id=f"usr_{number}",
            auth_token=token(f"usr_{number}"),
            device_id="d1",
            platform="test",
            app_version="1",
        )
        admission.check(payload, "10.0.0.1", 1000.0, WALL_SECONDS * 1000)
        assert admission.remembered[0] == min(number + 1, 3)


def test_suspected_heads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.sweep.SUSPECTS", 3)
    house = House()
    house.open("usr_a", heads={"conv_1": 1})
    sweep = HeadSweep(house.hub.users, "gw_test")
    for number in range(4):
        sweep.answered(records.HeadsAnswer([records.UserHead("usr_a", f"conv_{number}", 5)]), house.now)
        assert sweep.suspects == min(number + 1, 3)
    assert [name for _, name, _ in sweep.due_suspects(house.now + GRACE_SECONDS)] == ["conv_1", "conv_2", "conv_3"]


@pytest.mark.trio
async def test_a_gateway_reads_a_bounded_number_of_down_entries_at_once(
    address: Address, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "DOWN_ENTRIES", 3)
    receiver, broker = Recorder(), make_broker(address)
    sizes: list[int] = []
    route = broker._route_entries

    async def noted(entries: list[list[Any]]) -> None:
        sizes.append(len(entries))
        await route(entries)

    monkeypatch.setattr(broker, "_route_entries", noted)
    await nursery.start(broker.run, receiver)
    await eventually(lambda: len(sizes) > 0 or broker.down.connected)
    add = "for n = 1, 7 do redis.call('XADD', KEYS[1], '*', ARGV[1], ARGV[2]) end return 7"
    await broker.commands.call("EVAL", add, 1, keys.down("gw_1"), keys.FIELD, encode_down([records.Replaced(1)]))
    await eventually(lambda: len(receiver.items) == 7)
    assert max(sizes) == 3


@pytest.mark.trio
async def test_users_who_were_seen_wait_in_bounded_number(
    address: Address, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "SEEN_LIMIT", 3)
    wire = Wire(address, "test", max_outstanding=100, deadline_seconds=2)
    nursery.start_soon(wire.run)
    await wire.wait_connected()
    scripts = RegistryScripts("gw_1")
    for number in range(4):
        wire.post(scripts.attach(Attachment(f"usr_{number}", "d1", number, 1000 + number)), None)
    await eventually(lambda: wire.outstanding == 0)
    assert await wire.call("ZCARD", keys.SEEN) == 3
