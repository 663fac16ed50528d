"""Every reader stands some thousand changed inputs, and a reader with a bug is found out."""

from __future__ import annotations

import pytest

from bench import fuzz
from bench.fuzz_targets import SEEDS, TARGETS
from gateway import websocket

SEED = 20261124
TRIES = 3_000


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_refuses_or_reads_and_nothing_else(name: str) -> None:
    assert fuzz.change_at_random(name, SEED, tries=TRIES) == f"{TRIES} inputs"


def test_good_input_is_read() -> None:
    for name, target in TARGETS.items():
        for data in SEEDS[name]:
            target(data)


def test_a_reader_with_a_bug_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The incremental decoder of text lets a UnicodeDecodeError through that nobody catches."""

    class Forgetful(UnicodeError):
        pass

    monkeypatch.setattr(websocket, "UnicodeDecodeError", Forgetful, raising=False)
    with pytest.raises(fuzz.Found, match="UnicodeDecodeError"):
        fuzz.change_at_random("websocket", SEED, tries=TRIES)
