"""What state the MongoDB server is in, as far as our promises rest on it. Facts; `workers/fitness.py` judges them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pymongo.errors import OperationFailure

from workers.store.errors import store_errors
from workers.store.indexes import index_models

if TYPE_CHECKING:
    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
_LOG_KEYS: Final = (("conversation_id", "sequence_number"), ("conversation_id", "sender_id", "idempotency_key"))
"""The two that fence a second writer and a second copy."""


class Condition(msgspec.Struct, frozen=True):
    """`majority_journal`: does a majority have what it acknowledged in its journals (None: we may not ask)? `unfenced`:
    what has no unique index that it needs. `skew_seconds`: our clock minus the server's."""

    version: str
    is_replica_set: bool
    has_primary: bool
    majority_journal: bool | None
    unfenced: list[str]
    skew_seconds: float


async def look(client: AsyncMongoClient[Document], database: AsyncDatabase[Document]) -> Condition:
    """Ask the server. Raises StoreUnavailable."""
    with store_errors():
        asked_at = time.time_ns()
        hello = await client.admin.command("hello")
        middle_ns = (asked_at + time.time_ns()) // 2
        version = (await client.admin.command("buildInfo"))["version"]
        is_router = hello.get("msg") == "isdbgrid"
        has_primary = is_router or bool(hello.get("isWritablePrimary"))
        return Condition(
            version=version,
            is_replica_set=is_router or "setName" in hello,
            has_primary=has_primary,
            majority_journal=None if is_router else await _majority_journal(client),
            unfenced=await _unfenced(database) if has_primary else [],
            skew_seconds=middle_ns / 1e9 - _utc(hello["localTime"]).timestamp(),
        )


async def _majority_journal(client: AsyncMongoClient[Document]) -> bool | None:
    try:
        config = (await client.admin.command("replSetGetConfig"))["config"]
    except OperationFailure:
        return None
    return bool(config.get("writeConcernMajorityJournalDefault", True))


async def _unfenced(database: AsyncDatabase[Document]) -> list[str]:
    """Collections and fields whose unique index is missing, or not unique."""
    needed = {
        (name, tuple(model.document["key"]))
        for name, models in index_models(1).items()
        for model in models
        if model.document.get("unique")
    } | {("messages", fields) for fields in _LOG_KEYS}
    present: set[tuple[str, tuple[str, ...]]] = set()
    for name in {name for name, _ in needed}:
        async for index in await database[name].list_indexes():
            if index.get("unique"):
                present.add((name, tuple(index["key"])))
    return sorted(f"{name} ({', '.join(fields)})" for name, fields in needed - present)


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
