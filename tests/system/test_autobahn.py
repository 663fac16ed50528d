"""Both transports against the Autobahn cases, all four gates (reliability.md section 1), played by kosoku."""

from __future__ import annotations

import pytest

from bench import autobahn
from bench.autobahn_suites import SUITES

AT_ONCE = 8
"""The cases that go back and forth a thousand times wait for the reactor's next turn, 2 ms each: side by side."""


@pytest.mark.slow
def test_every_gate_is_passed(transport: str) -> None:
    verdicts, _ = autobahn.play(transport, SUITES["kosoku"](None, AT_ONCE))
    assert [line for verdict in verdicts for line in verdict.violations] == []
    assert {verdict.gate: verdict.played for verdict in verdicts} == {"G1": 247, "G2": 54, "G3": 54, "G4": 216}
