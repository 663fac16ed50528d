"""Presigned S3 requests with signed headers: whoever holds the URL can do this one thing, with exactly these headers.

AWS Signature Version 4 in the query string ("Authenticating Requests: Using Query Parameters", Amazon S3 API
reference). The `minio` client signs the host only; an upload's size and type must be fixed too. Pure: time comes in.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_SERVICE: Final = "s3"


class Signer(msgspec.Struct, frozen=True):
    """Whose signature it is, and the region the store believes to be in."""

    access_key: str
    secret_key: str
    region: str

    def presign(self, method: str, url: str, headers: Mapping[str, str], now: datetime, lifetime_seconds: int) -> str:
        """`url` (its path percent-encoded) with a signature over method, path, query, host and `headers`."""
        place = urlsplit(url)
        moment = now.strftime("%Y%m%dT%H%M%SZ")
        scope = f"{moment[:8]}/{self.region}/{_SERVICE}/aws4_request"
        signed = {"host": place.netloc} | {name.lower(): value.strip() for name, value in headers.items()}
        names = ";".join(sorted(signed))
        query = dict(parse_qsl(place.query, keep_blank_values=True)) | {
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{self.access_key}/{scope}",
            "X-Amz-Date": moment,
            "X-Amz-Expires": str(lifetime_seconds),
            "X-Amz-SignedHeaders": names,
        }
        text = "&".join(sorted(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query.items()))
        lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
        canonical = "\n".join((method, place.path, text, lines, names, "UNSIGNED-PAYLOAD"))
        claim = "\n".join((_ALGORITHM, moment, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        signature = hmac.new(self._key(moment[:8]), claim.encode(), hashlib.sha256).hexdigest()
        return f"{place.scheme}://{place.netloc}{place.path}?{text}&X-Amz-Signature={signature}"

    def _key(self, day: str) -> bytes:
        key = f"AWS4{self.secret_key}".encode()
        for part in (day, self.region, _SERVICE, "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return key
