"""Admission: genuine, forged, expired and misused tokens, and addresses that fail too often."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

import msgspec
import pytest
from joserfc import jwt
from joserfc.jwk import OKPKey

from gateway.admission import Admission, Admitted, PublicKeys, Refused
from protocol import dev_keys
from protocol.errors import AuthErrorCode
from protocol.frames import AuthPayload
from tests.gateway.fakes import WALL_SECONDS, token

NOW = 500.0


@pytest.fixture
def admission() -> Admission:
    return Admission(PublicKeys(dev_keys.PUBLIC_JWK), 10)


def check(
    admission: Admission,
    auth_token: str,
    *,
    user_id: str = "usr_a",
    remote: str = "10.0.0.1",
    now: float = NOW,
    wall_seconds: float = WALL_SECONDS,
) -> Admitted | Refused:
    payload = AuthPayload(user_id=user_id, auth_token=auth_token, device_id="d1", platform="test", app_version="1")
    return admission.check(payload, remote, now, int(wall_seconds * 1000))


def refused(outcome: Admitted | Refused) -> AuthErrorCode:
    assert isinstance(outcome, Refused)
    return outcome.code


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ["EdDSA", "Ed25519"])
def test_both_names_of_the_signature_are_good(admission: Admission, algorithm: str) -> None:
    outcome = check(admission, token(algorithm=algorithm))
    assert outcome == Admitted("usr_a", "d1", NOW + 3600 + 60, WALL_SECONDS * 1000)


def test_a_key_set_is_searched_by_key_id(admission: Admission) -> None:
    other = OKPKey.generate_key("Ed25519", parameters={"kid": "other"}).as_dict(private=False)
    keys = PublicKeys(msgspec.json.encode({"keys": [other, msgspec.json.decode(dev_keys.PUBLIC_JWK)]}).decode())
    claims = {"sub": "usr_a", "exp": WALL_SECONDS + 60}
    signing = OKPKey.import_key(msgspec.json.decode(dev_keys.PRIVATE_JWK))
    signed = jwt.encode({"alg": "Ed25519", "kid": "dev"}, claims, signing, algorithms=["Ed25519"])
    assert isinstance(check(Admission(keys, 10), signed), Admitted)


def test_tokens_of_an_old_key_are_good_while_it_is_in_the_set_and_not_after() -> None:
    old, new = OKPKey.generate_key("Ed25519"), OKPKey.generate_key("Ed25519")
    halves = [key.as_dict(private=False) | {"kid": key.thumbprint()} for key in (old, new)]
    sets = [PublicKeys(msgspec.json.encode({"keys": keys}).decode()) for keys in (halves, halves[::-1], halves[1:])]
    claims = {"sub": "usr_a", "exp": WALL_SECONDS + 60, "iat": WALL_SECONDS - 0.5}
    for key, verdicts in ((old, [True, True, False]), (new, [True, True, True])):
        signed = jwt.encode({"alg": "Ed25519", "kid": key.thumbprint()}, claims, key, algorithms=["Ed25519"])
        outcomes = [check(Admission(keys, 10), signed) for keys in sets]
        assert [isinstance(outcome, Admitted) for outcome in outcomes] == verdicts


def test_a_key_without_a_name_goes_by_its_thumbprint() -> None:
    key = OKPKey.generate_key("Ed25519")
    keys = PublicKeys(msgspec.json.encode(key.as_dict(private=False)).decode())
    claims = {"sub": "usr_a", "exp": WALL_SECONDS + 60, "iat": WALL_SECONDS - 0.5}
    signed = jwt.encode({"alg": "Ed25519", "kid": key.thumbprint()}, claims, key, algorithms=["Ed25519"])
    outcome = check(Admission(keys, 10), signed)
    assert isinstance(outcome, Admitted)
    assert outcome.issued_ms == WALL_SECONDS * 1000 - 500, "a fraction of a second counts"
    other = jwt.encode({"alg": "Ed25519", "kid": "other"}, claims, key, algorithms=["Ed25519"])
    assert refused(check(Admission(keys, 10), other)) is AuthErrorCode.INVALID_TOKEN


def hs256_with_the_public_key() -> str:
    head = f"{part({'alg': 'HS256'})}.{part({'sub': 'usr_a', 'exp': WALL_SECONDS + 60})}"
    signature = hmac.digest(dev_keys.PUBLIC_JWK.encode(), head.encode(), hashlib.sha256)
    return f"{head}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def another_key() -> str:
    return msgspec.json.encode(OKPKey.generate_key("Ed25519").as_dict(private=True)).decode()


@pytest.mark.parametrize(
    "forged",
    [
        "x",
        "a.b.c",
        "..",
        "\ud800",
        f"{part({'alg': 'none'})}.{part({'sub': 'usr_a', 'exp': WALL_SECONDS + 60})}.",
        hs256_with_the_public_key(),
        token(key=another_key()),
        f"{part({'alg': 'Ed25519', 'kid': '../../x'})}.{part({'sub': 'usr_a'})}.{'A' * 86}",
        token(exp=None),
        token(exp="soon"),
        token(sub=7),
        token(device_id="another"),
    ],
)
def test_whatever_is_not_a_token_of_ours_is_invalid(admission: Admission, forged: str) -> None:
    assert refused(check(admission, forged)) is AuthErrorCode.INVALID_TOKEN


def test_a_token_of_this_device_is_good(admission: Admission) -> None:
    assert isinstance(check(admission, token(device_id="d1")), Admitted)


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        ({"exp": WALL_SECONDS - 59}, True),
        ({"exp": WALL_SECONDS - 60}, False),
        ({"nbf": WALL_SECONDS + 60}, True),
        ({"nbf": WALL_SECONDS + 61}, False),
    ],
)
def test_clocks_may_differ_by_a_minute(admission: Admission, claims: dict[str, Any], good: bool) -> None:
    outcome = check(admission, token(**claims))
    if good:
        assert isinstance(outcome, Admitted)
    else:
        assert refused(outcome) is AuthErrorCode.EXPIRED_TOKEN


def test_a_token_seen_before_still_expires(admission: Admission) -> None:
    auth_token = token(exp=WALL_SECONDS + 1)
    assert isinstance(check(admission, auth_token), Admitted)
    later = check(admission, auth_token, now=NOW + 30, wall_seconds=WALL_SECONDS + 100)
    assert refused(later) is AuthErrorCode.EXPIRED_TOKEN


def test_a_token_seen_before_is_still_its_owners_only(admission: Admission) -> None:
    auth_token = token("usr_a")
    assert isinstance(check(admission, auth_token), Admitted)
    assert refused(check(admission, auth_token, user_id="usr_b")) is AuthErrorCode.USER_MISMATCH


def test_the_eleventh_failure_within_a_minute_is_rate_limited_for_this_address_alone(admission: Admission) -> None:
    for _ in range(10):
        assert refused(check(admission, "x")) is AuthErrorCode.INVALID_TOKEN
    outcome = check(admission, token(), now=NOW + 15)
    assert outcome == Refused(AuthErrorCode.RATE_LIMITED, 45_001)
    assert isinstance(check(admission, token(), remote="10.0.0.2"), Admitted)
    assert isinstance(check(admission, token(), now=NOW + 60), Admitted)


def test_a_token_that_was_good_a_moment_ago_passes_a_limited_address(admission: Admission) -> None:
    """A stranger behind the same address can't keep a reconnecting neighbour out."""
    auth_token = token()
    assert isinstance(check(admission, auth_token), Admitted)
    for _ in range(11):
        check(admission, "x")
    assert isinstance(check(admission, auth_token, now=NOW + 1), Admitted)


def test_old_tokens_of_an_office_do_not_lock_its_address_out(admission: Admission) -> None:
    """A hundred phones that slept over the week-end come back behind one address: nobody guesses there."""
    for number in range(100):
        old = token(f"usr_{number}", exp=WALL_SECONDS - 3600)
        assert refused(check(admission, old, user_id=f"usr_{number}")) is AuthErrorCode.EXPIRED_TOKEN
    assert isinstance(check(admission, token()), Admitted)


def test_a_token_of_somebody_elses_is_still_a_failure(admission: Admission) -> None:
    for _ in range(10):
        assert refused(check(admission, token("usr_b"))) is AuthErrorCode.USER_MISMATCH
    assert refused(check(admission, token())) is AuthErrorCode.RATE_LIMITED


def test_another_address_of_the_same_household_is_limited_too(admission: Admission) -> None:
    for number in range(10):
        check(admission, "x", remote=f"2001:db8::{number:x}")
    assert refused(check(admission, token(), remote="2001:db8::ffff")) is AuthErrorCode.RATE_LIMITED
    assert isinstance(check(admission, token(), remote="2001:db8:0:1::1"), Admitted)


def test_failures_are_forgotten_after_a_minute(admission: Admission) -> None:
    for number in range(40):
        assert refused(check(admission, "x", now=NOW + number * 7)) is AuthErrorCode.INVALID_TOKEN
