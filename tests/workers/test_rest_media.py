"""Media over HTTP with a real S3 store: what is declared is what can be stored, and only who may see it fetches it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import msgspec
import pytest

from bench.object_store import run_store
from protocol.media import MediaStatus
from tests.workers.conftest import serving
from tests.workers.seeding import Rest, refusal
from workers import orphans
from workers.objects import Objects
from workers.rest import media as routes
from workers.rest.media import PART_BYTES, SINGLE_PUT_BYTES, plain_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

PICTURE = b"\x89PNG and then some bytes that nobody looks at"


@pytest.fixture(scope="module")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_store(tmp_path_factory.mktemp("objects")) as url:
        yield url


@pytest.fixture
def settings(settings: Settings, s3_url: str) -> Settings:
    return msgspec.structs.replace(
        settings, s3_url=s3_url, media_quota_bytes=SINGLE_PUT_BYTES + 3 * PART_BYTES, media_max_bytes=10 * PART_BYTES
    )


@pytest.fixture
async def objects(settings: Settings) -> Objects:
    opened = Objects(settings)
    await opened.prepare()
    return opened


@pytest.fixture
async def rest(settings: Settings, store: Store, broker: Broker, objects: Objects) -> AsyncIterator[Rest]:
    async with serving(settings, store, broker, owner=True) as running:
        yield running


def declared(data: bytes = PICTURE, **more: Any) -> dict[str, Any]:
    described = {"kind": "image", "content_type": "image/png", "size_bytes": len(data)}
    return described | {"sha256": hashlib.sha256(data).hexdigest()} | more


async def put(url: str, data: bytes, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx2.AsyncClient(timeout=20) as client:
        return (await client.put(url, content=data, headers=named)).status_code


async def begin(rest: Rest, token: str, data: bytes = PICTURE, **more: Any) -> dict[str, Any]:
    answer = await rest.call("POST", "/v1/media", token, declared(data, **more))
    assert answer.status_code == 201, answer.text
    begun: dict[str, Any] = answer.json()
    return begun


async def upload(rest: Rest, token: str, data: bytes = PICTURE, **more: Any) -> str:
    """A finished upload; its url."""
    begun = await begin(rest, token, data, **more)
    assert await put(begun["upload"]["url"], data, Content_Type=begun["upload"]["content_type"]) == 200
    ended = await rest.call("POST", f"/v1/media/{begun['media_id']}/complete", token)
    assert (ended.status_code, ended.json()["status"]) == (200, "ready"), ended.text
    url: str = ended.json()["media_url"]
    return url


async def carry(rest: Rest, token: str, conversation: str, url: str, key: str, kind: str = "image") -> httpx2.Response:
    body = {"content": "", "type": kind, "media_url": url, "timestamp": 1}
    return await rest.call("POST", f"/v1/conversations/{conversation}/messages", token, body, Idempotency_Key=key)


async def test_a_picture_is_uploaded_sent_and_fetched_by_those_who_see_the_message(rest: Rest) -> None:
    (_, token), (bob, reader), (cat, stranger) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    group = await rest.group(token, bob)
    url = await upload(rest, token, file_name="../../\u202egnp.exe\r\nX: y")
    assert refusal(await rest.call("GET", url, reader)) == (404, "not_found"), "in no message yet"
    sent = await carry(rest, token, group, url, "k1")
    assert sent.status_code == 201, sent.text
    for caller in (token, reader):
        found = await rest.call("GET", url, caller)
        assert found.status_code == 200, found.text
        async with httpx2.AsyncClient() as client:
            fetched = await client.get(found.json()["url"])
        assert (fetched.status_code, fetched.content) == (200, PICTURE)
        assert fetched.headers["content-type"] == "application/octet-stream"
        assert fetched.headers["content-disposition"] == "attachment; filename*=UTF-8''gnp.exeX%3A%20y"
    unknown = await rest.call("GET", "/v1/media/med_" + "0" * 27, stranger)
    assert (await rest.call("GET", url, stranger)).json() == unknown.json(), "foreign and unknown look the same"

    added = await rest.call("POST", f"/v1/conversations/{group}/participants", token, {"user_ids": [cat]})
    assert added.status_code == 200, added.text
    assert refusal(await rest.call("GET", url, stranger)) == (404, "not_found"), "sent before they came"
    assert (await carry(rest, token, group, url, "k2")).status_code == 201
    assert (await rest.call("GET", url, stranger)).status_code == 200

    for key in ("k1", "k2"):
        message = sent.json()["message_id"] if key == "k1" else (await carry(rest, token, group, url, "k2")).json()
        message_id = message if isinstance(message, str) else message["message_id"]
        gone = await rest.call("DELETE", f"/v1/conversations/{group}/messages/{message_id}?scope=all", token)
        assert gone.status_code in (200, 204), gone.text
    assert refusal(await rest.call("GET", url, reader)) == (404, "not_found"), "deleted for all"


async def test_only_what_was_declared_can_be_stored_and_only_that_can_be_finished(rest: Rest) -> None:
    (_, token), (_, other) = await rest.user("Ann"), await rest.user("Bob")
    begun = await begin(rest, token)
    url, path = begun["upload"]["url"], f"/v1/media/{begun['media_id']}"
    assert refusal(await rest.call("POST", f"{path}/complete", token)) == (422, "upload_incomplete"), "nothing there"
    assert await put(url, PICTURE + b"!", Content_Type="image/png") == 403, "one byte more"
    assert await put(url, PICTURE, Content_Type="text/html") == 403, "another type"
    assert await put(url.replace(begun["media_id"], "med_" + "1" * 27), PICTURE, Content_Type="image/png") == 403
    assert refusal(await rest.call("POST", f"{path}/complete", other)) == (404, "not_found")
    assert refusal(await rest.call("GET", f"{path}/upload", other)) == (404, "not_found")
    assert await put(url, PICTURE, Content_Type="image/png") == 200
    for _ in range(2):
        assert (await rest.call("POST", f"{path}/complete", token)).json()["status"] == "ready"
    assert refusal(await rest.call("GET", f"{path}/upload", token)) == (409, "conflict"), "nothing is missing"
    again = await rest.call("POST", "/v1/media", token, declared())
    assert (again.status_code, again.json()["media_id"]) == (200, begun["media_id"]), "the same bytes again"
    assert (await begin(rest, other))["media_id"] != begun["media_id"], "nobody learns what others have"


async def test_an_upload_that_is_late_or_signed_by_somebody_else_is_refused_and_may_begin_again(
    rest: Rest, objects: Objects
) -> None:
    _, token = await rest.user("Ann")
    begun = await begin(rest, token)
    url = begun["upload"]["url"]
    head, _, signature = url.rpartition("=")
    assert await put(f"{head}={signature[::-1]}", PICTURE, Content_Type="image/png") == 403, "another signature"
    late = objects.put_url(begun["media_id"], len(PICTURE), "image/png", datetime.now(UTC) - timedelta(minutes=61))
    assert await put(late, PICTURE, Content_Type="image/png") == 403, "its hour is over"
    fresh = objects.put_url(begun["media_id"], len(PICTURE), "image/png", datetime.now(UTC) - timedelta(minutes=59))
    assert await put(fresh, PICTURE, Content_Type="image/png") == 200
    again = (await rest.call("GET", f"/v1/media/{begun['media_id']}/upload", token)).json()
    assert await put(again["upload"]["url"], PICTURE, Content_Type="image/png") == 200, (
        "who comes late asks for another"
    )


async def test_a_message_carries_only_media_its_sender_may_use(rest: Rest) -> None:
    (_, token), (bob, reader), (cat, third) = [await rest.user(name) for name in ("Ann", "Bob", "Cat")]
    group = await rest.group(token, bob)
    aside = await rest.group(reader, cat)
    begun = await begin(rest, token)
    refused = (400, "validation_failed")
    assert refusal(await carry(rest, token, group, begun["media_url"], "k0")) == refused, "not finished"
    url = await upload(rest, token, b"another")
    assert refusal(await carry(rest, reader, aside, url, "k1")) == refused, "somebody else's"
    assert refusal(await carry(rest, token, group, url, "k2", kind="video")) == refused, "another kind"
    assert refusal(await carry(rest, token, group, url, "k3", kind="text")) == refused
    assert (await carry(rest, token, group, url, "k4")).status_code == 201
    assert (await carry(rest, reader, aside, url, "k5")).status_code == 201, "forwarded by who sees it"
    assert (await rest.call("GET", url, third)).status_code == 200, "and so seen by their friends"
    for hostile in (
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "//evil.example/x",
        "https://127.0.0.1/x",
        f"{url}/..",
        f"{url}\r\nX: y",
        "/v1/media/" + "x" * 2049,
    ):
        assert refusal(await carry(rest, token, group, hostile, "k6")) == refused, hostile


async def test_a_large_file_goes_in_parts_and_goes_on_where_it_stopped(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    data = bytes(SINGLE_PUT_BYTES + PART_BYTES // 2)
    begun = await begin(rest, token, data, kind="video", content_type="video/mp4")
    parts = begun["upload"]["parts"]
    assert [part["size_bytes"] for part in parts] == [PART_BYTES] * 4 + [PART_BYTES // 2]
    assert await put(parts[0]["url"], data[: PART_BYTES + 1]) == 403, "one byte more"
    for part in parts[1:]:
        assert await put(part["url"], data[: part["size_bytes"]]) == 200
    path = f"/v1/media/{begun['media_id']}"
    short = await rest.call("POST", f"{path}/complete", token)
    assert refusal(short) == (422, "upload_incomplete")
    missing = (await rest.call("GET", f"{path}/upload", token)).json()["upload"]["parts"]
    assert [part["number"] for part in missing] == [1]
    assert await put(missing[0]["url"], data[:PART_BYTES]) == 200
    for _ in range(2):
        ended = await rest.call("POST", f"{path}/complete", token)
        assert (ended.status_code, ended.json()["status"]) == (200, "ready"), ended.text


async def test_limits_of_size_quota_and_number_hold_at_once(rest: Rest, settings: Settings, store: Store) -> None:
    user, token = await rest.user("Ann")
    fits, largest = settings.media_quota_bytes, settings.media_max_bytes
    answer = await rest.call("POST", "/v1/media", token, declared(size_bytes=largest + 1))
    assert refusal(answer) == (413, "too_large")
    assert refusal(await rest.call("POST", "/v1/media", token, declared(size_bytes=fits + 1))) == (
        507,
        "quota_exceeded",
    )
    assert await store.media.used_bytes(user) == 0
    outcomes: list[int] = []

    async def one(number: int) -> None:
        body = declared(size_bytes=PART_BYTES, sha256=f"{number:064x}")
        outcomes.append((await rest.call("POST", "/v1/media", token, body)).status_code)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(one, number)
    assert set(outcomes) <= {201, 507}
    assert await store.media.used_bytes(user) == outcomes.count(201) * PART_BYTES <= fits
    for bad in (
        declared(size_bytes=0),
        declared(sha256="x" * 64),
        declared(kind="text"),
        declared(content_type="image/png; charset=x"),
        declared(file_name=""),
        {"kind": "image"},
    ):
        assert refusal(await rest.call("POST", "/v1/media", token, bad))[1] == "validation_failed", bad


async def test_what_no_message_carries_is_deleted_and_what_one_carries_stays(
    rest: Rest, store: Store, objects: Objects
) -> None:
    (_, token), (bob, _) = await rest.user("Ann"), await rest.user("Bob")
    group = await rest.group(token, bob)
    carried, orphan = await upload(rest, token), await upload(rest, token, b"orphan")
    unfinished = (await begin(rest, token, b"never"))["media_url"]
    given_up = await upload(rest, token, b"not this one")
    assert (await carry(rest, token, group, carried, "k1")).status_code == 201
    assert refusal(await rest.call("DELETE", carried, token)) == (409, "conflict")
    assert (await rest.call("DELETE", given_up, token)).status_code == 204
    assert refusal(await carry(rest, token, group, given_up, "k2")) == (400, "validation_failed"), "it is leaving"

    async def sweep(after: timedelta) -> None:
        while await orphans.sweep_one(store, objects, datetime.now(UTC) + after, 86_400):
            pass

    async def there() -> set[str]:
        urls = (carried, orphan, unfinished, given_up)
        return {url for url in urls if await objects.head(url.rsplit("/", 1)[1]) is not None}

    await sweep(timedelta())
    assert await there() == {carried, orphan, given_up}, "nothing is due yet"
    await sweep(timedelta(minutes=10))
    assert await there() == {carried, orphan}
    await sweep(timedelta(days=1, minutes=5))
    assert await there() == {carried, orphan}, "marked, and looked at again"
    leaving = await store.media.get(orphan.rsplit("/", 1)[1])
    assert leaving is not None
    assert leaving.status is MediaStatus.LEAVING
    await sweep(timedelta(days=1, minutes=20))
    assert await there() == {carried}
    listed = (await rest.call("GET", "/v1/media", token)).json()["items"]
    assert [item["media_url"] for item in listed] == [carried]
    await sweep(timedelta(days=91))
    assert await there() == set(), "its life is over"


async def test_a_message_that_came_while_it_was_leaving_keeps_it(rest: Rest, store: Store, objects: Objects) -> None:
    (_, token), (bob, _) = await rest.user("Ann"), await rest.user("Bob")
    group = await rest.group(token, bob)
    url = await upload(rest, token)
    media_id = url.rsplit("/", 1)[1]
    # The commit saw it ready; the sweep decides before the commit shows.
    assert (await carry(rest, token, group, url, "k1")).status_code == 201
    await store.media.move(media_id, MediaStatus.LEAVING, datetime.now(UTC))
    assert await orphans.sweep_one(store, objects, datetime.now(UTC) + timedelta(seconds=1), 86_400)
    kept = await store.media.get(media_id)
    assert kept is not None
    assert kept.status is MediaStatus.READY


async def test_without_a_store_media_are_refused_and_with_one_away_they_wait(
    settings: Settings, store: Store, broker: Broker
) -> None:
    for s3_url, wanted in (("", (404, "not_found")), ("http://127.0.0.1:1", (503, "storage_unavailable"))):
        changed = msgspec.structs.replace(settings, s3_url=s3_url)
        async with serving(changed, store, broker, owner=False) as rest:
            _, token = await rest.user("Ann")
            large = declared(size_bytes=SINGLE_PUT_BYTES + 1)
            assert refusal(await rest.call("POST", "/v1/media", token, large)) == wanted


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.png", "a.png"),
        ("..", "file"),
        ("../../etc/passwd", "passwd"),
        ("C:\\dir\\x.txt", "x.txt"),
        ("a\u202ebc\x00\r\n.txt", "abc.txt"),
        ("x" * 300 + ".png", "x" * 124 + ".png"),
    ],
)
def test_h18_file_names_lose_what_could_harm(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_parts_cover_every_byte_once() -> None:
    for size in (SINGLE_PUT_BYTES + 1, 5 * PART_BYTES, 5 * PART_BYTES + 1, 2**30):
        assert sum(part for _, part in routes._part_sizes(size)) == size
