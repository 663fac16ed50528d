"""The gates over Autobahn's verdicts refuse what they should, and only that; the page shows every case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import autobahn, autobahn_page
from bench.autobahn_suites import Case

if TYPE_CHECKING:
    from pathlib import Path

G1, G2, G3, G4 = autobahn.GATES


def case(behavior: str = "OK", close: str = "OK", code: int | None = 1000, duration_ms: int = 5) -> Case:
    return Case(behavior, close, code, duration_ms, "Send <b>something</b>.")


def all_of_g1() -> dict[str, Case]:
    return {f"1.1.{number}": case() for number in range(1, 248)}


@pytest.mark.parametrize(
    ("gate", "name", "verdict"),
    [
        (G1, "2.1", case("FAILED")),
        (G1, "2.1", case(close="UNCLEAN")),
        (G1, "2.1", case(close="FAILED BY CLIENT")),
        (G1, "2.1", case(close="WRONG CODE")),
        (G1, "2.1", case("NON-STRICT")),
        (G1, "3.2", case("NON-STRICT")),  # listed for the other transport only
        (G2, "9.1.6", case("FAILED", code=1009)),
        (G2, "9.1.6", case("INFORMATIONAL")),
        (G3, "9.1.6", case()),
        (G3, "9.1.6", case("FAILED", code=1009, duration_ms=2001)),
        (G3, "9.1.6", case("FAILED", code=None)),
        (G3, "9.1.1", case("FAILED", code=1009)),
        (G4, "12.1.1", case()),
    ],
)
def test_one_bad_case_fails_the_gate(gate: autobahn.Gate, name: str, verdict: Case) -> None:
    assert len(autobahn.judge(gate, "epoll", {name: verdict}, whole=False)) == 1


@pytest.mark.parametrize(
    ("gate", "name", "verdict"),
    [
        (G1, "7.1.6", case("INFORMATIONAL", "INFORMATIONAL")),
        (G1, "6.4.3", case("NON-STRICT")),
        (G2, "9.1.6", case()),
        (G3, "9.1.1", case()),
        (G3, "9.4.9", case("FAILED", "FAILED", 1009)),
        (G4, "12.1.1", case("UNIMPLEMENTED")),
    ],
)
def test_what_a_gate_takes(gate: autobahn.Gate, name: str, verdict: Case) -> None:
    assert autobahn.judge(gate, "epoll", {name: verdict}, whole=False) == []


def test_a_wrong_address_is_not_mistaken_for_a_verdict() -> None:
    """Then every case is FAILED without a close code, or there is none at all."""
    assert autobahn.judge(G1, "epoll", {}) == [
        "G1 epoll: 0 cases instead of 247",
        "G1 epoll: 1.1.1 is not OK: None",
    ]
    assert autobahn.judge(G1, "epoll", all_of_g1()) == []
    assert len(autobahn.judge(G1, "epoll", all_of_g1() | {"1.1.1": case("INFORMATIONAL")})) == 1


def test_the_page_shows_gates_and_cases(tmp_path: Path) -> None:
    verdicts = [autobahn.Verdict("G1", 1, ["G1 epoll 1.1.1: bad & sad"], 1.0)]
    page = autobahn_page.write(tmp_path, "epoll", "a suite", autobahn.GATES, verdicts, {"G1 1.1.1": case("FAILED")})
    text = page.read_text()
    assert "bad &amp; sad" in text
    assert "<td>G1<td>1.1.1<td class=FAILED>FAILED<td>OK<td>1000<td class=n>5<td>Send something ." in text
