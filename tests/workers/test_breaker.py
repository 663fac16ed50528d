"""Breakers: a request is told at once that a server is away, the commit path never, and both see it come back."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from tests.workers.conftest import serving
from tests.workers.relay import open_relay
from tests.workers.seeding import refusal
from workers import breaker as breakers
from workers.breaker import Breaker, BreakerOpen, Breakers, State, guarding, probe
from workers.broker import BrokerUnavailable, open_broker
from workers.store import open_store
from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio


class Clock:
    """What `anyio.current_time` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(breakers.anyio, "current_time", lambda: self.now)  # type: ignore[attr-defined]


def gauge(name: str) -> float | None:
    return REGISTRY.get_sample_value("trireme_breaker_state", {"service": name})


async def test_it_opens_after_so_many_failures_in_a_row_and_lets_one_probe_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    tested = Breaker("tested", 3, 60.0)
    with capture_logs() as lines:
        for outcome in (tested.failed, tested.failed, tested.succeeded, tested.failed, tested.failed):
            tested.admit()
            outcome()
        assert (tested.state, gauge("tested")) == (State.CLOSED, 0)
        tested.failed()
        assert (tested.state, gauge("tested")) == (State.OPEN, 2)
        with pytest.raises(BreakerOpen):
            tested.admit()
        clock.now += 60
        tested.admit()
        assert (tested.state, gauge("tested")) == (State.HALF_OPEN, 1)
        with pytest.raises(BreakerOpen):
            tested.admit()
        tested.failed()
        with pytest.raises(BreakerOpen):
            tested.admit()
        clock.now += 60
        tested.admit()
        tested.succeeded()
        tested.admit()
    turns = [(line["before"], line["now"]) for line in lines if line["event"] == "breaker_turned"]
    assert turns == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]
    assert gauge("tested") == 0


async def test_a_probe_that_is_never_heard_of_again_does_not_keep_it_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    tested = Breaker("tested", 1, 10.0)
    tested.failed()
    clock.now += 10
    tested.admit()
    clock.now += 10
    tested.admit()
    tested.succeeded()
    assert tested.state is State.CLOSED


async def test_our_own_probe_closes_it_as_soon_as_the_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "PROBE_SECONDS", 0.02)
    tested = Breaker("tested", 1, 60.0)
    is_away = True
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        if is_away:
            raise StoreUnavailable("away")

    async with anyio.create_task_group() as group:
        group.start_soon(probe, tested, ask, StoreUnavailable)
        await anyio.sleep(0.1)
        assert asked == 0, "nobody asks while it is closed"
        tested.failed()
        await anyio.sleep(0.2)
        with pytest.raises(BreakerOpen):
            tested.admit()
        is_away = False
        with anyio.fail_after(5):
            while gauge("tested") != State.CLOSED:  # noqa: ASYNC110 - another task closes it
                await anyio.sleep(0.01)
        before = asked
        await anyio.sleep(0.1)
        assert asked == before
        group.cancel_scope.cancel()


async def test_a_request_fails_at_once_while_mongodb_is_away_and_the_commit_path_goes_on_trying(
    mongodb_url: str,
) -> None:
    port = urlsplit(mongodb_url).port
    assert port is not None
    async with (
        open_relay(port) as relay,
        open_store(f"mongodb://127.0.0.1:{relay.port}/test?directConnection=true") as store,
    ):
        relay.cut()
        guard = Breakers(store.breaker, Breaker("tested", 5, 10.0))
        with guarding(guard):
            for _ in range(5):
                with pytest.raises(StoreUnavailable):
                    await store.users.get("usr_x")
            started = anyio.current_time()
            for _ in range(20):
                with pytest.raises(StoreUnavailable, match="was away lately"):
                    await store.users.get("usr_x")
            assert anyio.current_time() - started < 0.5
        with pytest.raises(StoreUnavailable) as unguarded:
            await store.users.get("usr_x")
        assert "lately" not in str(unguarded.value)


async def test_an_answer_that_mongodb_does_not_like_opens_nothing(store: Store) -> None:
    """Or one user's input could take the API away from all."""
    with guarding(Breakers(store.breaker, Breaker("tested", 5, 10.0))):
        for _ in range(10):
            with pytest.raises(StoreUnavailable), store_errors():
                await store.db.command("noSuchCommand")
    assert store.breaker.state is State.CLOSED


async def test_a_request_fails_at_once_while_redis_is_away(redis_url: str) -> None:
    port = urlsplit(redis_url).port
    assert port is not None
    async with open_relay(port) as relay, open_broker(f"redis://127.0.0.1:{relay.port}") as broker:
        await broker.ping()
        relay.cut()
        with guarding(Breakers(Breaker("tested", 5, 30.0), broker.breaker)):
            for _ in range(5):
                with pytest.raises(BrokerUnavailable):
                    await broker.ping()
            with pytest.raises(BrokerUnavailable, match="was away lately"):
                await broker.ping()
        with pytest.raises(BrokerUnavailable) as unguarded:
            await broker.ping()
        assert "lately" not in str(unguarded.value)


async def test_rest_answers_at_once_while_mongodb_is_away(settings: Settings, broker: Broker, mongodb_url: str) -> None:
    port = urlsplit(mongodb_url).port
    assert port is not None
    async with (
        open_relay(port) as relay,
        open_store(f"mongodb://127.0.0.1:{relay.port}/test?directConnection=true") as store,
        serving(settings, store, broker, owner=False) as rest,
    ):
        relay.cut()
        for _ in range(6):
            answer = await rest.call("POST", "/v1/users", rest.admin_token, {"name": "Ann"})
            assert refusal(answer) == (503, "storage_unavailable")
        started = anyio.current_time()
        answer = await rest.call("POST", "/v1/users", rest.admin_token, {"name": "Ann"})
        assert refusal(answer) == (503, "storage_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert anyio.current_time() - started < 0.5
        assert (await rest.client.get("/health/live")).status_code == 200
