"""Broken sessions against both running gateways: each is refused or read, and nobody notices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import fuzz_sessions

if TYPE_CHECKING:
    from tests.system.house import House

SESSIONS = 400
SEED = 20261124


@pytest.mark.trio
async def test_sessions_with_flipped_bytes_harm_nobody(house: House) -> None:
    outcome = await fuzz_sessions.storm(house.stack, SESSIONS, SEED, house.gateways)
    assert outcome.violations == []
    assert outcome.counts["closed by the gateway"] > SESSIONS / 10
    assert all(house.is_alive(name) for name in house.pids)
