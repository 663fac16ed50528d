"""The S3 side of media: the only module that imports the S3 client. Called by the REST role and its sweep.

Clients move the bytes to and from the store themselves, by URLs that end after an hour; this process asks about
objects, signs and deletes. Calls run in threads, a few at a time.

*Raises*: `ObjectsUnavailable` where the store is away or refuses. *Cancellation*: the call goes on in its thread, its
outcome is dropped; every call may be repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import anyio
import anyio.to_thread
import msgspec
import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import InvalidResponseError, MinioException, S3Error
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, Expiration, LifecycleConfig, Rule

from workers.presign import Signer

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from minio.datatypes import Part as StoredPart

    from workers.settings import Settings

LIFETIME_SECONDS: Final = 3600
"""Of a presigned URL."""
CALL_SECONDS: Final = 10.0
"""Deadline of one call: none of them moves a medium's bytes."""
THREADS: Final = 8
"""Calls under way at once; each holds a thread and a connection."""
_BLOB: Final = "application/octet-stream"
_GONE: Final = frozenset(("NoSuchKey", "NoSuchUpload", "NoSuchBucket"))

Answer = TypeVar("Answer")


class ObjectsUnavailable(Exception):
    """The object store is away, or refuses us: try again later."""


class Head(msgspec.Struct, frozen=True):
    """What the store says of an object."""

    size_bytes: int
    content_type: str


class Objects:
    """One bucket. Makes no connection until it is first asked."""

    def __init__(self, settings: Settings) -> None:
        place = urlsplit(settings.s3_url)
        self._bucket = settings.s3_bucket
        self._public = f"{settings.s3_public_url or settings.s3_url}".rstrip("/")
        self._signer = Signer(settings.s3_access_key, settings.s3_secret_key, settings.s3_region)
        self._retention_days = settings.message_retention_days
        self._limiter = anyio.CapacityLimiter(THREADS)
        self._client = Minio(
            place.netloc,
            access_key=settings.s3_access_key,
            secret_key=settings.s3_secret_key,
            secure=place.scheme == "https",
            region=settings.s3_region,
            http_client=urllib3.PoolManager(maxsize=THREADS, timeout=CALL_SECONDS, retries=False),
        )

    async def prepare(self) -> None:
        """The bucket exists, and forgets what is older than a message can be, and uploads that nobody completes."""
        rule = Rule(
            ENABLED,
            rule_filter=Filter(prefix=""),
            rule_id="retention",
            expiration=Expiration(days=self._retention_days),
            abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(days_after_initiation=1),
        )

        def work() -> None:
            if not self._client.bucket_exists(self._bucket):
                self._client.make_bucket(self._bucket)
            self._client.set_bucket_lifecycle(self._bucket, LifecycleConfig([rule]))

        await self._call(work)

    # --- what clients get --------------------------------------------------------------------------------------------

    def put_url(self, name: str, size_bytes: int, content_type: str, now: datetime) -> str:
        """Store exactly so many bytes of this type under this name, once or more, within the hour."""
        headers = {"content-length": str(size_bytes), "content-type": content_type}
        return self._signer.presign("PUT", self._url(name), headers, now, LIFETIME_SECONDS)

    def part_url(self, name: str, upload_id: str, number: int, size_bytes: int, now: datetime) -> str:
        """Store one part of exactly so many bytes; `number` from 1."""
        url = self._url(name, partNumber=str(number), uploadId=upload_id)
        return self._signer.presign("PUT", url, {"content-length": str(size_bytes)}, now, LIFETIME_SECONDS)

    def get_url(self, name: str, file_name: str, now: datetime) -> str:
        """Fetch it, as a download of opaque bytes whatever its sender called it (RFC 6266)."""
        disposition = "attachment"
        if file_name:
            disposition += f"; filename*=UTF-8''{quote(file_name, safe='')}"
        query = {"response-content-disposition": disposition, "response-content-type": _BLOB}
        return self._signer.presign("GET", self._url(name, **query), {}, now, LIFETIME_SECONDS)

    def _url(self, name: str, **query: str) -> str:
        return f"{self._public}/{self._bucket}/{name}" + (f"?{urlencode(query)}" if query else "")

    # --- what we ask -------------------------------------------------------------------------------------------------

    async def head(self, name: str) -> Head | None:
        """What is stored under this name; None for nothing."""

        def work() -> Head:
            found = self._client.stat_object(self._bucket, name)
            return Head(found.size or 0, found.content_type or _BLOB)

        return await self._ask(work)

    async def begin_parts(self, name: str, content_type: str) -> str:
        """An upload in parts; its id. (The client library has these calls for its own use only; they are pinned.)"""
        headers: dict[str, str | list[str] | tuple[str]] = {"Content-Type": content_type}
        return await self._call(lambda: self._client._create_multipart_upload(self._bucket, name, headers))

    async def parts(self, name: str, upload_id: str) -> dict[int, int] | None:
        """The parts that are there, number → bytes; None where the upload has ended or never was."""
        found = await self._parts(name, upload_id)
        return None if found is None else {part.part_number: part.size or 0 for part in found}

    async def _parts(self, name: str, upload_id: str) -> list[StoredPart] | None:
        def work() -> list[StoredPart]:
            found: list[StoredPart] = []
            marker = None
            while True:
                page = self._client._list_parts(self._bucket, name, upload_id, part_number_marker=marker)
                found += page.parts
                if not page.is_truncated:
                    return found
                marker = str(page.next_part_number_marker)

        return await self._ask(work)

    async def complete_parts(self, name: str, upload_id: str) -> None:
        """One object of all the parts that are there. Nothing where the upload has ended: the caller looks at it."""
        parts = await self._parts(name, upload_id)
        if parts:
            await self._ask(lambda: self._client._complete_multipart_upload(self._bucket, name, upload_id, parts))

    async def delete(self, name: str, upload_id: str = "") -> None:
        """The object, and the upload in parts if there is one, are gone; also where they were."""
        if upload_id:
            await self._ask(lambda: self._client._abort_multipart_upload(self._bucket, name, upload_id))
        await self._ask(lambda: self._client.remove_object(self._bucket, name))

    async def _ask(self, work: Callable[[], Answer]) -> Answer | None:
        """None where the object or upload is not there."""
        try:
            return await self._call(work)
        except ObjectsUnavailable as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code in _GONE:
                return None
            raise

    async def _call(self, work: Callable[[], Answer]) -> Answer:
        """Run in a thread."""
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
        except (MinioException, InvalidResponseError, urllib3.exceptions.HTTPError, OSError) as error:
            raise ObjectsUnavailable(str(error)[:200]) from error
