"""Dead letters for the tests of who looks at them and replays them: made by a lane, since nobody else makes any."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from workers.dead_letters import dead_letter_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.store import Store

POISON = "poison-canary"
"""What the store refuses while `refusing`."""


@asynccontextmanager
async def refusing(store: Store, content: str = POISON) -> AsyncIterator[None]:
    """MongoDB refuses documents with this content, for their own reason: a validator."""
    await store.db.command("collMod", "messages", validator={"content": {"$ne": content}})
    try:
        yield
    finally:
        await store.db.command("collMod", "messages", validator={})


async def postpone(store: Store) -> None:
    """Nobody tries the letters again by themselves."""
    later = datetime.now(UTC) + timedelta(days=1)
    await store.db["dead_letter_queue"].update_many({}, {"$set": {"next_retry_at": later}})


async def letters(store: Store) -> list[dict[str, Any]]:
    return await store.db["dead_letter_queue"].find().sort("created_at", 1).to_list()


def id_of(conversation_id: str, sender_id: str, key: str) -> str:
    return dead_letter_id(conversation_id, sender_id, key)
