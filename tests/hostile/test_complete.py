"""No row of the matrix is missing."""

from __future__ import annotations

from typing import Final

from tests.hostile import (
    rows,
    test_auth,
    test_dead_letters,
    test_frames,
    test_handshake,
    test_media,
    test_messages,
    test_rest,
    test_stories,
    test_tls,
    test_written_logs,
)

PARTS: Final = (
    (rows.HANDSHAKE, [test_handshake.ROWS, test_tls.ROWS]),
    (rows.FRAMES, [test_frames.ROWS]),
    (rows.AUTH, [test_auth.ROWS]),
    (rows.MESSAGES, [test_messages.ROWS, test_stories.ROWS]),
    (rows.REST, [test_rest.ROWS, test_media.ROWS, test_dead_letters.ROWS, test_written_logs.ROWS]),
)


def test_the_matrix_has_105_rows() -> None:
    assert len(rows.MATRIX) == len(set(rows.MATRIX)) == 105


def test_every_row_stands_in_its_table() -> None:
    for ids, tables in PARTS:
        written = {row.id for table in tables for row in table}
        assert written == set(ids)


def test_no_two_inputs_of_a_row_have_one_name() -> None:
    names = [(row.id, row.sent) for _, tables in PARTS for table in tables for row in table]
    assert len(names) == len(set(names))
