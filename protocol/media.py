"""Media as messages name them: ids, urls, kinds, and the `media_metadata` document.

Called by everyone. A `media_url` names an upload of this system and nothing else: it is a path of the HTTP API, so no
message makes anybody fetch from a host of its sender's choice. The bytes lie in an S3 store and are opaque; clients
encrypt them.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocol.models import MessageType

URL_PREFIX: Final = "/v1/media/"
ContentType = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9!#$&^_.+-]{0,62}/[a-z0-9][a-z0-9!#$&^_.+-]{0,62}\Z")]
"""A media type without parameters (RFC 6838 section 4.2). Encrypted blobs say `application/octet-stream`."""
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class MediaKind(StrEnum):
    """What a medium is shown as; the message types that carry one."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
    DOCUMENT = "document"


class MediaStatus(StrEnum):
    """`pending`: nobody has confirmed that the bytes are there. `leaving`: in no message, about to be deleted."""

    PENDING = "pending"
    READY = "ready"
    LEAVING = "leaving"


KINDS: Final = {
    MessageType.IMAGE: MediaKind.IMAGE,
    MessageType.VIDEO: MediaKind.VIDEO,
    MessageType.AUDIO: MediaKind.AUDIO,
    MessageType.DOCUMENT: MediaKind.DOCUMENT,
}
"""Message type → the kind of medium it may carry; the other types carry none."""


class MediaMetadata(msgspec.Struct, kw_only=True, frozen=True):
    """A `media_metadata` document; `_id` is also the object's name in the bucket.

    `sha256`: what the owner says the bytes hash to. `upload_id`: the store's name for an upload in parts.
    `due_at`: when the sweep next looks at it. `expires_at`: the end of its life (message retention).
    """

    media_id: str = msgspec.field(name="_id")
    owner_id: str
    kind: MediaKind
    content_type: str
    size_bytes: int
    sha256: str
    file_name: str | UnsetType = UNSET
    status: MediaStatus
    upload_id: str | UnsetType = UNSET
    created_at: datetime
    due_at: datetime
    expires_at: datetime


def url_of(media_id: str) -> str:
    """What a message says to carry this medium."""
    return URL_PREFIX + media_id


def id_of(media_url: str) -> str:
    """The id in a `MediaUrl`."""
    return media_url[len(URL_PREFIX) :]
