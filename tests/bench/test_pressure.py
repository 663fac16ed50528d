"""Overload, one hot conversation and slow readers in their short forms, on one small system of real processes.

The commands judge times, too; here a machine may be busy, so what is asserted is the contract, that nothing waits
longer than it may, and that what must happen under pressure has happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench import hot, load, overload, slow_readers
from bench.__main__ import parse
from bench.driver_process import open_driver
from bench.stack import run_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.stack import Stack

pytestmark = pytest.mark.slow

BACKLOG = 400


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Workers that commit ten at a time, and room for 400 entries that wait for them."""
    with run_stack(settings={"TRIREME_BATCH": "10", "TRIREME_INGEST_BACKLOG": str(BACKLOG)}) as running:
        yield running


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WARM_UP_MESSAGES", 200)


def measured(bench: Any, stack: Stack, *argv: str) -> dict[str, Any]:
    """The figures of one run of `bench`."""
    _, args = parse(list(argv))
    with open_driver() as driver:
        found: dict[str, Any] = bench.measure(args, stack, driver)
    return found


TRIES = 3
"""How often goodput is measured, where tests in other processes take the processors away; all else holds each time."""


def broken(found: dict[str, Any], *timing: str) -> list[str]:
    """What the verdict has against the contract; `timing`: how the complaints begin that only a quiet machine owes."""
    verdict = found["verdict"]
    return [] if verdict == "ok" else [text for text in verdict if not text.startswith(timing)]


def test_three_times_the_load_is_refused_at_once_and_loses_nothing(stack: Stack) -> None:
    goodput = 0.0
    for _ in range(TRIES):
        found = measured(
            overload,
            stack,
            "overload",
            "--pairs",
            "30",
            "--messages",
            "800",
            "--seconds",
            "3",
            "--backlog",
            str(BACKLOG),
        )
        assert broken(found, "goodput", "late refusals", "slow after") == []
        assert found["refused"] > found["acked"] / 2
        assert found["refused_ms"]["p50"] < overload.REFUSAL_MS
        assert found["ack_ms"]["max"] < overload.ACK_MS
        assert found["drained_seconds"] < overload.RECOVERY_SECONDS
        goodput = max(goodput, found["goodput"])
        if goodput > 0.6:
            break
    assert goodput > 0.6


def test_one_hot_conversation_has_no_hole(stack: Stack) -> None:
    found = measured(hot, stack, "hot", "--members", "20", "--each", "10", "--seconds", "3")
    assert broken(found, "late acks") == []
    assert found["messages"] == 600


def test_slow_readers_get_everything_once_they_read_again(stack: Stack) -> None:
    found = measured(
        slow_readers, stack, "slow-readers", "--connections", "40", "--slow", "5", "--rate", "60", "--noise", "30",
        "--seconds", "5", "--turns", "1",
    )  # fmt: skip
    assert broken(found, "noticed") == []
    assert found["dropped_for_the_slow"] > 0
