"""H-01 to H-28: bad input against the HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.hostile.rows import Row, by_row, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio


def refused(method: str, path: str, *, token: str | None = None, body: object = None) -> Play:
    """(Status, error code) of one request; `token` None: that of a user."""

    async def play(scene: Scene) -> tuple[int, str]:
        user_id = await scene.people.user()
        good = scene.people.tokens[user_id]
        answer = await scene.ask(method, path, good if token is None else token, body)
        return answer.status_code, answer.json()["error"]["code"]

    return play


ROWS: Final = [
    Row("H-01", "a token that is none", (401, "unauthorized"), refused("GET", "/v1/conversations", token="garbage")),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
