"""Where a user's conversations stand: the reads behind `auth_success`, `sync`, conversation lists and the sweep.

Called by the query and REST roles. A constant number of round trips however many conversations, and all of them at one
snapshot of what a majority holds: marks, flush positions and heads read at different times would disagree, and an own
message would count as unread.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from protocol import keys, watermarks
from protocol.models import MessageType
from protocol.records import OpenHead, UserHead
from workers.store.conversations import escape_device, heads_pipeline
from workers.store.errors import store_errors
from workers.store.indexes import SEQUENCE_INDEX
from workers.store.marks import HeadMark
from workers.store.messages import from_ms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from pymongo import AsyncMongoClient
    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.database import AsyncDatabase

Document = dict[str, Any]

_CLAUSES: Final = 200
"""Conversations per own-tail query. Only those written to within the last second (the flush lag) need one."""
_UNFLUSHED_MS: Final = 5_000
"""Longer than a head waits for its flush: 1 s, and a commit before it."""
_LIVE: Final[Document] = {"$exists": False}
ENDED_TOLD: Final = timedelta(days=30)
"""How long a device that was away hears of a stay that ended meanwhile, without asking. Who names the conversation with
its cursor is told whenever that was."""
ENDED_SWEPT: Final = timedelta(minutes=10)
"""How long the sweep speaks of a stay that has ended: a round is 10 s, a gateway or worker away is back within minutes,
and a connection that opens later is told then."""


class Standing(NamedTuple):
    """One live membership: its document, where its log ends, and what of it is unread."""

    membership: Document
    head: int
    digest: bytes
    unread: int


class HeadReader:
    """Readers of `memberships`, `sequence_numbers` and the ends of logs."""

    def __init__(self, client: AsyncMongoClient[Document], database: AsyncDatabase[Document]) -> None:
        self._client = client
        self._memberships = database["memberships"]
        self._sequences = database["sequence_numbers"]
        self._messages = database["messages"]

    async def open_heads(
        self, user_id: str, device_id: str, cursors: Mapping[str, int], now_ms: int
    ) -> tuple[int, list[OpenHead]]:
        """Unread over all live memberships, and each one's head with the device's cursor.

        The cursor is the client's own where it named one, else what the device acknowledged, else the place before the
        first visible entry (a new device gets everything); always within [join_seq-1, head]. Stays that have ended come
        last, as far as the device had part of them and has not seen their end, which is their head. Conversations
        in `cursors` that the user was never in are ignored: no oracle. Raises StoreUnavailable.
        """
        device = escape_device(device_id)
        heads = []
        unread = 0
        ended: Document = {
            "$or": [{"left_at": {"$gte": from_ms(now_ms) - ENDED_TOLD}}, {"conversation_id": {"$in": list(cursors)}}]
        }
        with store_errors():
            async with self._snapshot() as session:
                wanted = {"user_id": user_id, "$or": [{"leave_seq": _LIVE}, ended]}
                members = await self._memberships.find(wanted, session=session).to_list()
                standings = await self._stand(user_id, [m for m in members if "leave_seq" not in m], session)
                ends = await self._ends([m for m in members if "leave_seq" in m], device, cursors, session)
        for standing in standings:
            membership = standing.membership
            conversation_id = membership["conversation_id"]
            before_first = membership["join_seq"] - 1
            cursor = cursors.get(conversation_id)
            if cursor is None:
                cursor = membership["devices"].get(device, before_first)
            cursor = max(before_first, min(cursor, standing.head))
            heads.append(OpenHead(conversation_id, cursor, standing.head, standing.digest))
            unread += standing.unread
        return unread, heads + ends

    async def _ends(
        self, ended: Sequence[Document], device: str, cursors: Mapping[str, int], session: AsyncClientSession
    ) -> list[OpenHead]:
        """Where these stays ended, as far as this device had part of them and is behind their end."""
        behind: dict[str, tuple[int, int]] = {}
        for member in ended:
            conversation_id, end = member["conversation_id"], member["leave_seq"]
            cursor = cursors.get(conversation_id, member["devices"].get(device))
            if cursor is not None and cursor < end:
                behind[conversation_id] = max(member["join_seq"] - 1, cursor), end
        clauses = [{"conversation_id": name, "sequence_number": end} for name, (_, end) in behind.items()]
        digests: dict[str, bytes] = {}
        for start in range(0, len(clauses), _CLAUSES):
            wanted = {"$or": clauses[start : start + _CLAUSES]}
            async for entry in self._messages.find(wanted, {"conversation_id": 1, "digest": 1}, session=session):
                digests[entry["conversation_id"]] = entry["digest"]
        # An end that has expired is none any more.
        return [OpenHead(name, *behind[name], digest) for name, digest in digests.items()]

    async def standings(self, user_id: str, conversation_ids: Sequence[str] | None = None) -> list[Standing]:
        """Every live membership of a user, or those of the named conversations. Raises StoreUnavailable."""
        wanted: Document = {"user_id": user_id, "leave_seq": _LIVE}
        if conversation_ids is not None:
            wanted["conversation_id"] = {"$in": list(conversation_ids)}
        with store_errors():
            async with self._snapshot() as session:
                members = await self._memberships.find(wanted, session=session).to_list()
                return await self._stand(user_id, members, session)

    async def _stand(self, user_id: str, members: Sequence[Document], session: AsyncClientSession) -> list[Standing]:
        if not members:
            return []
        names = [member["conversation_id"] for member in members]
        flushed = {
            document["_id"]: document
            async for document in self._sequences.find({"_id": {"$in": names}}, session=session)
        }
        heads = await self._heads(names, session)
        own = await self._own_tails(user_id, heads, flushed, session)
        return [_standing(member, heads, flushed, own) for member in members]

    def _snapshot(self) -> AbstractAsyncContextManager[AsyncClientSession]:
        return self._client.start_session(snapshot=True)

    async def _heads(self, conversation_ids: list[str], session: AsyncClientSession) -> dict[str, Document]:
        pipeline = heads_pipeline(conversation_ids)
        cursor = await self._messages.aggregate(pipeline, session=session, hint=SEQUENCE_INDEX)
        return {document["_id"]: document["head"] async for document in cursor}

    async def _own_tails(
        self, user_id: str, heads: Mapping[str, Document], flushed: Mapping[str, Document], session: AsyncClientSession
    ) -> dict[str, int]:
        """Conversation → countable of the user's last unflushed message: sending moves the own read mark."""
        clauses: list[Document] = []
        for conversation_id, head in heads.items():
            through = flushed.get(conversation_id, {}).get("last_sequence_number", 0)
            if through < head["sequence_number"]:
                clauses.append(
                    {"conversation_id": conversation_id, "sequence_number": {"$gt": through}, "sender_id": user_id}
                )
        own: dict[str, int] = {}
        fields = {"_id": 0, "conversation_id": 1, "countable": 1}
        for start in range(0, len(clauses), _CLAUSES):
            tail = self._messages.find({"$or": clauses[start : start + _CLAUSES]}, fields, session=session)
            async for message in tail:
                conversation_id = message["conversation_id"]
                own[conversation_id] = max(own.get(conversation_id, 0), message["countable"])
        return own

    async def sweep_heads(self, user_ids: Sequence[str], now_ms: int) -> list[UserHead]:
        """Heads of all live memberships of these users, at most the flush interval (1 s) old, and the ends of those
        that ended within the last minutes. Raises StoreUnavailable.

        Two queries and no look at the log: this runs for every connected user every 10 s.
        """
        ended = {"left_at": {"$gte": from_ms(now_ms) - ENDED_SWEPT}}
        wanted = {"user_id": {"$in": list(user_ids)}, "$or": [{"leave_seq": _LIVE}, ended]}
        fields = {"_id": 0, "user_id": 1, "conversation_id": 1, "join_seq": 1, "leave_seq": 1}
        with store_errors():
            members = await self._memberships.find(wanted, fields).to_list()
            if not members:
                return []
            names = list({member["conversation_id"] for member in members})
            heads = {
                document["_id"]: document["last_sequence_number"]
                async for document in self._sequences.find({"_id": {"$in": names}}, {"last_sequence_number": 1})
            }
        found = []
        for member in members:
            conversation_id, end = member["conversation_id"], member.get("leave_seq")
            head = heads.get(conversation_id, 0) if end is None else end
            if head >= member["join_seq"]:
                found.append(UserHead(member["user_id"], conversation_id, head, end is not None))
        return found

    async def recent(self, shards: Iterable[int], since_ms: int) -> tuple[list[HeadMark], dict[str, int]]:
        """Of the logs of these shards that were written to since then: where those end of which `sequence_numbers` does
        not say it, and for each that has a new message the sequence of the last one. Raises StoreUnavailable.

        In an outage of all workers nothing was written since then, however long it was: what was before it is looked at
        too.
        """
        fields = {
            "conversation_id": 1,
            "sequence_number": 1,
            "countable": 1,
            "digest": 1,
            "created_at": 1,
            "target_message_id": 1,
            "type": 1,
        }
        heads: dict[str, HeadMark] = {}
        said: dict[str, int] = {}
        with store_errors():
            older = {"_id": {"$gte": "msg_", "$lt": keys.new_message_id(since_ms, 0, 0)}}
            newest = await self._messages.find_one(older, {"_id": 1}, sort=[("_id", -1)])
            if newest is not None:
                since_ms = keys.made_at_ms(newest["_id"]) - _UNFLUSHED_MS
            async for document in self._messages.find(written_since(shards, since_ms), fields):
                name = document["conversation_id"]
                heads[name] = _newer(heads.get(name), document)
                if document["type"] != MessageType.SYSTEM.value:
                    said[name] = max(said.get(name, 0), document["sequence_number"])
            flushed = {
                document["_id"]: document["last_sequence_number"]
                async for document in self._sequences.find({"_id": {"$in": list(heads)}}, {"last_sequence_number": 1})
            }
        return [head for name, head in heads.items() if flushed.get(name, 0) < head.sequence_number], said


def written_since(shards: Iterable[int], since_ms: int) -> Document:
    """The messages of these shards since then. Ids carry time and shard: what is not wanted is passed over in the `_id`
    index and never fetched."""
    ends = "|".join(f"{shard:03x}" for shard in sorted(shards))
    return {"_id": {"$gte": keys.new_message_id(since_ms, 0, 0), "$regex": f"({ends})$"}}


def _newer(head: HeadMark | None, document: Document) -> HeadMark:
    """The later of the two, and active when either was: a change of a message is no activity."""
    created_at = document["created_at"]
    active_at = None if "target_message_id" in document else created_at
    if head is not None and head.active_at is not None:
        active_at = head.active_at if active_at is None else max(head.active_at, active_at)
    if head is not None and head.sequence_number > document["sequence_number"]:
        return head._replace(active_at=active_at)
    return HeadMark(
        document["conversation_id"],
        document["sequence_number"],
        document["countable"],
        document["digest"],
        created_at,
        active_at,
    )


def _standing(
    member: Document, heads: Mapping[str, Document], flushed: Mapping[str, Document], own: Mapping[str, int]
) -> Standing:
    """A log whose every message has expired ends where its flushed counter says, with nothing unread in it."""
    conversation_id = member["conversation_id"]
    head = heads.get(conversation_id)
    if head is None:
        at = flushed.get(conversation_id, {})
        return Standing(member, at.get("last_sequence_number", 0), at.get("digest", watermarks.NO_DIGEST), 0)
    read = max(member["read_countable"], own.get(conversation_id, 0))
    return Standing(member, head["sequence_number"], head["digest"], watermarks.unread(head["countable"], read))
