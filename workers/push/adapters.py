"""The seam to those who reach devices: what they are given, what they say. An adapter is one try; `dispatch.py`
repeats it.

To add a provider: a class with `kind`, `provider` and `send` in a module of its own, a row in `providers.py`, a shape
of its token in `rest/push_tokens.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import structlog

from protocol.webhooks import TRANSIENT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.records import PushJob
    from workers.store.push_tokens import PushToken

LOG: Final = "log"
TRY_SECONDS: Final = 3.0
"""For one try, to the end of its answer."""
_GONE: Final = frozenset((404, 410))
"""RFC 8030 section 7.3; webhooks and FCM say it so too."""
_LONGEST_WAIT_SECONDS: Final = 3600.0

log = structlog.get_logger(__name__)


class KeyUnfit(ValueError):
    """A setting that is no key; one line, to stand behind the setting's name."""


class Delivered(NamedTuple):
    """The provider has it."""


class Gone(NamedTuple):
    """There is no such token any more: nobody is to use it again."""


class Retry(NamedTuple):
    """Not now. `after_seconds`: what the provider asks for; 0 where it says nothing."""

    reason: str
    after_seconds: float = 0.0


class Refused(NamedTuple):
    """Never: another try would end the same. `reason` without anything of the token."""

    reason: str


Outcome = Delivered | Gone | Retry | Refused


class Adapter(Protocol):
    """One kind of token."""

    kind: str

    def provider(self, token: PushToken) -> str:
        """Who is away when this token's pushes fail: one breaker for each."""

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """One try, within the caller's deadline. `ttl_seconds`: so long is it worth something. Never raises for what
        comes from the network."""


class LogAdapter:
    """Development: whoever reads the log sees who would be told."""

    kind = LOG

    def provider(self, token: PushToken) -> str:
        """See `Adapter.provider`."""
        return self.kind

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """See `Adapter.send`."""
        log.info(
            "push",
            user_id=token.user_id,
            device_id=token.device_id,
            conversation_id=job.conversation_id,
            message_id=job.message_id,
            sequence_number=job.sequence_number,
            badge=job.badge,
            ttl_seconds=ttl_seconds,
        )
        return Delivered()


def outcome_of(status: int, headers: Mapping[str, str]) -> Outcome:
    """What a provider's answer means, by its status."""
    if 200 <= status < 300:
        return Delivered()
    if status in _GONE:
        return Gone()
    if status in TRANSIENT:
        return Retry(f"status {status}", retry_after(headers))
    return Refused(f"status {status}")


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, 0 where the header says nothing we read (a date, say)."""
    text = headers.get("retry-after", "")
    return min(float(text), _LONGEST_WAIT_SECONDS) if text.isascii() and text.isdecimal() else 0.0
