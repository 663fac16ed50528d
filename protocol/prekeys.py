"""Public keys of devices as they are uploaded and claimed, and the bytes a device signs. Called by the REST role and by
clients.

The server hands public keys out and checks their signatures; what is encrypted with them it cannot read. All values are
unpadded base64 in its one canonical form.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

PublicKey = Annotated[
    str, Meta(min_length=43, max_length=43, pattern=r"\A[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]\Z", description="32 bytes")
]
Signature = Annotated[
    str, Meta(min_length=86, max_length=86, pattern=r"\A[A-Za-z0-9+/]{85}[AQgw]\Z", description="64 bytes")
]
KeyId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[A-Za-z0-9+/=_-]+\Z")]


class Purpose(StrEnum):
    """What a prekey is for: one session, or all that come when the one-time keys are used up."""

    ONE_TIME = "one_time"
    FALLBACK = "fallback"


class SignedKey(msgspec.Struct, frozen=True):
    """A Curve25519 prekey; `signature` is the device's, over `signed_bytes`."""

    key_id: KeyId
    key: PublicKey
    signature: Signature


def signed_bytes(user_id: str, device_id: str, identity_key: str, purpose: Purpose, key_id: str, key: str) -> bytes:
    """What the device's Ed25519 signing key signs: these fields in this order, in UTF-8, with a NUL between them.

    With the identity key in it, one good signature proves the device's whole identity, and no prekey can be passed off
    as another device's or for another purpose.
    """
    return "\0".join(("trireme.prekey.v1", user_id, device_id, identity_key, purpose.value, key_id, key)).encode()
