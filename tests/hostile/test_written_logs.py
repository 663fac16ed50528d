"""H-27, the last of all rows: nothing of what was said in the matrix stands in the log of any process."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import pytest

from bench import canary
from protocol import codec, frames
from tests.hostile.rows import BOTH, Row, by_row, judge
from tests.hostile.scene import HANDED_OUT
from tests.hostile.test_auth import BAD_TOKENS, payload
from tests.system.crowd import message

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio

DATABASES: Final = ("valkey", "mongod")


async def speak(scene: Scene, mark: str) -> set[str]:
    """Say the mark wherever a client can, rightly and wrongly; the tokens that were shown."""
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    shown = {make(user_id) for make in BAD_TOKENS.values()}
    for token in shown:
        scene.move()
        async with scene.talk() as talk:
            await talk.send({"type": "auth", "payload": payload(user_id, token)})
            await talk.close_code()
    async with scene.talk() as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        await talk.send(message(conversation_id, "k", mark))
        await talk.expect(frames.MessageAck)
        body = {"conversation_id": mark, "content": {"x": mark}, "type": mark, "timestamp": mark}
        for wrong in (
            mark.encode(),
            codec.JSON.encode({"type": mark}),
            codec.JSON.encode({"type": "message", "idempotency_key": mark * 9, "payload": body}),
            codec.JSON.encode(message(conversation_id, mark, mark, media_url=mark)),
            codec.JSON.encode({"type": "auth", "payload": payload(user_id, mark)}),
        ):
            await talk.send_bytes(wrong)
        await talk.close_code()
    return shown - {"garbage"}


async def searched(scene: Scene) -> tuple[list[str], bool, bool]:
    """(Where something was found, were there logs to look through, and tokens to look for)."""
    mark = f"canary-{secrets.token_hex(8)}"
    shown = await speak(scene, mark)
    directory = scene.house.log("rest").parent
    logs = [path for path in directory.glob("*.log") if path.stem not in DATABASES]
    signatures = {token.rsplit(".", 1)[1] for token in HANDED_OUT | shown | set(scene.people.tokens.values())}
    found = canary.search_files(logs, {mark, scene.house.stack.admin_token, *signatures} - {""})
    return found.found, len(logs) >= 6 and found.log_bytes > 1000, len(signatures) >= 5


ROWS: Final = [Row("H-27", "marks and tokens over the WebSocket", ([], True, True), searched, BOTH)]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
