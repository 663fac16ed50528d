"""The page of bounds is what the code says, and no container of the code is missing on it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from bench import bounds
from bench.bound_rows import BOUNDS, EXEMPT, OTHERS
from workers import metrics

if TYPE_CHECKING:
    from bench.bound import Bound

PROJECT = Path(__file__).resolve().parent.parent.parent
HELD = {container for bound in BOUNDS for container in bound.holds}

each_bound = pytest.mark.parametrize("bound", BOUNDS, ids=[bound.where for bound in BOUNDS])


def test_the_committed_page_is_what_the_code_says() -> None:
    written = bounds.PAGE.read_text("utf-8")
    assert written == bounds.page(), "docs/bounds.md is old; write it again: uv run python -m bench bounds"


def test_every_container_that_can_grow_has_a_bound_or_a_reason() -> None:
    """Whoever adds a deque, a dict or a stream says what bounds it, in bench/bound_rows.py."""
    found = set(bounds.containers())
    assert found - HELD - OTHERS.keys() - {name for name in found if name.startswith(tuple(EXEMPT))} == set()
    assert (HELD | OTHERS.keys()) - found == set(), "these are no more"
    assert HELD & OTHERS.keys() == set()


@each_bound
def test_a_bound_has_a_value_a_reason_and_a_gauge(bound: Bound) -> None:
    value = bounds.value_of(bound)
    assert isinstance(value, int | float)
    assert value > 0
    assert len(bound.reason or bounds.reason_of(bound)) > 20
    assert bool(bound.gauge) is not bool(bound.no_gauge), "one of the two"
    if bound.gauge.startswith("gateway_"):
        source = (PROJECT / "gateway" / "metrics.py").read_text("utf-8")
        assert f'"{bound.gauge.removeprefix("gateway_")}"' in source or f'"{bound.gauge}"' in source
    elif bound.gauge:
        assert metrics.__name__
        assert bound.gauge in {family.name for family in REGISTRY.collect()}


@each_bound
def test_the_test_of_a_bound_exists(bound: Bound) -> None:
    path, _, name = bound.test.partition("::")
    tree = ast.parse((PROJECT / path).read_text("utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in names
