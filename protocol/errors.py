"""Every error code and close code, and what a client may do about it. Spec tables are generated from here.

Called by everyone; holds no behaviour beyond looking a row up.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ErrorCode(StrEnum):
    """`code` of an `error` frame and of a REST error body. `retryable`: may the same request succeed later?"""

    retryable: bool
    http_status: int

    def __new__(cls, value: str, retryable: bool, http_status: int) -> ErrorCode:
        member = str.__new__(cls, value)
        member._value_ = value
        member.retryable = retryable
        member.http_status = http_status
        return member

    BAD_FRAME = "bad_frame", False, 400
    UNKNOWN_TYPE = "unknown_type", False, 400
    VALIDATION_FAILED = "validation_failed", False, 400
    CONVERSATION_NOT_FOUND = "conversation_not_found", False, 404
    NOT_FOUND = "not_found", False, 404
    METHOD_NOT_ALLOWED = "method_not_allowed", False, 405
    FORBIDDEN = "forbidden", False, 403
    UNAUTHORIZED = "unauthorized", False, 401
    CONFLICT = "conflict", False, 409
    MUTED = "muted", False, 403
    BLOCKED = "blocked", False, 403
    BANNED = "banned", False, 403
    TOO_LATE = "too_late", False, 409
    CODE_REFUSED = "code_refused", False, 403
    REVOKED = "revoked", False, 401
    GROUP_FULL = "group_full", False, 409
    IDEMPOTENCY_CONFLICT = "idempotency_conflict", False, 409
    RATE_LIMITED = "rate_limited", True, 429
    TOO_LARGE = "too_large", False, 413
    UPLOAD_INCOMPLETE = "upload_incomplete", False, 422
    QUOTA_EXCEEDED = "quota_exceeded", False, 507
    STORAGE_UNAVAILABLE = "storage_unavailable", True, 503
    OVERLOADED = "overloaded", True, 503
    QUEUED_FOR_RETRY = "queued_for_retry", True, 503
    REPLACED = "replaced", False, 409
    SLOW_CONSUMER = "slow_consumer", True, 429
    INTERNAL = "internal", True, 500


class AuthErrorCode(StrEnum):
    """`error` of an `auth_error` frame."""

    AUTH_REQUIRED = "auth_required"
    INVALID_TOKEN = "invalid_token"
    EXPIRED_TOKEN = "expired_token"
    USER_MISMATCH = "user_mismatch"
    REVOKED = "revoked"
    DEVICE_LIMIT = "device_limit"
    RATE_LIMITED = "rate_limited"
    DRAINING = "draining"
    SERVER_BUSY = "server_busy"
    VALIDATION_FAILED = "validation_failed"


class Reconnect(StrEnum):
    """What a client does after a close."""

    NO = "no"
    YES = "yes"
    LATER = "later"
    JITTERED = "jittered"


class CloseCode(IntEnum):
    """WebSocket close codes this server sends (RFC 6455 section 7.4; 4000–4999 are the application's)."""

    reason: str
    reconnect: Reconnect

    def __new__(cls, value: int, reason: str, reconnect: Reconnect) -> CloseCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.reason = reason
        member.reconnect = reconnect
        return member

    NORMAL = 1000, "bye", Reconnect.NO
    GOING_AWAY = 1001, "going_away", Reconnect.YES
    PROTOCOL_ERROR = 1002, "protocol_error", Reconnect.NO
    UNSUPPORTED_DATA = 1003, "unsupported_data", Reconnect.NO
    INVALID_TEXT = 1007, "invalid_text", Reconnect.NO
    POLICY = 1008, "policy", Reconnect.NO
    TOO_LARGE = 1009, "too_large", Reconnect.NO
    INTERNAL = 1011, "internal", Reconnect.YES
    RESTART = 1012, "restart", Reconnect.JITTERED
    BAD_FRAME = 4400, "bad_frame", Reconnect.NO
    AUTH = 4401, "auth", Reconnect.NO
    AUTH_TIMEOUT = 4408, "timeout", Reconnect.YES
    REPLACED = 4409, "replaced", Reconnect.NO
    RATE = 4429, "rate", Reconnect.LATER
    OVERLOADED = 4503, "overloaded", Reconnect.LATER
    SLOW_CONSUMER = 4508, "slow_consumer", Reconnect.YES


class ProtocolError(Exception):
    """Somebody broke the protocol; see the two kinds."""


class LocalProtocolError(ProtocolError):
    """This process asked for something the protocol forbids: a bug here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol forbids. `code` goes back to it; `client_message_id` and `idempotency_key`
    are whatever could be read from the refused frame, so that the client can match the error to its send."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        client_message_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.client_message_id = client_message_id
        self.idempotency_key = idempotency_key
