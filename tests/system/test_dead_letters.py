"""Dead letters on real processes: a message that kills its workers, and one that comes back from the dead."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio

from tests.system.crowd import PATIENCE_SECONDS, crowd, eventually
from tests.system.mortal import POISON

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]

WORKERS = ("worker-1", "worker-2")
MORTAL = [sys.executable, "-m", "tests.system.mortal", "ingest", "query", "retry"]
LOOP_SECONDS = 20.0
"""Reliability.md F-W6: three deaths, each followed by what is left of a lease (5 s) and the second look of its heir."""


async def keep_alive(house: House) -> None:
    """What a service manager does."""
    while True:
        for name in WORKERS:
            if not house.is_alive(name):
                house.start(name)
        await trio.sleep(0.2)


def letters(house: House) -> list[dict[str, Any]]:
    with house.database() as database:
        return list(database["dead_letter_queue"].find())


async def test_a_message_that_kills_its_workers_is_buried_the_rest_goes_on_and_a_fix_brings_it_back(
    house: House,
) -> None:
    """F-W6, then a replay: it takes the next number and reaches who is online."""
    async with crowd(house) as people:
        conversation_id, ann, bob = await people.pair()
        other_id, cat, dan = await people.pair()
        mortals = {name: house.exchange(name, MORTAL) for name in WORKERS}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_alive, house)
            for sender, conv in ((ann, conversation_id), (cat, other_id)):
                await sender.send_nowait(conv, "before")
            for conv in (conversation_id, other_id):
                is_theirs = partial(lambda conv: house.sequences(conv) == [1], conv)
                await eventually(is_theirs, "the mortals' leases", LOOP_SECONDS)
            for text in ("one", POISON, "two", "three"):
                await ann.send_nowait(conversation_id, text)
            await cat.send_nowait(other_id, "elsewhere")
            started = trio.current_time()
            await eventually(lambda: house.sequences(conversation_id) == [1, 2, 3, 4], "the others", LOOP_SECONDS)
            await eventually(lambda: [letter["status"] for letter in letters(house)] == ["pending"], "the letter")
            print(f"buried and passed by after {trio.current_time() - started:.1f} s")  # noqa: T201 - for the report
            await eventually(lambda: house.sequences(other_id) == [1, 2], "the others' others")
            nursery.cancel_scope.cancel()
        (letter,) = letters(house)
        assert (letter["conversation_id"], letter["next_retry_at"]) == (conversation_id, None)
        assert letter["message"]["content"] == POISON
        assert "died" in letter["error"]
        for name, arguments in mortals.items():
            house.exchange(name, arguments)
        await eventually(lambda: dan.client.logs[other_id].cursor == 2, "the others' delivery")
        answer = await replay(house, letter["_id"])
        assert answer["letter"]["status"] == "retrying"
        await people.settle(conversation_id)
        assert house.sequences(conversation_id) == [1, 2, 3, 4, 5]
        with house.database() as database:
            last = database["messages"].find_one({"conversation_id": conversation_id, "sequence_number": 5})
        assert last["content"] == POISON
        assert bob.client.logs[conversation_id].cursor == 5
        assert dan.client.logs[other_id].cursor == 2
        await eventually(lambda: letters(house)[0]["status"] == "resolved", "the resolution")


async def replay(house: House, letter_id: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {house.stack.admin_token}"}
    async with httpx2.AsyncClient(base_url=house.rest_url, headers=headers, timeout=PATIENCE_SECONDS) as client:
        answer = await client.post(f"/v1/dead-letters/{letter_id}/replay")
    assert answer.status_code == 202, answer.text
    taken: dict[str, Any] = answer.json()
    return taken
