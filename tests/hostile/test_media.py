"""H-15 to H-19: bad input about media. Nobody looks into the bytes, so what they claim to be harms nobody."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import httpx2
import msgspec
import pytest

from tests.hostile.rows import Row, by_row, judge
from workers.rest.media import SINGLE_PUT_BYTES
from workers.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

LARGEST: Final = 2**29
QUOTA: Final = 2**30
DANGEROUS: Final = (
    (b"\x89PNG\r\n\x1a\n<html><script>alert(1)</script>", "image/png"),
    (b"GIF89a/*<svg onload=alert(1)>*/=1;", "image/gif"),
    (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml"),
    (b"PK\x03\x04" * 100, "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
)
NAMES: Final = {
    "../../x": "x",
    "a\r\nSet-Cookie: b": "aSet-Cookie%3A%20b",
    "\u202egpj.exe": "gpj.exe",
    "x" * 256: "x" * 128,
}


def declared(data: bytes, **more: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    return {"kind": "image", "content_type": "image/png", "size_bytes": len(data), "sha256": sha256} | more


async def put(url: str, data: bytes, content_type: str) -> int:
    async with httpx2.AsyncClient(timeout=20) as client:
        return (await client.put(url, content=data, headers={"Content-Type": content_type})).status_code


async def begun(scene: Scene, token: str, data: bytes, **more: Any) -> dict[str, Any]:
    answer = await scene.ask("POST", "/v1/media", token, declared(data, **more))
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def downloaded(scene: Scene, data: bytes, **more: Any) -> httpx2.Response:
    """What a browser gets of an upload."""
    token = scene.people.tokens[await scene.people.user()]
    media = await begun(scene, token, data, **more)
    assert await put(media["upload"]["url"], data, media["content_type"]) == 200
    ended = await scene.ask("POST", f"/v1/media/{media['media_id']}/complete", token)
    assert ended.status_code == 200, ended.text
    url = (await scene.ask("GET", media["media_url"], token)).json()["url"]
    assert "?" in url
    assert url.split("?")[0].endswith(f"/{media['media_id']}"), "no name of the user's in the path"
    async with httpx2.AsyncClient(timeout=20) as client:
        return await client.get(url)


def begins(**more: Any) -> Play:
    """(Status, error code) of the begin of an upload."""

    async def play(scene: Scene) -> tuple[int, str]:
        token = scene.people.tokens[await scene.people.user()]
        answer = await scene.ask("POST", "/v1/media", token, declared(b"x", **more))
        return answer.status_code, answer.json()["error"]["code"] if answer.status_code >= 400 else ""

    return play


async def another_size(scene: Scene) -> tuple[int, int, int, str]:
    """(PUT of one byte more, of one less, status and code of the end) of an upload that was declared otherwise."""
    token = scene.people.tokens[await scene.people.user()]
    media = await begun(scene, token, b"declared")
    puts = [await put(media["upload"]["url"], data, "image/png") for data in (b"declared!", b"declare")]
    ended = await scene.ask("POST", f"/v1/media/{media['media_id']}/complete", token)
    return puts[0], puts[1], ended.status_code, ended.json()["error"]["code"]


async def another_key(scene: Scene) -> int:
    token = scene.people.tokens[await scene.people.user()]
    first, second = await begun(scene, token, b"first"), await begun(scene, token, b"other")
    return await put(first["upload"]["url"].replace(first["media_id"], second["media_id"]), b"first", "image/png")


def harmless(data: bytes, content_type: str) -> Play:
    """(Status, type, beginning of the disposition) of the download, whatever was uploaded."""

    async def play(scene: Scene) -> tuple[int, str, str, bool]:
        answer = await downloaded(scene, data, content_type=content_type)
        headers = answer.headers
        return (
            answer.status_code,
            headers["content-type"],
            headers["content-disposition"].split(";")[0],
            answer.content == data,
        )

    return play


def named(name: str) -> Play:
    """The name that a browser is offered."""

    async def play(scene: Scene) -> str:
        answer = await downloaded(scene, b"named", file_name=name)
        assert "set-cookie" not in answer.headers
        return answer.headers["content-disposition"].removeprefix("attachment; filename*=UTF-8''")

    return play


async def the_101st(scene: Scene) -> tuple[set[int], int, bool]:
    """(Statuses of the first hundred, of the next, has it Retry-After?) of uploads begun within the hour."""
    token = scene.people.tokens[await scene.people.user()]
    answers = [
        await scene.ask("POST", "/v1/media", token, declared(b"x", sha256=f"{number:064x}")) for number in range(101)
    ]
    last = answers.pop()
    return {answer.status_code for answer in answers}, last.status_code, "retry-after" in last.headers


async def over_quota(scene: Scene) -> list[int]:
    """Two of the largest fill it; then not one byte more."""
    token = scene.people.tokens[await scene.people.user()]
    sizes = (LARGEST, LARGEST, 1)
    bodies = [declared(b"x", size_bytes=size, sha256=f"{number:064x}") for number, size in enumerate(sizes)]
    return [(await scene.ask("POST", "/v1/media", token, body)).status_code for body in bodies]


ROWS: Final = [
    Row("H-15", "one byte over the largest", (413, "too_large"), begins(size_bytes=LARGEST + 1), because="512 MiB"),
    Row("H-15", "over 64 MiB", (201, ""), begins(size_bytes=SINGLE_PUT_BYTES + 1), because="it goes in parts"),
    Row("H-15", "another size than declared", (403, 403, 422, "upload_incomplete"), another_size),
    Row("H-15", "a presigned URL for another key", 403, another_key),
    *(
        Row(
            "H-16",
            f"{content_type} with something else in it",
            (200, "application/octet-stream", "attachment", True),
            harmless(data, content_type),
            because="opaque bytes, which most clients have encrypted, so there is no limit of pixels to check",
        )
        for data, content_type in DANGEROUS
    ),
    Row(
        "H-17",
        "a download",
        (200, "application/octet-stream", "attachment", True),
        harmless(b"plain", "text/html"),
        because="an S3 answer has no nosniff and no CSP; its type and disposition are signed, and it is another origin",
    ),
    *(Row("H-18", f"the name {name[:20]!r}", plain, named(name)) for name, plain in NAMES.items()),
    Row("H-19", "the 101st upload in an hour", ({201}, 429, True), the_101st),
    Row("H-19", "over 1 GiB", [201, 201, 507], over_quota),
]


@pytest.mark.trio
@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)


def test_the_rows_name_the_defaults() -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    assert defaults["media_max_bytes"] == LARGEST
    assert defaults["media_quota_bytes"] == QUOTA
    assert defaults["media_uploads_per_hour"] == 100
