"""Kind `webhook`: the operator's own program, which knows what the token means and reaches the device.

Each job is a signed POST (Standard Webhooks 1.0, symmetric): `{"type": "push.job", "data": {user_id, device_id, token,
conversation_id, message_id, sequence_number, badge, ttl_seconds}}`. 2xx: taken; 404 or 410: the token is gone and is
removed; 429 and 5xx: later, `Retry-After` is heeded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx2
import msgspec

from protocol import webhooks
from protocol.keys import trace_id
from workers.push.adapters import Outcome, Retry, outcome_of

if TYPE_CHECKING:
    from protocol.records import PushJob
    from workers.store.push_tokens import PushToken


class WebhookAdapter:
    """See `adapters.Adapter`. The URL is the operator's own, so it may be anywhere."""

    kind = "webhook"

    def __init__(self, client: httpx2.AsyncClient, url: str, secret: str) -> None:
        """`secret`: `whsec_` and Base64."""
        self._client = client
        self._url = url
        self._key = webhooks.key_of(secret)

    def provider(self, token: PushToken) -> str:
        """See `Adapter.provider`."""
        return self.kind

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """See `Adapter.send`. The same job has the same `webhook-id`, whoever sends it how often."""
        data = msgspec.structs.asdict(job) | {
            "user_id": token.user_id,
            "device_id": token.device_id,
            "token": token.address,
            "ttl_seconds": ttl_seconds,
        }
        body = msgspec.json.encode({"type": "push.job", "data": data})
        message_id = trace_id(token.user_id, token.device_id, job.message_id)
        signed = webhooks.signed_headers([self._key], message_id, time.time_ns() // 1_000_000_000, body)
        headers = {"content-type": "application/json", **signed}
        try:
            async with self._client.stream("POST", self._url, content=body, headers=headers) as response:
                return outcome_of(response.status_code, response.headers)
        except httpx2.TransportError as error:
            return Retry(type(error).__name__)
