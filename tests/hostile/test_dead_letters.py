"""H-22: dead letters that are replayed more often than once. One effect, whatever is asked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from protocol import codec, keys, records
from protocol.models import DLQErrorType, MessageType
from tests.hostile.rows import Row, by_row, judge
from workers.dead_letters import letter_id_of, letter_of
from workers.plan import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio


async def buried(scene: Scene) -> tuple[str, str, str]:
    """A letter of a message that could be committed now: (its id, the conversation, a reader's token)."""
    ann, bob = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(ann, bob)
    shard = keys.shard_of(conversation_id, keys.DEFAULT_SHARDS)
    record = records.SendMessage(
        "", 0, ann, "phone-1", conversation_id, "c1", "k1", "", "late", MessageType.TEXT, None, None, 1
    )
    now_ms = time.time_ns() // 1_000_000
    entry = Entry(shard, b"1-1", record, False)
    raw = codec.encode_record(record)
    letter = letter_of(entry, raw, "refused once", DLQErrorType.UNKNOWN, now_ms, None)
    with scene.house.database() as database:
        database["dead_letter_queue"].insert_one(letter | {"_id": letter_id_of(entry)})
    return letter_id_of(entry), conversation_id, scene.people.tokens[bob]


async def replayed_again_and_again(scene: Scene) -> tuple[list[int], int, int, list[str]]:
    """(Answers to four replays at once, to one and to a resolution when it is resolved, what the log says)."""
    letter_id, conversation_id, token = await buried(scene)
    admin = scene.house.stack.admin_token
    path = f"/v1/dead-letters/{letter_id}"
    at_once: list[int] = []

    async def replay() -> None:
        at_once.append((await scene.ask("POST", f"{path}/replay", admin)).status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(replay)
    with trio.fail_after(10):
        while (await _letter(scene, path))["status"] != "resolved":  # noqa: ASYNC110 - a worker does it
            await trio.sleep(0.1)
    after = (await scene.ask("POST", f"{path}/replay", admin)).status_code
    resolved = (await scene.ask("POST", f"{path}/resolve", admin, {"reason": "x"})).status_code
    log = (await scene.ask("GET", f"/v1/conversations/{conversation_id}/messages", token)).json()["items"]
    return sorted(at_once), after, resolved, [item["content"] for item in log]


async def _letter(scene: Scene, path: str) -> dict[str, Any]:
    found: dict[str, Any] = (await scene.ask("GET", path, scene.house.stack.admin_token)).json()
    return found


async def not_for_users(scene: Scene) -> set[tuple[int, bool]]:
    """(Status, is it as any unknown path) of every route for a user."""
    token = scene.people.tokens[await scene.people.user()]
    letter_id, _, _ = await buried(scene)
    nowhere = (await scene.ask("GET", "/nowhere", token)).json()
    found = set()
    routes = (("GET", ""), ("GET", "/statistics"), ("GET", f"/{letter_id}"), ("POST", f"/{letter_id}/replay"))
    for method, path in routes:
        answer = await scene.ask(method, f"/v1/dead-letters{path}", token)
        found.add((answer.status_code, answer.json()["error"]["code"] == nowhere["error"]["code"]))
    return found


ROWS: Final = [
    Row(
        "H-22",
        "four replays at once, one more and a resolution afterwards",
        ([202, 409, 409, 409], 409, 409, ["late"]),
        replayed_again_and_again,
    ),
    Row("H-21", "dead letters with a user's token", {(404, True)}, not_for_users),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
