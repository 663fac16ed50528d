"""The query role on real Valkey and mongod: what is asked on `query` is answered on `down:{instance}`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import pytest

from protocol import codec, frames, keys, records
from protocol.errors import ErrorCode
from tests.workers.relay import open_relay
from tests.workers.seeding import Log
from workers import query
from workers.store import Store, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from workers.broker import Broker
    from workers.settings import Settings

pytestmark = pytest.mark.anyio

GATEWAY = "gw_1"


class Asker:
    """A gateway, as far as the query role can see one."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._last = b"0"
        self.entries = 0

    async def ask(self, *queries: records.Query, answers: int | None = None) -> list[records.DownItem]:
        """Publish all, then collect as many answers as there were questions."""
        for asked in queries:
            await self._broker.append_query(asked)
        items: list[records.DownItem] = []
        with anyio.fail_after(10):
            while len(items) < (len(queries) if answers is None else answers):
                for entry_id, payload in await self._broker.read_down(GATEWAY, self._last, 500):
                    self._last = entry_id
                    self.entries += 1
                    items += codec.decode_down(payload)
        return items


@asynccontextmanager
async def running(settings: Settings, store: Store, broker: Broker) -> AsyncIterator[Asker]:
    stopping = anyio.Event()
    await broker.create_down(GATEWAY)
    async with anyio.create_task_group() as group:
        group.start_soon(query.run, settings, store, broker, stopping)
        yield Asker(broker)
        stopping.set()


@pytest.fixture
async def gateway(settings: Settings, store: Store, broker: Broker) -> AsyncIterator[Asker]:
    async with running(settings, store, broker) as asker:
        yield asker


async def log_of(store: Store, messages: int) -> Log:
    log = await Log(store, "c", ["a", "b"]).create()
    await log.append(*["a"] * messages)
    return log


def frame_of(item: records.DownItem) -> frames.ServerFrame:
    assert isinstance(item, records.Reply | records.PageAnswer)
    return codec.JSON.decode_server(item.frame)


def numbers(items: Sequence[records.DownItem]) -> list[int]:
    return sorted(item.connection for item in items if isinstance(item, records.Reply | records.PageAnswer))


async def test_an_open_is_answered_with_unread_and_heads(gateway: Asker, store: Store) -> None:
    log = await log_of(store, 3)
    answers = await gateway.ask(records.OpenQuery(GATEWAY, 7, "b", "phone", {"c": 1}))
    assert answers == [records.OpenAnswer(7, 3, [records.OpenHead("c", 1, 3, log.digest)])]


async def test_a_check_of_a_good_token_is_answered_too(gateway: Asker, store: Store) -> None:
    """Or nobody could tell it from one that was lost."""
    await log_of(store, 1)
    assert await gateway.ask(records.OpenQuery(GATEWAY, 7, "b", "phone", {}, is_check=True)) == [records.TokenGood(7)]


async def test_pages_are_backlog_frames_with_the_head_on_the_last(gateway: Asker, store: Store) -> None:
    log = await log_of(store, 5)
    (first,) = await gateway.ask(records.PageQuery(GATEWAY, 7, "b", "c", 0, 3))
    assert isinstance(first, records.PageAnswer)
    assert (first.from_sequence, first.to_sequence, first.has_more) == (1, 3, True)
    payload = frame_of(first).payload  # type: ignore[union-attr]
    assert isinstance(payload, frames.MessagesPayload)
    assert (payload.origin, payload.from_sequence, payload.to_sequence, payload.has_more) == ("backlog", 1, 3, True)
    assert [message.sequence_number for message in payload.messages] == [1, 2, 3]
    (last,) = await gateway.ask(records.PageQuery(GATEWAY, 7, "b", "c", 3, 3))
    assert isinstance(last, records.PageAnswer)
    assert (last.from_sequence, last.to_sequence, last.has_more, last.digest) == (4, 5, False, log.digest)
    payload = frame_of(last).payload  # type: ignore[union-attr]
    assert isinstance(payload, frames.MessagesPayload)
    assert payload.head == frames.Head(sequence_number=5, digest=log.digest.hex())


async def test_a_page_of_nothing_has_no_frame_and_leaves_the_cursor(gateway: Asker, store: Store) -> None:
    await log_of(store, 2)
    asked = [("b", "c", 2), ("x", "c", 0), ("b", "nowhere", 4)]
    for user, conversation, after in asked:
        (answer,) = await gateway.ask(records.PageQuery(GATEWAY, 7, user, conversation, after, 10))
        assert answer == records.PageAnswer(7, conversation, after + 1, after, False, bytes(16), b"")


async def test_a_page_of_expired_entries_moves_the_cursor_and_says_so(gateway: Asker, store: Store) -> None:
    log = await log_of(store, 4)
    await log.flush()
    await log.expire_through(4)
    (answer,) = await gateway.ask(records.PageQuery(GATEWAY, 7, "b", "c", 1, 10))
    assert isinstance(answer, records.PageAnswer)
    assert (answer.from_sequence, answer.to_sequence, answer.has_more) == (2, 4, False)
    payload = frame_of(answer).payload  # type: ignore[union-attr]
    assert isinstance(payload, frames.MessagesPayload)
    assert (payload.messages, payload.expired_through) == ([], 4)


async def test_retransmit_and_history_are_answered_with_messages(gateway: Asker, store: Store) -> None:
    log = await log_of(store, 6)
    (ranged,) = await gateway.ask(records.RangeQuery(GATEWAY, 7, "b", "c", 2, 4))
    (history,) = await gateway.ask(records.HistoryQuery(GATEWAY, 8, "b", "c", 3, 10))
    for answer, connection, found in ((ranged, 7, [2, 3, 4]), (history, 8, [1, 2])):
        assert isinstance(answer, records.Reply)
        assert answer.connection == connection
        payload = frame_of(answer).payload  # type: ignore[union-attr]
        assert isinstance(payload, frames.MessagesPayload)
        assert payload.origin == "retransmit"
        assert [message.sequence_number for message in payload.messages] == found
        assert payload.head == frames.Head(sequence_number=6, digest=log.digest.hex())


async def test_a_stranger_gets_the_same_error_for_foreign_and_unknown(gateway: Asker, store: Store) -> None:
    await log_of(store, 6)
    for asked in (records.RangeQuery(GATEWAY, 7, "x", "c", 1, 2), records.HistoryQuery(GATEWAY, 7, "x", "c", 9, 5)):
        (foreign,) = await gateway.ask(asked)
        (unknown,) = await gateway.ask(type(asked)(GATEWAY, 7, "x", "d", 1, 2))
        assert isinstance(foreign, records.Reply)
        assert isinstance(unknown, records.Reply)
        error = frame_of(foreign).payload  # type: ignore[union-attr]
        assert isinstance(error, frames.ErrorPayload)
        assert (error.code, error.conversation_id) == (ErrorCode.CONVERSATION_NOT_FOUND, "c")
        assert foreign.frame.replace(b'"c"', b'"d"') == unknown.frame


async def test_the_sweep_is_answered_with_heads(gateway: Asker, store: Store) -> None:
    log = await log_of(store, 6)
    await log.flush()
    answers = await gateway.ask(records.HeadsQuery(GATEWAY, ["b", "nobody"]))
    assert answers == [records.HeadsAnswer([records.UserHead("b", "c", 6)])]


async def test_a_burst_is_answered_in_fewer_records_than_questions(
    settings: Settings, store: Store, broker: Broker
) -> None:
    await log_of(store, 3)
    await broker.read_queries("nobody", 1, 1)
    for connection in range(200):
        await broker.append_query(records.PageQuery(GATEWAY, connection, "b", "c", 0, 10))
    async with running(settings, store, broker) as asker:
        answers = await asker.ask(answers=200)
    assert numbers(answers) == list(range(200))
    assert asker.entries < 200


async def test_garbage_in_the_stream_harms_nobody_else(gateway: Asker, broker: Broker, store: Store) -> None:
    await log_of(store, 3)
    for garbage in (b"", b"\xc1", b"\x91\xa1z", codec.encode_record(["p", "gw", "seven"])):
        await broker.client.xadd(keys.QUERY, {keys.FIELD: garbage})
    answers = await gateway.ask(records.PageQuery(GATEWAY, 7, "b", "c", 0, 10))
    assert numbers(answers) == [7]


async def test_the_group_is_made_again_when_redis_came_back_empty(gateway: Asker, broker: Broker, store: Store) -> None:
    await log_of(store, 3)
    assert numbers(await gateway.ask(records.PageQuery(GATEWAY, 7, "b", "c", 0, 10))) == [7]
    await broker.client.flushall()
    await broker.create_down(GATEWAY)
    gateway._last = b"0"
    assert numbers(await gateway.ask(records.PageQuery(GATEWAY, 8, "b", "c", 0, 10))) == [8]


async def test_an_open_drops_delivered_ids_from_the_inbox(gateway: Asker, broker: Broker, store: Store) -> None:
    log = await log_of(store, 3)
    ids = [message["_id"] async for message in store.db["messages"].find().sort("sequence_number")]
    await broker.push_inbox({"b": [*ids, "msg_gone"]})
    await log.mark("b", delivered=2)
    await gateway.ask(records.OpenQuery(GATEWAY, 7, "b", "phone", {}))
    with anyio.fail_after(5):
        while await broker.read_inbox("b", 100) != ids[2:]:  # noqa: ASYNC110 - tidied after the answer
            await anyio.sleep(0.02)


async def test_while_the_store_is_away_clients_are_told_and_gateways_ask_again(
    settings: Settings, store: Store, broker: Broker
) -> None:
    await log_of(store, 3)
    server = urlsplit(settings.mongodb_url)
    assert server.port is not None
    async with open_relay(server.port) as relay:
        url = f"mongodb://127.0.0.1:{relay.port}{server.path}?directConnection=true"
        async with open_store(url) as distant, running(settings, distant, broker) as asker:
            relay.cut()
            answers = await asker.ask(
                records.OpenQuery(GATEWAY, 1, "b", "phone", {}),
                records.PageQuery(GATEWAY, 2, "b", "c", 0, 10),
                records.RangeQuery(GATEWAY, 3, "b", "c", 1, 2),
                records.HistoryQuery(GATEWAY, 4, "b", "c", 9, 5),
                answers=2,
            )
    assert numbers(answers) == [3, 4]
    for answer in answers:
        error = frame_of(answer).payload  # type: ignore[union-attr]
        assert isinstance(error, frames.ErrorPayload)
        assert (error.code, error.retryable, error.retry_after_ms) == (ErrorCode.STORAGE_UNAVAILABLE, True, 1000)


async def test_a_stop_finishes_what_is_under_way(settings: Settings, store: Store, broker: Broker) -> None:
    await log_of(store, 3)
    await broker.create_down(GATEWAY)
    stopping = anyio.Event()
    await broker.read_queries("nobody", 1, 1)
    for connection in range(20):
        await broker.append_query(records.PageQuery(GATEWAY, connection, "b", "c", 0, 10))
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(query.run, settings, store, broker, stopping)
            while not await broker.client.xlen(keys.down(GATEWAY)) > 1:  # noqa: ASYNC110 - the first answer
                await anyio.sleep(0.005)
            stopping.set()
    assert numbers(await Asker(broker).ask(answers=20)) == list(range(20))
