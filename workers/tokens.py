"""Access tokens: EdDSA-signed JWTs (RFC 7519, RFC 8037). The REST role signs them, the gateway verifies them.

Claims: `sub` user id, `iat`, `exp`, `jti`, and `device_id` where a token is bound to one device. `iat` has fractional
seconds: a revocation tells tokens of the same second apart. The header's `kid` names the key, so that keys can be
changed without a token becoming bad: docs/accounts.md, "Changing the key". Time and entropy come in as arguments.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

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
    exp: float
    iat: float
    jti: str = ""
    device_id: str | None = None

    @property
    def issued_ms(self) -> int:
        """When the token was made, epoch milliseconds."""
        return round(self.iat * 1000)


class KeyUnfit(Exception):
    """The private key cannot sign; one line."""


@contextmanager
def _older_name() -> Iterator[None]:
    """The library warns that the name "EdDSA" is deprecated; the signature is the same, and verifiers know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        yield


class Tokens:
    """Signs with the first private key, verifies with the public halves of all."""

    def __init__(self, private_jwks: str) -> None:
        """`private_jwks`: a JWK, or a JWK set. A key without `kid` goes by its RFC 7638 thumbprint.

        Raises KeyUnfit.
        """
        try:
            loaded = msgspec.json.decode(private_jwks)
            private = [OKPKey.import_key(jwk) for jwk in loaded.get("keys", [loaded])]
            if not private or not all(key.is_private for key in private):
                raise KeyUnfit("TRIREME_JWT_PRIVATE_KEY cannot sign: it is no key or a public one")
            self._private = private[0]
            named = {_kid(key): key for key in private}
            self._public = {kid: OKPKey.import_key(key.as_dict(private=False)) for kid, key in named.items()}
        except (JoseError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise KeyUnfit(f"TRIREME_JWT_PRIVATE_KEY cannot sign: {type(error).__name__}") from error
        if len(named) != len(private):
            raise KeyUnfit("TRIREME_JWT_PRIVATE_KEY cannot sign: two keys have one kid")
        self._header = {"alg": ALGORITHM, "typ": "JWT", "kid": _kid(self._private)}

    def sign(
        self, user_id: str, device_id: str | None, now_ms: int, ttl_seconds: int, token_id: str
    ) -> tuple[str, int]:
        """A token for this user from `now_ms` (epoch milliseconds) on; returns it with its end, epoch milliseconds."""
        expires_ms = now_ms + ttl_seconds * 1000
        claims = {"sub": user_id, "iat": now_ms / 1000, "exp": expires_ms / 1000, "jti": token_id}
        if device_id is not None:
            claims["device_id"] = device_id
        with _older_name():
            return jwt.encode(self._header, claims, self._private, algorithms=ACCEPTED), expires_ms

    def verify(self, token: str, now_ms: int) -> Claims | None:
        """The claims of a token that is ours and good at `now_ms` (epoch milliseconds), else None: never why not."""
        try:
            with _older_name():
                decoded = jwt.decode(token, self._key_of, algorithms=ACCEPTED)
            claims = msgspec.convert(decoded.claims, Claims, strict=True)
        except (JoseError, ValueError, TypeError, KeyError):
            return None
        now = now_ms / 1000
        if not claims.sub or now >= claims.exp or claims.iat > now + _LEEWAY_SECONDS:
            return None
        return claims

    def _key_of(self, token: Any) -> OKPKey:
        """The key a token says it is signed with; a token that does not say was signed with the first one."""
        return self._public[token.headers().get("kid", self._header["kid"])]

    def public_set(self) -> dict[str, list[dict[str, str]]]:
        """The public halves as a JWK set (RFC 7517), the signing one first."""
        return {
            "keys": [
                {"kty": "OKP", "crv": "Ed25519", "x": str(key.as_dict(private=False)["x"]), "kid": kid}
                | {"alg": ALGORITHM, "use": "sig"}
                for kid, key in self._public.items()
            ]
        }


def _kid(key: OKPKey) -> str:
    return key.kid or key.thumbprint()


def new_key() -> tuple[str, str]:
    """A fresh private JWK and its public half, one line each; `kid` is the RFC 7638 thumbprint."""
    key = OKPKey.generate_key("Ed25519")
    kid = {"kid": key.thumbprint()}
    halves = (key.as_dict(private=True) | kid, key.as_dict(private=False) | kid)
    private, public = (msgspec.json.encode(half, order="sorted").decode() for half in halves)
    return private, public
