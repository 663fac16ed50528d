"""People log in: a code to a phone or mailbox proves who they are, then access and refresh tokens, then log out.

Whether an account exists is told to nobody but who has proven the phone or mailbox. A refresh token is `rt_`, the
session's id and a secret; each is good once, and a second use of one ends the session, because then two have it.
"""

from __future__ import annotations

import hmac
import secrets
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Annotated, Final

import msgspec
import structlog
from litestar import delete, post
from litestar.params import JSONBody
from msgspec import Meta

from protocol.errors import ErrorCode
from protocol.frames import DeviceId, Label
from protocol.models import Id, User, UserStatus
from workers.rest.access import shape_guard, user_guard
from workers.rest.allowances import address_of, spend, spend_login
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.devices import end_device
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, moment_at, ms_of
from workers.rest.users import Email, Name, Phone
from workers.senders import SendFailed
from workers.store.devices import NewSession, Session
from workers.store.users import Account, Taken, email_key, phone_key
from workers.store.verifications import Target

_HOUR: Final = 3600
_PREFIX: Final = "rt_"

log = structlog.get_logger(__name__)

RefreshToken = Annotated[str, Meta(min_length=1, max_length=256)]
Code = Annotated[str, Meta(pattern=r"\A[0-9]{6}\Z")]


class NewVerification(msgspec.Struct, frozen=True):
    """Exactly one of the two. A phone number has its country code: `+49…` or `0049…`."""

    phone: Phone | None = None
    email: Email | None = None


class Verification(msgspec.Struct, frozen=True):
    """The code is good for one login until `expires_at`, or until another one is sent to the same place."""

    verification_id: str
    expires_at: datetime


class NewLogin(msgspec.Struct, frozen=True):
    """`name` is needed where there is no account yet, and otherwise ignored."""

    verification_id: Id
    code: Code
    device_id: DeviceId
    platform: Label = ""
    device_name: Label = ""
    name: Name | None = None


class TokenPair(msgspec.Struct, frozen=True):
    """Tokens of one device. The refresh token is used once, for the next pair; refresh from one place at a time."""

    access_token: str
    expires_at: datetime
    refresh_token: str
    refresh_expires_at: datetime


class Login(TokenPair, frozen=True):
    """A device's tokens, and whose they are."""

    user: Account


class Refresh(msgspec.Struct, frozen=True):
    refresh_token: RefreshToken


@post(
    "/v1/verifications",
    guards=[shape_guard],
    status_code=202,
    opt={"errors": (ErrorCode.RATE_LIMITED,)},
    summary="Have a code sent to a phone or mailbox",
)
async def begin_verification(
    request: CallerRequest, data: JSONBody[NewVerification], desk: DeskDependency
) -> Verification:
    """202 whether there is an account or not. 429 after 5 codes an hour to one place, or 20 from one address."""
    target = _target(data)
    await spend(desk, "codes_from", address_of(request), desk.settings.codes_per_address, _HOUR)
    await spend(desk, "codes_to", target.name, desk.settings.codes_per_target, _HOUR)
    try:
        verification_id, expires_at = await desk.codes.begin(target, moment_at(now_ms()))
    except SendFailed:
        raise RestError(ErrorCode.STORAGE_UNAVAILABLE, "the code could not be sent; try again") from None
    return Verification(verification_id, expires_at)


def _target(data: NewVerification) -> Target:
    if (data.phone is None) is (data.email is None):
        raise RestError(ErrorCode.VALIDATION_FAILED, "name a phone number or an email address")
    field, key = ("phone", phone_key(data.phone)) if data.phone is not None else ("email", email_key(data.email or ""))
    if key is None:
        raise RestError(ErrorCode.VALIDATION_FAILED, f"{field}: no address with a country or a domain")
    return Target(field, key)


@post(
    "/v1/sessions",
    guards=[shape_guard],
    opt={"errors": (ErrorCode.CODE_REFUSED, ErrorCode.CONFLICT, ErrorCode.RATE_LIMITED)},
    summary="Log a device in",
)
async def log_in(request: CallerRequest, data: JSONBody[NewLogin], desk: DeskDependency) -> Login:
    """201 with the device's tokens; the account is made where there was none.

    403 `code_refused` for a code that is wrong, old, used, superseded or was tried 5 times: which of these is not told.
    """
    await spend_login(desk, request)
    target = await prove(desk, data.verification_id, data.code)
    account = await desk.store.users.find_by_contact(f"{target.field}_key", target.key)
    if account is None and data.name is None:
        raise RestError(ErrorCode.VALIDATION_FAILED, "name: a new account needs one; the code is still good")
    if not await desk.codes.spend(data.verification_id):
        raise code_refused()
    if account is None:
        account = await _register(desk, target, data.name or "")
    user_id = str(account.user_id)
    now = now_ms()
    token, session = _new_session(desk, "ses_" + secrets.token_hex(16), now)
    issued_at = await desk.store.devices.log_in(
        user_id, data.device_id, data.platform, data.device_name, session, moment_at(now)
    )
    for device_id in await desk.store.devices.surplus(user_id, data.device_id, desk.settings.devices_per_account):
        await end_device(desk, user_id, device_id)
    log.info("logged_in", user_id=user_id, device_id=data.device_id)
    access, expires_at = _access_token(desk, user_id, data.device_id, issued_at)
    return Login(access, expires_at, token, session.refresh_expires_at, account)


async def prove(desk: Desk, verification_id: str, code: str) -> Target:
    """Where a code was sent to. It is not spent yet. Raises RestError: never why not."""
    target = await desk.codes.prove(verification_id, code, moment_at(now_ms()))
    if target is None:
        raise code_refused()
    return target


def code_refused() -> RestError:
    """What every refusal of a code looks like."""
    return RestError(ErrorCode.CODE_REFUSED, "no such code, or not any more")


async def _register(desk: Desk, target: Target, name: str) -> Account:
    user = User(
        user_id=desk.new_id("usr"),
        phone=target.key if target.field == "phone" else None,
        email=target.key if target.field == "email" else None,
        name=name,
        created_at=moment_at(now_ms()),
        status=UserStatus.OFFLINE,
    )
    if isinstance(await desk.store.users.create(user), Taken):
        log.info("registered_meanwhile", field=target.field)
    else:
        log.info("registered", user_id=user.user_id)
    # Also where the administrator made it between our look and our write.
    account = await desk.store.users.find_by_contact(f"{target.field}_key", target.key)
    if account is None:
        raise RestError(ErrorCode.CONFLICT, "another account has it; ask for another code")
    return account


@post(
    "/v1/tokens/refresh",
    guards=[shape_guard],
    status_code=200,
    opt={"errors": (ErrorCode.UNAUTHORIZED, ErrorCode.REVOKED, ErrorCode.RATE_LIMITED)},
    summary="Exchange a refresh token for the next pair",
)
async def refresh(request: CallerRequest, data: JSONBody[Refresh], desk: DeskDependency) -> TokenPair:
    """200 with new tokens; the old refresh token is used up.

    401 `unauthorized` for one that is unknown, too old, or of a device that was logged out. 401 `revoked` for one that
    was used before: the device's session has just ended, whoever holds its tokens.
    """
    await spend_login(desk, request)
    session_id, used = _read_refresh(data.refresh_token)
    now = now_ms()
    session = await desk.store.devices.session(session_id)
    if session is None or session.refresh_expires_at <= moment_at(now):
        raise RestError(ErrorCode.UNAUTHORIZED, "no such session; log in again")
    if not hmac.compare_digest(session.refresh_hash, used):
        raise await _reused(desk, session)
    token, fresh = _new_session(desk, session_id, now)
    issued_at = await desk.store.devices.rotate(session_id, used, fresh, moment_at(now))
    if issued_at is None:
        raise await _reused(desk, session)
    access, expires_at = _access_token(desk, session.user_id, session.device_id, issued_at)
    return TokenPair(access, expires_at, token, fresh.refresh_expires_at)


async def _reused(desk: Desk, session: Session) -> RestError:
    """Two hold tokens of one session: nobody can say which of them is the thief."""
    log.warning("refresh_token_reused", user_id=session.user_id, device_id=session.device_id)
    await end_device(desk, session.user_id, session.device_id)
    return RestError(ErrorCode.REVOKED, "this refresh token was used before; log in again")


@delete(
    "/v1/sessions/current",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.FORBIDDEN,)},
    summary="Log this device out",
)
async def log_out(request: CallerRequest, desk: DeskDependency) -> None:
    """204; the device's tokens are void and its connections end. 403 for a token that is bound to no device."""
    if request.user.device_id is None:
        raise RestError(ErrorCode.FORBIDDEN, "this token is bound to no device")
    await end_device(desk, request.user.user, request.user.device_id, has_token=True)


def _new_session(desk: Desk, session_id: str, now: int) -> tuple[str, NewSession]:
    """A refresh token, and what is kept of it: a fast hash will do for 256 random bits."""
    secret = secrets.token_urlsafe(32)
    expires_at = moment_at(now) + timedelta(seconds=desk.settings.refresh_ttl_seconds)
    return f"{_PREFIX}{session_id}.{secret}", NewSession(session_id, _hash(secret), expires_at)


def _read_refresh(token: str) -> tuple[str, bytes]:
    session_id, _, secret = token.removeprefix(_PREFIX).partition(".")
    return session_id, _hash(secret)


def _hash(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _access_token(desk: Desk, user_id: str, device_id: str, issued_at: datetime) -> tuple[str, datetime]:
    token, expires_ms = desk.tokens.sign(
        user_id, device_id, ms_of(issued_at), desk.settings.access_ttl_seconds, desk.new_id("tok")
    )
    return token, moment_at(expires_ms)
