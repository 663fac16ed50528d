"""Settings: what the environment says, and the one line about what it gets wrong."""

from __future__ import annotations

import pytest

from gateway.settings import SettingError, load_settings
from gateway.wire import Address
from protocol import dev_keys
from protocol.limits import Limits

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
