"""What a run of the tests takes of the machine: how many processes, where their data lie, compiled code.

Called by `tests/conftest.py` before anything starts. What is set here is in the environment, so the processes of the
suite and every program that a test starts have it too.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pytest

SUITE_PROCESSES: Final = 4
"""The suite waits about as long as it works: more processes than a small machine has processors."""

MEMORY: Final = Path("/dev/shm")
ROOM_BYTES: Final = 8 << 30
"""A dozen servers at a time, each with 200 MB of journal and log; and as much for what runs."""


def keep_data_in_memory() -> None:
    """Temporary directories, so the servers' data, lie in memory where there is plenty: a commit waits for its journal,
    1 ms there, 10 ms on a disk that four mongods share. What is kept is what a disk would keep, short of a power cut,
    and no test cuts the power. Who says TMPDIR is heeded."""
    if "TMPDIR" in os.environ or not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return
    if min(shutil.disk_usage(MEMORY).free, _available_bytes()) >= ROOM_BYTES:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # to be asked again


def _available_bytes() -> int:
    """What the kernel would give without swapping, the page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def compile_once(config: pytest.Config) -> None:
    """Where nobody may write compiled code beside its source (PYTHONDONTWRITEBYTECODE), it goes to pytest's cache: a
    worker takes 2.4 s of a processor to start without it, 1.1 s with it, and the suite starts a hundred of them."""
    if not sys.dont_write_bytecode or not hasattr(config, "cache"):
        return
    sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    del os.environ["PYTHONDONTWRITEBYTECODE"]
