"""The device's side of Web Push: the keys of a subscription, RFC 8291 and RFC 8292 written out, apart from the library
that sends."""

from __future__ import annotations

import base64
import re
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwt
from joserfc.jwk import ECKey

from workers.store.push_tokens import PushToken


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Subscriber:
    """A browser that has subscribed."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.public = self.private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.auth = b"sixteen bytes !!"

    @property
    def keys(self) -> dict[str, str]:
        """As `PushSubscription.toJSON()` has them."""
        return {"p256dh": base64url(self.public), "auth": base64url(self.auth)}

    def token(self, url: str) -> PushToken:
        now = datetime.now(UTC)
        return PushToken(
            user_id="bob",
            device_id="browser",
            kind="web_push",
            address=url,
            p256dh=base64url(self.public),
            auth=base64url(self.auth),
            registered_at=now,
            expires_at=now,
        )

    def decrypt(self, body: bytes) -> bytes:
        """RFC 8188 section 2.1 and RFC 8291 section 3.4."""
        salt, size, key_size = body[:16], int.from_bytes(body[16:20], "big"), body[20]
        sender, encrypted = body[21 : 21 + key_size], body[21 + key_size :]
        assert len(encrypted) <= size, "one record"
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sender)
        shared = self.private.exchange(ec.ECDH(), point)
        info = b"WebPush: info\0" + self.public + sender
        secret = _derive(shared, self.auth, info, 32)
        key = _derive(secret, salt, b"Content-Encoding: aes128gcm\0", 16)
        nonce = _derive(secret, salt, b"Content-Encoding: nonce\0", 12)
        padded = AESGCM(key).decrypt(nonce, encrypted, None)
        content, _, _ = padded.rstrip(b"\0").rpartition(b"\x02")
        return content


def _derive(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt, info).derive(secret)


def proven(authorization: str, public_key: str, url: str) -> dict[str, Any]:
    """The claims of who sends, as a push service checks them (RFC 8292)."""
    found = re.fullmatch(r"vapid t=([^, ]+), k=([A-Za-z0-9_-]+)", authorization)
    assert found is not None
    assert found[2] == public_key
    point = base64.urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4))
    assert (len(point), point[0]) == (65, 4)
    half = {"x": base64url(point[1:33]), "y": base64url(point[33:])}
    decoded = jwt.decode(found[1], ECKey.import_key({"kty": "EC", "crv": "P-256", **half}), algorithms=["ES256"])
    parts = urlsplit(url)
    claims: dict[str, Any] = decoded.claims
    assert claims["aud"] == f"https://{parts.netloc}"
    assert time.time_ns() // 10**9 < claims["exp"] <= time.time_ns() // 10**9 + 86_400
    return claims
