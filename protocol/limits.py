"""The budgets of one connection, the token bucket that keeps a rate, and what a message may hold.

Called by `session.py`; the gateway fills `Limits` from its settings. Time comes in as seconds of a monotonic clock.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

import msgspec

from protocol.codec import MAX_CONTENT_BYTES, MAX_FRAME_BYTES
from protocol.errors import ErrorCode
from protocol.media import KINDS
from protocol.models import MessagePayload, MessageType

_HOUSEHOLD: Final = 64
"""Bits of an IPv6 address that a household gets; whoever has one has 2^64 addresses."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Every number a session obeys. Defaults as in protocol.md; each has a `TRIREME_*` setting in the gateway."""

    max_frame_bytes: int = MAX_FRAME_BYTES
    max_content_bytes: int = MAX_CONTENT_BYTES
    window: int = 32
    """Unacknowledged messages per connection; a full window stops reading."""
    message_rate: float = 20.0
    message_burst: int = 60
    bot_message_rate: float = 1000.0
    """Of an agent's account, which talks to many; `bot_message_burst` is its burst."""
    bot_message_burst: int = 2000
    lookup_rate: float = 5.0
    """retransmit, sync and history together, per second."""
    typing_spacing_seconds: float = 3.0
    """At most one `typing` start of a user per conversation is passed on in this time."""
    typing_seconds: float = 6.0
    """Without another start, typing has stopped."""
    typing_conversations: int = 20
    """Conversations one user may be typing in."""
    watched_people: int = 500
    """People whose presence one connection may watch."""
    people_per_lookup: int = 50
    """People of a `presence_subscribe` that cost as much as one retransmit: each may be a read and a frame."""
    retransmit_span: int = 500
    page_limit: int = 100
    auth_timeout_seconds: float = 10.0
    open_timeout_seconds: float = 10.0
    """From a good token to the answer of a worker."""
    ack_timeout_seconds: float = 10.0
    repeat_seconds: float = 5.0
    """How long what was sent behind a refused message is refused too, unless it comes again: it was told to after 1 s,
    and a phone's next round trip may take some seconds. Who gives a message up waits so long with the next."""
    repeats: int = 128
    """Keys of refused messages kept per connection: what `message_burst` and a few seconds of `message_rate` bring.
    What is past it is refused as the others, and its order left to its sender."""
    ask_timeout_seconds: float = 5.0
    """A page, or where a user stands, not answered by then is asked again."""
    heartbeat_seconds: float = 30.0
    """Silence after which the server pings; also told to the client."""
    dead_seconds: float = 60.0
    protocol_errors: int = 10
    """Soft protocol errors within `error_window_seconds` that end the connection with 4400."""
    rate_errors: int = 100
    """Rate refusals within `error_window_seconds` that end the connection with 4429."""
    error_window_seconds: float = 60.0


class TokenBucket:
    """`rate` tokens per second, at most `burst`. `take` is atomic: it never awaits."""

    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._updated = now

    def take(self, now: float) -> float:
        """Take one token. Returns 0.0, or the seconds until one is there (and takes nothing)."""
        level = self._level + (now - self._updated) * self._rate
        self._updated = now
        if level > self._burst:
            level = self._burst
        if level >= 1.0:
            self._level = level - 1.0
            return 0.0
        self._level = level
        return (1.0 - level) / self._rate

    def owe(self, tokens: float) -> None:
        """What was taken for turned out to be dearer: so many more, which may leave a debt to wait for."""
        self._level -= tokens


class TypingBudget:
    """How often somebody says that they are typing, over all their connections. `take` is atomic: it never awaits."""

    __slots__ = ("_limits", "_told")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._told: dict[str, float] | None = None
        """Conversation → when a start was last passed on."""

    def take(self, conversation_id: str, now: float) -> bool:
        """May a start be passed on?"""
        spacing = self._limits.typing_spacing_seconds
        told = self._told or {}
        if now - told.get(conversation_id, float("-inf")) < spacing:
            return False
        if len(told) >= self._limits.typing_conversations:
            told = {name: at for name, at in told.items() if now - at < spacing}
            if len(told) >= self._limits.typing_conversations:
                return False
        told[conversation_id] = now
        self._told = told
        return True

    def forget(self, conversation_id: str) -> None:
        """They have sent what they typed: the next start is another one."""
        if self._told:
            self._told.pop(conversation_id, None)


def counted_address(remote: str) -> str:
    """Whom to count where something is limited per network address: of IPv6 the network's part. The same for both
    doors; what is no address counts as it is."""
    try:
        address = ip_address(remote)
    except ValueError:
        return remote
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((int(address), _HOUSEHOLD), strict=False))
    return str(address)


def check_content(content: str, limit: int) -> tuple[ErrorCode, str] | None:
    """Why this is no content of a text message, or None. `limit`: bytes."""
    if len(content) * 4 > limit and len(content.encode("utf-8", "surrogatepass")) > limit:
        return ErrorCode.TOO_LARGE, f"content is over {limit} bytes"
    return None if content else (ErrorCode.VALIDATION_FAILED, "a text message needs content")


def check_message(payload: MessagePayload, limits: Limits) -> tuple[ErrorCode, str] | None:
    """Why no conversation could take this message, or None. The same for both doors."""
    content = payload.content
    kind = payload.message_type
    unfit = check_content(content, limits.max_content_bytes)
    if unfit is not None and (content or kind is MessageType.TEXT):
        return unfit
    if kind is MessageType.SYSTEM:
        return ErrorCode.FORBIDDEN, "system messages come from the server only"
    if kind not in KINDS:
        if payload.media_url is not None:
            return ErrorCode.VALIDATION_FAILED, f"a {kind.value} message carries no media_url"
        if not content:
            return ErrorCode.VALIDATION_FAILED, f"a {kind.value} message needs content"
    elif not content and payload.media_url is None:
        return ErrorCode.VALIDATION_FAILED, "a media message needs media_url or content"
    return None
