"""The agents role as a real process that is killed: every question has one answer, and the bench says so."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import msgspec
import pytest

from bench import agents

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_every_question_has_one_answer_though_the_agents_process_is_killed(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    agents.add_arguments(parser)
    figures = tmp_path / "figures.json"
    arguments = ["--users", "10", "--questions", "2", "--every-seconds", "1.5", "--kills", "1", "--json", str(figures)]
    args = parser.parse_args(arguments)
    args.command = "agents"
    status = agents.main(args)
    found = msgspec.json.decode(figures.read_bytes())
    assert found["verdict"] == "ok"
    assert status == 0
    assert found["killed"]["kills"] == 1
    assert found["killed"]["answered"] == 20
    assert found["routing_ms_from_before_the_commit"]["count"] > 0
