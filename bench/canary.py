"""Does a plaintext lie anywhere? Everything in MongoDB, in Redis and in the logs of a stack is read and looked through.

Called by `e2ee` and its system test. Every plaintext of a run carries the run's mark, a random string; it is looked for
as it is and in the usual disguises. A `Tap` writes down what goes through Redis meanwhile, since streams are trimmed.
"""

from __future__ import annotations

import socket
import threading
from base64 import b64encode
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec
import pymongo
import redis

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from bench.stack import Stack

_READ_BYTES: Final = 1 << 20
_TAP_SECONDS: Final = 5.0


class Search(msgspec.Struct):
    """`found`: where the mark was. The counts say how much was looked through."""

    found: list[str] = []
    documents: int = 0
    keys: int = 0
    log_bytes: int = 0


def search(stack: Stack, mark: str, also: Iterable[Path] = ()) -> Search:
    """Look through all of a running stack, and the files `also` given."""
    result = Search()
    needles = disguises(mark)
    with pymongo.MongoClient[dict[str, Any]](stack.mongodb_url) as mongo:
        _search_mongodb(mongo, needles, result)
    with redis.Redis.from_url(stack.redis_url, single_connection_client=True) as client:
        keyspace: Any = client.info("keyspace")
        for name in keyspace:
            client.select(int(name.removeprefix("db")))
            _search_redis(client, needles, result)
    logs = [] if stack.log_dir is None else stack.log_dir.rglob("*.log")
    for path in {*logs, *also}:
        _search_file(path, needles, result)
    return result


def search_files(paths: Iterable[Path], secrets: Iterable[str]) -> Search:
    """Look through files for any of these, as they are and in the usual disguises."""
    result = Search()
    needles = [needle for secret in secrets for needle in disguises(secret)]
    for path in paths:
        _search_file(path, needles, result)
    return result


def disguises(mark: str) -> list[bytes]:
    """The mark in UTF-8 and UTF-16, in hexadecimal, and as it looks within Base64, wherever it begins there."""
    plain = mark.encode()
    found = [plain, mark.encode("utf-16-le"), plain.hex().encode(), plain.hex().upper().encode()]
    for before in range(3):
        whole = b64encode(b"\0" * before + plain).rstrip(b"=")
        # The characters at both ends hold bits of the neighbours too.
        end = len(whole) - 1 if (before + len(plain)) % 3 else len(whole)
        found.append(whole[(0, 2, 3)[before] : end])
    return found


def _is_in(data: bytes, needles: list[bytes]) -> bool:
    return any(needle in data for needle in needles)


def _search_mongodb(client: pymongo.MongoClient[dict[str, Any]], needles: list[bytes], result: Search) -> None:
    """All databases: the oplog in `local` holds what was written and is gone."""
    for database_name in client.list_database_names():
        database = client[database_name]
        for collection in database.list_collections(filter={"type": "collection"}):
            place = f"mongodb {database_name}.{collection['name']}"
            batches: Any = database[collection["name"]].find_raw_batches()
            for batch in batches:
                result.documents += _count_documents(batch)
                if _is_in(batch, needles):
                    result.found.append(place)


def _count_documents(batch: bytes) -> int:
    count = position = 0
    while position < len(batch):
        position += int.from_bytes(batch[position : position + 4], "little")
        count += 1
    return count


def _search_redis(client: redis.Redis, needles: list[bytes], result: Search) -> None:
    for key in client.scan_iter(count=1000):
        result.keys += 1
        for part in (key, *_flat(_value(client, key))):
            if _is_in(part, needles):
                result.found.append(f"redis {key.decode(errors='replace')}")
                break


def _value(client: redis.Redis, key: bytes) -> Any:
    """Everything in a key, by its type (DUMP compresses)."""
    kind: Any = client.type(key)
    match kind:
        case b"string":
            return client.get(key)
        case b"hash":
            return client.hgetall(key)
        case b"list":
            return client.lrange(key, 0, -1)
        case b"set":
            return client.smembers(key)
        case b"zset":
            return client.zrange(key, 0, -1)
        case b"stream":
            return client.xrange(key)
        case b"none":  # it has ended meanwhile
            return None
        case _:
            raise ValueError(f"nobody reads a key of type {kind!r}")


def _flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(name)
            yield from _flat(part)
    elif value is not None:
        for part in value:
            yield from _flat(part)


def _search_file(path: Path, needles: list[bytes], result: Search) -> None:
    """In pieces that overlap."""
    kept = max(len(needle) for needle in needles)
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            result.log_bytes += len(piece)
            if _is_in(tail + piece, needles):
                result.found.append(f"log {path.name}")
                return
            tail = piece[-kept:]


@contextmanager
def tap(redis_url: str, path: Path) -> Iterator[None]:
    """Write every command that Redis is given while the block runs into a file, arguments and all (MONITOR)."""
    address = urlsplit(redis_url)
    with (
        socket.create_connection((address.hostname or "", address.port or 6379), _TAP_SECONDS) as connection,
        path.open("wb") as file,
    ):
        connection.sendall(b"MONITOR\r\n")
        file.write(connection.recv(_READ_BYTES))
        connection.settimeout(None)

        def write_down() -> None:
            while piece := connection.recv(_READ_BYTES):
                file.write(piece)

        writer = threading.Thread(target=write_down, name="valkey tap", daemon=True)
        writer.start()
        try:
            yield
        finally:
            connection.shutdown(socket.SHUT_RDWR)
            writer.join(_TAP_SECONDS)
