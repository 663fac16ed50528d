"""An unset or malformed setting is one clear line on stderr that names the variable, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.stack import PROJECT
from protocol import dev_keys

GATEWAY = ["gateway"]
REST = ["workers", "rest"]
INGEST = ["workers", "ingest"]
NO_REDIS = "redis://127.0.0.1:1/0"
NO_MONGODB = "mongodb://127.0.0.1:1/trireme"


def run(arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment | settings,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "variable"),
    [
        (GATEWAY, {}, "TRIREME_REDIS_URL"),
        (GATEWAY, {"TRIREME_REDIS_URL": NO_REDIS}, "TRIREME_JWT_PUBLIC_KEY"),
        (GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_REDIS_URL": "ftp://x"}, "TRIREME_REDIS_URL"),
        (GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_GATEWAY_PORT": "70000"}, "TRIREME_GATEWAY_PORT"),
        (GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_GATEWAY_PORT": "many"}, "TRIREME_GATEWAY_PORT"),
        (GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_GATEWAY_TRANSPORT": "pigeon"}, "TRIREME_GATEWAY_TRANSPORT"),
        (GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_WINDOW": "0"}, "TRIREME_WINDOW"),
        (GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_JWT_PUBLIC_KEY": "{}"}, "TRIREME_JWT_PUBLIC_KEY"),
        (INGEST, {}, "TRIREME_REDIS_URL"),
        (INGEST, {"TRIREME_REDIS_URL": NO_REDIS}, "TRIREME_MONGODB_URL"),
        (INGEST, {"TRIREME_ENV": "dev", "TRIREME_MONGODB_URL": "mysql://x"}, "TRIREME_MONGODB_URL"),
        (INGEST, {"TRIREME_ENV": "dev", "TRIREME_BATCH": "-1"}, "TRIREME_BATCH"),
        (REST, {"TRIREME_REDIS_URL": NO_REDIS, "TRIREME_MONGODB_URL": NO_MONGODB}, "TRIREME_ADMIN_TOKEN"),
        (
            REST,
            {
                "TRIREME_REDIS_URL": NO_REDIS,
                "TRIREME_MONGODB_URL": NO_MONGODB,
                "TRIREME_ADMIN_TOKEN": "a",
                "TRIREME_JWT_PRIVATE_KEY": dev_keys.PRIVATE_JWK,
            },
            "TRIREME_JWT_PRIVATE_KEY",
        ),
    ],
)
def test_one_line_names_the_variable(arguments: list[str], settings: dict[str, str], variable: str) -> None:
    ended = run(arguments, settings)
    assert ended.returncode != 0
    (line,) = ended.stderr.strip().splitlines()
    assert variable in line
    assert ended.stdout == ""


def test_no_secret_is_repeated() -> None:
    ended = run(GATEWAY, {"TRIREME_ENV": "dev", "TRIREME_JWT_PUBLIC_KEY": "canary-secret"})
    assert ended.returncode != 0
    assert "canary" not in ended.stderr


def test_an_unknown_role_is_one_line() -> None:
    ended = run(["workers", "gardener"], {"TRIREME_ENV": "dev"})
    assert ended.returncode != 0
    assert "gardener" in ended.stderr
    assert "Traceback" not in ended.stderr
