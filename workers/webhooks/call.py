"""One request to a webhook: an event as a CloudEvent in structured or binary mode, signed as Standard Webhooks.

Called by the couriers, and by the REST role for a test event. Changes nothing that is stored.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from protocol import codec, events, webhooks
from protocol.webhooks import Mode
from workers import metrics
from workers.egress import Answered

if TYPE_CHECKING:
    from datetime import datetime

    from workers.egress import Egress
    from workers.store.webhooks import Registered

CALL_SECONDS: Final = 10.0
"""From the look-up of the name to the end of the answer (reliability.md section 11)."""
ANSWER_BYTES: Final = 16 * 1024
"""Of an answer's body, which nobody reads: a small one is taken, so that the connection can be used again."""
USER_AGENT: Final = "Trireme-Webhooks/1"
_GONE: Final = 410


class Verdict(StrEnum):
    """What a try means for its event. gone: Standard Webhooks, the receiver wants nothing any more."""

    DELIVERED = "delivered"
    TRANSIENT = "transient"
    PERMANENT = "permanent"
    BLOCKED = "blocked"
    GONE = "gone"


class Outcome(NamedTuple):
    """`status`: of the answer, None where there was none. `reason`: one line, "" for what arrived."""

    verdict: Verdict
    status: int | None
    reason: str


async def call(egress: Egress, registered: Registered, event: events.Sendable, now: datetime) -> Outcome:
    """Send an event once. `now` is what the signature says."""
    webhook = registered.webhook
    headers, body = request_of(registered, event, now)
    started = anyio.current_time()
    answer = await egress.post(webhook.url, headers, body, seconds=CALL_SECONDS, max_bytes=ANSWER_BYTES)
    metrics.WEBHOOK_SECONDS.observe(anyio.current_time() - started)
    if isinstance(answer, Answered):
        outcome = _judge(answer.status)
    elif answer.is_refused:
        outcome = Outcome(Verdict.BLOCKED, None, answer.reason)
    else:
        outcome = Outcome(Verdict.TRANSIENT, None, answer.reason)
    metrics.WEBHOOK_TRIES.labels(outcome.verdict.value).inc()
    return outcome


def request_of(registered: Registered, event: events.Sendable, now: datetime) -> tuple[dict[str, str], bytes]:
    """Headers and body."""
    if registered.webhook.mode is Mode.BINARY:
        body = codec.encode_value(event.data)
        headers = {"content-type": events.BINARY_TYPE, **events.binary_headers(event)}
    else:
        body = codec.encode_value(event)
        headers = {"content-type": events.STRUCTURED_TYPE}
    headers["user-agent"] = USER_AGENT
    headers |= webhooks.signed_headers(registered.keys, event.id, int(now.timestamp()), body)
    return headers, body


def _judge(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome(Verdict.DELIVERED, status, "")
    if status == _GONE:
        return Outcome(Verdict.GONE, status, "it wants nothing any more (410)")
    if status in webhooks.TRANSIENT:
        return Outcome(Verdict.TRANSIENT, status, f"status {status}")
    if 300 <= status < 400:
        return Outcome(Verdict.PERMANENT, status, f"status {status}: redirects are not followed")
    return Outcome(Verdict.PERMANENT, status, f"status {status}")
