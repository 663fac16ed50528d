"""The whole gateway process on both transports against a real Valkey; the test plays the workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import msgspec
import pytest
import trio
import trio.lowlevel
import trio_websocket

from gateway import arrivals
from gateway.server import Gateway, open_listener, stop_listening
from gateway.settings import load_settings
from gateway.wire import Address, Wire
from protocol import codec, keys, records
from protocol.models import UserStatus
from tests.gateway.fakes import eventually, message, token
from tests.gateway.peers import Peer, request_head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.gateway.proxy import Proxy

pytestmark = pytest.mark.trio
TRANSPORTS = ["epoll", "trio-websocket"]


class Running:
    """A gateway under test, and the worker's side of its Redis."""

    def __init__(self, gateway: Gateway, listener: socket.socket, redis: Wire, stopping: trio.Event) -> None:
        self.gateway = gateway
        self.listener = listener
        self.port: int = listener.getsockname()[1]
        self.redis = redis
        self.stopping = stopping
        self.ended = trio.Event()
        self.streams: list[trio.SocketStream] = []
        self._query_position: bytes = b"0"

    async def next_query(self, kind: type[Any]) -> Any:
        """The next query of this kind; others are passed over."""
        with trio.fail_after(15):
            while True:
                entry = await self._next("query", self._query_position)
                self._query_position = entry[0]
                query = codec.decode_query(entry[1][1])
                if isinstance(query, kind):
                    return query

    async def published(self, conversation_id: str, after: bytes = b"0") -> Any:
        """The first record behind `after` in a conversation's shard."""
        key = keys.ingest(keys.shard_of(conversation_id, keys.DEFAULT_SHARDS))
        with trio.fail_after(5):
            entry = await self._next(key, after)
        return codec.decode_ingest(entry[1][1])

    async def _next(self, key: str, after: bytes) -> Any:
        while True:
            entries = await self.redis.call("XRANGE", key, b"(" + after if after != b"0" else b"-", "+", "COUNT", 1)
            if entries:
                return entries[0]
            await trio.sleep(0.01)

    async def down(self, *items: records.DownItem) -> None:
        """One entry on the gateway's stream."""
        key = keys.down(self.gateway.instance_id)
        await self.redis.call("XADD", key, "NOMKSTREAM", "*", "r", codec.encode_down(list(items)))

    @asynccontextmanager
    async def client(self) -> AsyncIterator[trio_websocket.WebSocketConnection]:
        """A WebSocket that has not authenticated."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        try:
            async with trio.open_nursery() as nursery:
                yield await trio_websocket.wrap_client_stream(nursery, stream, "127.0.0.1", "/v1/ws")
                nursery.cancel_scope.cancel()
        finally:
            stream.socket.close()  # the library leaves it open when the server has closed

    async def open(self, websocket: trio_websocket.WebSocketConnection, user_id: str = "usr_a", **extra: Any) -> int:
        """Authenticate and be answered by the test's worker → the connection number."""
        await websocket.send_message(auth_frame(user_id, **extra))
        query = await self.next_query(records.OpenQuery)
        await self.down(records.OpenAnswer(query.connection, 0, [records.OpenHead("conv_1", 0, 0, bytes(16))]))
        assert await receive_types(websocket, 2) == ["auth_success", "sync_complete"]
        number: int = query.connection
        return number

    async def exists(self, count: int, *names: str) -> bool:
        """Do exactly so many of these keys exist?"""
        return bool(await self.redis.call("EXISTS", *names) == count)

    async def http(self, path: str) -> httpx2.Response:
        async with httpx2.AsyncClient() as client:
            return await client.get(f"http://127.0.0.1:{self.port}{path}")


def auth_frame(user_id: str, **extra: Any) -> str:
    payload = {
        "user_id": user_id,
        "auth_token": token(user_id, exp=int(time.time_ns() / 1e9) + 60),
        "device_id": "d1",
        "platform": "test",
        "app_version": "1",
    }
    return json.dumps({"type": "auth", "payload": payload | extra})


async def receive(websocket: trio_websocket.WebSocketConnection) -> Any:
    with trio.fail_after(5):
        return json.loads(await websocket.get_message())


async def receive_types(websocket: trio_websocket.WebSocketConnection, count: int) -> list[str]:
    return [(await receive(websocket))["type"] for _ in range(count)]


async def close_code(websocket: trio_websocket.WebSocketConnection, seconds: float = 5) -> int:
    with trio.fail_after(seconds):
        while True:
            try:
                await websocket.get_message()
            except trio_websocket.ConnectionClosed as closed:
                return closed.reason.code if closed.reason is not None else 0


async def start(nursery: trio.Nursery, address: Address, direct: Address, **variables: str) -> Running:
    """A gateway on `address`; the test itself reaches Redis by `direct`."""
    environ = {"TRIREME_ENV": "dev", "TRIREME_REDIS_URL": f"redis://{address}", **variables}
    gateway = Gateway(load_settings(environ))
    listener = open_listener("127.0.0.1", 0)
    redis = Wire(direct, "test", max_outstanding=1000, deadline_seconds=5)
    nursery.start_soon(redis.run)
    await redis.wait_connected()
    running = Running(gateway, listener, redis, trio.Event())

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with listener:
            await gateway.run(running.stopping, listener, task_status=task_status)
        running.ended.set()

    with trio.fail_after(5):
        await nursery.start(run)
    return running


@pytest.fixture(params=TRANSPORTS)
async def running(request: pytest.FixtureRequest, address: Address, nursery: trio.Nursery) -> Running:
    return await start(nursery, address, address, TRIREME_GATEWAY_TRANSPORT=request.param)


@pytest.fixture
async def behind_proxy(proxy: Proxy, address: Address, nursery: trio.Nursery) -> Running:
    return await start(nursery, proxy.address, address)


async def test_a_message_goes_through_and_comes_back(running: Running) -> None:
    async with running.client() as sender, running.client() as recipient:
        number = await running.open(sender, "usr_a")
        await running.open(recipient, "usr_b")
        await sender.send_message(json.dumps(message("k1", "conv_1", "hello")))
        record = await running.published("conv_1")
        assert (record.instance, record.connection) == (running.gateway.instance_id, number)
        assert (record.sender_id, record.content) == ("usr_a", "hello")
        frame = b'{"type":"messages","payload":{"conversation_id":"conv_1"}}'
        await running.down(
            records.Outcome(number, "k1", b'{"type":"message_ack"}'),
            records.Delivery("conv_1", 1, 1, ["usr_a", "usr_b"], number, frame),
        )
        assert await receive_types(sender, 1) == ["message_ack"]
        assert await receive_types(recipient, 1) == ["messages"]


async def test_receipts_of_a_moment_make_one_record_per_shard(running: Running) -> None:
    first, second = (keys.new_message_id(1, n, keys.shard_of("conv_1", 64)) for n in range(2))
    async with running.client() as websocket:
        await running.open(websocket)
        for message_id in (first, "msg_nonsense", second):
            ack = {"type": "delivery_ack", "message_id": message_id, "timestamp": 1}
            await websocket.send_message(json.dumps(ack))
        record = await running.published("conv_1")
        assert [mark.message_id for mark in record.delivered] == [first, second]
        assert running.gateway.broker.receipts.unknown_ids == 1


async def test_connection_and_presence_stand_in_redis_while_connected(running: Running) -> None:
    async with running.client() as websocket:
        number = await running.open(websocket)
        stored = codec.decode_registry(await running.redis.call("HGET", keys.connection("usr_a"), "d1"))
        assert (stored.instance_id, stored.connection_id) == (running.gateway.instance_id, str(number))
        assert 3500 < await running.redis.call("TTL", keys.connection("usr_a")) <= 3600
        assert codec.decode_presence(await running.redis.call("GET", keys.presence("usr_a"))).status == "online"
        assert 290 < await running.redis.call("TTL", keys.presence("usr_a")) <= 300
        await websocket.send_message(json.dumps({"type": "goodbye"}))
        assert await close_code(websocket) == 1000
        await eventually(lambda: running.exists(0, keys.connection("usr_a")))
        assert codec.decode_presence(await running.redis.call("GET", keys.presence("usr_a"))).status == "offline"


async def test_forged_and_expired_tokens_are_turned_away(running: Running) -> None:
    good = token("usr_a", exp=int(time.time_ns() / 1e9) + 60)
    forged = good[:-8] + ("A" * 8 if not good.endswith("A" * 8) else "B" * 8)
    for bad, error in ((forged, "invalid_token"), (token("usr_a", exp=1), "expired_token"), ("x", "invalid_token")):
        async with running.client() as websocket:
            await websocket.send_message(auth_frame("usr_a", auth_token=bad))
            assert await receive(websocket) == {"type": "auth_error", "error": error}
            assert await close_code(websocket) == 4401
    assert not await running.redis.call("EXISTS", keys.QUERY)


async def upgrade_status(running: Running, client: str) -> int:
    """What the upgrade of a client behind the balancer on this machine is answered; the connection stays open."""
    peer = Peer(await trio.open_tcp_stream("127.0.0.1", running.port))
    await peer.send(request_head(X_Forwarded_For=client))
    running.streams.append(peer.stream)
    return int((await peer.head()).split()[1])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_w17_one_client_behind_a_balancer_shuts_out_nobody_but_itself(
    transport: str, address: Address, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lasts an hour here, so that any machine is fast enough to fill it; `test_arrivals.py` lets it pass."""
    monkeypatch.setattr(arrivals, "_WINDOW_SECONDS", 3600.0)
    running = await start(
        nursery, address, address, TRIREME_GATEWAY_TRANSPORT=transport, TRIREME_TRUSTED_PROXIES="127.0.0.1"
    )
    assert [await upgrade_status(running, "203.0.113.9") for _ in range(50)] == [101] * 50
    assert await upgrade_status(running, "203.0.113.9") == 429
    assert await upgrade_status(running, "198.51.100.7") == 101
    assert (await running.http("/health/live")).status_code == 200
    assert "gateway_turned_away_total 1.0" in (await running.http("/metrics")).text
    for stream in running.streams:
        await stream.aclose()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_w17_the_201st_connection_without_a_token_has_to_wait(
    transport: str, address: Address, nursery: trio.Nursery
) -> None:
    running = await start(
        nursery, address, address, TRIREME_GATEWAY_TRANSPORT=transport, TRIREME_CONNECTIONS_PER_SECOND="1000"
    )
    assert [await upgrade_status(running, "ignored") for _ in range(200)] == [101] * 200
    assert await upgrade_status(running, "ignored") == 429
    await running.streams[0].aclose()
    await eventually(lambda: running.gateway.hub.load == 199)
    assert await upgrade_status(running, "ignored") == 101
    for stream in running.streams:
        await stream.aclose()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_client_that_does_not_read_for_a_while_then_hears_how_all_whom_it_watches_are(
    transport: str, address: Address, nursery: trio.Nursery
) -> None:
    """500 people who come and go 24 times fill any socket: it took 512 frames until the client was cut off."""
    running = await start(nursery, address, address, TRIREME_GATEWAY_TRANSPORT=transport, TRIREME_STUCK_SECONDS="20")
    people = [f"usr_{number:03d}_{'x' * 50}" for number in range(500)]
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    stream = await trio.open_tcp_stream("127.0.0.1", running.port)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    async with trio.open_nursery() as inner:
        websocket = await trio_websocket.wrap_client_stream(inner, stream, "127.0.0.1", "/v1/ws", message_queue_size=0)
        number = await running.open(websocket)
        subscribe = {"type": "presence_subscribe", "payload": {"user_ids": people}}
        await websocket.send_message(json.dumps(subscribe))
        await running.next_query(records.PresenceQuery)
        watched = [records.Watched(name, UserStatus.ONLINE, 1) for name in people]
        await running.down(records.PresenceAnswer(number, watched, []))
        presence = running.gateway.hub.presence
        await eventually(lambda: presence.told > 200)
        for seen in range(2, 50):
            for name in people:
                change = records.PresenceChange(
                    UserStatus.OFFLINE if seen % 2 else UserStatus.ONLINE, seen, settled=True
                )
                running.gateway.hub.presence_changed(name, change)
            await trio.lowlevel.checkpoint()
        told = presence.told
        assert told < 500 * 49 / 2, "nothing waited: the socket took it all"
        heard: dict[str, dict[str, Any]] = {}
        frames = 0
        while len(heard) < 500 or any(payload["last_seen"] != 49 for payload in heard.values()):
            payload = (await receive(websocket))["payload"]
            heard[payload["user_id"]] = payload
            frames += 1
        assert {payload["status"] for payload in heard.values()} == {"offline"}
        assert frames == presence.told
        assert running.gateway.hub.load == 1
        stream.socket.close()
        inner.cancel_scope.cancel()


async def test_health_and_metrics_are_served_on_the_same_port(running: Running) -> None:
    live, ready, metrics, unknown = [
        await running.http(path) for path in ("/health/live", "/health/ready", "/metrics", "/nothing")
    ]
    assert (live.status_code, live.json()) == (200, {"status": "live"})
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert unknown.status_code == 404
    assert "gateway_isolated_errors_total 0.0" in metrics.text
    assert 'gateway_redis_up{wire="commands"} 1.0' in metrics.text


async def test_the_instance_holds_a_lease_and_a_stream(running: Running) -> None:
    instance_id = running.gateway.instance_id
    info = msgspec.json.decode(await running.redis.call("GET", keys.instance(instance_id)))
    assert (info["kind"], info["draining"]) == ("gateway", False)
    assert 5 < await running.redis.call("TTL", keys.instance(instance_id)) <= keys.INSTANCE_TTL_SECONDS
    assert await running.redis.call("SISMEMBER", keys.INSTANCES, instance_id) == 1
    assert await running.redis.call("XLEN", keys.down(instance_id)) >= 0
    assert await running.redis.call("GET", keys.SHARDS) == b"64"


async def test_a_drain_waits_for_what_is_in_flight_and_leaves_redis_clean(running: Running) -> None:
    async with running.client() as websocket:
        number = await running.open(websocket)
        await websocket.send_message(json.dumps(message("k1")))
        await running.published("conv_1")
        running.stopping.set()
        await trio.sleep(0.3)
        assert not running.ended.is_set()
        assert (await running.redis.call("HLEN", keys.connection("usr_a"))) == 1
        await running.down(records.Outcome(number, "k1", b'{"type":"message_ack"}'))
        assert await receive_types(websocket, 1) == ["message_ack"]
        assert await close_code(websocket) == 1012
    with trio.fail_after(2):
        await running.ended.wait()
    instance_id = running.gateway.instance_id
    left = ["EXISTS", keys.connection("usr_a"), keys.instance(instance_id), keys.down(instance_id)]
    assert await running.redis.call(*left) == 0
    assert await running.redis.call("SCARD", keys.INSTANCES) == 0


async def test_who_stops_listening_leaves_every_new_connection_to_those_who_share_the_port() -> None:
    with open_listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with open_listener("127.0.0.1", port) as second:
            stop_listening(first)
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", port), 1):
                    second.settimeout(1)
                    second.accept()[0].close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), 1)


async def test_a_drain_does_not_wait_for_ever(address: Address, nursery: trio.Nursery) -> None:
    running = await start(nursery, address, address, TRIREME_DRAIN_SECONDS="1.5")
    async with running.client() as websocket:
        await running.open(websocket)
        await websocket.send_message(json.dumps(message("k1")))
        await running.published("conv_1")
        began = trio.current_time()
        running.stopping.set()
        assert await close_code(websocket) == 1012
    await running.ended.wait()
    assert 1.0 <= trio.current_time() - began <= 1.7


async def test_redis_away_keeps_connections_and_everything_resumes(behind_proxy: Running, proxy: Proxy) -> None:
    running = behind_proxy
    async with running.client() as websocket:
        number = await running.open(websocket)
        proxy.refusing = True
        proxy.cut()
        await trio.sleep(0.1)
        began = trio.current_time()
        await websocket.send_message(json.dumps(message("k1")))
        error = (await receive(websocket))["payload"]
        assert (error["code"], error["retryable"], error["idempotency_key"]) == ("storage_unavailable", True, "k1")
        assert trio.current_time() - began < 2
        ready = await running.http("/health/ready")
        assert (ready.status_code, ready.json()["missing"]) == (503, ["redis_commands", "redis_down", "redis_channels"])
        assert (await running.http("/health/live")).status_code == 200
        async with running.client() as late:
            await late.send_message(auth_frame("usr_b"))
            assert (await receive(late))["error"] == "server_busy"
            assert await close_code(late) == 4503
        proxy.refusing = False
        await eventually(lambda: not running.gateway.missing(), 5)
        await websocket.send_message(json.dumps(message("k1")))
        assert (await running.published("conv_1")).idempotency_key == "k1"
        await running.down(records.Outcome(number, "k1", b'{"type":"message_ack"}'))
        assert await receive_types(websocket, 1) == ["message_ack"]


async def test_a_message_that_meets_a_silent_redis_is_answered_within_two_seconds(
    behind_proxy: Running, proxy: Proxy
) -> None:
    async with behind_proxy.client() as websocket:
        await behind_proxy.open(websocket)
        proxy.silent = True
        began = trio.current_time()
        await websocket.send_message(json.dumps(message("k1")))
        assert (await receive(websocket))["payload"]["code"] == "storage_unavailable"
        assert trio.current_time() - began <= 2.2


async def test_i7_what_is_sent_once_the_line_stands_again_does_not_overtake_what_was_refused(
    behind_proxy: Running, proxy: Proxy
) -> None:
    running = behind_proxy
    async with running.client() as websocket:
        await running.open(websocket)
        proxy.silent = True
        for key in ("k1", "k2"):
            await websocket.send_message(json.dumps(message(key)))
        refused = [(await receive(websocket))["payload"]["idempotency_key"] for _ in range(2)]
        proxy.silent = False
        await eventually(lambda: not running.gateway.missing(), 5)
        for key in ("k3", "k1", "k2", "k3"):
            await websocket.send_message(json.dumps(message(key)))
        refused.append((await receive(websocket))["payload"]["idempotency_key"])
        assert refused == ["k1", "k2", "k3"]
        # Redis took the first two, and its answer was lost: their retries become the same documents.
        await eventually(lambda: has_taken(running, ["k1", "k2", "k1", "k2", "k3"]), 5)


async def has_taken(running: Running, expected: list[str]) -> bool:
    """Do these keys lie in the shard of `conv_1`, in this order?"""
    entries = await running.redis.call("XRANGE", keys.ingest(keys.shard_of("conv_1", 64)), "-", "+")
    return [codec.decode_ingest(entry[1][1]).idempotency_key for entry in entries] == expected


@pytest.mark.slow
async def test_a_redis_that_forgot_everything_is_told_again(running: Running) -> None:
    instance_id = running.gateway.instance_id
    async with running.client() as websocket:
        await running.open(websocket)
        await running.redis.call("FLUSHALL")
        running._query_position = b"0"
        written = [keys.connection("usr_a"), keys.presence("usr_a"), keys.instance(instance_id), keys.down(instance_id)]
        await eventually(lambda: running.exists(4, *written), 9)
        assert await running.redis.call("SISMEMBER", keys.INSTANCES, instance_id) == 1
        query = await running.next_query(records.HeadsQuery)
        assert query.user_ids == ["usr_a"]
        await running.down(records.Notice(["usr_a"], b'{"type":"conversation_update"}'))
        assert await receive_types(websocket, 1) == ["conversation_update"]


async def test_a_device_that_connects_to_another_gateway_is_replaced_on_the_first(
    running: Running, address: Address, nursery: trio.Nursery
) -> None:
    other = await start(nursery, address, address)
    async with running.client() as first, other.client() as second:
        await running.open(first)
        other._query_position = running._query_position
        number = await other.open(second)
        assert (await receive(first))["payload"]["code"] == "replaced"
        assert await close_code(first) == 4409
        await trio.sleep(0.05)
        stored = codec.decode_registry(await running.redis.call("HGET", keys.connection("usr_a"), "d1"))
        assert (stored.instance_id, stored.connection_id) == (other.gateway.instance_id, str(number))


# --- the process -----------------------------------------------------------------------------------------------------


@contextmanager
def spawn(address: Address, port: int, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A gateway process; it does not outlive the block."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}
    environ |= {"TRIREME_ENV": "dev", "TRIREME_REDIS_URL": f"redis://{address}", "TRIREME_GATEWAY_PORT": str(port)}
    command = [sys.executable, "-m", "gateway"]
    with subprocess.Popen(command, env=environ | variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def finish(process: subprocess.Popen[str], seconds: float = 30) -> tuple[int, str]:
    """Wait for the end → exit status, standard error."""
    _, errors = await trio.to_thread.run_sync(lambda: process.communicate(timeout=seconds))
    return process.returncode, errors


async def status_of(port: int) -> int:
    """What /health/ready answers; 0 while nobody listens."""
    try:
        async with httpx2.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{port}/health/ready")).status_code
    except httpx2.HTTPError:
        return 0


async def wait_status(port: int, wanted: int) -> None:
    async def answers() -> bool:
        return await status_of(port) == wanted

    await eventually(answers, 30)


async def ready_line(process: subprocess.Popen[str]) -> None:
    """Read the log up to `gateway_ready`."""
    assert process.stderr is not None
    with trio.fail_after(30):
        while "gateway_ready" not in await trio.to_thread.run_sync(process.stderr.readline):
            pass


async def test_sigterm_drains_the_process_and_two_of_them_share_a_port(address: Address, free_port: int) -> None:
    with spawn(address, free_port) as first, spawn(address, free_port) as second:
        for process in (first, second):
            await ready_line(process)
        began = trio.current_time()
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
        for process in (first, second):
            status, errors = await finish(process)
            assert status == 0
            events = [json.loads(line)["event"] for line in errors.splitlines()]
            assert events == ["drain_started", "drain_ended", "gateway_stopped"]
        assert trio.current_time() - began < 4


async def test_a_process_without_redis_says_once_what_it_waits_for_and_is_live(free_port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = Address("127.0.0.1", taken.getsockname()[1], "", "", 0)
        with spawn(nobody, free_port) as process:
            await wait_status(free_port, 503)
            await trio.sleep(1)
            process.send_signal(signal.SIGTERM)
            status, errors = await finish(process)
    assert status == 0
    waits = [json.loads(line)["wire"] for line in errors.splitlines() if "waiting_for_redis" in line]
    assert sorted(waits) == ["channels", "commands", "down"]


@pytest.mark.parametrize(
    ("variables", "start_of_line"),
    [
        ({"TRIREME_WINDOW": "0"}, "TRIREME_WINDOW"),
        ({"TRIREME_ENV": "production"}, "TRIREME_JWT_PUBLIC_KEY"),
        ({"TRIREME_SHARDS": "32"}, "TRIREME_SHARDS is 32, but this Redis was set up with 64"),
    ],
)
async def test_what_the_operator_has_to_mend_is_one_line_and_status_2(
    address: Address, free_port: int, nursery: trio.Nursery, variables: dict[str, str], start_of_line: str
) -> None:
    await start(nursery, address, address)
    with spawn(address, free_port, TRIREME_LOG_LEVEL="error", **variables) as process:
        status, errors = await finish(process)
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith(start_of_line)


async def test_a_redis_that_may_evict_the_log_is_refused(
    address: Address, free_port: int, nursery: trio.Nursery
) -> None:
    running = await start(nursery, address, address)
    await running.redis.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with spawn(address, free_port, TRIREME_LOG_LEVEL="error") as process:
            status, errors = await finish(process)
    finally:
        await running.redis.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert status == 2
    assert "maxmemory-policy is allkeys-lru" in errors
