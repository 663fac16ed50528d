"""Gateways go and come back under load; their clients move from one to the other and notice nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.system.crowd import Crowd, crowd, eventually

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]
SIZE = 6
DRAIN_SECONDS = 5.0
"""What the Procfile's process manager waits before it kills."""


async def chat(people: Crowd, conversation_id: str, number: int, count: int) -> None:
    for said in range(count):
        await people.phones[number].send_nowait(conversation_id, f"{number}/{said}")
        await trio.sleep(0.1)


async def drain(house: House, name: str) -> None:
    house.terminate(name)
    await eventually(lambda: not house.is_alive(name), f"the end of {name}", DRAIN_SECONDS)


async def test_clients_move_to_the_other_gateway_and_back_and_are_never_alone(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(SIZE)
        phones = [await people.phone(user_id, urls=[house.urls["epoll"]]) for user_id in users]
        async with trio.open_nursery() as nursery:
            for number in range(SIZE):
                nursery.start_soon(chat, people, conversation_id, number, 100)
            await drain(house, "epoll")
            assert {phone.url for phone in phones} == {house.urls["trio-websocket"]}
            house.start("epoll")
            await drain(house, "trio-websocket")
            assert {phone.url for phone in phones} == {house.urls["epoll"]}
            nursery.cancel_scope.cancel()
        house.start("trio-websocket")
        await people.settle(conversation_id)
        counts = people.ledger.counts
        assert (counts["migrated"], counts["closed"]) == (2 * SIZE, 0)
        assert {phone.client.connection for phone in phones} == {3}


async def test_when_all_gateways_are_stopped_at_once_everybody_comes_back_to_everything(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(SIZE)
        phones = [await people.phone(user_id) for user_id in users]
        async with trio.open_nursery() as nursery:
            for number in range(SIZE):
                nursery.start_soon(chat, people, conversation_id, number, 20)
            await trio.sleep(0.3)
            for name in house.urls:
                house.terminate(name)
            for name in house.urls:
                await eventually(lambda name=name: not house.is_alive(name), f"the end of {name}", DRAIN_SECONDS)  # type: ignore[misc]
            house.start(*house.urls)
        await people.settle(conversation_id)
        assert all(phone.client.connection > 1 for phone in phones)
