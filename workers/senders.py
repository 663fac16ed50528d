"""Who delivers verification codes to phones and mailboxes: the log in development, a webhook in production.

Called by the REST role. The webhook is whatever the operator has that sends SMS and email; it gets a signed POST
(Standard Webhooks 1.0, symmetric). Nothing of a code is logged but by the development sender.

*Raises*: SendFailed. *Cancellation*: the code may have been sent.
"""

from __future__ import annotations

import random
import secrets
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import httpx2
import msgspec
import structlog

from protocol import webhooks
from workers.breaker import Breaker, BreakerOpen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from workers.settings import Settings
    from workers.store.verifications import Target

log = structlog.get_logger(__name__)

_TRY_SECONDS: Final = 5.0
_AT_ONCE: Final = 32
"""Deliveries under way: a webhook that hangs holds no more requests than these."""


class SendFailed(Exception):
    """The code was not handed over; one line without the code."""


class SendRefused(SendFailed):
    """Whoever delivers is up and will not deliver this one; another try would end the same."""


class Sender(Protocol):
    """Delivers a code. Raises SendFailed."""

    async def send(self, target: Target, code: str, expires_at: datetime) -> None:
        """Hand the code over to whoever reaches the target."""


class LogSender:
    """Development: whoever reads the log logs in."""

    async def send(self, target: Target, code: str, expires_at: datetime) -> None:
        """See `Sender.send`."""
        log.info("verification_code", field=target.field, to=target.key, code=code, expires_at=expires_at.isoformat())


class NoSender:
    """An installation where people are logged in by another program."""

    async def send(self, target: Target, code: str, expires_at: datetime) -> None:
        """See `Sender.send`."""
        raise SendFailed("no sender is configured (TRIREME_VERIFICATION_SENDER)")


class WebhookSender:
    """POSTs each code to the operator's URL: tries, and a breaker that spares a webhook which is down."""

    def __init__(self, client: httpx2.AsyncClient, url: str, secret: str) -> None:
        """`secret`: `whsec_` and Base64. Raises ValueError for any other."""
        self._client = client
        self._url = url
        self._key = webhooks.key_of(secret)
        self._room = anyio.CapacityLimiter(_AT_ONCE)
        self._breaker = Breaker("webhook", webhooks.FAILURES_TO_OPEN, webhooks.OPEN_SECONDS)

    async def send(self, target: Target, code: str, expires_at: datetime) -> None:
        """See `Sender.send`. Redirects are not followed: a code goes where the operator said or nowhere."""
        try:
            self._breaker.admit()
        except BreakerOpen:
            raise SendFailed("the webhook failed lately") from None
        async with self._room:
            try:
                await self._deliver(target, code, expires_at)
            except SendRefused as error:
                # One address' fault, which must not keep the others from their codes.
                self._breaker.succeeded()
                log.warning("verification_refused", field=target.field, reason=str(error))
                raise
            except SendFailed as error:
                self._breaker.failed()
                log.warning("verification_not_sent", field=target.field, reason=str(error))
                raise
            self._breaker.succeeded()

    async def _deliver(self, target: Target, code: str, expires_at: datetime) -> None:
        message_id = "msg_" + secrets.token_hex(12)
        data = {"channel": target.field, "to": target.key, "code": code, "expires_at": expires_at}
        body = msgspec.json.encode({"type": "verification.code", "data": data})
        reason = ""
        for number in range(webhooks.TRIES):
            if number:
                delay = webhooks.quick_retry_seconds(number)
                await anyio.sleep(delay * random.uniform(1 - webhooks.JITTER, 1 + webhooks.JITTER))
            try:
                with anyio.fail_after(_TRY_SECONDS):
                    status = await self._post(message_id, body)
            except (httpx2.TransportError, TimeoutError) as error:
                reason = type(error).__name__
                continue
            if 200 <= status < 300:
                return
            reason = f"status {status}"
            if status not in webhooks.TRANSIENT:
                if 400 <= status < 500:
                    raise SendRefused(f"the webhook refused it: {reason}")
                break
        raise SendFailed(f"the webhook did not take it: {reason}")

    async def _post(self, message_id: str, body: bytes) -> int:
        """One try; the answer's body is not read."""
        signed = webhooks.signed_headers([self._key], message_id, time.time_ns() // 1_000_000_000, body)
        headers = {"content-type": "application/json", **signed}
        async with self._client.stream("POST", self._url, content=body, headers=headers) as response:
            return response.status_code


@asynccontextmanager
async def open_sender(settings: Settings) -> AsyncIterator[Sender]:
    """The sender that the settings name; closes its connections on exit."""
    if settings.verification_sender == "log":
        yield LogSender()
    elif settings.verification_sender == "none":
        yield NoSender()
    else:
        # Deadlines stand at the call; trust_env off: no proxy variable may lead a code elsewhere.
        async with httpx2.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as client:
            yield WebhookSender(client, settings.verification_webhook_url, settings.verification_webhook_secret)
