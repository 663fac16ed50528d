"""A lane's surroundings on real servers, for the tests of the ingest role: who sends, who is where, what came down."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from protocol import codec, keys, records
from protocol.media import MediaKind, MediaMetadata, MediaStatus, url_of
from protocol.models import ConnectionRegistry, ConversationType, MessageType, StoredMessage
from workers.consumer import BLOCK_MS, Lane
from workers.delivery import Registry
from workers.interest import Interest
from workers.store.logs import Excerpt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from protocol.errors import ErrorCode
    from workers.broker import Broker
    from workers.store import Store

SHARDS = 4
INSTANCE = "gw-test"


def shown(frame: bytes) -> Any:
    """The payload of a frame as a client decodes it."""
    decoded: Any = codec.JSON.decode_server(frame)
    return decoded.payload


class Yard:
    """One instance's view: it puts records into shards and reads what comes down."""

    def __init__(self, store: Store, broker: Broker) -> None:
        self.store = store
        self.broker = broker
        self._last_down = b"0"
        self.down: list[records.DownItem] = []
        self.interest = Interest()
        self.updates: list[tuple[list[str], Any]] = []
        """(users, payload) of the `conversation_update` frames about conversations, which nobody has to wait for."""

    async def open(self) -> None:
        await self.broker.agree_shards(SHARDS)
        await self.broker.create_down(INSTANCE)
        await self.broker.renew_instance(INSTANCE, records.InstanceInfo("gateway", "", 0, draining=False))
        await self.broker.client.expire(keys.instance(INSTANCE), 120)  # nobody renews it
        await self.broker.create_ingest_groups(range(SHARDS))

    async def connect(self, *user_ids: str) -> None:
        """These users have one device here."""
        for user_id in user_ids:
            value = codec.encode_value(ConnectionRegistry(instance_id=INSTANCE, connection_id="1", timestamp=1))
            await self.broker.client.hset(keys.connection(user_id), "d1", value)

    async def put(self, record: records.IngestRecord, conversation_id: str) -> None:
        await self.broker.append_ingest(keys.shard_of(conversation_id, SHARDS), record)

    async def send(
        self,
        conversation_id: str,
        sender_id: str,
        key: str,
        content: str = "hello",
        connection: int = 7,
        **changes: object,
    ) -> None:
        fields = {
            "instance": INSTANCE,
            "connection": connection,
            "sender_id": sender_id,
            "device_id": "d1",
            "conversation_id": conversation_id,
            "client_message_id": f"c-{key}",
            "idempotency_key": key,
            "receiver_id": "",
            "content": content,
            "message_type": MessageType.TEXT,
            "media_url": None,
            "reply_to_message_id": None,
            "timestamp": 1_700_000_000_000,
        }
        await self.put(records.SendMessage(**{**fields, **changes}), conversation_id)  # type: ignore[arg-type]

    async def upload(self, owner: str, kind: MediaKind = MediaKind.IMAGE) -> str:
        """A finished upload; its url."""
        now = datetime.now(UTC)
        media = MediaMetadata(
            media_id=keys.new_id("med", 1, secrets.randbits(64)),
            owner_id=owner,
            kind=kind,
            content_type="application/octet-stream",
            size_bytes=1,
            sha256="0" * 64,
            status=MediaStatus.READY,
            created_at=now,
            due_at=now + timedelta(days=1),
            expires_at=now + timedelta(days=90),
        )
        assert await self.store.media.begin(media, 2**30)
        return url_of(media.media_id)

    async def create(
        self, *participants: str, kind: ConversationType = ConversationType.ONE_TO_ONE, agent_id: str = ""
    ) -> str:
        """Ask for a conversation; returns its id at once."""
        if kind is ConversationType.ONE_TO_ONE:
            conversation_id = keys.direct_conversation_id(*participants)
        else:
            conversation_id = f"conv_group_of_{participants[0]}"
        record = records.CreateConversation(
            INSTANCE,
            "create",
            f"create:{conversation_id}",
            conversation_id,
            kind,
            participants[0],
            list(participants),
            agent_id,
        )
        await self.put(record, conversation_id)
        return conversation_id

    async def add(self, conversation_id: str, actor: str, *user_ids: str, request: str = "add") -> None:
        record = records.AddParticipants(INSTANCE, request, f"cmd-{request}", conversation_id, actor, list(user_ids))
        await self.put(record, conversation_id)

    async def remove(self, conversation_id: str, actor: str, user_id: str, request: str = "remove") -> None:
        record = records.RemoveParticipant(INSTANCE, request, f"cmd-{request}", conversation_id, actor, user_id)
        await self.put(record, conversation_id)

    async def change(
        self,
        conversation_id: str,
        sender_id: str,
        key: str,
        message_id: str,
        change: records.Edit | records.Delete | records.React,
        request: str = "",
    ) -> None:
        record = records.ChangeMessage(
            INSTANCE, 7, request, sender_id, "d1", conversation_id, f"c-{key}", key, message_id, change
        )
        await self.put(record, conversation_id)

    async def command(self, conversation_id: str, actor: str, change: Any, request: str) -> None:
        record = records.ChangeConversation(INSTANCE, request, f"cmd-{request}", conversation_id, actor, change)
        await self.put(record, conversation_id)

    async def decided(self, conversation_id: str, actor: str, change: Any, request: str) -> ErrorCode | None:
        """Ask for a change of a conversation and wait: its code, None where it happened."""
        await self.command(conversation_id, actor, change, request)
        (outcome,) = await self.next_down(records.CommandOutcome, 1)
        assert outcome.request == request
        code: ErrorCode | None = outcome.code
        return code

    async def said(
        self, conversation_id: str, sender_id: str, key: str, content: str = "hello", **changes: object
    ) -> str:
        """Send and wait for the ack: the message's id."""
        await self.send(conversation_id, sender_id, key, content, **changes)  # type: ignore[arg-type]
        (ack,) = await self.acks(1)
        assert ack["type"] == "message_ack", ack
        message_id: str = ack["payload"]["message_id"]
        return message_id

    async def changed(
        self,
        conversation_id: str,
        sender_id: str,
        key: str,
        message_id: str,
        change: records.Edit | records.Delete | records.React,
    ) -> dict[str, Any]:
        """Change a message and wait: the payload of the ack or the error."""
        await self.change(conversation_id, sender_id, key, message_id, change)
        (answer,) = await self.acks(1)
        payload: dict[str, Any] = answer["payload"]
        return payload

    async def stored(self, message_id: str) -> dict[str, Any]:
        document = await self.store.db["messages"].find_one({"_id": message_id})
        assert document is not None
        return document

    async def seen(self, user_id: str, conversation_id: str) -> dict[str, StoredMessage]:
        """The log as this user pages it, by message id."""
        page = await self.store.logs.page(user_id, conversation_id, 0, 100)
        assert isinstance(page, Excerpt)
        return {str(message.message_id): message for message in page.messages}

    async def hide(self, user_id: str, *conversation_ids: str, hides: bool = True) -> None:
        """The account hides what it reads, or no longer, and the owners of these are told to look."""
        await self.store.db["users"].update_one(
            {"_id": user_id}, {"$set": {"privacy.read_receipts": not hides}}, upsert=True
        )
        for conversation_id in conversation_ids:
            await self.look(conversation_id, user_id)

    async def block(self, user_id: str, other_id: str, *, blocks: bool = True) -> None:
        """Put a block or lift it, and tell the owner to look."""
        if blocks:
            await self.store.blocks.block(user_id, other_id, datetime.now(UTC))
        else:
            await self.store.blocks.unblock(user_id, other_id, datetime.now(UTC))
        await self.look(keys.direct_conversation_id(user_id, other_id), user_id)

    async def look(self, conversation_id: str, user_id: str) -> None:
        await self.put(records.LookAtAccount("", "", conversation_id, user_id), conversation_id)

    async def delivered(self, message_id: str, user_id: str, device_id: str = "d1") -> None:
        shard = keys.shard_of_message(message_id, SHARDS)
        assert shard is not None
        mark = records.DeliveredMark(user_id, device_id, message_id)
        await self.broker.append_ingest(shard, records.Receipts([mark], []))

    async def read(self, message_id: str, user_id: str) -> None:
        shard = keys.shard_of_message(message_id, SHARDS)
        assert shard is not None
        mark = records.ReadMark(user_id, "d1", [message_id])
        await self.broker.append_ingest(shard, records.Receipts([], [mark]))

    async def next_down(self, wanted: type | tuple[type, ...], count: int, seconds: float = 5.0) -> list[Any]:
        """The next `count` items of these kinds, in order; the others stay in `down`."""
        found: list[Any] = []
        with anyio.fail_after(seconds):
            while True:
                for item in list(self.down):
                    if len(found) < count and isinstance(item, wanted):
                        self.down.remove(item)
                        found.append(item)
                if len(found) == count:
                    return found
                for entry_id, payload in await self.broker.read_down(INSTANCE, self._last_down, 200):
                    self._last_down = entry_id
                    self._sort_in(codec.decode_down(payload))

    def _sort_in(self, items: list[records.DownItem]) -> None:
        for item in items:
            payload = shown(item.frame) if isinstance(item, records.Notice) else None
            if isinstance(item, records.Notice) and getattr(payload, "event", "read") in (
                "created",
                "updated",
                "removed",
            ):
                self.updates.append((item.users, payload))
            else:
                self.down.append(item)

    async def acks(self, count: int) -> list[dict[str, Any]]:
        """Frames of the next outcomes, decoded loosely."""

        return [msgspec.json.decode(item.frame) for item in await self.next_down(records.Outcome, count)]

    async def log(self, conversation_id: str) -> list[dict[str, Any]]:
        """The stored log, in order."""
        cursor = self.store.db["messages"].find({"conversation_id": conversation_id}).sort("sequence_number", 1)
        return [document async for document in cursor]


@asynccontextmanager
async def run_lane(
    yard: Yard,
    shards: frozenset[int] = frozenset(range(SHARDS)),
    edit_seconds: int = 3600,
    *,
    batch: int = 500,
    conversations: int = 20_000,
    push_after_ms: int = 3000,
) -> AsyncIterator[Lane]:
    """A lane at work on these shards until the block ends, then stopped cleanly."""
    registry = Registry(yard.broker)
    lane = Lane(
        yard.store,
        yard.broker,
        registry,
        batch,
        SHARDS,
        edit_seconds,
        yard.interest,
        conversations=conversations,
        push_after_ms=push_after_ms,
    )
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(registry.run)
        async with anyio.create_task_group() as lanes:
            lanes.start_soon(lane.run, stopping)
            lane.set_shards(shards)
            yield lane
            stopping.set()
        group.cancel_scope.cancel()


@asynccontextmanager
async def crashing_lane(yard: Yard, edit_seconds: int = 3600) -> AsyncIterator[Lane]:
    """A lane that is cut off where it stands when the block ends, as by kill -9."""
    registry = Registry(yard.broker)
    lane = Lane(yard.store, yard.broker, registry, 500, SHARDS, edit_seconds, yard.interest)
    async with anyio.create_task_group() as group:
        group.start_soon(registry.run)
        group.start_soon(lane.run, anyio.Event())
        lane.set_shards(frozenset(range(SHARDS)))
        yield lane
        group.cancel_scope.cancel()


async def lose_its_lease(lane: Lane) -> None:
    """Others may own its shards from here on, and it reads no more; what it is at, it goes on with."""
    lane.set_shards(frozenset())
    await anyio.sleep(BLOCK_MS / 1000 + 0.05)


async def settled(yard: Yard) -> bool:
    """Every entry of every shard has been read and acknowledged."""
    for shard in range(SHARDS):
        stream = await yard.broker.client.xinfo_stream(keys.ingest(shard))
        (group,) = await yard.broker.client.xinfo_groups(keys.ingest(shard))
        if group["pending"] or group["last-delivered-id"] != stream["last-generated-id"]:
            return False
    return True


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    with anyio.fail_after(seconds):
        while not await check():  # noqa: ASYNC110 - the servers tell nobody
            await anyio.sleep(0.05)
