"""The bad-input matrix: what a row is, which rows there are, how one is played and judged.

A row is data: its id, what is sent, what must come back, and `play`, which sends it to real processes and returns what
came back. Each `test_*.py` here holds the rows of one part of the matrix in `ROWS`; a row with several inputs stands
there several times. Every answer is held against the rules of all rows, too: nothing of ours shows through, and no
process ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed

from tests.hostile.scene import Scene, open_scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.system.house import House

Play = Callable[[Scene], Awaitable[Any]]

FAILURES: Final = (AssertionError, EOFError, trio.TooSlowError, trio.BrokenResourceError, ConnectionClosed)
"""How the other side can disappoint: what a row then got is the failure."""

PATIENCE_SECONDS: Final = 45.0
"""For one row, on a busy machine."""

BOTH: Final = ("epoll", "trio-websocket")
PATIENT: Final = "patient"
"""A third gateway, on epoll, that takes any number of messages and connections a second."""
ONE: Final = ("epoll",)


def _ids(letter: str, *spans: tuple[int, int]) -> list[str]:
    return [f"{letter}-{number:02}" for first, last in spans for number in range(first, last + 1)]


HANDSHAKE: Final = _ids("W", (1, 18))
FRAMES: Final = _ids("W", (20, 36))
AUTH: Final = _ids("W", (40, 51))
MESSAGES: Final = _ids("W", (55, 84))
REST: Final = _ids("H", (1, 28))
MATRIX: Final = (*HANDSHAKE, *FRAMES, *AUTH, *MESSAGES, *REST)
"""Every id: 18 + 17 + 12 + 30 + 28 = 105."""


class Row(msgspec.Struct, frozen=True):
    """One input of one row. `sent` says it in words; `wanted` is what `play` must return."""

    id: str
    sent: str
    wanted: Any
    play: Play
    transports: tuple[str, ...] = ONE
    """`BOTH` where it is about bytes; what a session answers is the same code on either."""
    because: str = ""
    """Why `wanted` is not what the matrix says, where it is not."""


class Verdict(msgspec.Struct, frozen=True):
    """One line of the report."""

    id: str
    sent: str
    transport: str
    got: str
    wanted: str
    because: str

    @property
    def is_good(self) -> bool:
        return self.got == self.wanted


def by_row(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """A test per row and transport, named after the row."""
    cases = [(row, transport) for row in rows for transport in row.transports]
    names = [f"{row.id} {row.sent} ({transport})" for row, transport in cases]
    return pytest.mark.parametrize(("row", "transport"), cases, ids=names)


async def judge(row: Row, house: House, transport: str, record: Callable[[str, object], None]) -> None:
    """Play one row; `record` is pytest's `record_property`."""
    async with open_scene(house, transport) as scene:
        try:
            with trio.fail_after(PATIENCE_SECONDS):
                got: Any = await row.play(scene)
        except* FAILURES as failures:
            got = failures
    verdict = Verdict(row.id, row.sent, transport, repr(got), repr(row.wanted), row.because)
    record("hostile", msgspec.structs.asdict(verdict))  # plain: it may come from another process
    assert verdict.is_good, f"{row.id} {row.sent} ({transport}): got {verdict.got}, wanted {verdict.wanted}"
    assert not scene.indiscretions, f"{row.id} {row.sent}: the answer tells too much: {scene.indiscretions}"
    dead = [name for name in house.pids if not house.is_alive(name)]
    assert not dead, f"{row.id} {row.sent}: ended {dead}"
