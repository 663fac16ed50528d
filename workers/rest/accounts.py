"""The caller's own account: profile, privacy, export, deletion; and what others are shown of an account."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec
import structlog
from litestar import delete, get, patch, post
from litestar.params import JSONBody
from litestar.response import Stream
from msgspec import UNSET, UnsetType

from protocol import codec, records
from protocol.errors import ErrorCode
from protocol.models import Id, LastSeen, UserStatus
from workers import revocation
from workers.broker import BrokerUnavailable
from workers.instances import TooManyWaiting
from workers.rest import upkeep
from workers.rest.access import admin_guard, shape_guard, user_guard
from workers.rest.allowances import spend, spend_login
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.export import NDJSON, Line, export_lines
from workers.rest.sessions import Code, code_refused, prove
from workers.rest.shapes import CallerRequest, PathId, moment_at
from workers.rest.users import AvatarUrl, Name
from workers.store.errors import StoreUnavailable
from workers.store.users import READ_RECEIPTS, Account, email_key, phone_key

if TYPE_CHECKING:
    from workers.store.verifications import Target

_HOUR: Final = 3600
_DAY: Final = 86_400

log = structlog.get_logger(__name__)


class PrivacyChange(msgspec.Struct, frozen=True):
    """What is left out stays as it is."""

    last_seen: LastSeen | UnsetType = UNSET
    read_receipts: bool | UnsetType = UNSET


class AccountChange(msgspec.Struct, frozen=True):
    """What is left out stays as it is; `avatar_url` null takes it away."""

    name: Name | UnsetType = UNSET
    avatar_url: AvatarUrl | UnsetType | None = UNSET
    privacy: PrivacyChange = PrivacyChange()


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What others see of an account. `last_seen` is left out where they may not see it, or it is not known."""

    user_id: str = msgspec.field(name="_id")
    name: str
    avatar_url: str | UnsetType = UNSET
    last_seen: datetime | UnsetType = UNSET


class DeletionRequest(msgspec.Struct, frozen=True):
    """A code that was sent to the account's own phone or mailbox, from `POST /v1/verifications`."""

    verification_id: Id
    code: Code


class Deletion(msgspec.Struct, frozen=True):
    """`finished`: everything is gone by now; it will be, whatever happens."""

    user_id: str
    finished: bool


@get("/v1/users/me", guards=[user_guard, shape_guard], summary="Read one's account")
async def read_account(request: CallerRequest, desk: DeskDependency) -> Account:
    """The account with what only its owner sees."""
    return await _own(desk, request.user.user)


@patch(
    "/v1/users/me",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.RATE_LIMITED,)},
    summary="Change one's account",
)
async def change_account(request: CallerRequest, data: JSONBody[AccountChange], desk: DeskDependency) -> Account:
    """The account as it is then. Without `read_receipts` nobody is told what the account reads from now on."""
    user_id = request.user.user
    await spend(desk, "account_changes", user_id, desk.settings.account_changes_per_hour, _HOUR)
    given: dict[str, Any] = {"name": data.name, "avatar_url": data.avatar_url}
    given |= {"privacy.last_seen": data.privacy.last_seen, "privacy.read_receipts": data.privacy.read_receipts}
    values = {field: value for field, value in given.items() if value is not UNSET and value is not None}
    gone = ["avatar_url"] if data.avatar_url is None else []
    unfinished = READ_RECEIPTS if data.privacy.read_receipts is not UNSET else None
    account = await desk.store.users.change(user_id, values, gone, unfinished, moment_at(now_ms()))
    if account is None:
        raise _unknown()
    if unfinished is not None:
        try:
            await upkeep.finish(desk, user_id)
        except upkeep.Undecided as error:
            raise upkeep.stored_only() from error
    if data.privacy.last_seen is LastSeen.NOBODY:
        await desk.broker.publish_presence(user_id, records.PresenceChange(UserStatus.OFFLINE, 0, hidden_from="*"))
    return account


@get(
    "/v1/users/{user_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Read somebody's profile",
)
async def read_profile(request: CallerRequest, user_id: PathId, desk: DeskDependency) -> Profile:
    """`last_seen` as their privacy allows, never where one of the two blocks the other. 404 for an unknown id."""
    account = await desk.store.users.profile(user_id)
    if account is None:
        raise _unknown()
    seen: datetime | UnsetType = UNSET
    if await _may_see(desk, account, request.user.user):
        seen = await _last_seen(desk, account)
    return Profile(user_id=user_id, name=account.name, avatar_url=account.avatar_url, last_seen=seen)


async def _may_see(desk: Desk, account: Account, viewer_id: str) -> bool:
    user_id = str(account.user_id)
    if user_id == viewer_id:
        return True
    rule = account.privacy.last_seen
    if rule is LastSeen.NOBODY or await desk.store.blocks.between(user_id, viewer_id):
        return False
    return rule is LastSeen.EVERYONE or await desk.store.stays.share(user_id, viewer_id)


async def _last_seen(desk: Desk, account: Account) -> datetime | UnsetType:
    """The later of what Redis knows (minutes) and what is written down (exact to an hour)."""
    value = await desk.broker.last_seen(str(account.user_id))
    if value is None:
        return account.last_seen
    live = moment_at(codec.decode_presence(value).last_seen)
    return live if account.last_seen is UNSET else max(live, account.last_seen)


@get(
    "/v1/users/me/export",
    guards=[user_guard, shape_guard],
    media_type=NDJSON,
    opt={"errors": (ErrorCode.RATE_LIMITED,), "answers": {200: Line}},
    summary="Export one's account",
)
async def export_account(request: CallerRequest, desk: DeskDependency) -> Stream:
    """Everything the account may see, one JSON object a line; the last line is `end`. 429 after 5 a day.

    Account, devices, their push tokens, blocks, then each conversation with its settings and its messages in order.
    """
    account = await _own(desk, request.user.user)
    await spend(desk, "exports", request.user.user, desk.settings.exports_per_day, _DAY)
    return Stream(export_lines(desk.store, account), media_type=NDJSON)


@post(
    "/v1/users/me/deletion",
    guards=[user_guard, shape_guard],
    status_code=202,
    opt={"errors": (ErrorCode.CODE_REFUSED, ErrorCode.RATE_LIMITED)},
    summary="Delete one's account",
)
async def delete_account(request: CallerRequest, data: JSONBody[DeletionRequest], desk: DeskDependency) -> Deletion:
    """202; no token of the account is good any more, its phone and email are free, it leaves its groups.

    Messages stay with those they were sent to, from "Deleted account". 403 `code_refused` as for a login.
    """
    account = await _own(desk, request.user.user)
    user_id = request.user.user
    await spend_login(desk, request)
    target = await prove(desk, data.verification_id, data.code)
    if not _is_of(target, account) or not await desk.codes.spend(data.verification_id):
        raise code_refused()
    return await end_account(desk, user_id)


@delete(
    "/v1/users/{user_id:str}",
    guards=[admin_guard, shape_guard],
    status_code=202,
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Delete an account",
)
async def delete_user(user_id: PathId, desk: DeskDependency) -> Deletion:
    """202 as where its owner deletes it, also where it was deleted before; 404 `not_found` for an unknown id.

    For accounts without phone and email, which get no code, and for whoever is asked to delete one by law.
    """
    if await desk.store.users.profile(user_id) is None:
        raise _unknown()
    return await end_account(desk, user_id)


async def end_account(desk: Desk, user_id: str) -> Deletion:
    """Delete an account, and do what follows from it as far as that goes now. May be repeated."""
    await revocation.hold(desk.broker, user_id)
    await desk.store.users.begin_deletion(user_id, moment_at(now_ms()))
    log.info("deletion_begun", user_id=user_id)
    finished = False
    with anyio.move_on_after(desk.settings.command_timeout_seconds):
        try:
            await upkeep.finish(desk, user_id)
            finished = True
        except (StoreUnavailable, BrokerUnavailable, TooManyWaiting, upkeep.Undecided) as error:
            log.warning("deletion_left", user_id=user_id, error=str(error))
    return Deletion(user_id, finished)


def _is_of(target: Target, account: Account) -> bool:
    if target.field == "phone":
        return target.key == phone_key(account.phone or "")
    return target.key == email_key(account.email or "")


async def _own(desk: Desk, user_id: str) -> Account:
    account = await desk.store.users.account(user_id)
    if account is None:
        raise _unknown()
    return account


def _unknown() -> RestError:
    return RestError(ErrorCode.NOT_FOUND, "no such user")
