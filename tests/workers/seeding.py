"""Logs and memberships for the tests of what reads them, written by the real writers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from protocol import keys, watermarks
from protocol.models import (
    Conversation,
    ConversationType,
    Membership,
    MessageDocument,
    MessageStatus,
    MessageType,
    Role,
    to_document,
)
from workers.store.conversations import MemberChange, Projected, new_membership
from workers.store.marks import HeadMark, Mark

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import httpx2

    from workers.store import Store

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
NOW_MS = int(START.timestamp() * 1000) + 60_000
"""A minute after the logs begin."""


class Log:
    """One conversation under construction. `flush` is what the owner's flusher does within a second."""

    def __init__(self, store: Store, conversation_id: str, participants: Sequence[str]) -> None:
        self.store = store
        self.conversation_id = conversation_id
        self.participants = list(participants)
        self.last = 0
        self.countable = 0
        self.digest = watermarks.NO_DIGEST

    async def create(self, kind: ConversationType = ConversationType.GROUP) -> Log:
        conversation = Conversation(
            conversation_id=self.conversation_id,
            user_id=self.participants[0],
            agent_id="",
            conversation_type=kind,
            participants=self.participants,
            last_sequence_number=0,
            created_at=START,
        )
        members = [new_membership(self.conversation_id, user, Role.MEMBER, 1, 0) for user in self.participants]
        await self.store.conversations.create([(conversation, members)])
        return self

    async def append(self, *senders: str, content: str = "x") -> None:
        """One message per named sender ("system": a system message)."""
        documents = []
        for sender in senders:
            self.last += 1
            system = sender == "system"
            self.countable += not system
            message_id = keys.new_message_id(self.last, hash(self.conversation_id), 0)
            text = '{"event":"added","actor":"a","targets":["b"],"version":1}' if system else content
            self.digest = watermarks.chain_digest(
                self.digest, message_id, sender, self.last, watermarks.content_hash(text)
            )
            at = START + timedelta(seconds=self.last)
            document = MessageDocument(
                message_id=message_id,
                idempotency_key=f"k{self.last}",
                conversation_id=self.conversation_id,
                sequence_number=self.last,
                sender_id=sender,
                receiver_id="",
                message_type=MessageType.SYSTEM if system else MessageType.TEXT,
                content=text,
                timestamp=at,
                status=MessageStatus.SENT,
                created_at=at,
                digest=self.digest,
                countable=self.countable,
            )
            documents.append(to_document(document))
        await self.store.messages.append(documents)

    async def mark(
        self, user_id: str, *, delivered: int = 0, read: int = 0, read_countable: int = 0, **devices: int
    ) -> None:
        mark = Mark(self.conversation_id, user_id, delivered, read, read_countable, devices)
        await self.store.marks.flush_marks([mark])

    async def flush(self) -> None:
        at = START + timedelta(seconds=self.last)
        head = HeadMark(self.conversation_id, self.last, self.countable, self.digest, at, at)
        await self.store.marks.flush_heads([head])
        # The flusher's write is a light one; a majority write behind it makes it visible to majority reads.
        await self.store.db["sequence_numbers"].update_one(
            {"_id": self.conversation_id}, {"$max": {"last_sequence_number": self.last}}
        )

    async def join(self, user_id: str, join_seq: int) -> None:
        member = new_membership(self.conversation_id, user_id, Role.MEMBER, join_seq, self.countable)
        self.participants.append(user_id)
        await self._project(join_seq, MemberChange(user_id, join_seq, member, {}))

    async def leave(self, user_id: str, leave_seq: int) -> None:
        self.participants.remove(user_id)
        left_at = START + timedelta(seconds=leave_seq)
        fields = {"leave_seq": leave_seq, "left_at": left_at}
        await self._project(leave_seq, MemberChange(user_id, leave_seq, None, fields))

    async def _project(self, sequence: int, change: MemberChange) -> None:
        fields = {"participants": self.participants}
        await self.store.conversations.apply([Projected(self.conversation_id, sequence, fields, [change], [])])

    async def expire_through(self, sequence: int) -> None:
        """What the retention does to the oldest messages."""
        await self.store.db["messages"].delete_many(
            {"conversation_id": self.conversation_id, "sequence_number": {"$lte": sequence}}
        )


async def membership(store: Store, conversation_id: str, user_id: str) -> Membership:
    document = await store.db["memberships"].find_one({"_id": f"{conversation_id}:{user_id}"})
    return msgspec.convert(document, Membership)


class Rest:
    """HTTP calls as the administrator or a user makes them."""

    def __init__(self, client: httpx2.AsyncClient, admin_token: str) -> None:
        self.client = client
        self.admin_token = admin_token

    async def call(
        self, method: str, path: str, token: str | None, body: Any = None, **headers: str
    ) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            named["Authorization"] = f"Bearer {token}"
        return await self.client.request(method, path, json=body, headers=named)

    async def hold(
        self, method: str, path: str, token: str, body: Any, meanwhile: Callable[[], Awaitable[object]]
    ) -> httpx2.Response:
        """As `call`, but the end of the body is sent only when something else has happened."""

        async def drip() -> AsyncIterator[bytes]:
            whole = msgspec.json.encode(body)
            yield whole[:1]
            await anyio.sleep(0.3)
            await meanwhile()
            yield whole[1:]

        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        return await self.client.request(method, path, content=drip(), headers=headers)

    async def user(self, name: str) -> tuple[str, str]:
        """A new user's id and token."""
        created = await self.call("POST", "/v1/users", self.admin_token, {"name": name})
        assert created.status_code == 201, created.text
        user_id: str = created.json()["_id"]
        issued = await self.call("POST", "/v1/tokens", self.admin_token, {"user_id": user_id})
        assert issued.status_code == 201, issued.text
        return user_id, issued.json()["access_token"]

    async def group(self, token: str, *participants: str) -> str:
        """A new group's id."""
        created = await self.call(
            "POST", "/v1/conversations", token, {"type": "group", "participants": list(participants)}
        )
        assert created.status_code == 201, created.text
        conversation_id: str = created.json()["_id"]
        return conversation_id


def refusal(response: httpx2.Response) -> tuple[int, str]:
    """Status and code of an error answer, whose body has the one documented shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"code", "message"}, body
    assert response.headers["content-type"].startswith("application/json")
    return response.status_code, body["error"]["code"]
