"""The workers' settings: `TRIREME_*` environment variables, read once into a frozen struct.

Called by `__main__` only; everyone else is handed the struct. A missing or malformed variable is one line that names
it, before anything starts. No value is ever repeated in an error: some are secrets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from protocol import dev_keys, keys
from workers.networks import parse_networks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX: Final = "TRIREME_"
DEV: Final = "dev"

MEBIBYTE: Final = 2**20
LONGEST_TOKEN_SECONDS: Final = 366 * 86_400
"""So long must it be remembered that a device was revoked."""
Port = Annotated[int, Meta(ge=1, le=65535)]
_DEV_DEFAULTS: Final = {
    "redis_url": "redis://127.0.0.1:6379/0",
    "mongodb_url": "mongodb://127.0.0.1:27017/trireme?directConnection=true",
    "admin_token": dev_keys.ADMIN_TOKEN,
    "jwt_private_key": dev_keys.PRIVATE_JWK,
    "verification_sender": "log",
    "push_vapid_private_key": dev_keys.VAPID_PRIVATE_KEY,
    "push_vapid_subject": dev_keys.VAPID_SUBJECT,
    "s3_url": dev_keys.S3_URL,
    "s3_access_key": dev_keys.S3_ACCESS_KEY,
    "s3_secret_key": dev_keys.S3_SECRET_KEY,
    "egress_allow": "127.0.0.0/8,::1",
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


_WEBHOOK_SECRET: Final = r"\A(whsec_([A-Za-z0-9+/]{4}){8,}([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)?\Z"
_PrivateJwks = Annotated[list[_PrivateJwk], Meta(min_length=1)]


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
    conversations: Annotated[int, Meta(ge=100, le=10_000_000)] = 20_000
    """Conversations that one lane remembers: a 1:1 takes 3 KB, a full group 110 KB; past it those that were quiet
    longest are forgotten and read again when somebody speaks there."""
    queries: Annotated[int, Meta(ge=1, le=1024)] = 32
    """Reads for the gateways under way at once in one process; more wait in the stream, which is capped."""
    drain_seconds: Annotated[float, Meta(gt=0, le=300)] = 4.0
    """From SIGTERM to a hard cancel. honcho kills after 5 s; a service manager may allow 30 s."""
    edit_seconds: Annotated[int, Meta(ge=0, le=31_536_000)] = 86_400
    """How long after it was committed a message can be edited."""
    message_retention_days: Annotated[int, Meta(ge=1, le=36500)] = 90
    rest_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    rest_port: Port = 8080
    rest_connections: Annotated[int, Meta(ge=1, le=1_000_000)] = 2000
    """HTTP connections at once, 64 KiB each before a request is let in; more are told `overloaded`."""
    head_seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    """From an HTTP connection's beginning, or a request's, to the end of its head (reliability.md R4); then 408."""
    body_seconds: Annotated[float, Meta(gt=0, le=120)] = 10.0
    """From a request's head to the end of its body (reliability.md H-07); then 408."""
    rest_url: str = ""
    """Endpoint others reach this REST instance by; `http://host:port` when empty."""
    command_timeout_seconds: Annotated[float, Meta(gt=0, le=120)] = 10.0
    """How long a REST request waits for the shard owner before it answers 503."""
    admin_token: str = ""
    jwt_private_key: str = ""
    token_ttl_seconds: Annotated[int, Meta(ge=1, le=LONGEST_TOKEN_SECONDS)] = 86_400
    """Life of a token that the administrator issues."""
    access_ttl_seconds: Annotated[int, Meta(ge=1, le=LONGEST_TOKEN_SECONDS)] = 3600
    """Life of an access token from a login: how long a gateway without Redis and workers would trust a revoked one."""
    refresh_ttl_seconds: Annotated[int, Meta(ge=60, le=LONGEST_TOKEN_SECONDS)] = 60 * 86_400
    """A device that was not used for so long logs in again; every use begins it anew."""
    verification_sender: Literal["log", "webhook", "none"] = "none"
    """Who delivers codes: the log (development only), a webhook, or nobody: then people cannot log in by themselves."""
    verification_webhook_url: Annotated[str, Meta(pattern=r"\A(https?://\S+)?\Z")] = ""
    verification_webhook_secret: Annotated[str, Meta(pattern=_WEBHOOK_SECRET)] = ""
    """Signs what the webhook gets: `whsec_` and Base64 of 24 bytes or more (Standard Webhooks)."""
    verification_ttl_seconds: Annotated[int, Meta(ge=30, le=3600)] = 600
    verification_tries: Annotated[int, Meta(ge=1, le=10)] = 5
    """Comparisons per code: with 5 codes an hour, 25 guesses at a million in an hour."""
    codes_per_target: Annotated[int, Meta(ge=1, le=1000)] = 5
    """Codes per hour for one phone number or email address: somebody pays for each, and somebody is disturbed."""
    codes_per_address: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    """Codes per hour asked for from one network address (IPv6: one /64): a family, not a list of numbers."""
    logins_per_address: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    """Logins, refreshes and deletions a minute from one network address: a code that is compared is hashed for 30 ms.
    """
    conversations_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 200
    """Conversations that one account begins: each is an entry of the log, and news to up to 100 people."""
    group_steps_per_minute: Annotated[int, Meta(ge=1, le=1_000_000)] = 120
    """Changes of groups by one account (who is in, roles, bans, titles): each is an entry that every member gets. A
    whole group can be silenced one by one."""
    account_changes_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    """Changes of one account: one of its privacy goes to the owners of all its conversations."""
    exports_per_day: Annotated[int, Meta(ge=1, le=1000)] = 5
    """Exports of one account: each reads all its conversations."""
    devices_per_account: Annotated[int, Meta(ge=1, le=1000)] = 32
    """Devices an account has at once; one more login ends the session of the one that was seen longest ago."""
    trusted_proxies: str = ""
    """Addresses, comma-separated, whose `X-Forwarded-For` is believed. Nobody's by default: a forwarder on this machine
    that adds no such header would let every client write its own."""
    key_uploads_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    """Uploads of identities by one user, and as many of one-time keys: 100 signatures take 7 ms, and a new identity is
    told to everybody the user talks to."""
    key_claims_per_minute: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    """Claim requests of one user, each for up to 100 devices."""
    key_claims_per_pair_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    """One-time keys of one device that one user gets; then the fallback key, so that nobody drains a device."""
    key_claims_per_device_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    """One-time keys of one device that all users together get; then the fallback key."""
    message_rate: Annotated[float, Meta(gt=0, le=1_000_000)] = 20.0
    """Sends and changes of messages per user and second over REST: the gateway's own settings, of the same names."""
    message_burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 60
    s3_url: Annotated[str, Meta(pattern=r"\A(https?://[^/\s?#]+/?)?\Z")] = ""
    """Where media lie: an S3 store. Empty: this installation has no media."""
    s3_public_url: Annotated[str, Meta(pattern=r"\A(https?://[^/\s?#]+/?)?\Z")] = ""
    """How clients reach it; `s3_url` when empty."""
    s3_access_key: str = ""
    s3_secret_key: str = ""
    s3_bucket: Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")] = "trireme"
    s3_region: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,32}\Z")] = "us-east-1"
    media_max_bytes: Annotated[int, Meta(ge=1, le=2**40)] = 512 * MEBIBYTE
    """The largest upload."""
    media_quota_bytes: Annotated[int, Meta(ge=1, le=2**50)] = 1024 * MEBIBYTE
    """What one user's uploads may take together."""
    media_uploads_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    """Uploads one user begins."""
    media_orphan_seconds: Annotated[int, Meta(ge=1, le=31_536_000)] = 86_400
    """An upload that no message carries is deleted after so long."""
    egress_allow: str = ""
    """Networks, comma-separated, that URLs of webhooks and agents may lead to although they are not public, and to
    which plain http is spoken. None by default: such a URL could reach whatever trusts this machine."""
    agent_classes: str = ""
    """Python agents of this installation: `name=module:Class`, comma-separated; `echo` and `retrieval` are there."""
    retrieval_directory: str = ""
    """Chat logs that the agent `retrieval` answers from: `NAME.raw.txt`, with `NAME.annotation.txt` beside them."""
    intent_classifier: str = ""
    """Who tells what a message of a plaintext conversation is about: `module:Class`; by its words when empty."""
    webhook_disable_seconds: Annotated[int, Meta(ge=1, le=31_536_000)] = 5 * 86_400
    """A webhook that has taken nothing for so long, though it was tried ten times, is disabled: as long as a dead
    letter is tried again."""
    webhook_backlog: Annotated[int, Meta(ge=1, le=100_000_000)] = 100_000
    """Deliveries that wait for one webhook (300 bytes each): past it the webhook is disabled. What it missed is in the
    log, and can be replayed."""
    push_after_seconds: Annotated[float, Meta(ge=1, le=60)] = 3.0
    """A message that no device of a member has confirmed for so long becomes a push."""
    push_ttl_seconds: Annotated[int, Meta(ge=10, le=2_419_200)] = 86_400
    """So old a message wakes nobody any more: what a provider has not taken by then is given up, and it keeps nothing
    longer. At most four weeks, the longest that providers keep anything."""
    push_token_days: Annotated[int, Meta(ge=1, le=366)] = 60
    """A token that its device did not register again for so long is forgotten; apps do it whenever they start."""
    push_registrations_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] = 120
    """Tokens that one user registers."""
    push_vapid_private_key: Annotated[str, Meta(pattern=r"\A([A-Za-z0-9_-]{43})?\Z")] = ""
    """Who we are to Web Push services: `python -m workers keygen vapid`. Without it browsers are not told."""
    push_vapid_subject: Annotated[str, Meta(pattern=r"\A((mailto:|https://)\S+)?\Z")] = ""
    """How they reach the operator: `mailto:…` or `https://…`."""
    push_fcm_credentials: str = ""
    """The JSON of a Firebase service account. Without it there is no `fcm`."""
    push_fcm_url: Annotated[str, Meta(pattern=r"\Ahttps?://[^/\s]+\Z")] = "https://fcm.googleapis.com"
    push_apns_key: str = ""
    """The PEM of an APNs .p8 key. Without it there is no `apns`."""
    push_apns_key_id: Annotated[str, Meta(pattern=r"\A[A-Z0-9]{0,16}\Z")] = ""
    push_apns_team_id: Annotated[str, Meta(pattern=r"\A[A-Z0-9]{0,16}\Z")] = ""
    push_apns_topic: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9.-]{0,128}\Z")] = ""
    """The app's bundle id."""
    push_apns_url: Annotated[str, Meta(pattern=r"\Ahttps?://[^/\s]+\Z")] = "https://api.push.apple.com"
    push_webhook_url: Annotated[str, Meta(pattern=r"\A(https?://\S+)?\Z")] = ""
    """Where jobs for tokens of the kind `webhook` go: a program of the operator's that reaches those devices."""
    push_webhook_secret: Annotated[str, Meta(pattern=_WEBHOOK_SECRET)] = ""
    """Signs what it gets: `whsec_` and Base64 of 24 bytes or more (Standard Webhooks)."""
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
    private = _private_jwks(settings.jwt_private_key) if settings.jwt_private_key else []
    if settings.env != DEV:
        _check_secrets(settings, private)
    try:
        parse_networks(settings.egress_allow)
    except ValueError:
        raise SettingError(f"{PREFIX}EGRESS_ALLOW is malformed: it must be networks, comma-separated") from None
    if settings.s3_url:
        for name in ("s3_access_key", "s3_secret_key"):
            if name not in values:
                raise SettingError(f"{PREFIX}{name.upper()} is not set: it opens the store of TRIREME_S3_URL")
    if settings.verification_sender == "webhook":
        for name in ("verification_webhook_url", "verification_webhook_secret"):
            if name not in values:
                raise SettingError(f"{PREFIX}{name.upper()} is not set: there the codes are to go")
    _check_pushes(settings)
    return settings


_PUSH_NEEDS: Final = {
    "push_webhook_url": ("push_webhook_secret",),
    "push_vapid_private_key": ("push_vapid_subject",),
    "push_apns_key": ("push_apns_key_id", "push_apns_team_id", "push_apns_topic"),
}
"""Setting → those that it is no use without."""


def _check_pushes(settings: Settings) -> None:
    for name, needed in _PUSH_NEEDS.items():
        for other in needed:
            if getattr(settings, name) and not getattr(settings, other):
                raise SettingError(f"{PREFIX}{other.upper()} is not set: TRIREME_{name.upper()} needs it")


def _private_jwks(text: str) -> list[_PrivateJwk]:
    """The keys of a JWK or a JWK set, the signing one first."""
    try:
        loaded = msgspec.json.decode(text)
        if isinstance(loaded, dict) and "keys" in loaded:
            jwks: list[_PrivateJwk] = msgspec.convert(loaded["keys"], _PrivateJwks)
            return jwks
        return [msgspec.convert(loaded, _PrivateJwk)]
    except msgspec.DecodeError as error:
        raise SettingError(f"{PREFIX}JWT_PRIVATE_KEY is not an Ed25519 private key in JWK form: {error}") from None


def _check_secrets(settings: Settings, private: list[_PrivateJwk]) -> None:
    """The dev secrets are public, and a log is read by many: fit for `TRIREME_ENV=dev` only."""
    if settings.admin_token == dev_keys.ADMIN_TOKEN:
        raise SettingError(f"{PREFIX}ADMIN_TOKEN is the public dev token; choose another one")
    if any(jwk.x == dev_keys.PUBLIC_X for jwk in private):
        raise SettingError(f"{PREFIX}JWT_PRIVATE_KEY is the public dev key; make another one: python -m workers keygen")
    if settings.s3_secret_key == dev_keys.S3_SECRET_KEY:
        raise SettingError(f"{PREFIX}S3_SECRET_KEY is the public dev key; choose another one")
    if settings.push_vapid_private_key == dev_keys.VAPID_PRIVATE_KEY:
        raise SettingError(f"{PREFIX}PUSH_VAPID_PRIVATE_KEY is the public dev key; python -m workers keygen vapid")
    if settings.verification_sender == "log":
        raise SettingError(f"{PREFIX}VERIFICATION_SENDER writes codes where many read them; choose webhook or none")
