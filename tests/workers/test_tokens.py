"""Tokens as the gateway sees them: verified by the library with the public key alone."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import OctKey, OKPKey

from protocol import dev_keys
from workers.tokens import KeyUnfit, Tokens

NOW = 1_800_000_000


pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(dev_keys.PRIVATE_JWK)


def forge(claims: dict[str, Any], key: Any = None, alg: str = "EdDSA") -> str:
    key = key or OKPKey.import_key(json.loads(dev_keys.PRIVATE_JWK))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        return jwt.encode({"alg": alg}, claims, key, algorithms=[alg])


def test_the_public_key_verifies_what_was_signed(tokens: Tokens) -> None:
    token, expires_at = tokens.sign("usr_1", "phone", NOW, 60, "tok_1")
    decoded = jwt.decode(token, OKPKey.import_key(json.loads(dev_keys.PUBLIC_JWK)), algorithms=["EdDSA"])
    assert decoded.header == {"alg": "EdDSA", "typ": "JWT", "kid": "dev"}
    assert decoded.claims == {"sub": "usr_1", "iat": NOW, "exp": NOW + 60, "jti": "tok_1", "device_id": "phone"}
    assert expires_at == NOW + 60


def test_a_token_is_good_until_the_second_it_expires(tokens: Tokens) -> None:
    token, _ = tokens.sign("usr_1", None, NOW, 60, "tok_1")
    claims = tokens.verify(token, NOW + 59)
    assert claims is not None
    assert (claims.sub, claims.device_id) == ("usr_1", None)
    assert tokens.verify(token, NOW + 60) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "é.é.é",
        forge({"sub": "usr_1", "iat": NOW, "exp": NOW + 60}, OKPKey.generate_key("Ed25519")),
        forge({"sub": "usr_1", "iat": NOW, "exp": NOW + 60}, OctKey.import_key("x" * 32), "HS256"),
        forge({"sub": "usr_1", "iat": NOW}),
        forge({"iat": NOW, "exp": NOW + 60}),
        forge({"sub": "", "iat": NOW, "exp": NOW + 60}),
        forge({"sub": "usr_1", "iat": NOW + 3600, "exp": NOW + 7200}),
        forge({"sub": "usr_1", "iat": NOW, "exp": "later"}),
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ1c3JfMSIsImlhdCI6MSwiZXhwIjo5OTk5OTk5OTk5fQ.",
    ],
)
def test_anything_else_is_refused(tokens: Tokens, token: str) -> None:
    assert tokens.verify(token, NOW) is None


def test_a_key_that_cannot_sign_is_one_line() -> None:
    with pytest.raises(KeyUnfit, match="TRIREME_JWT_PRIVATE_KEY"):
        Tokens(dev_keys.PUBLIC_JWK)
