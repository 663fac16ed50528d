"""The webhook that delivers codes: signed, tried three times, never led elsewhere, and spared while it is down."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio
import anyio.abc
import msgspec
import pytest
from structlog.testing import capture_logs

from protocol import webhooks
from workers.senders import SendFailed, open_sender
from workers.store.verifications import Target

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers import senders
    from workers.settings import Settings

pytestmark = pytest.mark.anyio

KEY = b"k" * 32
SECRET = "whsec_" + base64.b64encode(KEY).decode()
ANN = Target("phone", "+49301234567")
END = datetime(2026, 11, 22, 12, 10, tzinfo=UTC)


class Hook:
    """An HTTP server that answers with these statuses in turn, the last one for ever; 0 hangs up."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.url = ""

    async def serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            self.url = f"http://127.0.0.1:{port}/codes"
            task_status.started()
            await listener.serve(self._answer)

    async def _answer(self, client: anyio.abc.SocketStream) -> None:
        async with client:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await client.receive()
            head, _, body = data.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")[1:]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            while len(body) < int(headers["content-length"]):
                body += await client.receive()
            self.requests.append((headers, body))
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            if status:
                where = f"Location: {self.url}\r\n" if status == 307 else ""
                await client.send(
                    f"HTTP/1.1 {status} x\r\n{where}Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )


@asynccontextmanager
async def hooked(settings: Settings, *statuses: int) -> AsyncIterator[tuple[Hook, senders.Sender]]:
    hook = Hook(*statuses)
    async with anyio.create_task_group() as group:
        await group.start(hook.serve)
        chosen = msgspec.structs.replace(
            settings,
            verification_sender="webhook",
            verification_webhook_url=hook.url,
            verification_webhook_secret=SECRET,
        )
        async with open_sender(chosen) as sender:
            yield hook, sender
        group.cancel_scope.cancel()


async def test_a_code_is_posted_with_a_signature_that_verifies(settings: Settings) -> None:
    with capture_logs() as lines:
        async with hooked(settings, 204) as (hook, sender):
            await sender.send(ANN, "123456", END)
    ((headers, body),) = hook.requests
    assert json.loads(body) == {
        "type": "verification.code",
        "data": {"channel": "phone", "to": "+49301234567", "code": "123456", "expires_at": "2026-11-22T12:10:00Z"},
    }
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert "123456" not in str(lines)


@pytest.mark.parametrize(
    ("statuses", "tries", "taken"),
    [
        ((503, 0, 200), 3, True),
        ((500,), 3, False),
        ((400, 200), 1, False),
        ((307, 200), 1, False),
    ],
)
async def test_what_may_pass_is_tried_three_times_and_what_cannot_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, ...], tries: int, taken: bool
) -> None:
    monkeypatch.setattr(webhooks, "FIRST_RETRY_SECONDS", 0.01)
    async with hooked(settings, *statuses) as (hook, sender):
        if taken:
            await sender.send(ANN, "123456", END)
        else:
            with pytest.raises(SendFailed):
                await sender.send(ANN, "123456", END)
    assert len(hook.requests) == tries
    assert len({headers["webhook-id"] for headers, _ in hook.requests}) == 1, "a repetition can be recognised"


async def test_a_webhook_that_fails_again_and_again_is_left_alone_for_a_while(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "FIRST_RETRY_SECONDS", 0.01)
    async with hooked(settings, *(503,) * 9, 200) as (hook, sender):
        for _ in range(5):
            with pytest.raises(SendFailed):
                await sender.send(ANN, "123456", END)
        assert len(hook.requests) == 9
        monkeypatch.setattr(anyio, "current_time", lambda now=anyio.current_time: now() + 61)
        await sender.send(ANN, "123456", END)


@pytest.mark.parametrize("status", [400, 404, 410, 422])
async def test_numbers_that_cannot_be_reached_keep_nobody_else_from_their_codes(
    settings: Settings, status: int
) -> None:
    """Three of them opened the breaker for everybody, for a minute."""
    async with hooked(settings, *(status,) * 6, 204) as (hook, sender):
        for _ in range(6):
            with pytest.raises(SendFailed):
                await sender.send(ANN, "123456", END)
        await sender.send(ANN, "123456", END)
    assert len(hook.requests) == 7


async def test_a_refusal_shows_that_the_webhook_is_up_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "FIRST_RETRY_SECONDS", 0.01)
    async with hooked(settings, *(503,) * 6, 400, *(503,) * 6, 204) as (hook, sender):
        for _ in range(5):
            with pytest.raises(SendFailed):
                await sender.send(ANN, "123456", END)
        await sender.send(ANN, "123456", END)
    assert len(hook.requests) == 14


async def test_an_installation_without_a_sender_says_so(settings: Settings) -> None:
    async with open_sender(msgspec.structs.replace(settings, verification_sender="none")) as sender:
        with pytest.raises(SendFailed, match="TRIREME_VERIFICATION_SENDER"):
            await sender.send(ANN, "123456", END)
