"""How far one message has come, as the store knows it: its document without its content, and the members' marks.

Called by `workers/trace.py` for the administrator. Every method raises StoreUnavailable.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - a field of a NamedTuple
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo.errors import ExecutionTimeout

from protocol import keys
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from pymongo.asynchronous.database import AsyncDatabase

    from workers.store.messages import Key

Document = dict[str, Any]
SEARCH_MS: Final = 5000
"""Longest look through the keys of the last 24 h, which no index orders by what the client called its message."""
KEYS_LIMIT: Final = 50
_FIELDS: Final = {"content": 0, "media_url": 0, "reactions": 0}
_MARKS: Final = {"user_id": 1, "join_seq": 1, "leave_seq": 1, "delivered_seq": 1, "read_seq": 1, "devices": 1}


class Standing(NamedTuple):
    """A member who may see the message, and how far it has come."""

    user_id: str
    delivered_seq: int
    read_seq: int
    devices: dict[str, int]


class Journey(NamedTuple):
    """A committed message on its way to its recipients."""

    message_id: str
    sequence_number: int
    sender_id: str
    message_type: str
    digest: bytes
    created_at: datetime
    is_deleted: bool
    members: list[Standing]


class JourneyReader:
    """Reads of `messages`, `memberships` and `idempotency_keys` for who traces a message."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._messages = database["messages"]
        self._memberships = database["memberships"]
        self._keys = database["idempotency_keys"]

    async def key_of(self, message_id: str) -> Key | None:
        """What names this message besides its id."""
        fields = {"conversation_id": 1, "sender_id": 1, "idempotency_key": 1}
        with store_errors():
            found = await self._messages.find_one({"_id": message_id}, fields)
        return None if found is None else (found["conversation_id"], found["sender_id"], found["idempotency_key"])

    async def keys_like(self, name: str) -> list[Key]:
        """Keys of messages of the last 24 h among which those are that are called `name`, by their key or trace id.

        Reads through all of them, for at most 5 s: what was not reached by then is not found.
        """
        found: list[Key] = []
        with store_errors():
            try:
                async for document in self._keys.find({}, {"_id": 1}, max_time_ms=SEARCH_MS):
                    key = _split(document["_id"])
                    if name in (key[2], keys.trace_id(*key)):
                        found.append(key)
                    if len(found) >= KEYS_LIMIT:
                        break
            except ExecutionTimeout:
                pass
        return found

    async def journey(self, key: Key) -> Journey | None:
        """Of the message with this key; None where it is not committed."""
        wanted = dict(zip(("conversation_id", "sender_id", "idempotency_key"), key, strict=True))
        with store_errors():
            found = await self._messages.find_one(wanted, _FIELDS)
            if found is None:
                return None
            number = found["sequence_number"]
            members = [
                Standing(member["user_id"], member["delivered_seq"], member["read_seq"], member["devices"])
                async for member in self._memberships.find({"conversation_id": key[0]}, _MARKS)
                if member["join_seq"] <= number <= member.get("leave_seq", number)
            ]
        return Journey(
            found["_id"],
            number,
            found["sender_id"],
            found["type"],
            found["digest"],
            found["created_at"],
            "deleted_at" in found,
            sorted(members),
        )


def _split(scoped: str) -> Key:
    """The parts of an `idempotency_keys` id; our own ids hold no colon, a client's key may."""
    conversation_id, sender_id, name = scoped.split(":", 2)
    return conversation_id, sender_id, name
