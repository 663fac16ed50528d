"""The local S3 store for media: SeaweedFS from its pip wheel, with the dev credentials. Called by `services` and tests.

For development and tests only: a deployment points TRIREME_S3_URL at a store of its own.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException

from bench.services import HOST, START_DEADLINE_SECONDS, STOP_DEADLINE_SECONDS, Server, ServicesError, free_port, stop
from protocol import dev_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_S3_PORT: Final = 8333
ATTEMPTS: Final = 4
VARIABLE: Final = "TRIREME_S3_URL"
_ADVICE: Final = f"point {VARIABLE} at a running S3 store"
_INNER: Final = ("master.port", "volume.port", "filer.port", "admin.port")


@contextmanager
def start_store(data_dir: Path, port: int) -> Iterator[Server]:
    """The store's process, with its data and log under `data_dir`; `wait_ready` says when it can be used.

    Resource handling: it ends with the block; what it had no time to write is recovered at the next start.
    Raises ServicesError when it cannot run here.
    """
    directory = data_dir / "s3"
    directory.mkdir(parents=True, exist_ok=True)
    credentials = {"AWS_ACCESS_KEY_ID": dev_keys.S3_ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": dev_keys.S3_SECRET_KEY}
    server = Server(
        "s3", _arguments(directory, port), port, data_dir / "s3.log", _ADVICE, {**os.environ, **credentials}
    )
    try:
        yield server
    finally:
        stop(server.process, STOP_DEADLINE_SECONDS)


def wait_ready(server: Server) -> None:
    """Until it answers with our credentials. Raises ServicesError when it ends or takes too long."""
    server.wait_until(lambda: answers(server.port), time.monotonic() + START_DEADLINE_SECONDS)


@contextmanager
def run_store(data_dir: Path) -> Iterator[str]:
    """A ready store on a free port; its URL. Nine ports are a lot to stay free for a second, so it may try again."""
    for attempt in range(ATTEMPTS):
        with start_store(data_dir / str(attempt), free_port()) as server:
            try:
                wait_ready(server)
            except ServicesError:
                if attempt + 1 < ATTEMPTS:
                    continue
                raise
            yield f"http://{HOST}:{server.port}"
            return


@contextmanager
def run_temporary() -> Iterator[str]:
    """A ready store whose data go with it; its URL."""
    with tempfile.TemporaryDirectory(prefix="trireme-s3-") as directory, run_store(Path(directory)) as url:
        yield url


def _arguments(directory: Path, port: int) -> list[str]:
    binary = Path(sysconfig.get_path("scripts"), "weed")
    if not binary.is_file():
        raise ServicesError(f"no SeaweedFS for this platform (the group `services` has it); {_ADVICE}")
    # Its parts talk to each other over loopback; with the default ports two stores could not run side by side.
    ports = {name: free_port() for name in (*_INNER, *(f"{name}.grpc" for name in (*_INNER, "s3.port")))}
    options = {
        "dir": str(directory),
        "ip": HOST,
        "ip.bind": HOST,
        "s3.port": str(port),
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "webdav": "false",
        "admin.ui": "false",
        **{name: str(number) for name, number in ports.items()},
    }
    return [str(binary), "mini", *(f"-{name}={value}" for name, value in options.items())]


def answers(port: int) -> bool:
    """Does it serve us? It listens a second before it knows the credentials."""
    client = Minio(
        f"{HOST}:{port}",
        access_key=dev_keys.S3_ACCESS_KEY,
        secret_key=dev_keys.S3_SECRET_KEY,
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(timeout=1.0, retries=False),
    )
    try:
        client.list_buckets()
    except (MinioException, InvalidResponseError, urllib3.exceptions.HTTPError):
        return False
    return True
