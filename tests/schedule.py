"""Which tests of a whole run share a process: those that share something expensive, so that it is started once.

Called by `tests/conftest.py`. Of our own, because the groups of pytest-xdist 3.8 (`xdist_group`) do nothing with
pytest 9.2: it writes them to `item._nodeid`, which nobody reads any more; every process started every whole system.
"""

from __future__ import annotations

from typing import Final

from xdist.scheduler import LoadScopeScheduling

SHARED: Final = {
    "tests/bench/test_pressure.py": "pressure",
    "tests/bench/test_replay.py": "replay",
    "tests/system/test_audit.py": "audit",
    "tests/workers/test_rest_media.py": "rest media",
}
"""Modules that start something for all of their tests."""
HOUSELESS: Final = tuple(f"tests/system/test_{name}.py" for name in ("autobahn", "chaos", "media", "settings_lines"))
"""System tests that do not use the running system of their package: each goes wherever there is time."""
SECOND_HOUSE: Final = tuple(
    f"tests/system/test_{name}.py"
    for name in ("accounts", "contract", "conversations", "drain", "migration", "neighbours")
)
"""System tests mostly wait, so two systems, half of the tests each, are done sooner than one."""


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process, one after the other."""
    path = nodeid.split("::", 1)[0]
    if path in SHARED:
        return SHARED[path]
    if path.startswith("tests/hostile/"):
        return "hostile"
    if path.startswith("tests/system/") and path not in HOUSELESS:
        return "system, second house" if path in SECOND_HOUSE else "system"
    return nodeid


class Schedule(LoadScopeScheduling):  # type: ignore[misc]
    """Groups go first, the largest before the others; then test by test in the order of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
