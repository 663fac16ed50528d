"""One running system for the whole matrix, with the limits of production and shorter deadlines; and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from bench.object_store import VARIABLE, run_store
from tests.hostile.rows import MATRIX, PATIENT, Verdict
from tests.system.house import House, run_house

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _pytest.terminal import TerminalReporter

SETTINGS: Final = {
    "TRIREME_LOG_LEVEL": "debug",
    "TRIREME_MESSAGE_RATE": "20",
    "TRIREME_MESSAGE_BURST": "60",
    "TRIREME_LOOKUP_RATE": "5",
    "TRIREME_AUTH_FAILURES_PER_MINUTE": "10",
    "TRIREME_CONNECTIONS_PER_SECOND": "50",
    "TRIREME_UNAUTHENTICATED_CONNECTIONS": "200",
    "TRIREME_ALLOWED_ORIGINS": "https://app.example.com",
    "TRIREME_HANDSHAKE_SECONDS": "1.5",
    "TRIREME_MESSAGE_SECONDS": "2",
    "TRIREME_STUCK_SECONDS": "3",
    "TRIREME_AUTH_TIMEOUT_SECONDS": "2",
    "TRIREME_HEARTBEAT_SECONDS": "2",
    "TRIREME_DEAD_SECONDS": "4",
    "TRIREME_BODY_SECONDS": "1",
    "TRIREME_HEAD_SECONDS": "1.5",
    "TRIREME_LOGINS_PER_ADDRESS": "10",
}
"""Rates and sizes are protocol.md's. Deadlines are shorter, and the rows that wait for one check its default too."""

PATIENCE: Final = {
    "TRIREME_MESSAGE_RATE": "100000",
    "TRIREME_MESSAGE_BURST": "100000",
    "TRIREME_CONNECTIONS_PER_SECOND": "100000",
    "TRIREME_AUTH_TIMEOUT_SECONDS": "10",
}


@pytest.fixture(scope="package")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with run_store(tmp_path_factory.mktemp("s3")) as s3_url, run_house(SETTINGS | {VARIABLE: s3_url}) as running:
        running.add_gateway("epoll", PATIENT, PATIENCE)
        yield running


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """The report of the matrix: every row with -v, those that were not as wanted always."""
    verdicts = [
        Verdict(**value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "hostile" and isinstance(value, dict) and report.when == "call"
    ]
    if not verdicts:
        return
    verdicts.sort(key=lambda verdict: (verdict.id, verdict.sent, verdict.transport))
    rows = {verdict.id for verdict in verdicts}
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    terminalreporter.section("bad input: row, sent, got, wanted")
    for verdict in verdicts if terminalreporter.config.get_verbosity() > 0 else bad:
        mark = "ok " if verdict.is_good else "BAD"
        terminalreporter.write_line(
            f"{mark} {verdict.id} ({verdict.transport}) {verdict.sent}: got {verdict.got}, wanted {verdict.wanted}"
            + (f" [{verdict.because}]" if verdict.because else "")
        )
    terminalreporter.write_line(
        f"{len(rows)} of {len(MATRIX)} rows, {len(verdicts)} inputs, {len(verdicts) - len(bad)} as wanted"
    )
