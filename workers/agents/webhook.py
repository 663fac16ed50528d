"""Agents that are reached by HTTP: a signed POST of the event, whose answer is what the agent says.

The body is the CloudEvent of the message (structured mode), signed as Standard Webhooks with the message's id, so a
repeat is known. Status 200 carries the answer, `{"response": "…"}` or a CloudEvent with such data; 202 and 204 are
none. What comes back is a stranger's: bounded, never followed anywhere, read strictly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from protocol import codec, webhooks
from protocol.events import STRUCTURED_TYPE, message_received
from workers.agents.calls import Answer, Failure, judged
from workers.agents.replies import now_ms
from workers.egress import Answered, Egress, Failed

if TYPE_CHECKING:
    from protocol.models import Agent
    from workers.agents.classes import Context
    from workers.store import Store
    from workers.store.agent_tasks import Task

ANSWER_BYTES: Final = 320 * 1024
"""48 KiB of content are up to 288 KiB of JSON."""
USER_AGENT: Final = "Trireme-Agents/1"
_SILENT: Final = frozenset((202, 204))


class _Said(msgspec.Struct):
    response: str | None = None


class _Reply(_Said):
    """Bare, or as the data of an event."""

    data: _Said | None = None


_decode = msgspec.json.Decoder(_Reply).decode


class WebhookCaller:
    """See `calls.Caller`."""

    def __init__(self, store: Store, egress: Egress) -> None:
        self._store = store
        self._egress = egress

    async def call(self, agent: Agent, task: Task, context: Context) -> Answer | Failure:
        """See `calls.Caller.call`. Raises StoreUnavailable."""
        body = codec.encode_value(message_received(task.event))
        key = webhooks.key_of(await self._store.agents.secret(agent.agent_id))
        headers = {
            "content-type": STRUCTURED_TYPE,
            "user-agent": USER_AGENT,
            "trireme-agent": agent.agent_id,
            **webhooks.signed_headers([key], task.message_id, now_ms() // 1000, body),
        }
        if context.intent:
            headers["trireme-intent"] = context.intent
        found = await self._egress.post(
            str(agent.url), headers, body, seconds=agent.timeout_seconds, max_bytes=ANSWER_BYTES
        )
        return _read(found)


def _read(found: Answered | Failed) -> Answer | Failure:
    if isinstance(found, Failed):
        return Failure(found.reason, is_final=found.is_refused, is_away=not found.is_refused)
    if found.status in _SILENT:
        return Answer(None)
    if 300 <= found.status < 400:
        return Failure(f"status {found.status}: redirects are not followed", is_final=True)
    if found.status != 200:
        is_away = found.status in webhooks.TRANSIENT
        return Failure(f"status {found.status}", is_final=not is_away, is_away=is_away)
    if not found.is_whole:
        return Failure(f"the answer is over {ANSWER_BYTES} bytes", is_final=True)
    try:
        reply = _decode(found.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Failure('the answer is no JSON object with a "response"', is_final=True)
    return judged(reply.response if reply.data is None else reply.data.response)
