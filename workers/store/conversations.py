"""Conversations and memberships as their shard's owner loads and changes them.

A group's state is the fold of the system messages in its log; `memberships` and `conversations.participants` are its
projection, and `conversations.membership_seq` says through which entry the projection is written. Loading folds what
lies behind that, so a crash between the log and its projection loses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pymongo import DESCENDING, ReplaceOne, UpdateOne

from protocol.models import Conversation, ConversationType, Membership, Role, to_document
from protocol.watermarks import NO_DIGEST
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class TailMessage(NamedTuple):
    """A committed message whose effects may not be in the projections yet."""

    sequence_number: int
    sender_id: str
    countable: int
    system_content: str | None


class Loaded(NamedTuple):
    """Everything an owner needs of one conversation, by majority reads."""

    conversation: Conversation
    membership_seq: int
    members: list[Membership]
    """Live ones only."""
    last: int
    digest: bytes
    countable: int
    last_created_at: datetime | None
    tail: list[TailMessage]
    """System messages after `membership_seq` and all messages after the flushed sequence, ascending."""


class ConversationStore:
    """`conversations` and `memberships`, for the owner of their shard."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._conversations = database["conversations"]
        self._memberships = database["memberships"]
        self._messages = database["messages"]
        self._sequences = database["sequence_numbers"]

    async def load(self, conversation_ids: Sequence[str]) -> dict[str, Loaded]:
        """State of these conversations; unknown ids are left out. A constant number of round trips."""
        ids = list(conversation_ids)
        with store_errors():
            documents = {d["_id"]: d async for d in self._conversations.find({"_id": {"$in": ids}})}
            if not documents:
                return {}
            known = list(documents)
            members: dict[str, list[Membership]] = {name: [] for name in known}
            async for document in self._memberships.find(
                {"conversation_id": {"$in": known}, "leave_seq": {"$exists": False}}
            ):
                members[document["conversation_id"]].append(membership_of(document))
            heads = {d["_id"]: d["head"] async for d in await self._messages.aggregate(heads_pipeline(known))}
            flushed = {d["_id"]: d async for d in self._sequences.find({"_id": {"$in": known}})}
            tails = await self._tails(documents, heads, flushed)
        return {
            name: _loaded(document, members[name], heads.get(name), flushed.get(name), tails.get(name, []))
            for name, document in documents.items()
        }

    async def _tails(
        self, documents: dict[str, Document], heads: dict[str, Document], flushed: dict[str, Document]
    ) -> dict[str, list[TailMessage]]:
        clauses: list[Document] = []
        for name, head in heads.items():
            last = head["sequence_number"]
            through = flushed.get(name, {}).get("last_sequence_number", 0)
            if through < last:
                clauses.append({"conversation_id": name, "sequence_number": {"$gt": through}})
            membership_seq = documents[name].get("membership_seq", 0)
            if membership_seq < through:
                clauses.append({"conversation_id": name, "sequence_number": {"$gt": membership_seq}, "type": "system"})
        tails: dict[str, dict[int, TailMessage]] = {}
        if clauses:
            fields = {
                "conversation_id": 1,
                "sequence_number": 1,
                "sender_id": 1,
                "countable": 1,
                "type": 1,
                "content": 1,
            }
            async for message in self._messages.find({"$or": clauses}, fields):
                sequence = message["sequence_number"]
                content = message["content"] if message["type"] == "system" else None
                tails.setdefault(message["conversation_id"], {})[sequence] = TailMessage(
                    sequence, message["sender_id"], message["countable"], content
                )
        return {name: [tail[sequence] for sequence in sorted(tail)] for name, tail in tails.items()}

    async def create(self, created: Sequence[tuple[Conversation, Iterable[Membership]]]) -> None:
        """Write conversations and the memberships they begin with, where they are missing; repeating it changes
        nothing.

        Memberships come first: a conversation that exists has them. Its `sequence_numbers` document starts at 0.
        """
        stays = [_insert_once(to_document(m)) for _, members in created for m in members]
        conversations = []
        sequences = []
        for conversation, _ in created:
            document = to_document(conversation)
            document["membership_seq"] = 0
            conversations.append(_insert_once(document))
            sequences.append(
                _insert_once(
                    {
                        "_id": document["_id"],
                        "last_sequence_number": 0,
                        "countable": 0,
                        "digest": NO_DIGEST,
                        "updated_at": conversation.created_at,
                    }
                )
            )
        with store_errors():
            if stays:
                await self._memberships.bulk_write(stays, ordered=False)
            await self._sequences.bulk_write(sequences, ordered=False)
            await self._conversations.bulk_write(conversations, ordered=False)

    async def apply(
        self,
        conversation_id: str,
        membership_seq: int,
        participants: Sequence[str],
        joined: Iterable[Membership],
        left: Iterable[tuple[str, int]],
        roles: Iterable[tuple[str, Role]],
    ) -> None:
        """Write the projection of system messages through `membership_seq`: memberships first, then the mark that
        they are written.
        """
        operations: list[ReplaceOne[Document] | UpdateOne] = [
            ReplaceOne({"_id": m.membership_id}, to_document(m), upsert=True) for m in joined
        ]
        operations += [
            UpdateOne({"_id": f"{conversation_id}:{user_id}"}, {"$set": {"leave_seq": leave_seq}})
            for user_id, leave_seq in left
        ]
        operations += [
            UpdateOne({"_id": f"{conversation_id}:{user_id}"}, {"$set": {"role": role.value}})
            for user_id, role in roles
        ]
        with store_errors():
            if operations:
                await self._memberships.bulk_write(operations, ordered=True)
            await self._conversations.update_one(
                {"_id": conversation_id, "membership_seq": {"$lt": membership_seq}},
                {"$set": {"participants": list(participants), "membership_seq": membership_seq}},
            )


def heads_pipeline(conversation_ids: list[str]) -> list[Document]:
    """Last entry of each log: `{_id, head: {sequence_number, digest, countable, created_at}}`; the index answers with
    a DISTINCT_SCAN.
    """
    return [
        {"$match": {"conversation_id": {"$in": conversation_ids}}},
        {"$sort": {"conversation_id": DESCENDING, "sequence_number": DESCENDING}},
        {
            "$group": {
                "_id": "$conversation_id",
                "head": {
                    "$first": {
                        "sequence_number": "$sequence_number",
                        "digest": "$digest",
                        "countable": "$countable",
                        "created_at": "$created_at",
                    }
                },
            }
        },
    ]


_ESCAPES = (("%", "%25"), (".", "%2E"), ("$", "%24"))


def escape_device(device_id: str) -> str:
    """A device id as a BSON field name."""
    for plain, escaped in _ESCAPES:
        device_id = device_id.replace(plain, escaped)
    return device_id


def unescape_device(field: str) -> str:
    """The device id of a BSON field name."""
    for plain, escaped in reversed(_ESCAPES):
        field = field.replace(escaped, plain)
    return field


def membership_of(document: Document) -> Membership:
    """A `memberships` document with its device ids as clients know them."""
    devices = {unescape_device(field): sequence for field, sequence in document.get("devices", {}).items()}
    return Membership(
        membership_id=document["_id"],
        conversation_id=document["conversation_id"],
        user_id=document["user_id"],
        role=Role(document["role"]),
        join_seq=document["join_seq"],
        delivered_seq=document["delivered_seq"],
        read_seq=document["read_seq"],
        read_countable=document["read_countable"],
        devices=devices,
        **({"leave_seq": document["leave_seq"]} if "leave_seq" in document else {}),
    )


def conversation_of(document: Document) -> Conversation:
    """A `conversations` document as the model."""
    return Conversation(
        conversation_id=document["_id"],
        user_id=document["user_id"],
        agent_id=document["agent_id"],
        conversation_type=ConversationType(document["type"]),
        participants=document["participants"],
        last_sequence_number=document["last_sequence_number"],
        created_at=document["created_at"],
        **({"last_message_at": document["last_message_at"]} if "last_message_at" in document else {}),
    )


def new_membership(
    conversation_id: str, user_id: str, role: Role, join_seq: int, countable_before: int, read_seq: int | None = None
) -> Membership:
    """A fresh stay from `join_seq` on: nothing before it counts as unread or undelivered."""
    return Membership(
        membership_id=f"{conversation_id}:{user_id}",
        conversation_id=conversation_id,
        user_id=user_id,
        role=role,
        join_seq=join_seq,
        delivered_seq=join_seq - 1,
        read_seq=join_seq - 1 if read_seq is None else read_seq,
        read_countable=countable_before,
        devices={},
    )


def _insert_once(document: Document) -> UpdateOne:
    values = {name: value for name, value in document.items() if name != "_id"}
    return UpdateOne({"_id": document["_id"]}, {"$setOnInsert": values}, upsert=True)


def _loaded(
    document: Document,
    members: list[Membership],
    head: Document | None,
    flushed: Document | None,
    tail: list[TailMessage],
) -> Loaded:
    # A log whose every message has expired goes on where it ended: the flushed counter knows.
    at: Document = head or flushed or {}
    return Loaded(
        conversation=conversation_of(document),
        membership_seq=document.get("membership_seq", 0),
        members=members,
        last=at["sequence_number"] if head else at.get("last_sequence_number", 0),
        digest=at.get("digest", NO_DIGEST),
        countable=at.get("countable", 0),
        last_created_at=at.get("created_at", at.get("updated_at")),
        tail=tail,
    )
