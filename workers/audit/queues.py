"""What lies beside the logs: streams, dead letters, idempotency records, indexes: I12, I13, I16, I19. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from protocol.models import DLQStatus
from workers.audit.snapshot import OPEN_LETTERS, DeadLetter, Document, KeyRecord, Queues, Setting, key_of, letter_key
from workers.audit.timeline import OFFLINE_SECONDS
from workers.store.indexes import index_models

if TYPE_CHECKING:
    from datetime import datetime

    from workers.audit.report import Findings

RETRYING_SECONDS: Final = 60
"""The lease of a claim: nothing is `retrying` for longer (I13)."""
_STORED_REASONS: Final = ("committed as ", "its message is in the log")
"""What a lane or a replay writes when it has seen the message (`workers/dead_letters.py`, `workers/replay.py`)."""
_ASYNC_SLACK_SECONDS: Final = 120
"""How late the TTL monitor may be: it runs once a minute."""


def check_queues(queues: Queues, setting: Setting, findings: Findings) -> None:
    """Redis: in a settled system the streams are at rest, and always everything keeps within its bound."""
    for shard in queues.shards:
        findings.counts["shards"] += 1
        if setting.settled and (shard.pending or shard.unread):
            findings.add(
                "I12", "the ingest stream is not at rest", shard=shard.shard, pending=shard.pending, unread=shard.unread
            )
        if shard.consumers > 1:
            findings.add("I16", "more than one consumer name", shard=shard.shard, consumers=shard.consumers)
    for amount in queues.amounts:
        if amount.value > amount.limit:
            findings.add("I16", f"{amount.what} is over its bound", value=amount.value, limit=amount.limit)
    for ghost in queues.ghosts or ():
        if ghost.seconds > OFFLINE_SECONDS:
            findings.add(
                "I19", "shown online without a connection", user=ghost.user_id, seconds=round(ghost.seconds, 1)
            )


def check_key(pair: KeyRecord, setting: Setting, findings: Findings) -> None:
    """One idempotency record."""
    findings.counts["idempotency keys"] += 1
    record, message = pair.record, pair.message
    if message is None:
        created_at: datetime | None = record.get("created_at")
        age = 0.0 if created_at is None else (setting.taken_at - created_at).total_seconds()
        if age + _ASYNC_SLACK_SECONDS < setting.retention_seconds:
            findings.add(
                "keys", "names a message that is not there", record=record["_id"], message_id=record["message_id"]
            )
    elif ":".join(key_of(message)) != record["_id"]:
        findings.add("keys", "names the message of another key", record=record["_id"], message_id=record["message_id"])


def check_dead_letter(letter: DeadLetter, setting: Setting, findings: Findings) -> None:
    """One dead letter: of something that is not stored, until it is resolved."""
    findings.counts["dead letters"] += 1
    document = letter.document
    status = document.get("status")
    evidence = {"entry": document["_id"], "key": letter_key(document)}
    if status in OPEN_LETTERS and letter.message_id is not None:
        findings.add("I13", "an open dead letter of a stored message", **evidence, message_id=letter.message_id)
    if status not in OPEN_LETTERS and letter.message_id is None and _must_be_stored(document):
        findings.add("I13", "resolved, and no message with its key is stored", **evidence)
    if document.get("retry_count", 0) > document.get("max_retries", 0):
        findings.add("I13", "retried more often than it may be", **evidence, count=document["retry_count"])
    since = document.get("last_retry_at") or document.get("created_at")
    if status == DLQStatus.RETRYING.value and since is not None:
        seconds = (setting.taken_at - since).total_seconds()
        if seconds > RETRYING_SECONDS:
            findings.add("I13", "retrying for too long", **evidence, seconds=round(seconds))


def _must_be_stored(document: Document) -> bool:
    """Of what was resolved by somebody's word, or was nothing for the log, no message need be there."""
    return str(document.get("resolved_reason", "")).startswith(_STORED_REASONS)


def check_indexes(indexes: dict[str, list[Document]], findings: Findings) -> None:
    """Every index that is unique by design is there, and unique."""
    for collection, models in index_models(1).items():
        present = {index["name"]: index for index in indexes.get(collection, ())}
        for model in models:
            wanted = model.document
            if not wanted.get("unique"):
                continue
            findings.counts["unique indexes"] += 1
            found = present.get(wanted["name"])
            if found is None or dict(found["key"]) != dict(wanted["key"]):
                findings.add("indexes", "a unique index is missing", collection=collection, index=wanted["name"])
            elif not found.get("unique"):
                findings.add("indexes", "an index is not unique", collection=collection, index=wanted["name"])
