"""SIGTERM: a gateway lets its clients go elsewhere, a worker hands its shards over; nobody loses anything or waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from protocol import frames
from protocol.errors import CloseCode, Reconnect
from tests.system.crowd import PATIENCE_SECONDS, crowd, eventually, message, talker

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]
DRAIN_SECONDS = 5.0
"""What the Procfile's process manager waits before it kills."""


async def test_a_draining_gateway_ends_in_time_and_its_clients_lose_nothing(house: House, transport: str) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(6)
        phones = [await people.phone(user_id) for user_id in users]

        async def chat(number: int) -> None:
            for count in range(40):
                await phones[number].send_nowait(conversation_id, f"{number}/{count}")
                await trio.sleep(0.03)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(chat, number)
            await trio.sleep(0.4)
            house.terminate(transport)
            await eventually(lambda: not house.is_alive(transport), "the end of the gateway", DRAIN_SECONDS)
        house.start(transport)
        await people.settle(conversation_id)
        assert house.sequences(conversation_id) == list(range(1, 6 * 40 + 2))


async def test_a_draining_gateway_says_that_it_restarts(house: House, transport: str) -> None:
    async with crowd(house) as people:
        user_id = await people.user()
        async with talker(house.urls[transport]) as talk:
            await talk.log_in(user_id, people.tokens[user_id])
            house.terminate(transport)
            code = CloseCode(await talk.close_code())  # type: ignore[call-arg]
            assert code.reconnect in (Reconnect.YES, Reconnect.JITTERED)
        await eventually(lambda: not house.is_alive(transport), "the end of the gateway", DRAIN_SECONDS)
    house.start(transport)


@pytest.mark.parametrize("worker", ["worker-1", "worker-2"])
async def test_a_draining_worker_hands_its_shards_over_before_their_leases_end(house: House, worker: str) -> None:
    async with crowd(house, judged=False) as people:
        user_id = await people.user()
        others = [await people.user() for _ in range(12)]
        conversations = [await people.direct(user_id, other) for other in others]
        async with talker(house.urls["epoll"]) as talk:
            await talk.log_in(user_id, people.tokens[user_id])
            house.terminate(worker)
            started = trio.current_time()
            for number, conversation_id in enumerate(conversations):
                await talk.send(message(conversation_id, f"k{number}"))
            for _ in conversations:
                await talk.expect(frames.MessageAck, PATIENCE_SECONDS)
            assert trio.current_time() - started < 4.0
        await eventually(lambda: not house.is_alive(worker), "the end of the worker", DRAIN_SECONDS)
    house.start(worker)
