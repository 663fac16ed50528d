"""Role `query`: reads of MongoDB for the gateways: where a user stands, backlog, ranges, history, heads.

Any number of processes share the work through one consumer group. Nothing is acknowledged: a query that dies with its
worker is asked again by the gateway (pages, opens) or by the client (retransmit, history). Answers that come together
for one instance travel in one down record.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, assert_never

import anyio
import anyio.abc
import msgspec
import structlog

from protocol import codec, frames, records
from protocol.errors import AuthErrorCode, ErrorCode
from workers import metrics, presence
from workers.breaker import Breakers, guarding
from workers.broker import Broker, BrokerUnavailable
from workers.revocation import is_good, moment
from workers.store.errors import StoreUnavailable
from workers.store.logs import Excerpt, NotVisible

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from workers.settings import Settings
    from workers.store import Store

_BLOCK_MS: Final = 500
"""Longest wait for a first query; also how soon a stop is seen."""
_QUERY_SECONDS: Final = 4.0
"""Below the gateway's 5 s for a page: later than that nobody waits for the answer."""
ANSWERS: Final = 1000
"""Answers waiting to be published; when full, reads wait for Redis."""
_ANSWERS_AT_ONCE: Final = 100
_RETRY_AFTER_MS: Final = 1000
_FIRST_RETRY_SECONDS: Final = 0.1
_LONGEST_RETRY_SECONDS: Final = 2.0
_NOTE_SECONDS: Final = 3600
_INBOX_LOOK: Final = 200
"""Inbox ids checked per open; an inbox longer than that shrinks over several."""

Answer = tuple[str, records.DownItem]

log = structlog.get_logger(__name__)


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Answer queries until `stopping`; those under way are finished. At most `settings.queries` at once.

    *Cancellation*: drops what is under way; it is asked again.
    """
    consumer = f"worker-{os.getpid()}"
    answers_in, answers_out = anyio.create_memory_object_stream[Answer](ANSWERS)
    metrics.ANSWERS_WAITING.set_function(lambda: answers_in.statistics().current_buffer_used)
    role = QueryRole(store, broker, settings.queries, settings.devices_per_account)
    async with anyio.create_task_group() as group:
        group.start_soon(publish_answers, broker, answers_out, name="query answers")
        async with answers_in:
            await role.serve(consumer, answers_in, stopping)


class QueryRole:
    """Reads queries as far as there is room, one task per query under way."""

    def __init__(self, store: Store, broker: Broker, at_once: int, devices_per_account: int = 32) -> None:
        self._store = store
        self._devices = devices_per_account
        self._broker = broker
        self._breakers = Breakers(store.breaker, broker.breaker)
        self._room = anyio.Semaphore(at_once, max_value=at_once)

    async def serve(self, consumer: str, answers: MemoryObjectSendStream[Answer], stopping: anyio.Event) -> None:
        """Read and answer until `stopping`, then finish what is under way."""
        delay = _FIRST_RETRY_SECONDS
        async with anyio.create_task_group() as group:
            while not stopping.is_set():
                await self._room.acquire()
                room = self._room.value + 1
                self._room.release()
                try:
                    payloads = await self._broker.read_queries(consumer, room, _BLOCK_MS)
                except BrokerUnavailable as error:
                    log.warning("queries_unreadable", error=str(error))
                    await anyio.sleep(delay)
                    delay = min(delay * 2, _LONGEST_RETRY_SECONDS)
                    continue
                delay = _FIRST_RETRY_SECONDS
                for payload in payloads:
                    await self._room.acquire()
                    group.start_soon(self._answer, payload, answers, name="query")

    async def _answer(self, payload: bytes, answers: MemoryObjectSendStream[Answer]) -> None:
        """The record boundary: whatever goes wrong with one query stays with it."""
        kind, outcome = "unreadable", "failed"
        started = time.perf_counter()
        try:
            with metrics.QUERIES_UNDER_WAY.track_inprogress():
                query = codec.decode_query(payload)
                kind = type(query).__name__
                item, outcome = await self._item(query)
                if item is not None:
                    await answers.send((query.instance, item))
                if isinstance(query, records.OpenQuery) and outcome == "answered":
                    await self._tidy_inbox(query.user_id)
                    await self._note_device(query)
        except msgspec.DecodeError as error:
            log.error("query_unreadable", error=str(error), size_bytes=len(payload))
        except Exception:
            log.exception("query_failed", kind=kind)
        finally:
            self._room.release()
            metrics.QUERIES.labels(kind, outcome).inc()
            metrics.QUERY_SECONDS.labels(kind).observe(time.perf_counter() - started)

    async def _item(self, query: records.Query) -> tuple[records.DownItem | None, str]:
        try:
            with guarding(self._breakers), anyio.fail_after(_QUERY_SECONDS):
                if isinstance(query, records.OpenQuery) and not await is_good(
                    self._store, self._broker, query.user_id, query.device_id, query.issued_ms
                ):
                    return records.OpenAnswer(query.connection, 0, [], AuthErrorCode.REVOKED), "revoked"
                if isinstance(query, records.OpenQuery) and query.is_check:
                    return records.TokenGood(query.connection), "checked"
                return await _answer_query(self._store, self._broker, query), "answered"
        except (BrokerUnavailable, StoreUnavailable, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self._breakers.mongodb.failed()  # it was cancelled before it could say so
            log.warning("query_unanswered", kind=type(query).__name__, error=str(error))
            return _unanswered(query), "unavailable"

    async def _tidy_inbox(self, user_id: str) -> None:
        """Drop inbox ids that were delivered since. Losing this costs nothing: the log is the truth."""
        try:
            with anyio.move_on_after(_QUERY_SECONDS):
                waiting = await self._broker.read_inbox(user_id, _INBOX_LOOK)
                if not waiting:
                    return
                delivered = await self._store.logs.delivered_ids(user_id, waiting)
                if delivered:
                    await self._broker.drop_from_inbox({user_id: delivered})
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("inbox_untidied", error=str(error))

    async def _note_device(self, query: records.OpenQuery) -> None:
        """Write down that the device and its user were here, once an hour."""
        try:
            with anyio.move_on_after(_QUERY_SECONDS):
                device = f"{query.user_id}:{query.device_id}"
                if not await self._broker.spend("device_seen", device, 1, _NOTE_SECONDS):
                    now, issued = moment(_now_ms()), moment(query.issued_ms)
                    await self._store.devices.seen(query.user_id, query.device_id, self._devices, issued, now)
                    await self._store.users.seen(query.user_id, now)
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("device_unnoted", error=str(error))


def _now_ms() -> int:
    """Epoch milliseconds: the one place where this role reads the clock."""
    return time.time_ns() // 1_000_000


async def publish_answers(broker: Broker, answers: MemoryObjectReceiveStream[Answer]) -> None:
    """Publish answers until their stream ends: whatever has gathered for one instance in one record, in order."""
    async with answers:
        async for first in answers:
            gathered: dict[str, list[records.DownItem]] = {first[0]: [first[1]]}
            for _ in range(_ANSWERS_AT_ONCE - 1):
                try:
                    instance, item = answers.receive_nowait()
                except (anyio.WouldBlock, anyio.EndOfStream):
                    break
                gathered.setdefault(instance, []).append(item)
            for instance, items in gathered.items():
                try:
                    await broker.publish_down(instance, items)
                except BrokerUnavailable as error:
                    log.warning("answers_lost", answers=len(items), error=str(error))


async def _answer_query(store: Store, broker: Broker, query: records.Query) -> records.DownItem | None:
    match query:
        case records.OpenQuery():
            unread, heads = await store.heads.open_heads(query.user_id, query.device_id, query.cursors, _now_ms())
            return records.OpenAnswer(query.connection, unread, heads)
        case records.PageQuery():
            page = await store.logs.page(query.user_id, query.conversation_id, query.after_sequence, query.limit)
            return _page_answer(query, page)
        case records.RangeQuery():
            found = await store.logs.retransmit(
                query.user_id, query.conversation_id, query.from_sequence, query.to_sequence
            )
            return records.Reply(query.connection, _reply_frame(query.conversation_id, found, "retransmit"))
        case records.HistoryQuery():
            found = await store.logs.history(query.user_id, query.conversation_id, query.before_sequence, query.limit)
            return records.Reply(query.connection, _reply_frame(query.conversation_id, found, "history"))
        case records.HeadsQuery():
            return records.HeadsAnswer(await store.heads.sweep_heads(query.user_ids, _now_ms()))
        case records.PresenceQuery():
            return await presence.look(store, broker, query)
        case _:
            assert_never(query)


def _unanswered(query: records.Query) -> records.DownItem | None:
    """A client that asked is told; the gateway's own questions it repeats by itself."""
    match query:
        case records.RangeQuery():
            tag = "retransmit"
        case records.HistoryQuery():
            tag = "history"
        case _:
            return None
    frame = frames.error_frame(
        ErrorCode.STORAGE_UNAVAILABLE,
        "the log cannot be read now",
        conversation_id=query.conversation_id,
        retry_after_ms=_RETRY_AFTER_MS,
        in_reply_to=tag,
    )
    return records.Reply(query.connection, codec.JSON.encode(frame))


def _page_answer(query: records.PageQuery, page: Excerpt | NotVisible) -> records.PageAnswer:
    """Not visible (any more): nothing, and no more of it; the cursor stays."""
    after = query.after_sequence
    if isinstance(page, NotVisible):
        return records.PageAnswer(query.connection, query.conversation_id, after + 1, after, False, bytes(16), b"")
    frame = b""
    if page.messages or page.expired_through is not None:
        frame = codec.JSON.encode(_messages_frame(query.conversation_id, page, "backlog", with_head=not page.has_more))
    return records.PageAnswer(
        query.connection,
        query.conversation_id,
        page.from_sequence,
        page.to_sequence,
        page.has_more,
        page.digest,
        frame,
    )


def _reply_frame(conversation_id: str, found: Excerpt | NotVisible, tag: str) -> bytes:
    if isinstance(found, NotVisible):
        return codec.JSON.encode(
            frames.error_frame(
                ErrorCode.CONVERSATION_NOT_FOUND,
                "no such conversation",
                conversation_id=conversation_id,
                in_reply_to=tag,
            )
        )
    return codec.JSON.encode(_messages_frame(conversation_id, found, "retransmit", with_head=True))


def _messages_frame(conversation_id: str, found: Excerpt, origin: str, *, with_head: bool) -> frames.Messages:
    head: frames.Head | msgspec.UnsetType = msgspec.UNSET
    if with_head:
        head = frames.Head(sequence_number=found.head_sequence, digest=found.head_digest.hex())
    return frames.Messages(
        payload=frames.MessagesPayload(
            conversation_id=conversation_id,
            messages=found.messages,
            origin=origin,
            from_sequence=found.from_sequence,
            to_sequence=found.to_sequence,
            expired_through=msgspec.UNSET if found.expired_through is None else found.expired_through,
            has_more=True if found.has_more else msgspec.UNSET,
            head=head,
        )
    )
