"""The two programs that play the Autobahn cases, behind one seam: play these cases, say what came of each.

Called by `autobahn`. Both leave a folder with `index.json` and a file per case; that is all that is read of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from bench.stack import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RUN_SECONDS: Final = 600.0
INSTALL_SECONDS: Final = 300.0
INSTALLED: Final = PROJECT / ".data" / "autobahn"
TESTSUITE: Final = "autobahntestsuite==25.10.1"
VIRTUALENV: Final = "virtualenv<20.22"
"""The last line that makes environments for Python 2.7."""


class SuiteError(Exception):
    """A suite could not be installed or did not run."""


class Case(msgspec.Struct, frozen=True):
    """What a suite says of one case, in its own words. `code`: of the Close frame that came, if one did."""

    behavior: str
    close: str
    code: int | None
    duration_ms: int
    description: str


class Suite(Protocol):
    """One of the two programs. `title`: its name and version."""

    title: str

    def run(self, url: str, cases: Sequence[str], but: Sequence[str], directory: Path) -> dict[str, Case]:
        """Play the cases that match, except those that match `but`; by id. Blocks. Raises SuiteError."""


class Kosoku:
    """Autobahn's cases in a runner of their own, on Python 3."""

    title = "kosoku 0.1.0"

    def __init__(self, _python2: str | None, at_once: int) -> None:
        self._at_once = at_once

    def run(self, url: str, cases: Sequence[str], but: Sequence[str], directory: Path) -> dict[str, Case]:
        program = Path(sys.executable).with_name("kosoku")
        chosen = [word for glob in cases for word in ("-i", glob)] + [word for glob in but for word in ("-x", glob)]
        _run([str(program), "-o", str(directory), "-p", str(self._at_once), *chosen, url], RUN_SECONDS)
        return _read(directory)


class Testsuite:
    """The original, on Python 2.7; installed from the package index at first use."""

    title = "Autobahn|Testsuite 25.10.1"

    def __init__(self, python2: str | None, _at_once: int) -> None:
        self._program = INSTALLED / "py27" / "bin" / "wstest"
        if not self._program.exists():
            _install(python2 or shutil.which("python2.7") or "")

    def run(self, url: str, cases: Sequence[str], but: Sequence[str], directory: Path) -> dict[str, Case]:
        directory.mkdir(parents=True)
        todo = {
            "outdir": str(directory),
            "servers": [{"agent": "trireme", "url": url}],
            "cases": list(cases),
            "exclude-cases": list(but),
            "exclude-agent-cases": {},
        }
        plan = directory / "fuzzingclient.json"
        plan.write_text(json.dumps(todo))
        _run([str(self._program), "-m", "fuzzingclient", "-s", str(plan)], RUN_SECONDS)
        return _read(directory)


SUITES: Final[dict[str, Callable[[str | None, int], Suite]]] = {"kosoku": Kosoku, "autobahn": Testsuite}


def _install(python2: str) -> None:
    """About half a minute, with a compiler. Raises SuiteError."""
    if not python2 or subprocess.run([python2, "-c", "pass"], capture_output=True, check=False).returncode:
        raise SuiteError("the original suite needs a Python 2.7; say where one is with --python2")
    modern = INSTALLED / "virtualenv"
    steps = [
        [sys.executable, "-m", "venv", str(modern)],
        [str(modern / "bin" / "pip"), "install", "--quiet", VIRTUALENV],
        [str(modern / "bin" / "virtualenv"), "--quiet", "-p", python2, str(INSTALLED / "py27")],
        [str(INSTALLED / "py27" / "bin" / "pip"), "install", "--quiet", TESTSUITE],
    ]
    for step in steps:
        done = _run(step, INSTALL_SECONDS)
        if done.returncode:
            raise SuiteError(f"{' '.join(step)} ended with status {done.returncode}:\n{done.stdout[-2000:]}")


def _run(arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Its exit status says nothing: the index is judged."""
    try:
        return subprocess.run(
            arguments,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SuiteError(f"{arguments[0]}: {error}") from error


def _read(directory: Path) -> dict[str, Case]:
    try:
        index: dict[str, dict[str, dict[str, Any]]] = json.loads((directory / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise SuiteError(f"no report in {directory}: {error}") from error
    cases: dict[str, Case] = {}
    for agent in index.values():
        for name, entry in agent.items():
            told = json.loads((directory / entry["reportfile"]).read_text())
            cases[name] = Case(
                entry["behavior"],
                entry["behaviorClose"],
                entry["remoteCloseCode"],
                entry["duration"],
                told["description"],
            )
    return cases
