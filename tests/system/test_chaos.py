"""A short chaos run on real processes, with a fixed seed: nothing is lost, doubled, reordered or invented."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

import pytest

from bench.chaos import campaign
from bench.chaos.campaign import Campaign
from bench.chaos.rig import open_rig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
ROWS: Final = ("F-W1", "F-R3", "F-G1")
"""A worker, all that Valkey holds, a gateway: in this order with this seed."""
WORDS: Final = "--faults 3 --seed 4 --rate 60 --pairs 10 --groups 1 --give-up 8"


def test_kills_and_a_flush_cost_retries_only(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    campaign.add_arguments(parser)
    args = parser.parse_args([*WORDS.split(), "--only", ",".join(ROWS)])
    with open_rig(tmp_path) as rig:
        run = Campaign(rig, args)
        run.run()
        run.audit()
        found = run.report()
    assert found["verdict"] == "ok"
    assert [episode.row for episode in run.nemesis.episodes] == list(ROWS)
    assert found["messages_audited"] > 500
    assert found["counts"]["acked"] + found["counts"]["duplicate_acks"] >= found["counts"]["sent"]
    assert found["digests_proven"] >= 20
