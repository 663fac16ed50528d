"""Conversations and memberships as their shard's owner loads and changes them.

A group's state is the fold of the system messages in its log; `memberships` and `conversations.participants` are its
projection, and `conversations.membership_seq` says through which entry the projection is written. Loading folds what
lies behind that, so a crash between the log and its projection loses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pymongo import DESCENDING, ReplaceOne, UpdateOne
from pymongo.errors import BulkWriteError

from protocol.models import Conversation, ConversationType, Membership, Role, to_document
from protocol.watermarks import NO_DIGEST
from workers.store.blocks import IN_FORCE, block_name
from workers.store.changes import Effect, operations, original_hash
from workers.store.errors import store_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]


class TailMessage(NamedTuple):
    """A committed message whose effects may not be in the projections yet. `target_hash`: of a change, the hash of what
    its target said first; "" where it names none."""

    sequence_number: int
    sender_id: str
    countable: int
    system_content: str | None
    created_at: datetime
    target_id: str
    hidden_for: str
    target_hash: str


class Loaded(NamedTuple):
    """Everything an owner needs of one conversation, by majority reads."""

    conversation: Conversation
    membership_seq: int
    members: list[Membership]
    """Live ones only."""
    banned: list[str]
    last: int
    digest: bytes
    countable: int
    last_created_at: datetime | None
    tail: list[TailMessage]
    """System messages after `membership_seq` and all messages after the flushed sequence, ascending."""
    hiding: frozenset[str]
    """Those who hide what they read, as their accounts say; perhaps others too."""
    blocking: frozenset[tuple[str, str]]
    """(who, whom) in 1:1 conversations; perhaps of others too."""


class MemberChange(NamedTuple):
    """What the projection changes in one membership: a new `stay` (None: the present one), and fields of it (None: gone
    from it).

    `sequence`: the last entry that touched it."""

    user_id: str
    sequence: int
    stay: Membership | None
    fields: Document


class Projected(NamedTuple):
    """What the system messages of one conversation through `membership_seq` have made of it. `fields`: of
    `conversations` (None: gone from it)."""

    conversation_id: str
    membership_seq: int
    fields: Document
    members: list[MemberChange]
    effects: list[Effect]


class ConversationStore:
    """`conversations` and `memberships`, for the owner of their shard."""

    def __init__(self, database: AsyncDatabase[Document]) -> None:
        self._conversations = database["conversations"]
        self._memberships = database["memberships"]
        self._messages = database["messages"]
        self._sequences = database["sequence_numbers"]
        self._users = database["users"]
        self._blocks = database["blocks"]

    async def load(self, conversation_ids: Sequence[str]) -> dict[str, Loaded]:
        """State of these conversations; unknown ids are left out. A constant number of round trips."""
        ids = list(conversation_ids)
        with store_errors():
            documents = {d["_id"]: d async for d in self._conversations.find({"_id": {"$in": ids}})}
            if not documents:
                return {}
            known = list(documents)
            # Before the members: a flush writes marks first, so theirs hold all that is flushed by this, whoever writes
            # meanwhile; the tail holds the rest.
            flushed = {d["_id"]: d async for d in self._sequences.find({"_id": {"$in": known}})}
            members: dict[str, list[Membership]] = {name: [] for name in known}
            async for document in self._memberships.find(
                {"conversation_id": {"$in": known}, "leave_seq": {"$exists": False}}
            ):
                members[document["conversation_id"]].append(membership_of(document))
            heads = {d["_id"]: d["head"] async for d in await self._messages.aggregate(heads_pipeline(known))}
            tails = await self._tails(documents, heads, flushed)
        # Behind the members: what an account says is stored before its memberships are looked for (`rest/upkeep.py`).
        hiding = await self.hiding({member.user_id for name in known for member in members[name]})
        pairs = [members[name] for name in known if documents[name]["type"] == ConversationType.ONE_TO_ONE.value]
        blocking = await self.blocking([(one.user_id, other.user_id) for one, other in filter(_is_pair, pairs)])
        return {
            name: _loaded(
                document, members[name], heads.get(name), flushed.get(name), tails.get(name, []), hiding, blocking
            )
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
            found = await self._messages.find({"$or": clauses}, _TAIL_FIELDS).to_list()
            hashes = await self._target_hashes(message["target_message_id"] for message in found if _is_change(message))
            for message in found:
                sequence = message["sequence_number"]
                target_id = message.get("target_message_id", "")
                tails.setdefault(message["conversation_id"], {})[sequence] = TailMessage(
                    sequence,
                    message["sender_id"],
                    message["countable"],
                    message["content"] if message["type"] == "system" else None,
                    message["created_at"],
                    target_id,
                    message.get("hidden_for", ""),
                    hashes.get(target_id, ""),
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

    async def _target_hashes(self, message_ids: Iterable[str]) -> dict[str, str]:
        ids = list(set(message_ids))
        if not ids:
            return {}
        targets = self._messages.find({"_id": {"$in": ids}}, {"content": 1, "content_hash": 1})
        return {document["_id"]: original_hash(document) async for document in targets}

    async def apply(self, projected: Sequence[Projected]) -> None:
        """Write what system messages have changed: messages and memberships first, then the mark that they are
        written. Raises StoreUnavailable; safe to repeat, and for an owner that comes too late."""
        effects = [operation for one in projected for effect in one.effects for operation in operations(effect)]
        members = [_member_change(one.conversation_id, change) for one in projected for change in one.members]
        marks = [
            UpdateOne(
                {"_id": one.conversation_id, "membership_seq": {"$lt": one.membership_seq}},
                _set_or_unset(one.fields | {"membership_seq": one.membership_seq}),
            )
            for one in projected
        ]
        with store_errors():
            if effects:
                await self._messages.bulk_write(effects, ordered=True)
            if members:
                try:
                    await self._memberships.bulk_write(members, ordered=False)
                except BulkWriteError as error:
                    # A stay that is not older is there already: the filter left it alone, and so the upsert met it.
                    if error.details["writeConcernErrors"] or any(
                        item["code"] != _DUPLICATE_KEY for item in error.details["writeErrors"]
                    ):
                        raise
            if marks:
                await self._conversations.bulk_write(marks, ordered=False)

    async def hiding(self, user_ids: Iterable[str]) -> frozenset[str]:
        """Those whose account hides what it reads. Raises StoreUnavailable."""
        wanted = {"_id": {"$in": list(user_ids)}, "privacy.read_receipts": False}
        with store_errors():
            return frozenset([document["_id"] async for document in self._users.find(wanted, {"_id": 1})])

    async def blocking(self, pairs: Iterable[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """(who, whom) of the blocks, either way, between these pairs. Raises StoreUnavailable."""
        names = [block_name(*pair) for one, other in pairs for pair in ((one, other), (other, one))]
        if not names:
            return frozenset()
        with store_errors():
            found = self._blocks.find({"_id": {"$in": names}, **IN_FORCE}, {"user_id": 1, "blocked_id": 1})
            return frozenset([(document["user_id"], document["blocked_id"]) async for document in found])


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


_TAIL_FIELDS = dict.fromkeys(
    (
        "conversation_id",
        "sequence_number",
        "sender_id",
        "countable",
        "type",
        "content",
        "created_at",
        "target_message_id",
        "hidden_for",
    ),
    1,
)
_DUPLICATE_KEY = 11000


def _is_pair(members: list[Membership]) -> bool:
    return len(members) == 2


def _is_change(message: Document) -> bool:
    return message["type"] == "system" and "target_message_id" in message


def _set_or_unset(fields: Document) -> Document:
    """The update that gives a document these fields, and takes those from it that are None."""
    update: Document = {}
    for name, value in fields.items():
        if value is None:
            update.setdefault("$unset", {})[name] = ""
        else:
            update.setdefault("$set", {})[name] = value
    return update


def _member_change(conversation_id: str, change: MemberChange) -> ReplaceOne[Document] | UpdateOne:
    wanted = {"_id": f"{conversation_id}:{change.user_id}", "changed_seq": {"$not": {"$gte": change.sequence}}}
    if change.stay is not None:
        fields = {name: value for name, value in change.fields.items() if value is not None}
        document = to_document(change.stay) | fields | {"changed_seq": change.sequence}
        return ReplaceOne(wanted, document, upsert=True)
    return UpdateOne(wanted, _set_or_unset(change.fields | {"changed_seq": change.sequence}))


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


_OPTIONAL_OF_MEMBER = ("leave_seq", "silenced_until", "shown_read_seq")
_OPTIONAL_OF_CONVERSATION = ("last_message_at", "title", "disappearing_seconds", "plaintext")


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
        **{name: document[name] for name in _OPTIONAL_OF_MEMBER if name in document},
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
        **{name: document[name] for name in _OPTIONAL_OF_CONVERSATION if name in document},
    )


def new_membership(conversation_id: str, user_id: str, role: Role, join_seq: int, countable_before: int) -> Membership:
    """A fresh stay from `join_seq` on: nothing before it counts as unread or undelivered."""
    return Membership(
        membership_id=f"{conversation_id}:{user_id}",
        conversation_id=conversation_id,
        user_id=user_id,
        role=role,
        join_seq=join_seq,
        delivered_seq=join_seq - 1,
        read_seq=join_seq - 1,
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
    hiding: frozenset[str],
    blocking: frozenset[tuple[str, str]],
) -> Loaded:
    # A log whose every message has expired goes on where it ended: the flushed counter knows.
    at: Document = head or flushed or {}
    return Loaded(
        conversation=conversation_of(document),
        membership_seq=document.get("membership_seq", 0),
        members=members,
        banned=document.get("banned", []),
        last=at["sequence_number"] if head else at.get("last_sequence_number", 0),
        digest=at.get("digest", NO_DIGEST),
        countable=at.get("countable", 0),
        last_created_at=at.get("created_at", at.get("updated_at")),
        tail=tail,
        hiding=hiding,
        blocking=blocking,
    )
