"""Media: uploads begin and end here, the bytes go to the object store and come from it by presigned URL.

Whoever sees a message that carries a medium may download it; the server looks at no byte of it.
"""

from __future__ import annotations

import math
import unicodedata
from datetime import datetime, timedelta
from typing import Annotated, Final

import msgspec
from litestar import Response, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from protocol.errors import ErrorCode
from protocol.media import ContentType, MediaKind, MediaMetadata, MediaStatus, Sha256, url_of
from workers.objects import LIFETIME_SECONDS, Objects
from workers.rest.access import shape_guard, user_guard
from workers.rest.allowances import spend
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, Limit, Listing, moment_at
from workers.settings import MEBIBYTE
from workers.store.media import GRACE

SINGLE_PUT_BYTES: Final = 64 * MEBIBYTE
"""Larger ones go in parts, so that a broken line costs one of them."""
PART_BYTES: Final = 16 * MEBIBYTE
_FILE_NAME: Final = 128
_HOUR: Final = 3600

PathMedia = Annotated[str, PathParameter(pattern=r"\Amed_[0-9a-f]{27}\Z")]
MediaCursor = Annotated[str | None, QueryParameter(pattern=r"\Amed_[0-9a-f]{27}\Z", required=False)]


class NewMedia(msgspec.Struct, frozen=True, kw_only=True):
    """`sha256`: of the bytes as they will be uploaded, so that the same ones are stored once per user.

    `file_name` is only what a browser proposes for the download; clients that encrypt leave it out.
    """

    kind: MediaKind
    content_type: ContentType = "application/octet-stream"
    size_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    sha256: Sha256
    file_name: Annotated[str, Meta(min_length=1, max_length=1024)] | UnsetType = UNSET


class Part(msgspec.Struct, frozen=True):
    """PUT exactly `size_bytes` here. `number` counts from 1."""

    number: int
    size_bytes: int
    url: str


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes go, until `expires_at`: all of them to `url` with `content_type` as Content-Type, or each missing
    part to its own, in any order; part n holds the bytes from (n - 1) x `part_bytes`."""

    url: str | UnsetType = UNSET
    content_type: str | UnsetType = UNSET
    part_bytes: int | UnsetType = UNSET
    parts: list[Part] | UnsetType = UNSET
    expires_at: datetime


class Media(msgspec.Struct, frozen=True, kw_only=True):
    """A medium. A message carries it as `media_url` once it is `ready`. `upload`: what is missing while pending."""

    media_id: str
    media_url: str
    kind: MediaKind
    content_type: str
    size_bytes: int
    sha256: str
    file_name: str | UnsetType = UNSET
    status: MediaStatus
    created_at: datetime
    expires_at: datetime
    upload: Upload | UnsetType = UNSET


class Download(msgspec.Struct, frozen=True, kw_only=True):
    """`url` gives the bytes until `expires_at`."""

    media: Media
    url: str
    expires_at: datetime


@post(
    "/v1/media",
    guards=[user_guard, shape_guard],
    opt={
        "errors": (
            ErrorCode.TOO_LARGE,
            ErrorCode.QUOTA_EXCEEDED,
            ErrorCode.RATE_LIMITED,
            ErrorCode.NOT_FOUND,
            ErrorCode.OVERLOADED,
        ),
        "answers": {200: Media},
    },
    summary="Begin an upload",
)
async def create_media(request: CallerRequest, data: JSONBody[NewMedia], desk: DeskDependency) -> Response[Media]:
    """201 with where the bytes go; 200 where the caller has uploaded the same ones before, or begun to.

    404 `not_found` where this installation has no media, 413 `too_large`, 507 `quota_exceeded`.
    """
    objects = _objects(desk)
    user_id = request.user.user
    if data.size_bytes > desk.settings.media_max_bytes:
        raise RestError(ErrorCode.TOO_LARGE, f"an upload has at most {desk.settings.media_max_bytes} bytes")
    now = moment_at(now_ms())
    life = timedelta(days=desk.settings.message_retention_days)
    same = await desk.store.media.same(user_id, data.sha256, data.size_bytes, data.kind, now + life / 2)
    if same is not None:
        return Response(await _shown(objects, desk, same, now), status_code=200)
    await spend(desk, "media", user_id, desk.settings.media_uploads_per_hour, _HOUR)
    media = MediaMetadata(
        media_id=desk.new_id("med"),
        owner_id=user_id,
        kind=data.kind,
        content_type=data.content_type,
        size_bytes=data.size_bytes,
        sha256=data.sha256,
        file_name=data.file_name if data.file_name is UNSET else plain_name(data.file_name),
        status=MediaStatus.PENDING,
        created_at=now,
        due_at=now + timedelta(seconds=desk.settings.media_orphan_seconds),
        expires_at=now + life,
    )
    if not await desk.store.media.begin(media, desk.settings.media_quota_bytes):
        raise RestError(ErrorCode.QUOTA_EXCEEDED, f"uploads take at most {desk.settings.media_quota_bytes} bytes")
    return Response(await _shown(objects, desk, media, now), status_code=201)


@get(
    "/v1/media",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit")},
    summary="List the caller's uploads",
)
async def list_media(
    request: CallerRequest, desk: DeskDependency, cursor: MediaCursor = None, limit: Limit = 50
) -> Listing[Media]:
    """Oldest first."""
    page, following = await desk.store.media.owned(request.user.user, cursor or "", limit)
    return Listing([_media(media) for media in page], following)


@get(
    "/v1/media/{media_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Where to download a medium",
)
async def read_media(request: CallerRequest, media_id: PathMedia, desk: DeskDependency) -> Download:
    """For its owner and for everybody who sees a message that carries it; the same 404 for all others."""
    objects = _objects(desk)
    media = await desk.store.media.get(media_id)
    now = moment_at(now_ms())
    if media is None or media.status is MediaStatus.PENDING or media.expires_at <= now:
        raise _no_media()
    user_id = request.user.user
    if media.owner_id != user_id and not await desk.store.media.shown_to(user_id, url_of(media_id), now):
        raise _no_media()
    name = "" if media.file_name is UNSET else media.file_name
    return Download(media=_media(media), url=objects.get_url(media_id, name, now), expires_at=_end(now))


@get(
    "/v1/media/{media_id:str}/upload",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.OVERLOADED)},
    summary="Go on with an upload",
)
async def resume_media(request: CallerRequest, media_id: PathMedia, desk: DeskDependency) -> Media:
    """With fresh URLs for what is missing; 409 `conflict` where nothing is."""
    objects = _objects(desk)
    media = await _own(desk, request.user.user, media_id)
    if media.status is not MediaStatus.PENDING:
        raise RestError(ErrorCode.CONFLICT, "this upload is complete")
    return await _shown(objects, desk, media, moment_at(now_ms()))


@post(
    "/v1/media/{media_id:str}/complete",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": (ErrorCode.NOT_FOUND, ErrorCode.UPLOAD_INCOMPLETE, ErrorCode.OVERLOADED)},
    summary="End an upload",
)
async def complete_media(request: CallerRequest, media_id: PathMedia, desk: DeskDependency) -> Media:
    """The medium, which messages can carry from now on. Repeating it changes nothing.

    422 `upload_incomplete` where the store has less, more or something of another type than was declared.
    """
    objects = _objects(desk)
    media = await _own(desk, request.user.user, media_id)
    if media.status is not MediaStatus.PENDING:
        return _media(media)
    if media.upload_id is not UNSET:
        await _complete_parts(objects, media, media.upload_id)
    head = await objects.head(media_id)
    if head is None or head.size_bytes != media.size_bytes:
        there = 0 if head is None else head.size_bytes
        raise RestError(ErrorCode.UPLOAD_INCOMPLETE, f"{there} of {media.size_bytes} bytes are there")
    if head.content_type != media.content_type:
        raise RestError(ErrorCode.UPLOAD_INCOMPLETE, "it was stored with another type")
    due = moment_at(now_ms()) + timedelta(seconds=desk.settings.media_orphan_seconds)
    ready = await desk.store.media.finish(media_id, due)
    if ready is None:
        raise _no_media()
    return _media(ready)


@delete(
    "/v1/media/{media_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND, ErrorCode.CONFLICT)},
    summary="Give an upload up",
)
async def delete_media(request: CallerRequest, media_id: PathMedia, desk: DeskDependency) -> None:
    """204: it goes, and its bytes count no longer once the sweep has been there. 409 `conflict` while a message
    carries it: delete the message."""
    media = await _own(desk, request.user.user, media_id)
    if await desk.store.media.carried(media_id):
        raise RestError(ErrorCode.CONFLICT, "a message carries it")
    await desk.store.media.move(media.media_id, MediaStatus.LEAVING, moment_at(now_ms()) + GRACE)


# --- shared ----------------------------------------------------------------------------------------------------------


async def _complete_parts(objects: Objects, media: MediaMetadata, upload_id: str) -> None:
    there = await objects.parts(media.media_id, upload_id)
    if there is None:  # completed by an earlier call whose answer was lost
        return
    missing = [number for number, size in _part_sizes(media.size_bytes) if there.get(number) != size]
    if missing:
        raise RestError(ErrorCode.UPLOAD_INCOMPLETE, f"{len(missing)} parts are missing, the first is {missing[0]}")
    await objects.complete_parts(media.media_id, upload_id)


async def _shown(objects: Objects, desk: Desk, media: MediaMetadata, now: datetime) -> Media:
    """The medium with where its missing bytes go."""
    if media.status is not MediaStatus.PENDING:
        return _media(media)
    if media.size_bytes <= SINGLE_PUT_BYTES:
        url = objects.put_url(media.media_id, media.size_bytes, media.content_type, now)
        return _media(media, Upload(url=url, content_type=media.content_type, expires_at=_end(now)))
    upload_id = media.upload_id
    if upload_id is UNSET:
        begun = await objects.begin_parts(media.media_id, media.content_type)
        upload_id = await desk.store.media.note_parts(media.media_id, begun)
    there = await objects.parts(media.media_id, upload_id) or {}
    parts = [
        Part(number, size, objects.part_url(media.media_id, upload_id, number, size, now))
        for number, size in _part_sizes(media.size_bytes)
        if there.get(number) != size
    ]
    return _media(media, Upload(part_bytes=PART_BYTES, parts=parts, expires_at=_end(now)))


def _part_sizes(size_bytes: int) -> list[tuple[int, int]]:
    """(number, bytes) of every part."""
    count = math.ceil(size_bytes / PART_BYTES)
    return [(number, min(PART_BYTES, size_bytes - (number - 1) * PART_BYTES)) for number in range(1, count + 1)]


def plain_name(name: str) -> str:
    """A file name without directories, control and direction signs, short enough for any header (RFC 6266
    section 4.3)."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(sign for sign in last if unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return kept.strip(" .")[-_FILE_NAME:] or "file"


def _media(media: MediaMetadata, upload: Upload | UnsetType = UNSET) -> Media:
    return Media(
        media_id=media.media_id,
        media_url=url_of(media.media_id),
        kind=media.kind,
        content_type=media.content_type,
        size_bytes=media.size_bytes,
        sha256=media.sha256,
        file_name=media.file_name,
        status=media.status,
        created_at=media.created_at,
        expires_at=media.expires_at,
        upload=upload,
    )


def _end(now: datetime) -> datetime:
    return now + timedelta(seconds=LIFETIME_SECONDS)


def _objects(desk: Desk) -> Objects:
    if desk.objects is None:
        raise RestError(ErrorCode.NOT_FOUND, "this installation has no media")
    return desk.objects


async def _own(desk: Desk, user_id: str, media_id: str) -> MediaMetadata:
    media = await desk.store.media.get(media_id)
    if media is None or media.owner_id != user_id or media.status is MediaStatus.LEAVING:
        raise _no_media()
    return media


def _no_media() -> RestError:
    return RestError(ErrorCode.NOT_FOUND, "no such medium")
