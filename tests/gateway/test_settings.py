"""Settings: what the environment says, and the one line about what it gets wrong."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from gateway.settings import SettingError, load_settings
from gateway.wire import Address
from protocol import dev_keys
from protocol.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

PRODUCTION = {"TRIREME_REDIS_URL": "redis://r:1", "TRIREME_JWT_PUBLIC_KEY": dev_keys.PUBLIC_JWK}


def test_dev_needs_nothing() -> None:
    settings = load_settings({"TRIREME_ENV": "dev"})
    assert settings.address == Address("127.0.0.1", 6379, "", "", 0)
    assert (settings.gateway_host, settings.gateway_port, settings.gateway_transport) == ("127.0.0.1", 8765, "epoll")
    assert (settings.shards, settings.drain_seconds, settings.devices_per_user) == (64, 4.0, 8)
    assert settings.limits == Limits()
    assert settings.endpoint == "ws://127.0.0.1:8765/v1/ws"


def test_every_limit_of_a_session_and_of_a_transport_is_a_variable() -> None:
    settings = load_settings(
        PRODUCTION
        | {
            "TRIREME_MESSAGE_RATE": "1000.5",
            "TRIREME_WINDOW": "7",
            "TRIREME_OUTBOX_FRAMES": "9",
            "TRIREME_MAX_FRAME_BYTES": "1024",
            "TRIREME_GATEWAY_ENDPOINT": "wss://chat.example.org/v1/ws",
            "TRIREME_ALLOWED_ORIGINS": "https://a.example, https://b.example",
        }
    )
    assert (settings.limits.message_rate, settings.limits.window) == (1000.5, 7)
    assert settings.transport_limits.outbox_frames == 9
    assert settings.limits.max_frame_bytes == settings.transport_limits.max_message_bytes == 1024
    assert settings.endpoint == "wss://chat.example.org/v1/ws"
    assert settings.transport_limits.origins == frozenset(("https://a.example", "https://b.example"))


def test_a_variable_nobody_knows_is_no_error() -> None:
    load_settings(PRODUCTION | {"TRIREME_GATEWAY_FLAVOUR": "salty", "TRIREME_MONGODB_URL": "mongodb://m"})


@pytest.mark.parametrize("name", list(PRODUCTION))
def test_outside_dev_nothing_secret_has_a_default(name: str) -> None:
    environ = {key: value for key, value in PRODUCTION.items() if key != name}
    with pytest.raises(SettingError, match=rf"^{name} is not set$"):
        load_settings(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRIREME_REDIS_URL", "localhost:6379"),
        ("TRIREME_REDIS_URL", "rediss://r"),
        ("TRIREME_GATEWAY_PORT", "70000"),
        ("TRIREME_GATEWAY_PORT", "x"),
        ("TRIREME_GATEWAY_TRANSPORT", "carrier-pigeon"),
        ("TRIREME_SHARDS", "0"),
        ("TRIREME_SHARDS", "4097"),
        ("TRIREME_WINDOW", "0"),
        ("TRIREME_WINDOW", "1.5"),
        ("TRIREME_MESSAGE_RATE", "-1"),
        ("TRIREME_OUTBOX_BYTES", "much"),
        ("TRIREME_DRAIN_SECONDS", "0"),
        ("TRIREME_JWT_PUBLIC_KEY", "hunter2"),
        ("TRIREME_JWT_PUBLIC_KEY", '{"kty":"oct","k":"aHVudGVyMg"}'),
        ("TRIREME_JWT_PUBLIC_KEY", '{"keys":[]}'),
        ("TRIREME_LOG_LEVEL", "loud"),
        ("TRIREME_ALLOWED_ORIGINS", "https://a.example, null"),
        ("TRIREME_ALLOWED_ORIGINS", "https://a.example/"),
        ("TRIREME_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRIREME_TRUSTED_PROXIES", "hunter2"),
    ],
)
def test_a_malformed_variable_is_one_line_that_names_it_and_keeps_its_value_secret(name: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(PRODUCTION | {name: value})
    line = str(caught.value)
    assert line.startswith(f"{name} is malformed: ")
    assert "\n" not in line
    assert "hunter2" not in line
    assert "aHVudGVyMg" not in line


def test_a_certificate_makes_the_endpoint_secure(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("chat.example.org")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(str(key))
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    files = {"TRIREME_TLS_CERTIFICATE": str(chain), "TRIREME_TLS_KEY": str(key)}
    settings = load_settings(PRODUCTION | files | {"TRIREME_GATEWAY_TRANSPORT": "trio-websocket"})
    assert settings.endpoint == "wss://127.0.0.1:8765/v1/ws"
    assert settings.tls is not None
    assert settings.tls.minimum_version is ssl.TLSVersion.TLSv1_2
    assert load_settings(PRODUCTION).tls is None
    with pytest.raises(SettingError, match="TRIREME_GATEWAY_TRANSPORT=trio-websocket"):
        load_settings(PRODUCTION | files)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"TRIREME_TLS_CERTIFICATE": "/nowhere"}, "TRIREME_TLS_KEY is not set"),
        ({"TRIREME_TLS_KEY": "/nowhere"}, "TRIREME_TLS_CERTIFICATE is not set"),
        (
            {"TRIREME_TLS_CERTIFICATE": "/nowhere", "TRIREME_TLS_KEY": "/nowhere"},
            "TRIREME_TLS_CERTIFICATE is malformed",
        ),
    ],
)
def test_half_a_certificate_is_none(given: dict[str, str], named: str) -> None:
    with pytest.raises(SettingError, match=named) as refused:
        load_settings(PRODUCTION | {"TRIREME_GATEWAY_TRANSPORT": "trio-websocket"} | given)
    assert "\n" not in str(refused.value)
