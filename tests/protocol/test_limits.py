"""The token bucket keeps its rate; the defaults are those of the protocol."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import Limits, TokenBucket


def test_the_defaults_of_the_protocol() -> None:
    limits = Limits()
    assert limits.max_frame_bytes == 65_536
    assert limits.max_content_bytes == 49_152
    assert limits.window == 32
    assert (limits.message_rate, limits.message_burst) == (20.0, 60)
    assert limits.lookup_rate == 5.0
    assert limits.retransmit_span == 500
    assert limits.page_limit == 100
    assert limits.auth_timeout_seconds == 10.0
    assert limits.dead_seconds == 60.0


def test_w78_sixty_at_once_then_twenty_a_second() -> None:
    bucket = TokenBucket(20.0, 60, 0.0)
    assert [bucket.take(0.0) for _ in range(60)] == [0.0] * 60
    assert bucket.take(0.0) == pytest.approx(0.05)
    assert sum(bucket.take(tick / 128) == 0.0 for tick in range(1, 1281)) in (199, 200)


def test_a_refusal_takes_nothing() -> None:
    bucket = TokenBucket(1.0, 1, 0.0)
    assert bucket.take(0.0) == 0.0
    for _ in range(5):
        assert bucket.take(0.5) == pytest.approx(0.5)
    assert bucket.take(1.0) == 0.0


def test_rest_saves_no_more_than_a_burst() -> None:
    bucket = TokenBucket(20.0, 60, 0.0)
    assert sum(bucket.take(1e6) == 0.0 for _ in range(100)) == 60


@given(st.floats(0.5, 100), st.integers(1, 50), st.lists(st.floats(0, 2), max_size=100))
def test_never_more_than_burst_plus_rate_times_time(rate: float, burst: int, pauses: list[float]) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now, taken = 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        taken += wait == 0.0
        assert 0.0 <= wait <= 1.0 / rate + 1e-9
    assert taken <= burst + rate * now + 1e-6
