"""The people of a system test: phones on real connections, judged by the ledger; and a client without manners."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from bench.http_api import HttpApi
from bench.ledger import Ledger
from bench.phone import Phone, open_stream, open_websocket, wall_ms
from protocol import codec, frames
from protocol.models import MessagePayload, MessageType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from protocol.codec import FrameCodec
    from tests.system.house import House

PATIENCE_SECONDS: Final = 40.0
"""For what must happen by itself: the contract's 30 s of C8 and something for a busy machine."""


class Crowd:
    """Phones, their users and conversations. `settle` waits until all is said and known; then `check` judges."""

    def __init__(self, house: House, api: HttpApi, nursery: trio.Nursery) -> None:
        self.house = house
        self.api = api
        self.ledger = Ledger()
        self.phones: list[Phone] = []
        self.tokens: dict[str, str] = {}
        self._nursery = nursery

    async def user(self) -> str:
        """A new user with a token for the API."""
        user_id = await self.api.create_user("somebody")
        self.tokens[user_id] = await self.api.create_token(user_id, "phone-1")
        return user_id

    async def phone(self, user_id: str, device_id: str = "phone-1", urls: list[str] | None = None) -> Phone:
        """A device of this user, online and with its backlog."""
        phone = await self.phone_offline(user_id, device_id, urls)
        phone.go_online()
        with trio.fail_after(PATIENCE_SECONDS):
            await phone.wait_online()
        return phone

    async def phone_offline(self, user_id: str, device_id: str = "phone-1", urls: list[str] | None = None) -> Phone:
        """A device of this user that has never been online."""
        token = await self.api.create_token(user_id, device_id)
        seed = len(self.phones)
        phone = Phone(urls or self.house.gateways, user_id, device_id, token, self.ledger.record, seed=seed)
        await phone.go_offline()
        self.phones.append(phone)
        self._nursery.start_soon(phone.run)
        return phone

    async def direct(self, user_a: str, user_b: str) -> str:
        conversation_id = await self.api.create_conversation("1:1", [user_a, user_b], self.tokens[user_a])
        self.ledger.declare_direct(conversation_id, (user_a, user_b))
        return conversation_id

    async def pair(self) -> tuple[str, Phone, Phone]:
        """A new 1:1 conversation and a phone, online, for each of the two."""
        user_a, user_b = await self.user(), await self.user()
        conversation_id = await self.direct(user_a, user_b)
        return conversation_id, await self.phone(user_a), await self.phone(user_b)

    async def group(self, size: int) -> tuple[str, list[str]]:
        """A new group of new users, the first of them its owner."""
        users = [await self.user() for _ in range(size)]
        conversation_id = await self.api.create_conversation("group", users, self.tokens[users[0]])
        return conversation_id, users

    async def settle(self, *conversation_ids: str) -> None:
        """Until no send is undecided and every phone of these conversations that is on holds all of them."""
        with trio.fail_after(PATIENCE_SECONDS):
            while not self._is_settled(conversation_ids):  # noqa: ASYNC110 - it depends on many phones
                await trio.sleep(0.05)

    def _is_settled(self, conversation_ids: Iterable[str]) -> bool:
        if any(phone.client.pending for phone in self.phones):
            return False
        for conversation_id in conversation_ids:
            head = self.ledger.head(conversation_id)
            for phone in self.phones:
                log = phone.client.logs.get(conversation_id)
                if phone.wanted and log is not None and (log.cursor != head or log.ahead):
                    return False
        return all(phone.online and phone.client.synced for phone in self.phones if phone.wanted)

    def check(self) -> None:
        violations = self.ledger.verdict()
        assert violations == [], "\n".join(str(violation) for violation in violations[:10])


@asynccontextmanager
async def crowd(house: House, *, judged: bool = True) -> AsyncIterator[Crowd]:
    """Phones end with the block; the ledger's verdict is part of leaving it in peace.

    Not `judged`: a talker speaks in conversations of the phones, and the ledger would call what it sends invented.
    """
    async with HttpApi(house.rest_url, house.stack.admin_token) as api, trio.open_nursery() as nursery:
        people = Crowd(house, api, nursery)
        yield people
        if judged:
            people.check()
        nursery.cancel_scope.cancel()


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Poll until the condition holds, while the phones go on."""
    with trio.move_on_after(seconds):
        while not condition():  # noqa: ASYNC110 - it happens in another process
            await trio.sleep(0.05)
        return
    raise AssertionError(f"{what}: not within {seconds} s")


class Talker:
    """A connection without manners: it sends what it is given and shows what comes back."""

    def __init__(self, socket: WebSocketConnection, frame_codec: FrameCodec) -> None:
        self.socket = socket
        self.codec = frame_codec

    async def send(self, frame: frames.ClientFrame | dict[str, Any]) -> None:
        await self.send_bytes(self.codec.encode(frame))

    async def send_bytes(self, data: bytes) -> None:
        """In one data frame of the codec's kind."""
        await self.socket.send_message(data if self.codec.binary else data.decode("utf-8", "surrogatepass"))

    async def receive(self, seconds: float = 10.0) -> frames.ServerFrame:
        with trio.fail_after(seconds):
            return self.codec.decode_server(await self.socket.get_message())

    async def expect(self, kind: type[msgspec.Struct], seconds: float = 10.0) -> Any:
        """The next frame of this kind; others are passed over."""
        with trio.fail_after(seconds):
            while True:
                frame = await self.receive(seconds)
                if isinstance(frame, kind):
                    return frame

    async def log_in(
        self, user_id: str, token: str, device_id: str = "phone-1", resume: dict[str, int] | None = None
    ) -> frames.AuthSuccess:
        await self.send(auth(user_id, token, device_id, resume))
        success: frames.AuthSuccess = await self.expect(frames.AuthSuccess, 20.0)
        await self.expect(frames.SyncComplete, 20.0)
        return success

    async def close_code(self, seconds: float = 10.0) -> int:
        """How the server ends this connection; frames that still come are passed over."""
        with trio.fail_after(seconds):
            while True:
                try:
                    await self.socket.get_message()
                except ConnectionClosed as closed:
                    return int(closed.reason.code) if closed.reason is not None else 1006


@asynccontextmanager
async def talker(url: str, frame_codec: FrameCodec = codec.JSON) -> AsyncIterator[Talker]:
    """A WebSocket connection that has said nothing yet."""
    stream = await open_stream(url)
    async with stream, trio.open_nursery() as nursery:
        with trio.fail_after(10):
            socket = await open_websocket(nursery, stream, url, frame_codec.subprotocol)
        yield Talker(socket, frame_codec)
        with trio.move_on_after(3):
            await socket.aclose()
        nursery.cancel_scope.cancel()


def auth(user_id: str, token: str, device_id: str = "phone-1", resume: dict[str, int] | None = None) -> frames.Auth:
    return frames.Auth(
        payload=frames.AuthPayload(
            user_id=user_id,
            auth_token=token,
            device_id=device_id,
            platform="test",
            app_version="1",
            resume=msgspec.UNSET if resume is None else resume,
        )
    )


def message(conversation_id: str, key: str, content: str = "hello", **payload: Any) -> frames.Message:
    return frames.Message(
        client_message_id=f"c-{key}"[:64],
        idempotency_key=key,
        payload=MessagePayload(
            conversation_id=conversation_id,
            content=content,
            message_type=payload.pop("message_type", MessageType.TEXT),
            timestamp=wall_ms(),
            **payload,
        ),
    )
