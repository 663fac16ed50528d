"""How far the workers are behind, as one gateway knows it."""

from __future__ import annotations

from gateway.workload import Workload


def test_a_shard_is_full_at_its_high_water_mark_and_the_others_are_not() -> None:
    workload = Workload(2, 3, 100, lambda: 0)
    for _ in range(3):
        assert not workload.is_full(0)
        workload.add(0)
    assert workload.is_full(0)
    assert not workload.is_full(1)
    assert workload.greatest == 3


def test_every_shard_is_full_at_the_bound_over_all() -> None:
    workload = Workload(4, 100, 4, lambda: 0)
    for shard in range(4):
        assert not workload.is_full(shard)
        workload.add(shard)
    assert all(workload.is_full(shard) for shard in range(4))
    workload.seen(workload.look(2), 0)
    assert workload.entries == 3
    assert not workload.is_full(2)


def test_what_was_sent_behind_a_look_is_not_forgotten_by_its_answer() -> None:
    """A slow Redis answered a look from before a burst, and the burst counted for nothing."""
    workload = Workload(1, 100, 100, lambda: 0)
    workload.add(0)
    first = workload.look(0)
    for _ in range(5):
        workload.add(0)
    second = workload.look(0)
    workload.add(0)
    workload.seen(first, 1)
    assert workload.entries == workload.backlog[0] == 7
    workload.seen(second, 4)
    assert workload.entries == workload.backlog[0] == 5


def test_messages_that_have_their_outcome_make_room_before_the_next_look() -> None:
    """A quick load was refused although nothing waited: all of a quarter second's messages were counted."""
    outcomes = 0
    workload = Workload(1, 1000, 10, lambda: outcomes)
    for _ in range(100):
        assert not workload.is_full(0)
        workload.add(0)
        outcomes += 1
    assert workload.entries == 0
    workload.seen(workload.look(0), 7)
    assert workload.entries == 7
