"""A missing or malformed setting is one line that names the variable, and never shows a value."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from protocol import dev_keys
from workers.__main__ import parse_roles
from workers.settings import SettingError, load_settings

URLS = {"TRIREME_REDIS_URL": "redis://r:1/0", "TRIREME_MONGODB_URL": "mongodb://m:1/x"}
OTHER_KEY = '{{"kty":"OKP","crv":"Ed25519","x":"{}","d":"{}"}}'.format("A" * 43, "B" * 43)


def test_strangers_urls_lead_to_this_machine_in_dev_only() -> None:
    assert load_settings({"TRIREME_ENV": "dev"}, ["events"]).egress_allow == "127.0.0.0/8,::1"
    assert load_settings(URLS, ["events"]).egress_allow == ""


def test_dev_needs_nothing() -> None:
    settings = load_settings({"TRIREME_ENV": "dev"}, ["ingest", "rest"])
    assert settings.admin_token == "dev-admin"
    assert settings.shards == 64
    assert settings.message_retention_days == 90


def test_a_worker_without_rest_needs_no_secrets() -> None:
    settings = load_settings(URLS, ["ingest", "query"])
    assert (settings.env, settings.admin_token, settings.jwt_private_key) == ("production", "", "")


@pytest.mark.parametrize(
    ("environ", "roles", "variable"),
    [
        ({}, ["query"], "TRIREME_REDIS_URL"),
        ({"TRIREME_REDIS_URL": "redis://r:1"}, ["query"], "TRIREME_MONGODB_URL"),
        (URLS, ["rest"], "TRIREME_ADMIN_TOKEN"),
        (URLS | {"TRIREME_ADMIN_TOKEN": "s3cret"}, ["rest"], "TRIREME_JWT_PRIVATE_KEY"),
        (URLS | {"TRIREME_REDIS_URL": "http://x"}, ["query"], "TRIREME_REDIS_URL"),
        (URLS | {"TRIREME_MONGODB_URL": "postgres://x"}, ["query"], "TRIREME_MONGODB_URL"),
        (URLS | {"TRIREME_SHARDS": "0"}, ["query"], "TRIREME_SHARDS"),
        (URLS | {"TRIREME_SHARDS": "many"}, ["query"], "TRIREME_SHARDS"),
        (URLS | {"TRIREME_DRAIN_SECONDS": "-1"}, ["query"], "TRIREME_DRAIN_SECONDS"),
        (URLS | {"TRIREME_REST_PORT": "65536"}, ["query"], "TRIREME_REST_PORT"),
        (URLS | {"TRIREME_LOG_LEVEL": "loud"}, ["query"], "TRIREME_LOG_LEVEL"),
        (URLS | {"TRIREME_ENV": "A B"}, ["query"], "TRIREME_ENV"),
        (URLS | {"TRIREME_EGRESS_ALLOW": "10.0.0.0/8,intranet"}, ["query"], "TRIREME_EGRESS_ALLOW"),
        (URLS | {"TRIREME_EGRESS_ALLOW": "10.0.0.1/8"}, ["query"], "TRIREME_EGRESS_ALLOW"),
        (URLS | {"TRIREME_JWT_PRIVATE_KEY": "nonsense"}, ["query"], "TRIREME_JWT_PRIVATE_KEY"),
        (URLS | {"TRIREME_JWT_PRIVATE_KEY": dev_keys.PUBLIC_JWK}, ["query"], "TRIREME_JWT_PRIVATE_KEY"),
        (URLS | {"TRIREME_JWT_PRIVATE_KEY": '{"keys":[]}'}, ["query"], "TRIREME_JWT_PRIVATE_KEY"),
        (URLS | {"TRIREME_VERIFICATION_SENDER": "pigeon"}, ["query"], "TRIREME_VERIFICATION_SENDER"),
        (URLS | {"TRIREME_VERIFICATION_SENDER": "log"}, ["query"], "TRIREME_VERIFICATION_SENDER"),
        (URLS | {"TRIREME_VERIFICATION_SENDER": "webhook"}, ["query"], "TRIREME_VERIFICATION_WEBHOOK_URL"),
        (URLS | {"TRIREME_VERIFICATION_WEBHOOK_URL": "ftp://x"}, ["query"], "TRIREME_VERIFICATION_WEBHOOK_URL"),
        (URLS | {"TRIREME_VERIFICATION_WEBHOOK_SECRET": "short"}, ["query"], "TRIREME_VERIFICATION_WEBHOOK_SECRET"),
        (
            URLS | {"TRIREME_VERIFICATION_WEBHOOK_SECRET": "whsec_" + "A" * 33},
            ["query"],
            "TRIREME_VERIFICATION_WEBHOOK_SECRET",
        ),
        (
            URLS | {"TRIREME_JWT_PRIVATE_KEY": f'{{"keys":[{OTHER_KEY},{dev_keys.PRIVATE_JWK}]}}'},
            ["query"],
            "TRIREME_JWT_PRIVATE_KEY",
        ),
        (
            URLS | {"TRIREME_ADMIN_TOKEN": dev_keys.ADMIN_TOKEN, "TRIREME_JWT_PRIVATE_KEY": OTHER_KEY},
            ["rest"],
            "TRIREME_ADMIN_TOKEN",
        ),
        (
            URLS | {"TRIREME_ADMIN_TOKEN": "mine", "TRIREME_JWT_PRIVATE_KEY": dev_keys.PRIVATE_JWK},
            ["rest"],
            "TRIREME_JWT_PRIVATE_KEY",
        ),
    ],
)
def test_the_error_is_one_line_that_names_the_variable(
    environ: dict[str, str], roles: list[str], variable: str
) -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(environ, roles)
    text = str(caught.value)
    assert text.startswith(variable)
    assert "\n" not in text
    for value in environ.values():
        assert value not in text


def test_roles_are_checked_against_the_table() -> None:
    assert parse_roles(["query", "ingest", "query"]) == ["query", "ingest"]
    with pytest.raises(SettingError, match=r"unknown role 'rowing'; there are: ingest, query, "):
        parse_roles(["rowing"])
    with pytest.raises(SettingError, match="at least one role"):
        parse_roles([])


@pytest.mark.parametrize(
    ("arguments", "environ", "line"),
    [
        (
            ["rowing"],
            {},
            "workers: unknown role 'rowing'; there are: ingest, query, events, agents, push, retry, rest\n",
        ),
        (["query"], {}, "workers: TRIREME_REDIS_URL is not set\n"),
        (
            ["query"],
            {"TRIREME_ENV": "dev", "TRIREME_BATCH": "x"},
            "workers: TRIREME_BATCH is malformed: Expected `int`, got `str`\n",
        ),
    ],
)
def test_the_process_ends_with_status_2_and_that_line(arguments: list[str], environ: dict[str, str], line: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}
    ended = subprocess.run(
        [sys.executable, "-m", "workers", *arguments],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stderr, ended.stdout) == (2, line, "")


def test_keygen_prints_a_private_key_that_the_settings_take_and_its_public_half() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "workers", "keygen"], env={}, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    private, public = ended.stdout.splitlines()
    environ = URLS | {"TRIREME_ADMIN_TOKEN": "mine", "TRIREME_JWT_PRIVATE_KEY": private}
    assert load_settings(environ, ["rest"]).jwt_private_key == private
    assert '"d"' in private
    assert '"d"' not in public


def test_dev_logs_codes_and_no_other_environment_sends_them_by_default() -> None:
    assert load_settings({"TRIREME_ENV": "dev"}, ["rest"]).verification_sender == "log"
    assert load_settings(URLS, ["query"]).verification_sender == "none"
