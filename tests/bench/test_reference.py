"""The printed reference is what the code says now."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from bench import reference
from protocol import frames, specification
from protocol.errors import CloseCode, ErrorCode
from workers.rest import app, openapi

if TYPE_CHECKING:
    from pathlib import Path

TEXT = reference.page()


def test_the_committed_page_is_what_the_code_generates() -> None:
    assert reference.PAGE.read_text() == TEXT, f"docs/reference.md is old; write it again: {reference.COMMAND}"


def test_every_frame_route_and_code_has_a_row() -> None:
    lines = TEXT.splitlines()
    for kind in (*specification.CLIENT_FRAMES, *specification.SERVER_FRAMES):
        assert any(line.startswith(f"| `{specification.tag_of(kind)}` |") for line in lines)
    assert sum(line.startswith("| `typing` |") for line in lines) == 2
    for route in openapi.routes_of(app.ROUTES):
        assert sum(line.startswith(f"| `{route.method} {route.path}` |") for line in lines) == 1
    for code in ErrorCode:
        assert sum(line.startswith(f"| `{code.value}` | {code.http_status} |") for line in lines) == 1
    for close in CloseCode:
        assert sum(line.startswith(f"| {close.value} | {close.reason} |") for line in lines) == 1


def test_a_row_tells_fields_bounds_and_errors() -> None:
    (row,) = [line for line in TEXT.splitlines() if line.startswith("| `retransmit` |")]
    assert "`from_sequence` integer 1–2^53" in row
    for code in frames.REFUSALS[frames.Retransmit]:
        assert f"`{code.value}`" in row


def test_every_link_leads_to_a_row() -> None:
    for part in TEXT.split("](#")[1:]:
        assert f'<a id="{part.split(")")[0]}"></a>' in TEXT


def test_the_documents_are_written_where_asked(tmp_path: Path) -> None:
    assert reference.main(argparse.Namespace(documents=tmp_path / "out")) == 0
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert written == {
        "asyncapi.json": specification.asyncapi(),
        "openapi.json": openapi.document(openapi.routes_of(app.ROUTES)),
    }
