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
from workers.tokens import KeyUnfit, Tokens, new_key

NOW = 1_800_000_000
NOW_MS = NOW * 1000


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
    token, expires_ms = tokens.sign("usr_1", "phone", NOW_MS + 123, 60, "tok_1")
    decoded = jwt.decode(token, OKPKey.import_key(json.loads(dev_keys.PUBLIC_JWK)), algorithms=["EdDSA"])
    assert decoded.header == {"alg": "EdDSA", "typ": "JWT", "kid": "dev"}
    claims = {"sub": "usr_1", "iat": NOW + 0.123, "exp": NOW + 60.123, "jti": "tok_1", "device_id": "phone"}
    assert decoded.claims == claims
    assert expires_ms == NOW_MS + 60_123


def test_a_token_is_good_until_the_moment_it_expires(tokens: Tokens) -> None:
    token, _ = tokens.sign("usr_1", None, NOW_MS + 123, 60, "tok_1")
    claims = tokens.verify(token, NOW_MS + 60_122)
    assert claims is not None
    assert (claims.sub, claims.device_id, claims.issued_ms) == ("usr_1", None, NOW_MS + 123)
    assert tokens.verify(token, NOW_MS + 60_123) is None


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
    assert tokens.verify(token, NOW_MS) is None


@pytest.mark.parametrize(
    "text",
    [
        dev_keys.PUBLIC_JWK,
        f'{{"keys":[{dev_keys.PRIVATE_JWK},{dev_keys.PUBLIC_JWK}]}}',
        f'{{"keys":[{dev_keys.PRIVATE_JWK},{dev_keys.PRIVATE_JWK}]}}',
        '{"keys":[]}',
        '{"keys":1}',
        "[]",
        "7",
        "nonsense",
    ],
)
def test_a_key_that_cannot_sign_is_one_line(text: str) -> None:
    with pytest.raises(KeyUnfit, match=r"\ATRIREME_JWT_PRIVATE_KEY [^\n]*\Z"):
        Tokens(text)


# --- changing the key ------------------------------------------------------------------------------------------------


def key_set(*private: str) -> str:
    return f'{{"keys":[{",".join(private)}]}}'


def test_tokens_of_an_old_key_stay_good_while_it_is_in_the_set() -> None:
    (old, _), (new, _) = new_key(), new_key()
    token, _ = Tokens(old).sign("usr_1", "phone", NOW_MS, 60, "tok_1")
    both = Tokens(key_set(new, old))
    assert both.verify(token, NOW_MS) is not None
    fresh, _ = both.sign("usr_1", "phone", NOW_MS, 60, "tok_2")
    assert Tokens(new).verify(fresh, NOW_MS) is not None, "the first one signs"
    assert Tokens(old).verify(fresh, NOW_MS) is None
    assert Tokens(new).verify(token, NOW_MS) is None, "the old key was dropped"


def test_a_key_without_a_name_goes_by_its_thumbprint() -> None:
    private, public = (json.loads(half) for half in new_key())
    kid = private.pop("kid")
    assert kid == public["kid"] == OKPKey.import_key(private).thumbprint()
    tokens = Tokens(json.dumps(private))
    token, _ = tokens.sign("usr_1", None, NOW_MS, 60, "tok_1")
    assert jwt.decode(token, OKPKey.import_key(public), algorithms=["EdDSA"]).header["kid"] == kid
    assert tokens.verify(token, NOW_MS) is not None


def test_a_token_that_names_another_key_is_refused_although_its_signature_fits(tokens: Tokens) -> None:
    key = OKPKey.import_key(json.loads(dev_keys.PRIVATE_JWK))
    claims = {"sub": "usr_1", "iat": NOW, "exp": NOW + 60}
    for kid, good in (("dev", True), ("other", False), ("", False)):
        token = jwt.encode({"alg": "EdDSA", "kid": kid}, claims, key, algorithms=["EdDSA"])
        assert (tokens.verify(token, NOW_MS) is not None) is good, kid


def test_the_public_set_has_no_private_half() -> None:
    (old, old_public), (new, new_public) = new_key(), new_key()
    shown = Tokens(key_set(new, old)).public_set()
    extra = {"alg": "EdDSA", "use": "sig"}
    assert shown == {"keys": [json.loads(new_public) | extra, json.loads(old_public) | extra]}
