"""Accounts over real processes: people log in by a code; a revoked device is out everywhere at once, on both gateways;
a stolen refresh token ends the session; a deleted account is gone."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from bench.http_api import Refusal
from protocol import frames, keys
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode
from tests.system.crowd import Crowd, Talker, auth, crowd, eventually, message, talker

if TYPE_CHECKING:
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]

AT_ONCE_SECONDS = 5.0
"""I18 of the reliability contract."""


class Pair(msgspec.Struct):
    """A device's tokens."""

    user_id: str
    device_id: str
    access: str
    refresh: str


async def proof(people: Crowd, phone: str) -> dict[str, str]:
    """A verification and its code, which comes as in development: from the log of the REST process."""
    begun = await say(people, "POST", "/v1/verifications", {"phone": phone})
    lines = people.house.log("rest").read_text().splitlines()
    (*_, last) = [line for line in lines if '"verification_code"' in line and phone in line]
    return {"verification_id": begun["verification_id"], "code": json.loads(last)["code"]}


async def log_in(people: Crowd, phone: str, device_id: str) -> Pair:
    body = {**await proof(people, phone), "device_id": device_id, "platform": "test", "name": "Ann"}
    login = await say(people, "POST", "/v1/sessions", body)
    return Pair(login["user"]["_id"], device_id, login["access_token"], login["refresh_token"])


async def say(people: Crowd, method: str, path: str, body: object = None, token: str = "none") -> Any:
    """What REST answers; of a refusal its code."""
    answer: Any = await people.api.call(method, path, token, body)
    return answer.code if isinstance(answer, Refusal) else answer


async def ended(talk: Talker, since: float) -> None:
    """The connection was told that it is revoked, and ended, soon enough."""
    with trio.fail_after(AT_ONCE_SECONDS):
        error: frames.AuthError = await talk.expect(frames.AuthError)
        assert error.error is AuthErrorCode.REVOKED
        assert await talk.close_code() == CloseCode.AUTH
    assert time.monotonic() - since < AT_ONCE_SECONDS


async def shut_out(people: Crowd, pair: Pair) -> None:
    """No door takes the device's token any more."""
    assert await say(people, "GET", "/v1/devices", token=pair.access) is ErrorCode.REVOKED
    for url in people.house.gateways:
        async with talker(url) as talk:
            await talk.send(auth(pair.user_id, pair.access, pair.device_id))
            error: frames.AuthError = await talk.expect(frames.AuthError)
            assert error.error is AuthErrorCode.REVOKED
            assert await talk.close_code() == CloseCode.AUTH


async def test_a_revoked_device_is_out_on_every_gateway_at_once(house: House) -> None:
    async with crowd(house, judged=False) as people:
        phone = f"+4930{time.time_ns() % 10**9:09d}"
        names = ("phone", "laptop", "tablet")
        mine, laptop, tablet = [await log_in(people, phone, name) for name in names]
        assert len({mine.user_id, laptop.user_id, tablet.user_id}) == 1
        epoll, other = house.urls["epoll"], house.urls["trio-websocket"]
        async with talker(epoll) as on_epoll, talker(other) as on_trio, talker(other) as own:
            for talk, pair in ((on_epoll, laptop), (on_trio, tablet), (own, mine)):
                await talk.log_in(pair.user_id, pair.access, pair.device_id)
            since = time.monotonic()
            assert await say(people, "DELETE", "/v1/devices?keep=current", token=mine.access) == {}
            await ended(on_epoll, since)
            await ended(on_trio, since)
            for pair in (laptop, tablet):
                await shut_out(people, pair)
            bob = await people.user()
            made = await say(people, "POST", "/v1/conversations", {"type": "1:1", "participants": [bob]}, mine.access)
            await own.send(message(made["_id"], "still-here"))
            assert (await own.expect(frames.MessageAck)).payload.sequence_number == 1
            # A second use of a refresh token: somebody else has it, so nobody keeps the session.
            body = {"refresh_token": mine.refresh}
            pair_two = await say(people, "POST", "/v1/tokens/refresh", body)
            assert set(pair_two) == {"access_token", "expires_at", "refresh_token", "refresh_expires_at"}
            since = time.monotonic()
            assert await say(people, "POST", "/v1/tokens/refresh", body) is ErrorCode.REVOKED
            await ended(own, since)
        await shut_out(people, msgspec.structs.replace(mine, access=pair_two["access_token"]))


async def test_a_deleted_account_is_gone_and_others_keep_what_it_wrote(house: House) -> None:
    async with crowd(house, judged=False) as people:
        phone = f"+4940{time.time_ns() % 10**9:09d}"
        ann = await log_in(people, phone, "phone")
        bob = await people.user()
        group = await people.api.create_conversation("group", [ann.user_id, bob], ann.access)
        direct = await people.api.create_conversation("1:1", [ann.user_id, bob], ann.access)
        async with talker(house.urls["epoll"]) as talk:
            await talk.log_in(ann.user_id, ann.access, "phone")
            await talk.send(message(direct, "k1", "remember me"))
            await talk.expect(frames.MessageAck)
            owner = await proof(people, phone)
            since = time.monotonic()
            gone = await say(people, "POST", "/v1/users/me/deletion", owner, ann.access)
            assert gone == {"user_id": ann.user_id, "finished": True}
            await ended(talk, since)
        await shut_out(people, ann)
        token = people.tokens[bob]
        assert (await say(people, "GET", f"/v1/users/{ann.user_id}", token=token))["name"] == "Deleted account"
        assert (await say(people, "GET", f"/v1/conversations/{group}", token=token))["participants"] == [bob]
        kept = await say(people, "GET", f"/v1/conversations/{direct}/messages", token=token)
        assert [item["content"] for item in kept["items"]] == ["remember me"]
        with house.redis() as client, house.database() as database:
            await eventually(lambda: not client.exists(keys.connection(ann.user_id)), "she is nowhere")
            assert phone not in str(database["users"].find_one({"_id": ann.user_id}))
        again = await log_in(people, phone, "phone")
        assert again.user_id != ann.user_id
