"""The verdict of `bench drain` on scripted phones: who was away, who came back in time, and by what."""

from __future__ import annotations

from bench import journal
from bench.drain import Drain, Watch, curve, plot, quantiles


def connected(at: float, user_id: str = "usr_a", *, migrated: bool = False) -> journal.Connected:
    return journal.Connected(at=at, user_id=user_id, device_id="d", connection=1, resumed={}, migrated=migrated)


def closed(at: float, user_id: str = "usr_a") -> journal.Closed:
    return journal.Closed(at=at, user_id=user_id, device_id="d", connection=1, code=1012)


def test_a_phone_that_makes_before_it_breaks_was_never_away() -> None:
    watch = Watch()
    for event in (connected(1.0), connected(5.0, migrated=True)):
        watch.record(event)
    watch.close(9.0)
    assert watch.longest_gap == {"usr_a": 0.0}


def test_the_longest_time_away_counts_and_does_not_end_with_the_run() -> None:
    watch = Watch()
    for event in (closed(0.5), connected(1.0), closed(2.0), connected(2.5), closed(4.0), closed(5.0)):
        watch.record(event)
    watch.close(7.0)
    watch.record(closed(8.0))
    assert watch.longest_gap == {"usr_a": 3.0}


def test_the_drained_gateway_s_phones_are_counted_once_by_how_they_came_back() -> None:
    watch = Watch()
    watch.drain = drain = Drain("gateway-1", 10.0, {"usr_a", "usr_b"})
    watch.record(connected(11.0, migrated=True))
    watch.record(connected(12.0, "usr_other"))
    watch.record(connected(14.5, "usr_b"))
    watch.record(connected(15.0, "usr_b", migrated=True))
    assert drain.back == {"usr_a": (1.0, True), "usr_b": (4.5, False)}
    assert (drain.in_time(4.0), drain.in_time(5.0)) == (1, 2)


def test_the_curve_rises_to_the_share_that_came_back() -> None:
    points = curve([0.5, 1.0, 3.0], moved=4, window=4.0)
    assert points[0] == (0.0, 0.0)
    assert (points[2], points[4], points[-1]) == ((0.5, 0.25), (1.0, 0.5), (4.0, 0.75))
    assert plot(points)[-1].count("#") == 30
    assert quantiles([0.0, 1.0]) == {"p50": 0.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    assert quantiles([]) == {}
