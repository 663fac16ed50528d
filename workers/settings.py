"""The workers' settings: `TRIREME_*` environment variables, read once into a frozen struct.

Called by `__main__` only; everyone else is handed the struct. A missing or malformed variable is one line that names
it, before anything starts. No value is ever repeated in an error: some are secrets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from protocol import dev_keys, keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX: Final = "TRIREME_"
DEV: Final = "dev"

Port = Annotated[int, Meta(ge=1, le=65535)]
_DEV_DEFAULTS: Final = {
    "redis_url": "redis://127.0.0.1:6379/0",
    "mongodb_url": "mongodb://127.0.0.1:27017/trireme?directConnection=true",
    "admin_token": dev_keys.ADMIN_TOKEN,
    "jwt_private_key": dev_keys.PRIVATE_JWK,
}
"""Where `bench services` listens, and the public dev secrets. No other environment has them."""
_NEEDED_BY_ALL: Final = ("redis_url", "mongodb_url")
_NEEDED_BY_REST: Final = ("admin_token", "jwt_private_key")


class SettingError(Exception):
    """One line for the operator; begins with the variable's name."""


class _PrivateJwk(msgspec.Struct):
    """What an Ed25519 private key looks like as a JWK (RFC 8037 section 2)."""

    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{43}\Z")]
    d: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{43}\Z")]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Field `x` is the variable `TRIREME_X`. Empty strings are the secrets a process without the role `rest` lacks."""

    env: Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")] = "production"
    redis_url: Annotated[str, Meta(pattern=r"\A(rediss?|unix)://")]
    mongodb_url: Annotated[str, Meta(pattern=r"\Amongodb(\+srv)?://")]
    shards: Annotated[int, Meta(ge=1, le=keys.MAX_SHARDS)] = keys.DEFAULT_SHARDS
    lanes: Annotated[int, Meta(ge=1, le=64)] = 2
    """Disjoint shard sets of one ingest role, so that one lane's journal wait never idles the others."""
    batch: Annotated[int, Meta(ge=1, le=5000)] = 500
    """Most stream entries per commit (design.md section 5: 500 documents per insert 25,900/s, 50 only 16,600/s)."""
    queries: Annotated[int, Meta(ge=1, le=1024)] = 32
    """Reads for the gateways under way at once in one process; more wait in the stream, which is capped."""
    drain_seconds: Annotated[float, Meta(gt=0, le=300)] = 4.0
    """From SIGTERM to a hard cancel. honcho kills after 5 s; a service manager may allow 30 s."""
    message_retention_days: Annotated[int, Meta(ge=1, le=36500)] = 90
    rest_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    rest_port: Port = 8080
    rest_url: str = ""
    """Endpoint others reach this REST instance by; `http://host:port` when empty."""
    command_timeout_seconds: Annotated[float, Meta(gt=0, le=120)] = 10.0
    edit_seconds: Annotated[int, Meta(ge=0, le=31_536_000)] = 86_400
    """How long after it was committed a message can be edited."""
    """How long a REST request waits for the shard owner before it answers 503."""
    admin_token: str = ""
    jwt_private_key: str = ""
    token_ttl_seconds: Annotated[int, Meta(ge=1, le=31_536_000)] = 86_400
    message_rate: Annotated[float, Meta(gt=0, le=1_000_000)] = 20.0
    """Sends and changes of messages per user and second over REST: the gateway's own settings, of the same names."""
    message_burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    key_identities_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    """Uploads of an identity or fallback key by one user: another identity is told to everybody they talk to."""
    key_claims_per_minute: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    """Claim requests of one user, each for up to 100 devices."""
    key_claims_per_pair_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    """One-time keys of one device that one user gets; then the fallback key, so that nobody drains a device."""
    key_claims_per_device_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    """One-time keys of one device that all users together get; then the fallback key."""
    message_rate: Annotated[float, Meta(gt=0, le=1_000_000)] = 20.0
    """Sends and changes of messages per user and second over REST: the gateway's own settings, of the same names."""
    message_burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    worker_metrics_port: Port | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load_settings(environ: Mapping[str, str], roles: Iterable[str]) -> Settings:
    """The settings of a process that carries `roles`. Raises SettingError."""
    env = environ.get(f"{PREFIX}ENV", "production")
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(Settings):
        variable = f"{PREFIX}{field.name.upper()}"
        text = environ.get(variable, "")
        if not text and env == DEV:
            text = _DEV_DEFAULTS.get(field.name, "")
        if not text:
            continue
        try:
            values[field.name] = msgspec.convert(text, field.type, strict=False)
        except msgspec.ValidationError as error:
            choices = get_args(field.type) if get_origin(field.type) is Literal else ()
            reason = f"it must be one of {', '.join(choices)}" if choices else str(error)
            raise SettingError(f"{variable} is malformed: {reason}") from None
    needed = _NEEDED_BY_ALL + (_NEEDED_BY_REST if "rest" in roles else ())
    for name in needed:
        if name not in values:
            raise SettingError(f"{PREFIX}{name.upper()} is not set")
    settings = msgspec.convert(values, Settings)
    if settings.jwt_private_key:
        _check_private_key(settings.jwt_private_key)
    if settings.env != DEV:
        _check_secrets(settings)
    return settings


def _check_private_key(text: str) -> None:
    try:
        msgspec.json.decode(text, type=_PrivateJwk)
    except msgspec.DecodeError as error:
        raise SettingError(f"{PREFIX}JWT_PRIVATE_KEY is not an Ed25519 private key in JWK form: {error}") from None


def _check_secrets(settings: Settings) -> None:
    """The dev secrets are public: outside `TRIREME_ENV=dev` they are as good as none."""
    if settings.admin_token == dev_keys.ADMIN_TOKEN:
        raise SettingError(f"{PREFIX}ADMIN_TOKEN is the public dev token; choose another one")
    if settings.jwt_private_key == dev_keys.PRIVATE_JWK:
        raise SettingError(f"{PREFIX}JWT_PRIVATE_KEY is the public dev key; make another one")
