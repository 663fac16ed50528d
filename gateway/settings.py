"""The gateway's settings: `TRIREME_*` environment variables, read once into a frozen struct.

Called by `__main__` only; everyone else is handed the struct or a part of it. A missing or malformed variable is one
line that names it, before anything starts. No value is ever repeated in an error: some are secrets.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway.admission import PublicKeys
from gateway.arrivals import TrustedProxies
from gateway.tls import load_context
from gateway.transport import WEBSOCKET_PATH, TransportLimits
from gateway.wire import Address
from protocol import dev_keys, keys
from protocol.limits import Limits

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

PREFIX: Final = "TRIREME_"
DEV: Final = "dev"
_DEV_DEFAULTS: Final = {
    "redis_url": "redis://127.0.0.1:6379/0",
    "jwt_public_key": dev_keys.PUBLIC_JWK,
}
"""Where `bench services` listens, and the public half of the dev key pair. No other environment has them."""
_DERIVED: Final = frozenset(("origins", "proxies", "max_message_bytes", "unasked_subprotocol"))
"""Transport limits that other settings decide, or the protocol."""

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")
"""RFC 6454 section 6.2, without `null`; apps have schemes of their own."""

Port = Annotated[int, Meta(ge=1, le=65535)]
Struct = TypeVar("Struct", bound=msgspec.Struct)
Parsed = TypeVar("Parsed")


class SettingError(Exception):
    """One line for the operator; begins with the variable's name."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Field `x` is the variable `TRIREME_X`; the fields of `limits` and `transport_limits` are variables of their own
    likewise."""

    env: Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")] = "production"
    redis_url: str
    jwt_public_key: str
    """A JWK or JWK set, JSON, Ed25519."""
    gateway_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    gateway_port: Port = 8765
    gateway_transport: Literal["epoll", "trio-websocket"] = "epoll"
    gateway_endpoint: str = ""
    """Where clients reach this instance; `ws://host:port/v1/ws` when empty, `wss://` with a certificate."""
    tls_certificate: str = ""
    """File with the chain, PEM; empty: no TLS here, a proxy ends it. The trio-websocket transport only."""
    tls_key: str = ""
    """File with its private key, PEM."""
    shards: Annotated[int, Meta(ge=1, le=keys.MAX_SHARDS)] = keys.DEFAULT_SHARDS
    drain_seconds: Annotated[float, Meta(gt=0, le=300)] = 4.0
    """From SIGTERM to the end of the process. honcho kills after 5 s; a service manager may allow 30 s."""
    devices_per_user: Annotated[int, Meta(ge=1, le=1000)] = 8
    auth_failures_per_minute: Annotated[int, Meta(ge=1)] = 10
    """Bad tokens from one address (IPv6: one /64); beyond it only tokens seen lately are let in."""
    connections_per_second: Annotated[int, Meta(ge=1)] = 50
    """New WebSockets from one address: a handshake and its opening cost 0.5 ms, so one client takes 3 % of a core."""
    unauthenticated_connections: Annotated[int, Meta(ge=1)] = 200
    """WebSockets of one address that have shown no good token yet; each may stay 10 s without."""
    trusted_proxies: str = ""
    """Addresses and networks, comma-separated, whose `X-Forwarded-For` is believed: the rightmost address that is not
    among them is the client's. Behind a balancer that is not named here all clients count as one."""
    redis_deadline_seconds: Annotated[float, Meta(ge=0.5, le=60)] = 2.0
    """The longest a client waits to hear that its message could not be handed over (reliability.md, F-R4)."""
    redis_outstanding: Annotated[int, Meta(ge=100, le=1_000_000)] = 20_000
    """Commands without an answer: 0.4 s of what one Valkey core takes (50,000 XADD/s); past it clients are told
    `overloaded`."""
    receipts_waiting: Annotated[int, Meta(ge=100, le=10_000_000)] = 100_000
    """Receipts kept while Redis is away, about 20 MB; past it they are dropped, the reader's next one makes up for
    them."""
    ingest_backlog: Annotated[int, Meta(ge=1)] = 20_000
    """Entries of all shards that no worker has settled: 2 to 4 s of what two cores commit (5,000 to 10,000/s), so that
    what is taken is acknowledged within 10 s and an overload is over within 5 s; past it clients are told
    `overloaded`. More workers may want more."""
    ingest_high_water: Annotated[int, Meta(ge=1)] = 10_000
    """The same of one shard: half of all, so that one conversation or one worker that stands still does not shut the
    others out."""
    opening_sessions: Annotated[int, Meta(ge=1, le=1_000_000)] = 2000
    """Clients with a good token that wait for a worker to say where they stand: some seconds of what one query role
    answers, well within `open_timeout_seconds`; past it clients are told `server_busy`."""
    allowed_origins: str = ""
    """Comma-separated values of `Origin` that may connect, compared exactly; empty: any. Clients that are no browsers
    send none. A token is in the first frame and never in a cookie, so no page can use somebody else's."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits
    transport_limits: TransportLimits

    @property
    def address(self) -> Address:
        """Where Redis is."""
        return Address.parse(self.redis_url)

    @property
    def endpoint(self) -> str:
        """What the instance's lease says."""
        host = f"[{self.gateway_host}]" if ":" in self.gateway_host else self.gateway_host
        scheme = "wss" if self.tls_certificate else "ws"
        return self.gateway_endpoint or f"{scheme}://{host}:{self.gateway_port}{WEBSOCKET_PATH}"

    @property
    def tls(self) -> ssl.SSLContext | None:
        """Reads both files. Raises ValueError."""
        return load_context(self.tls_certificate, self.tls_key) if self.tls_certificate else None


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Raises SettingError."""
    is_dev = environ.get(f"{PREFIX}ENV", "") == DEV
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(Settings):
        if field.name in ("limits", "transport_limits"):
            continue
        variable = f"{PREFIX}{field.name.upper()}"
        text = environ.get(variable, "") or (_DEV_DEFAULTS.get(field.name, "") if is_dev else "")
        if text:
            values[field.name] = _convert(variable, text, field.type)
        elif field.required:
            raise SettingError(f"{variable} is not set")
    limits = _load_limits(environ, Limits)
    transport_limits = msgspec.structs.replace(
        _load_limits(environ, TransportLimits),
        max_message_bytes=limits.max_frame_bytes,
        origins=_check(f"{PREFIX}ALLOWED_ORIGINS", _parse_origins, values.get("allowed_origins", "")),
        proxies=_check(f"{PREFIX}TRUSTED_PROXIES", TrustedProxies, values.get("trusted_proxies", "")),
    )
    _check(f"{PREFIX}REDIS_URL", Address.parse, values["redis_url"])
    _check(f"{PREFIX}JWT_PUBLIC_KEY", PublicKeys, values["jwt_public_key"])
    settings = Settings(**values, limits=limits, transport_limits=transport_limits)
    _check_tls(settings)
    return settings


def _check_tls(settings: Settings) -> None:
    if bool(settings.tls_certificate) is not bool(settings.tls_key):
        missing = "TLS_KEY" if settings.tls_certificate else "TLS_CERTIFICATE"
        raise SettingError(f"{PREFIX}{missing} is not set: a certificate and its key go together")
    if settings.tls_certificate and settings.gateway_transport != "trio-websocket":
        raise SettingError(f"{PREFIX}TLS_CERTIFICATE needs {PREFIX}GATEWAY_TRANSPORT=trio-websocket")
    _check(f"{PREFIX}TLS_CERTIFICATE", lambda _: settings.tls, "")


def _load_limits(environ: Mapping[str, str], kind: type[Struct]) -> Struct:
    """Every limit is a positive number: none of them means anything at zero."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        variable = f"{PREFIX}{field.name.upper()}"
        text = environ.get(variable, "")
        if text and field.name not in _DERIVED:
            values[field.name] = _convert(variable, text, Annotated[field.type, Meta(gt=0)])
    return kind(**values)


def _convert(variable: str, text: str, kind: Any) -> Any:
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingError(f"{variable} is malformed: {error}") from None


def _parse_origins(text: str) -> frozenset[str] | None:
    """None for none. Raises ValueError for what no page of ours can have: `null` is every sandboxed page's."""
    origins = frozenset(origin.strip() for origin in text.split(",") if origin.strip())
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("an origin is a scheme, a host and a port where it is not the scheme's own")
    return origins or None


def _check(variable: str, parse: Callable[[str], Parsed], text: str) -> Parsed:
    try:
        return parse(text)
    except ValueError as error:
        raise SettingError(f"{variable} is malformed: {error}") from None
