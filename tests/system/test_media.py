"""Media over real processes and a real S3 store: a file of 200 MB between two people, and a third who gets nothing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio

from bench.http_api import HttpApi, Refusal
from bench.object_store import run_store
from bench.stack import run_stack
from protocol import frames
from protocol.errors import ErrorCode
from protocol.models import MessageType
from tests.system.crowd import message, talker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.stack import Stack

pytestmark = [pytest.mark.trio, pytest.mark.slow]

SIZE = 200 * 1000 * 1000
UPLOADS_AT_ONCE = 4


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with run_store(tmp_path) as url, run_stack(settings={"TRIREME_S3_URL": url}) as running:
        yield running


def content(number: int, size: int) -> bytes:
    """One part: every one of them is different."""
    return hashlib.sha256(str(number).encode()).digest() * (size // 32 + 1)


async def put_parts(parts: list[dict[str, Any]]) -> None:
    room = trio.CapacityLimiter(UPLOADS_AT_ONCE)

    async def put(part: dict[str, Any]) -> None:
        async with room:
            body = content(part["number"], part["size_bytes"])[: part["size_bytes"]]
            answer = await client.put(part["url"], content=body)
            assert answer.status_code == 200, answer.text

    async with httpx2.AsyncClient(timeout=60) as client, trio.open_nursery() as nursery:
        for part in parts:
            nursery.start_soon(put, part)


async def digest_of(url: str) -> tuple[int, str]:
    """(bytes, SHA-256) of what is fetched there."""
    total, found = 0, hashlib.sha256()
    async with httpx2.AsyncClient(timeout=60) as client, client.stream("GET", url) as answer:
        assert answer.status_code == 200
        async for piece in answer.aiter_bytes():
            total += len(piece)
            found.update(piece)
    return total, found.hexdigest()


async def test_200_mb_go_from_one_to_another_and_a_third_is_refused(stack: Stack) -> None:
    async with HttpApi(stack.rest_url, stack.admin_token) as api:
        ann, bob, cat = [await api.create_user(name) for name in ("Ann", "Bob", "Cat")]
        tokens = {user: await api.create_token(user, "phone-1") for user in (ann, bob, cat)}
        conversation = await api.create_conversation("1:1", [ann, bob], tokens[ann])

        part_bytes = 16 * 2**20
        sizes = [min(part_bytes, SIZE - at) for at in range(0, SIZE, part_bytes)]
        whole = hashlib.sha256()
        for number, size in enumerate(sizes, 1):
            whole.update(content(number, size)[:size])
        declared = {"kind": "video", "content_type": "video/mp4", "size_bytes": SIZE, "sha256": whole.hexdigest()}
        begun: Any = await api.call("POST", "/v1/media", tokens[ann], declared)
        assert [part["size_bytes"] for part in begun["upload"]["parts"]] == sizes
        await put_parts(begun["upload"]["parts"])
        path = f"/v1/media/{begun['media_id']}"
        ended: Any = await api.call("POST", f"{path}/complete", tokens[ann])
        assert ended["status"] == "ready"

        async with talker(stack.ws_urls[0]) as anns, talker(stack.ws_urls[0]) as bobs:
            await anns.log_in(ann, tokens[ann])
            await bobs.log_in(bob, tokens[bob])
            await anns.send(
                message(conversation, "k1", "", message_type=MessageType.VIDEO, media_url=ended["media_url"])
            )
            await anns.expect(frames.MessageAck)
            pushed: frames.Messages = await bobs.expect(frames.Messages)
            (arrived,) = pushed.payload.messages
        assert arrived.media_url == path

        for user in (ann, bob):
            found: Any = await api.call("GET", path, tokens[user])
            assert await digest_of(found["url"]) == (SIZE, whole.hexdigest())
        refused = await api.call("GET", path, tokens[cat])
        assert isinstance(refused, Refusal)
        assert (refused.status, refused.code) == (404, ErrorCode.NOT_FOUND)
