"""The commit path: append messages to their logs, and look up what an append may have left behind.

Called by the ingest role alone. The insert with majority and journal is the only commit point of the system; the two
unique indexes of `messages` judge duplicates and fence a second writer. After anything but a clean success the caller
re-reads by key and plans again.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from pymongo import WriteConcern
from pymongo.errors import BulkWriteError, InvalidOperation, PyMongoError

from protocol.models import MessageStatus
from workers.store.changes import original_hash
from workers.store.errors import StoreUnavailable, store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]
Key = tuple[str, str, str]
"""(conversation_id, sender_id, idempotency_key)"""

Fingerprint = tuple[bytes, str, str | None, str | None]
"""(content hash, type, media, reply target)"""

_CHANGED = frozenset(("edited_at", "deleted_at", "expires_at"))
"""With one of these a message may no longer say what its sender's record says."""
_UNKNOWN_CODES = frozenset((6, 7, 50, 64, 89, 91, 112, 189, 262, 10107, 11600, 11602, 13435, 13436))
"""HostUnreachable … NotPrimaryOrSecondary: the outcome is not known (mongo's error_codes.yml)."""
_DUPLICATE_KEY = 11000


class OutcomeUnknown(StoreUnavailable):
    """The insert may or may not be durable: look the keys up with majority before doing anything else."""


class SequenceTaken(Exception):
    """Another writer holds that sequence: check the lease, reload the head, renumber."""


class KeyTaken(Exception):
    """A message with that (conversation, sender, key) exists: look it up and answer as a duplicate."""


class DocumentRefused(Exception):
    """The store refuses this one document for its own reason. `index` is its place in the batch; earlier ones are
    stored.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Found(NamedTuple):
    """A committed message found by its key. `as_sent`: it still says what it said. `deleted`: its media is gone too."""

    message_id: str
    sequence_number: int
    countable: int
    created_at: datetime
    fingerprint: Fingerprint
    as_sent: bool
    deleted: bool


class Located(NamedTuple):
    """Where a message id lies."""

    conversation_id: str
    sequence_number: int
    countable: int
    sender_id: str
    replyable: bool
    """Neither a system message nor deleted."""


class MessageStore:
    """`messages` and `idempotency_keys` as the ingest role uses them."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._messages = database["messages"]
        # A record of what `messages` already says, so nobody waits for a journal on its account.
        self._keys = database["idempotency_keys"].with_options(write_concern=WriteConcern(1))

    async def append(self, documents: Sequence[Document]) -> None:
        """Insert in order; returns when a majority has journalled all of them.

        *Raises* `KeyTaken`, `SequenceTaken`, `DocumentRefused` or `OutcomeUnknown`; a prefix of `documents` may then
        be stored, nothing after it.
        """
        try:
            await self._messages.insert_many(documents, ordered=True)
        except BulkWriteError as error:
            raise _classify(error) from error
        except InvalidOperation:
            raise
        except PyMongoError as error:
            raise OutcomeUnknown(str(error)) from error

    async def find_keys(self, wanted: Iterable[Key]) -> dict[Key, Found]:
        """The committed messages among these keys, by majority read: a local read may show what a failover takes
        back.
        """
        grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
        for conversation_id, sender_id, name in wanted:
            grouped[conversation_id, sender_id].append(name)
        if not grouped:
            return {}
        clauses = [
            {"conversation_id": conversation_id, "sender_id": sender_id, "idempotency_key": {"$in": names}}
            for (conversation_id, sender_id), names in grouped.items()
        ]
        found: dict[Key, Found] = {}
        with store_errors():
            async for document in self._messages.find({"$or": clauses}):
                key = (document["conversation_id"], document["sender_id"], document["idempotency_key"])
                found[key] = Found(
                    document["_id"],
                    document["sequence_number"],
                    document["countable"],
                    document["created_at"],
                    fingerprint(document),
                    as_sent=not _CHANGED & document.keys(),
                    deleted="deleted_at" in document,
                )
        return found

    async def locate(self, message_ids: Sequence[str]) -> dict[str, Located]:
        """Where these messages lie; unknown ids are left out."""
        fields = {
            "conversation_id": 1,
            "sequence_number": 1,
            "countable": 1,
            "sender_id": 1,
            "type": 1,
            "deleted_at": 1,
        }
        with store_errors():
            return {
                document["_id"]: Located(
                    document["conversation_id"],
                    document["sequence_number"],
                    document["countable"],
                    document["sender_id"],
                    document["type"] != "system" and "deleted_at" not in document,
                )
                async for document in self._messages.find({"_id": {"$in": list(message_ids)}}, fields)
            }

    async def authors(self, conversation_id: str, after: int, through: int) -> list[tuple[int, str]]:
        """(sequence, sender) of the messages in (after, through], newest first."""
        wanted = {"conversation_id": conversation_id, "sequence_number": {"$gt": after, "$lte": through}}
        fields = {"_id": 0, "sequence_number": 1, "sender_id": 1}
        order = [("conversation_id", -1), ("sequence_number", -1)]
        with store_errors():
            return [
                (document["sequence_number"], document["sender_id"])
                async for document in self._messages.find(wanted, fields, sort=order)
            ]

    async def remember_keys(self, records: Sequence[tuple[Key, str, datetime]]) -> None:
        """Write `idempotency_keys` for committed messages. A record of them, never asked: the message index answers."""
        if not records:
            return
        documents = [
            {"_id": f"{key[0]}:{key[1]}:{key[2]}", "message_id": message_id, "created_at": created_at}
            for key, message_id, created_at in records
        ]
        try:
            await self._keys.insert_many(documents, ordered=False)
        except BulkWriteError as error:
            if any(item["code"] != _DUPLICATE_KEY for item in error.details["writeErrors"]):
                raise StoreUnavailable(str(error)) from error
        except PyMongoError as error:
            raise StoreUnavailable(str(error)) from error


def fingerprint(document: Document) -> Fingerprint:
    """What makes two payloads under one key the same: what it said first (of a command: what it asked for), type, media
    and reply target. Not the client's clock. A deleted message has no media."""
    asked: bytes | None = document.get("request_hash")
    return (
        bytes.fromhex(original_hash(document)) if asked is None else asked,
        document["type"],
        document.get("media_url"),
        document.get("reply_to_message_id"),
    )


def _classify(error: BulkWriteError) -> Exception:
    """Which of the four failures this is (reliability.md section 10.2, "Result handling of W7")."""
    details = error.details
    if details["writeConcernErrors"] or not details["writeErrors"]:
        return OutcomeUnknown(str(details["writeConcernErrors"])[:200])
    first = details["writeErrors"][0]
    code = first["code"]
    if code == _DUPLICATE_KEY:
        pattern = first.get("keyPattern", {})
        if "sequence_number" in pattern:
            return SequenceTaken(str(first.get("keyValue")))
        return KeyTaken(str(first.get("keyValue")))
    if code in _UNKNOWN_CODES:
        return OutcomeUnknown(first["errmsg"])
    return DocumentRefused(first["index"], first["errmsg"])


def from_ms(epoch_ms: int) -> datetime:
    """Epoch milliseconds → UTC datetime."""
    return datetime.fromtimestamp(epoch_ms / 1000, UTC)


STATUS_SENT = MessageStatus.SENT.value
