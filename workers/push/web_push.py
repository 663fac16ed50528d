"""Kind `web_push`: browsers and UnifiedPush apps, by the push service that each has chosen (RFC 8030).

The job is encrypted for the device (RFC 8291, by `http-ece`), so the push service reads nothing of it; we name
ourselves by VAPID (RFC 8292). The service's URL comes from the client, so the request leaves by `egress.py`. A `Topic`
per conversation has the service keep the newest job only.
"""

from __future__ import annotations

import base64
import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import http_ece
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwt
from joserfc.jwk import ECKey

from protocol import codec
from workers.egress import Answered, Failed
from workers.push.adapters import TRY_SECONDS, KeyUnfit, Outcome, Refused, Retry, outcome_of

if TYPE_CHECKING:
    from protocol.records import PushJob
    from workers.egress import Egress
    from workers.store.push_tokens import PushToken

POINT_BYTES: Final = 65
"""Of an uncompressed point of P-256, `p256dh` of a subscription."""
AUTH_BYTES: Final = 16
_TOKEN_SECONDS: Final = 43_200
"""RFC 8292: at most 24 h; half of it leaves room for clocks."""
_ANSWER_BYTES: Final = 1024
_SCALAR_BYTES: Final = 32


class Vapid:
    """Who we say we are, to every push service: `subject` (mailto: or https:) and a key."""

    def __init__(self, private_key: str, subject: str) -> None:
        """`private_key`: the 32 bytes of a P-256 private key in Base64url, as all Web Push tools write it. Raises
        KeyUnfit."""
        try:
            scalar = unpadded(private_key)
            key = ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP256R1())
        except ValueError as error:
            raise KeyUnfit("it is no P-256 private key in Base64url") from error
        if len(scalar) != _SCALAR_BYTES:
            raise KeyUnfit("it is no P-256 private key in Base64url: that is 43 characters")
        point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.public_key = padless(point)
        """What clients subscribe with: `applicationServerKey`."""
        half = (POINT_BYTES - 1) // 2
        public = {"x": padless(point[1 : 1 + half]), "y": padless(point[1 + half :])}
        self._key = ECKey.import_key({"kty": "EC", "crv": "P-256", "d": padless(scalar), **public})
        self._subject = subject

    def header(self, endpoint: str, now_seconds: int) -> str:
        """The `Authorization` for this push service."""
        claims = {"aud": origin_of(endpoint), "exp": now_seconds + _TOKEN_SECONDS, "sub": self._subject}
        token = jwt.encode({"alg": "ES256", "typ": "JWT"}, claims, self._key, algorithms=["ES256"])
        return f"vapid t={token}, k={self.public_key}"


class WebPushAdapter:
    """See `adapters.Adapter`."""

    kind = "web_push"

    def __init__(self, egress: Egress, vapid: Vapid) -> None:
        self._egress = egress
        self._vapid = vapid

    def provider(self, token: PushToken) -> str:
        """See `Adapter.provider`: the push service."""
        return origin_of(token.address)

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """See `Adapter.send`."""
        headers = {
            "authorization": self._vapid.header(token.address, time.time_ns() // 1_000_000_000),
            "content-encoding": "aes128gcm",
            "content-type": "application/octet-stream",
            "ttl": str(ttl_seconds),
            "topic": topic_of(job.conversation_id),
            "urgency": "high",
        }
        body = encrypt(token, codec.encode_value(job))
        match await self._egress.post(token.address, headers, body, seconds=TRY_SECONDS, max_bytes=_ANSWER_BYTES):
            case Answered(status=status, headers=answered):
                return outcome_of(status, answered)
            case Failed(reason=reason, is_refused=is_refused):
                return Refused(reason) if is_refused else Retry(reason)


def encrypt(token: PushToken, content: bytes) -> bytes:
    """One `aes128gcm` record that only the device can read (RFC 8291)."""
    encrypted: bytes = http_ece.encrypt(
        content,
        private_key=ec.generate_private_key(ec.SECP256R1()),
        dh=unpadded(token.p256dh),
        auth_secret=unpadded(token.auth),
        version="aes128gcm",
    )
    return encrypted


def check_keys(p256dh: str, auth: str) -> str:
    """Why these two keys of a subscription are none; "" where they are."""
    try:
        point, secret = unpadded(p256dh), unpadded(auth)
    except ValueError:
        return "keys: they are Base64url"
    if len(secret) != AUTH_BYTES:
        return f"keys.auth: it has {AUTH_BYTES} bytes"
    try:
        if len(point) != POINT_BYTES:
            raise ValueError
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError:
        return f"keys.p256dh: it is an uncompressed point of P-256, {POINT_BYTES} bytes"
    return ""


def origin_of(url: str) -> str:
    """Scheme, host and port (RFC 6454)."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def topic_of(conversation_id: str) -> str:
    """RFC 8030 section 5.4: at most 32 characters of Base64url. A hash: it names the conversation to nobody."""
    return padless(blake2b(conversation_id.encode(), digest_size=24).digest())


def padless(data: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unpadded(text: str) -> bytes:
    """Base64url, with its padding or without. Raises ValueError for anything else."""
    text = text.rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def new_vapid_key() -> tuple[str, str]:
    """A fresh private key, and the public half that clients subscribe with."""
    scalar = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value
    private = padless(scalar.to_bytes(_SCALAR_BYTES, "big"))
    return private, Vapid(private, "").public_key
