"""No row of the matrix is missing."""

from __future__ import annotations

from typing import Final

from tests.hostile import rows, test_auth, test_frames, test_handshake, test_rest

TABLES: Final = {
    test_handshake: rows.HANDSHAKE,
    test_frames: rows.FRAMES,
    test_auth: rows.AUTH,
    test_rest: rows.REST,
}
PENDING: Final = {*rows.FRAMES, *rows.AUTH, *rows.MESSAGES, *rows.HANDSHAKE, *rows.REST} - {
    row.id for table in TABLES for row in table.ROWS
}
"""Not written yet. Empty when the matrix is complete."""


def test_the_matrix_has_105_rows() -> None:
    assert len(rows.MATRIX) == len(set(rows.MATRIX)) == 105


def test_every_row_stands_in_its_table() -> None:
    for table, ids in TABLES.items():
        written = {row.id for row in table.ROWS}
        assert written <= set(ids), "a row of another part"
        assert set(ids) - written <= PENDING


def test_no_two_inputs_of_a_row_have_one_name() -> None:
    names = [(row.id, row.sent) for table in TABLES for row in table.ROWS]
    assert len(names) == len(set(names))
