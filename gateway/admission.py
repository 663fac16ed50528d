"""Who may enter: tokens, and how often an address may fail to show a good one.

Called by the hub for every `auth` frame, on the loop: a new token costs one Ed25519 verification (80 us measured,
Python 3.11), one seen within the last minute a look-up. Holds no connection and reads no clock.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgspec
from joserfc import jwt
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import OKPKey

from gateway.arrivals import ADDRESSES
from protocol.errors import AuthErrorCode
from protocol.limits import counted_address

if TYPE_CHECKING:
    from protocol.frames import AuthPayload
    from protocol.records import MigrationTicket

_ALGORITHMS: Final = ["EdDSA", "Ed25519"]
"""RFC 8037 and its successor name, RFC 9864, of the same signature."""
SKEW_SECONDS: Final = 60
"""How far two honest clocks may differ."""
VERIFIED_TOKENS: Final = 20_000
"""Verified tokens remembered: a reconnect storm of 10,000 devices twice over, 3 MB."""
_VERIFIED_SECONDS: Final = 60.0
_WINDOW_SECONDS: Final = 60.0


class Admitted(msgspec.Struct, frozen=True):
    """The token is good until `expires_at` (seconds of the monotonic clock)."""

    user_id: str
    device_id: str
    expires_at: float
    issued_ms: int = 0
    """Epoch ms of when the token was made; 0: unknown."""


class Refused(msgspec.Struct, frozen=True):
    """Why not."""

    code: AuthErrorCode
    retry_after_ms: int | None = None


class _Claims(msgspec.Struct, frozen=True):
    sub: str
    exp: int | float
    iat: int | float = 0
    nbf: int | float = 0
    device_id: str | None = None


class PublicKeys:
    """The keys a token may be signed with, found by the `kid` in its header."""

    def __init__(self, text: str) -> None:
        """`text`: a JWK or a JWK set, JSON, Ed25519 only. A key without `kid` goes by its RFC 7638 thumbprint.

        Raises ValueError.
        """
        try:
            loaded = json.loads(text)
            jwks = loaded["keys"] if isinstance(loaded, dict) and "keys" in loaded else [loaded]
            parsed = [OKPKey.import_key(jwk) for jwk in jwks]
        except (ValueError, TypeError, KeyError, JoseError) as error:
            raise ValueError(f"not an Ed25519 JWK or JWK set: {type(error).__name__}") from None
        if not parsed or any(key.curve_name != "Ed25519" for key in parsed):
            raise ValueError("not an Ed25519 JWK or JWK set: no key, or another curve")
        self._by_id = {key.kid or key.thumbprint(): key for key in parsed}
        self._first = parsed[0]

    def of(self, token: Any) -> OKPKey:
        """The key a token names; one that names none was signed with the first. Raises KeyError."""
        kid = token.headers().get("kid")
        return self._first if kid is None else self._by_id[kid]


class Admission:
    """Checks tokens. `check` is atomic: it never awaits."""

    def __init__(self, public_keys: PublicKeys, failures_per_minute: int) -> None:
        self._keys = public_keys
        self._failures_per_minute = failures_per_minute
        self._verified: OrderedDict[bytes, tuple[float, _Claims]] = OrderedDict()
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    @property
    def remembered(self) -> tuple[int, int]:
        """(verified tokens, addresses with failures)."""
        return len(self._verified), len(self._failures)

    def check(self, payload: AuthPayload, remote: str, now: float, wall_ms: int) -> Admitted | Refused:
        """Is this token good for this user and device? A failure counts against `remote`, the address without its
        port; not one that is a genuine token's only for being old: whoever has it is no guesser."""
        digest = blake2b(payload.auth_token.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        seen = self._verified.get(digest)
        if seen is not None and seen[0] > now:
            claims: _Claims | None = seen[1]
        else:
            wait = self._blocked_for(remote, now)
            if wait > 0.0:
                return Refused(AuthErrorCode.RATE_LIMITED, int(wait * 1000) + 1)
            claims = self._verify(payload.auth_token)
            if claims is not None:
                self._remember(digest, claims, now)
        outcome = _judge(claims, payload, now, wall_ms / 1000)
        if isinstance(outcome, Refused) and outcome.code is not AuthErrorCode.EXPIRED_TOKEN:
            self._count_failure(remote, now)
        return outcome

    def check_address(self, remote: str, now: float) -> Refused | None:
        """Has this address failed too often for a session token of it to be looked up?"""
        wait = self._blocked_for(remote, now)
        return Refused(AuthErrorCode.RATE_LIMITED, int(wait * 1000) + 1) if wait > 0.0 else None

    def check_ticket(
        self, ticket: MigrationTicket | None, payload: AuthPayload, remote: str, now: float, wall_ms: int
    ) -> Admitted | Refused:
        """What a session token stood for (None: never made, taken already, or too old) against what the client says.

        A failure counts against `remote` as in `check`.
        """
        if ticket is None or (ticket.user_id, ticket.device_id) != (payload.user_id, payload.device_id):
            self._count_failure(remote, now)
            return Refused(AuthErrorCode.INVALID_TOKEN)
        if ticket.expires_ms <= wall_ms:
            return Refused(AuthErrorCode.EXPIRED_TOKEN)
        expires_at = now + (ticket.expires_ms - wall_ms) / 1000
        return Admitted(ticket.user_id, ticket.device_id, expires_at, ticket.issued_ms)

    def _verify(self, token: str) -> _Claims | None:
        """The claims of a token with a good signature, None for any other."""
        try:
            with warnings.catch_warnings():
                # The library warns that the name "EdDSA" is deprecated; both names are the same signature here.
                warnings.simplefilter("ignore", SecurityWarning)
                decoded = jwt.decode(token, self._keys.of, algorithms=_ALGORITHMS)
            return msgspec.convert(decoded.claims, _Claims)
        except (JoseError, ValueError, TypeError, KeyError):
            return None

    def _remember(self, digest: bytes, claims: _Claims, now: float) -> None:
        self._verified[digest] = (now + _VERIFIED_SECONDS, claims)
        if len(self._verified) > VERIFIED_TOKENS:
            self._verified.popitem(last=False)

    def _blocked_for(self, remote: str, now: float) -> float:
        """Seconds until this address may try again."""
        since, count = self._failures.get(counted_address(remote), (now, 0))
        if count < self._failures_per_minute:
            return 0.0
        return max(0.0, since + _WINDOW_SECONDS - now)

    def _count_failure(self, remote: str, now: float) -> None:
        address = counted_address(remote)
        since, count = self._failures.pop(address, (now, 0))
        if now - since >= _WINDOW_SECONDS:
            since, count = now, 0
        self._failures[address] = (since, count + 1)
        if len(self._failures) > ADDRESSES:
            self._failures.popitem(last=False)


def _judge(claims: _Claims | None, payload: AuthPayload, now: float, wall: float) -> Admitted | Refused:
    """The claims of a genuine token against what the client says and the time (`wall`, epoch seconds)."""
    if claims is None:
        return Refused(AuthErrorCode.INVALID_TOKEN)
    if claims.exp + SKEW_SECONDS <= wall or claims.nbf - SKEW_SECONDS > wall:
        return Refused(AuthErrorCode.EXPIRED_TOKEN)
    if claims.sub != payload.user_id:
        return Refused(AuthErrorCode.USER_MISMATCH)
    if claims.device_id is not None and claims.device_id != payload.device_id:
        return Refused(AuthErrorCode.INVALID_TOKEN)
    expires_at = now + claims.exp + SKEW_SECONDS - wall
    return Admitted(payload.user_id, payload.device_id, expires_at, round(claims.iat * 1000))
