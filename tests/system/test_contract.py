"""The contract of protocol.md, a test per sentence, on real processes that die. C7 and C8: `test_neighbours.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from msgspec import UNSET

from protocol import frames
from tests.system.crowd import PATIENCE_SECONDS, auth, crowd, eventually, message, talker

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]


async def test_c1_all_acks_of_a_key_carry_the_same_message_id_and_sequence(house: House) -> None:
    """Three devices on two gateways send one key at once, and again after Redis has forgotten everything."""
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        acks: list[frames.MessageAck] = []

        async def send(device_id: str, url: str, times: int) -> None:
            async with talker(url) as talk:
                await talk.log_in(user_a, await people.api.create_token(user_a, device_id), device_id)
                for _ in range(times):
                    await talk.send(message(conversation_id, "the-key", "the content"))
                acks.extend([await talk.expect(frames.MessageAck, PATIENCE_SECONDS) for _ in range(times)])

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(send, f"device-{number}", house.gateways[number % 2], 10)
        house.kill("worker-1", "worker-2")
        house.forget()
        house.start("worker-1", "worker-2")
        await send("device-late", house.gateways[0], 2)

        assert len(acks) == 32
        assert {(ack.payload.message_id, ack.payload.sequence_number) for ack in acks} == {
            (acks[0].payload.message_id, 1)
        }
        assert sum(ack.payload.duplicate is not True for ack in acks) == 1
        assert house.sequences(conversation_id) == [1]
    house.wait_remembered()


@pytest.mark.parametrize("victims", [("epoll", "trio-websocket"), ("worker-1", "worker-2"), ("valkey",), ()])
async def test_c2_an_acked_message_survives(house: House, victims: tuple[str, ...]) -> None:
    """Every gateway, every worker, Redis itself by kill -9, and (no victim) all that Redis holds by FLUSHALL."""
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        sender = await people.phone(user_a)
        for number in range(20):
            with trio.fail_after(PATIENCE_SECONDS):
                assert (await sender.send(conversation_id, f"before {number}")).sequence_number == number + 1

        if victims:
            house.kill(*victims)
        if "valkey" in victims:
            house.start("valkey")
        house.forget()
        house.start(*(name for name in victims if name != "valkey"))

        assert house.sequences(conversation_id) == list(range(1, 21))
        receiver = await people.phone(user_b)
        with trio.fail_after(PATIENCE_SECONDS):
            await receiver.wait_until(lambda: conversation_id in receiver.client.logs)
            assert (await sender.send(conversation_id, "after")).sequence_number == 21
        await people.settle(conversation_id)
        assert receiver.client.logs[conversation_id].cursor == 21
    house.wait_remembered()


async def test_c3_sequences_have_no_hole_and_no_repeat_when_a_worker_dies_among_many_senders(house: House) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(12)
        phones = [await people.phone(user_id) for user_id in users]

        async def chat(number: int) -> None:
            for count in range(40):
                await phones[number].send_nowait(conversation_id, f"{number}/{count}")
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            for number in range(len(phones)):
                nursery.start_soon(chat, number)
            await trio.sleep(0.3)
            house.kill("worker-1")
            await trio.sleep(0.3)
            house.start("worker-1")
            house.kill("worker-2")
        house.start("worker-2")
        await people.settle(conversation_id)
        assert house.sequences(conversation_id) == list(range(1, 12 * 40 + 2))
        assert all(phone.client.logs[conversation_id].cursor == 12 * 40 + 1 for phone in phones)


async def test_c4_one_connection_sees_one_conversation_in_order(house: House, transport: str) -> None:
    async with crowd(house) as people:
        conversation_id, users = await people.group(6)
        phones = [await people.phone(user_id) for user_id in users[1:]]
        async with talker(house.urls[transport]) as reader:
            await reader.log_in(users[0], people.tokens[users[0]], resume={conversation_id: 1})

            async def chat(number: int) -> None:
                for count in range(60):
                    await phones[number].send_nowait(conversation_id, f"{number}/{count}")

            seen: list[int] = []
            async with trio.open_nursery() as nursery:
                for number in range(len(phones)):
                    nursery.start_soon(chat, number)
                while len(seen) < 300:
                    frame: frames.Messages = await reader.expect(frames.Messages, PATIENCE_SECONDS)
                    seen.extend(stored.sequence_number for stored in frame.payload.messages)
        assert seen == list(range(2, 302))
        await people.settle(conversation_id)


async def test_c5_devices_that_come_and_go_end_with_exactly_their_conversations(house: House) -> None:
    """Two devices of each of five people, in two groups and a 1:1 conversation; one person joins in the middle."""
    async with crowd(house) as people:
        first, users = await people.group(5)
        owner = people.tokens[users[0]]
        second = await people.api.create_conversation("group", users[:4], owner)
        direct = await people.direct(users[0], users[1])
        steady = [await people.phone(user_id, "steady") for user_id in users]
        moody = [await people.phone(user_id, "moody") for user_id in users]

        async def chat(number: int) -> None:
            for count in range(50):
                conversation_id = (first, second if number < 4 else first, direct if number < 2 else first)[count % 3]
                await steady[number].send_nowait(conversation_id, f"{number}/{count}")
                await trio.sleep(0.02)

        async def come_and_go(number: int) -> None:
            for turn in range(4):
                await moody[number].go_offline()
                await trio.sleep(0.05 + 0.05 * number)
                moody[number].go_online()
                await trio.sleep(0.1 + 0.03 * turn)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(chat, number)
                nursery.start_soon(come_and_go, number)
            await trio.sleep(0.5)
            assert await people.api.add_participants(second, [users[4]], owner) is None
        await people.settle(first, second, direct)
        for number in range(5):
            here, there = steady[number].client, moody[number].client
            assert {name: log.cursor for name, log in here.logs.items()} == {
                name: log.cursor for name, log in there.logs.items()
            }
            assert set(here.logs) == ({first, second, direct} if number < 2 else {first, second})
        await moody[0].sync()
        with trio.fail_after(PATIENCE_SECONDS):
            await moody[0].wait_until(lambda: moody[0].client.synced)
        assert first in moody[0].client.proven


async def test_c5_a_person_who_was_never_online_gets_the_whole_backlog_in_order(house: House, transport: str) -> None:
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        sender = await people.phone(user_a)
        for number in range(250):
            await sender.send_nowait(conversation_id, f"{number}")
        await people.settle(conversation_id)
        async with talker(house.urls[transport]) as late:
            await late.send(auth(user_b, people.tokens[user_b]))
            success: frames.AuthSuccess = await late.expect(frames.AuthSuccess)
            assert success.payload.unread_count == 250
            seen: list[int] = []
            while len(seen) < 250:
                page: frames.Messages = await late.expect(frames.Messages)
                assert page.payload.origin == "backlog"
                assert len(page.payload.messages) <= 100
                seen.extend(stored.sequence_number for stored in page.payload.messages)
            complete: frames.SyncComplete = await late.expect(frames.SyncComplete)
        assert seen == list(range(1, 251))
        assert complete.payload.heads[conversation_id].sequence_number == 250


async def test_c6_receipts_only_move_forward(house: House) -> None:
    """A device confirms the third message, then, late, the first; it reads the second after the third."""
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        async with talker(house.urls["epoll"]) as author, talker(house.urls["trio-websocket"]) as reader:
            await author.log_in(user_a, people.tokens[user_a])
            await reader.log_in(user_b, people.tokens[user_b])
            for number in range(1, 4):
                await author.send(message(conversation_id, f"k{number}"))
            ids = [(await author.expect(frames.MessageAck)).payload.message_id for _ in range(3)]

            await reader.send(frames.DeliveryAck(message_id=ids[2], timestamp=1))
            update: frames.ReceiptUpdate = await author.expect(frames.ReceiptUpdate)
            assert (update.payload.user_id, update.payload.delivered_through) == (user_b, 3)
            await reader.send(frames.DeliveryAck(message_id=ids[0], timestamp=1))
            await reader.send(frames.ReadReceipt(message_ids=[ids[1]], timestamp=1))
            update = await author.expect(frames.ReceiptUpdate)
            assert update.payload.read_through == 2
            assert update.payload.delivered_through in (3, UNSET)
            await reader.send(frames.ReadReceipt(message_ids=[ids[2], ids[0]], timestamp=1))
            update = await author.expect(frames.ReceiptUpdate)
            assert update.payload.read_through == 3
            await reader.send(frames.ReadReceipt(message_ids=[ids[0]], timestamp=1))
            await reader.send(frames.DeliveryAck(message_id=ids[0], timestamp=1))
            with trio.move_on_after(1.5) as quiet:
                await author.expect(frames.ReceiptUpdate)
            assert quiet.cancelled_caught

        def stored() -> tuple[int, int]:
            with house.database() as database:
                membership = database["memberships"].find_one({"_id": f"{conversation_id}:{user_b}"})
            return membership["delivered_seq"], membership["read_seq"]

        await eventually(lambda: stored() == (3, 3), "watermarks")
