"""Access tokens: EdDSA-signed JWTs (RFC 7519, RFC 8037). The REST role signs them, the gateway verifies them.

Claims: `sub` user id, `iat`, `exp`, `jti`, and `device_id` where a token is bound to one device. Time and entropy come
in as arguments.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec
from joserfc import jwt
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import OKPKey

if TYPE_CHECKING:
    from collections.abc import Iterator

ALGORITHM: Final = "EdDSA"
ACCEPTED: Final = ["EdDSA", "Ed25519"]
"""RFC 9864 gives the same algorithm its second name."""
_LEEWAY_SECONDS: Final = 5


class Claims(msgspec.Struct, frozen=True):
    """What a token says. Times in epoch seconds."""

    sub: str
    exp: int
    iat: int
    jti: str = ""
    device_id: str | None = None


class KeyUnfit(Exception):
    """The private key cannot sign; one line."""


@contextmanager
def _older_name() -> Iterator[None]:
    """The library warns that the name "EdDSA" is deprecated; the signature is the same, and verifiers know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        yield


class Tokens:
    """Signs with one private key, verifies with its public half."""

    def __init__(self, private_jwk: str) -> None:
        try:
            self._private = OKPKey.import_key(msgspec.json.decode(private_jwk))
            if not self._private.is_private:
                raise KeyUnfit("TRIREME_JWT_PRIVATE_KEY cannot sign: it is a public key")
            self._public = OKPKey.import_key(self._private.as_dict(private=False))
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise KeyUnfit(f"TRIREME_JWT_PRIVATE_KEY cannot sign: {error}") from error
        self._header = {"alg": ALGORITHM, "typ": "JWT"}
        if self._private.kid:
            self._header["kid"] = self._private.kid

    def sign(self, user_id: str, device_id: str | None, now: int, ttl_seconds: int, token_id: str) -> tuple[str, int]:
        """A token for this user from `now` (epoch seconds) on; returns it with its `exp`."""
        expires_at = now + ttl_seconds
        claims = {"sub": user_id, "iat": now, "exp": expires_at, "jti": token_id}
        if device_id is not None:
            claims["device_id"] = device_id
        with _older_name():
            return jwt.encode(self._header, claims, self._private, algorithms=ACCEPTED), expires_at

    def verify(self, token: str, now: int) -> Claims | None:
        """The claims of a token that is ours and good at `now` (epoch seconds), else None: never why not."""
        try:
            with _older_name():
                decoded = jwt.decode(token, self._public, algorithms=ACCEPTED)
            claims = msgspec.convert(decoded.claims, Claims)
        except (JoseError, ValueError, TypeError, KeyError):
            return None
        if not claims.sub or now >= claims.exp or claims.iat > now + _LEEWAY_SECONDS:
            return None
        return claims
