"""The house rules that no linter knows: sizes, names, docstrings, what the documents must mention."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.schedule import group_of

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "gateway", "workers", "bench", "tests")
PRODUCT = ("protocol", "gateway", "workers")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 50
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "stuff"}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def offenders(breaks: Callable[[Path], object]) -> dict[str, object]:
    """The sources that break a rule, and how. One test per rule: a test per rule and file would be two thousand."""
    return {str(path.relative_to(ROOT)): how for path in SOURCES if (how := breaks(path))}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_there_are_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert Path(__file__) in SOURCES


def test_a_file_has_at_most_600_lines() -> None:
    assert offenders(lambda path: max(len(path.read_text().splitlines()) - MAX_FILE_LINES, 0)) == {}


def test_a_module_says_what_room_it_is() -> None:
    assert offenders(lambda path: len(ast.get_docstring(tree(path)) or "") < 20) == {}


def test_a_module_is_named_after_a_noun_of_the_domain() -> None:
    assert offenders(lambda path: NO_NAMES & {path.stem, *path.relative_to(ROOT).parent.parts}) == {}


def test_a_function_has_at_most_50_lines() -> None:
    def too_long(path: Path) -> list[str]:
        if path.is_relative_to(ROOT / "tests"):
            return []
        return [
            f"{function.name}: {function.end_lineno - function.lineno + 1}"
            for function in functions(tree(path))
            if function.end_lineno is not None and function.end_lineno - function.lineno + 1 > MAX_FUNCTION_LINES
        ]

    assert offenders(too_long) == {}


def test_nothing_is_left_to_do() -> None:
    def left(path: Path) -> list[str]:
        if path == Path(__file__):
            return []
        text = path.read_text()
        return [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text]

    assert offenders(left) == {}


@pytest.mark.parametrize("package", PRODUCT)
def test_public_classes_and_functions_of_the_product_have_docstrings(package: str) -> None:
    silent = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in tree(path).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name[0] != "_" and not ast.get_docstring(node) and not is_record(node):
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert silent == []


def is_record(node: ast.stmt) -> bool:
    """A struct or enum whose name and fields say everything: its docstring may be its base's."""
    return isinstance(node, ast.ClassDef) and bool(node.bases)


def test_protocol_waits_for_nothing() -> None:
    for path in (ROOT / "protocol").glob("*.py"):
        found = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.Await, ast.AsyncFunctionDef))]
        assert found == [], path


def test_no_test_package_shadows_a_product_package() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return listed.stdout.splitlines()


def shares(path: Path) -> bool:
    """Does a module of tests ask for the house of its package, or start something for all of its tests?"""
    for function in functions(tree(path)):
        decorators = " ".join(map(ast.unparse, function.decorator_list))
        if "scope='module'" in decorators or any(argument.arg == "house" for argument in function.args.args):
            return True
    return False


def test_what_is_shared_is_shared_by_one_process() -> None:
    """A module that shares something is a group of the schedule, or part of one; nothing else is held together."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT))
        together = group_of(f"{name}::a") == group_of(f"{name}::b")
        if "hostile" not in name and "gateway" not in name and together != shares(path):
            wrong.append(name)
    assert wrong == []


def test_the_lock_file_stays_out() -> None:
    assert "uv.lock" not in tracked()


def test_every_top_level_folder_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = {name.split("/")[0] for name in tracked() if "/" in name and not name.startswith(".")}
    assert {folder for folder in folders if f"{folder}/" not in readme} == set()


def test_every_room_is_in_the_architecture() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(architecture.splitlines()) <= 250
    for package in PRODUCT:
        assert f"{package}/" in architecture


def test_every_role_has_a_line_in_the_procfile() -> None:
    procfile = (ROOT / "Procfile").read_text()
    assert {line.split(":")[0] for line in procfile.splitlines() if line.strip() and line[0] != "#"} == {
        "services",
        "gateway",
        "worker",
        "rest",
    }
    for line in procfile.splitlines():
        if line.strip() and line[0] != "#":
            assert line.split(":", 1)[1].strip().split()[0] == "exec" or "exec " in line


@pytest.mark.parametrize("module", ["protocol.session", "gateway.server", "workers.ingest"])
def test_an_import_starts_nothing_and_is_quick(module: str) -> None:
    """No I/O and no clock at import: with an empty environment it just works."""
    ended = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        cwd=ROOT,
        env={},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
