"""`python -m bench bounds`: writes docs/bounds.md, every bound of what a process or a server holds for others.

`BOUNDS` says which settings and constants are bounds, what happens past each, which gauge shows how near it is, which
test stands at n and n + 1, and which containers of the code it bounds. Values and reasons are read from the code. A
test compares the page, and looks through the code for containers that stand nowhere here: so a buffer without a bound
is a failing test.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bench.bound_rows import BOUNDS, EXEMPT, OTHERS

if TYPE_CHECKING:
    import argparse

    from bench.bound import Bound

PROJECT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = PROJECT / "docs" / "bounds.md"
PACKAGES: Final = ("protocol", "gateway", "workers")
_KINDS: Final = frozenset(("deque", "dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "bytearray"))
_CHANNELS: Final = frozenset(("create_memory_object_stream", "open_memory_channel"))
_COLUMNS: Final = "| bound | value | why | past it | gauge | test |\n|---|---|---|---|---|---|\n"
_HEAD: Final = """# Bounds

Every number that keeps a process or a server from growing with what clients send, with its reason, what happens past
it, the gauge that shows how near it is, and the test at the bound and one past it. Written by
`uv run python -m bench bounds` from `bench/bound_rows.py` and the code; a test compares it, and fails for a container
of the code that stands nowhere here.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bounds`."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the page is old")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when the page is written, or up to date with `--check`."""
    text = page()
    if args.check:
        return 0 if PAGE.read_text("utf-8") == text else 1
    PAGE.write_text(text, "utf-8")
    print(f"{PAGE.relative_to(PROJECT)}: {len(BOUNDS)} bounds", file=sys.stderr)
    return 0


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    room = ""
    for bound in BOUNDS:
        if bound.room != room:
            room = bound.room
            parts.append(f"\n## {room}\n\n{_COLUMNS}")
        cells = (
            name_of(bound),
            f"{shown(value_of(bound))} {bound.unit}",
            bound.reason or reason_of(bound),
            bound.past,
            f"`{bound.gauge}`" if bound.gauge else bound.no_gauge,
            f"[{bound.test.rpartition('::')[2]}](../{bound.test.partition('::')[0]})",
        )
        parts.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n")
    parts.append("\n## Containers that need no bound of their own\n\n| container | because |\n|---|---|\n")
    others = {f"`{name}`": reason for name, reason in OTHERS.items()}
    others |= {f"all of `{prefix.removesuffix('.')}`": reason for prefix, reason in EXEMPT.items()}
    parts += [f"| {name} | {reason} |\n" for name, reason in sorted(others.items())]
    return "".join(parts)


def name_of(bound: Bound) -> str:
    """A setting by its variable, a constant by its module."""
    module, _, name = bound.where.partition(":")
    holder, _, field = name.partition(".")
    return f"`TRIREME_{field.upper()}`" if field else f"`{module}.{holder}`"


def value_of(bound: Bound) -> Any:
    """The default of a setting, the value of a constant. Raises LookupError where there is none."""
    module, _, name = bound.where.partition(":")
    holder, _, field = name.partition(".")
    found = getattr(importlib.import_module(module), holder)
    if not field:
        return found
    for candidate in msgspec.structs.fields(found):
        if candidate.name == field:
            return candidate.default
    raise LookupError(bound.where)


def reason_of(bound: Bound) -> str:
    """The words under the setting or constant. Raises LookupError where there are none."""
    module, _, name = bound.where.partition(":")
    holder, _, field = name.partition(".")
    tree = ast.parse((PROJECT / (module.replace(".", "/") + ".py")).read_text("utf-8"))
    body: list[ast.stmt] = tree.body
    if field:
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == holder)
    for node, following in zip(body, [*body[1:], None], strict=True):
        is_it = _assigns(node, field or holder)
        if is_it and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            return " ".join(str(following.value.value).split())
    raise LookupError(f"{bound.where} has no words under it")


def _assigns(node: ast.stmt, name: str) -> bool:
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def shown(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def containers() -> list[str]:
    """`module.Class.attribute` of everything in the packages that begins empty and can grow, and `module.function` of
    memory streams."""
    found: list[str] = []
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            module = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    found += [f"{module}.{node.name}.{name}" for name in _growing(node)]
                elif isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
                    found += [f"{module}.{node.name}()"] * any(_called(inner) in _CHANNELS for inner in ast.walk(node))
    return list(dict.fromkeys(found))


def _growing(node: ast.ClassDef) -> list[str]:
    names: list[str] = []
    for inner in ast.walk(node):
        target: ast.expr
        if isinstance(inner, ast.AnnAssign) and inner.value is not None:
            target, value = inner.target, inner.value
        elif isinstance(inner, ast.Assign) and len(inner.targets) == 1:
            target, value = inner.targets[0], inner.value
        else:
            continue
        is_own = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
        if is_own and isinstance(target, ast.Attribute) and _begins_empty(value):
            names.append(target.attr)
    return names


def _begins_empty(value: ast.expr) -> bool:
    match value:
        case ast.Dict(keys=[]) | ast.List(elts=[]):
            return True
        case ast.Call():
            return _called(value) in _KINDS | _CHANNELS
        case _:
            return False


def _called(node: ast.AST) -> str:
    """The last name of what is called; empty where nothing is."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""
