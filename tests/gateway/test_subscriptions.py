"""Channels on a real Valkey: what is heard, what is dropped, and what a gap leads to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from gateway.subscriptions import Subscriptions
from gateway.wire import Address, Wire
from protocol import codec, keys, records
from protocol.models import UserStatus
from tests.gateway.fakes import eventually

if TYPE_CHECKING:
    import trio

    from tests.gateway.proxy import Proxy

ONLINE = records.PresenceChange(UserStatus.ONLINE, 5)
FRAME = b'{"type":"keys_low","payload":{"device_id":"d1","remaining":3}}'
LONG = b'{"type":"keys_low","payload":{"device_id":"%b","remaining":3}}' % (b"x" * 70_000)
TELL = records.Tell(msgspec.Raw(FRAME))

pytestmark = pytest.mark.trio


class Ear:
    """Implements `subscriptions.Listener`."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.watched: set[str] = set()
        self.heard: list[tuple[str, Any]] = []
        self.gaps = 0

    def signalled(self, user_id: str, signal: records.UserSignal) -> None:
        self.heard.append((user_id, signal))

    def presence_changed(self, user_id: str, change: records.PresenceChange) -> None:
        self.heard.append((user_id, change))

    def heard_again(self) -> None:
        self.gaps += 1


class Listening:
    """Subscriptions that run, what they hear, and somebody who publishes."""

    def __init__(self, channels: Subscriptions, ear: Ear, redis: Wire, asked: list[records.PresenceQuery]) -> None:
        self.channels = channels
        self.ear = ear
        self.redis = redis
        self.asked = asked

    async def settle(self) -> None:
        """Until what was wanted so far is subscribed."""
        query = records.PresenceQuery("gw_1", 1, "usr_a", [])
        self.asked.clear()
        self.channels.ask_when_heard(query)
        await eventually(lambda: self.asked == [query], 5)

    async def publish(self, channel: str, value: Any) -> int:
        """How many hear it."""
        payload = value if isinstance(value, bytes) else codec.encode_value(value)
        receivers: int = await self.redis.call("PUBLISH", channel, payload)
        return receivers


async def listen(address: Address, direct: Address, nursery: trio.Nursery) -> Listening:
    asked: list[records.PresenceQuery] = []
    channels, ear = Subscriptions(address, 2.0, asked.append), Ear()
    redis = Wire(direct, "test", max_outstanding=100, deadline_seconds=5)
    nursery.start_soon(redis.run)
    nursery.start_soon(channels.run, ear)
    await redis.wait_connected()
    await channels.wire.wait_connected()
    return Listening(channels, ear, redis, asked)


@pytest.fixture
async def listening(address: Address, nursery: trio.Nursery) -> Listening:
    return await listen(address, address, nursery)


async def test_a_user_is_heard_while_connected_and_a_person_while_watched(listening: Listening) -> None:
    channels, ear = listening.channels, listening.ear
    ear.users.add("usr_a")
    channels.user_changed("usr_a")
    ear.watched.add("usr_b")
    channels.person_changed("usr_b")
    await listening.settle()
    revoked = records.Revoked("d1", 5)
    assert await listening.publish(keys.user_channel("usr_a"), revoked) == 1
    assert await listening.publish(keys.notification_channel("usr_a"), TELL) == 1
    assert await listening.publish(keys.presence("usr_b"), ONLINE) == 1
    assert await listening.publish(keys.user_channel("usr_b"), TELL) == 0
    await eventually(lambda: len(ear.heard) == 3)
    assert ear.heard == [("usr_a", revoked), ("usr_a", TELL), ("usr_b", ONLINE)]
    ear.users.clear()
    ear.watched.clear()
    channels.user_changed("usr_a")
    channels.person_changed("usr_b")
    await listening.settle()
    for channel in (keys.user_channel("usr_a"), keys.notification_channel("usr_a"), keys.presence("usr_b")):
        assert await listening.publish(channel, TELL) == 0


@pytest.mark.parametrize(
    ("channel", "payload"),
    [
        ("user:usr_a", b"\xff\x00"),
        ("user:usr_a", b"[" * 100_000),
        ("user:usr_a", b'{"type":"unknown"}'),
        ("user:usr_a", b'{"type":"tell","frame":"no frame"}'),
        ("user:usr_a", b'{"type":"tell","frame":{"type":"auth"}}'),
        ("user:usr_a", codec.encode_value(records.Tell(msgspec.Raw(LONG)))),
        ("notification:usr_a", codec.encode_value(records.Revoked("", 2**50))),
        ("presence:usr_a", codec.encode_value(TELL)),
        ("presence:usr_a", b'{"status":"away","last_seen":5}'),
    ],
)
async def test_what_is_none_of_ours_is_counted_and_dropped(listening: Listening, channel: str, payload: bytes) -> None:
    ear = listening.ear
    ear.users.add("usr_a")
    ear.watched.add("usr_a")
    listening.channels.user_changed("usr_a")
    listening.channels.person_changed("usr_a")
    await listening.settle()
    assert await listening.publish(channel, payload) == 1
    assert await listening.publish("user:usr_a", TELL) == 1
    await eventually(lambda: bool(ear.heard))
    assert ear.heard == [("usr_a", TELL)]
    assert listening.channels.undecodable == 1
    assert listening.channels.wire.connects == 1


async def test_many_changes_of_one_turn_are_few_commands(listening: Listening) -> None:
    await listening.settle()
    await listening.redis.call("CONFIG", "RESETSTAT")
    for number in range(1200):
        listening.ear.users.add(f"usr_{number}")
        listening.channels.user_changed(f"usr_{number}")
    await listening.settle()
    stats = (await listening.redis.call("INFO", "commandstats")).decode()
    line = next(line for line in stats.splitlines() if line.startswith("cmdstat_subscribe:"))
    assert line.split("calls=")[1].split(",")[0] == "3"
    assert await listening.publish(keys.notification_channel("usr_1199"), TELL) == 1


async def test_after_a_gap_everything_is_heard_again_and_the_listener_knows(
    proxy: Proxy, address: Address, nursery: trio.Nursery
) -> None:
    listening = await listen(proxy.address, address, nursery)
    ear = listening.ear
    ear.users.add("usr_a")
    ear.watched.add("usr_b")
    listening.channels.user_changed("usr_a")
    listening.channels.person_changed("usr_b")
    await listening.settle()
    gaps = ear.gaps
    proxy.refusing = True
    proxy.cut()
    await eventually(lambda: not listening.channels.wire.connected)
    assert await listening.publish(keys.presence("usr_b"), ONLINE) == 0
    ear.watched.add("usr_c")
    listening.channels.person_changed("usr_c")
    listening.asked.clear()
    listening.channels.ask_when_heard(records.PresenceQuery("gw_1", 7, "usr_a", ["usr_c"]))
    proxy.refusing = False
    await eventually(lambda: ear.gaps == gaps + 1, 5)
    for channel in (keys.user_channel("usr_a"), keys.presence("usr_b"), keys.presence("usr_c")):
        assert await listening.publish(channel, TELL if channel.startswith("user") else ONLINE) == 1
    await eventually(lambda: len(ear.heard) == 3)
    assert listening.asked == [], "kept by nobody while the wire is down: the listener asks for all it watches"


async def test_questions_wait_in_bounded_number(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    await listening.settle()
    monkeypatch.setattr("gateway.subscriptions.ASKS_WAITING", 3)
    listening.asked.clear()
    for number in range(4):
        listening.channels.ask_when_heard(records.PresenceQuery("gw_1", number, "usr_a", ["usr_c"]))
    assert listening.channels.waiting == 3
    await eventually(lambda: [query.connection for query in listening.asked] == [0, 1, 2])


async def test_a_silent_redis_is_given_up(proxy: Proxy, address: Address, nursery: trio.Nursery) -> None:
    listening = await listen(proxy.address, address, nursery)
    await listening.settle()
    proxy.silent = True
    await eventually(lambda: not listening.channels.wire.connected, 6)
