"""Accounts and their access tokens; both for the administrator only, who is whatever logs people in."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from litestar import post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from protocol.errors import ErrorCode
from protocol.frames import DeviceId
from protocol.models import Id, User, UserStatus
from workers.rest.access import admin_guard, shape_guard
from workers.rest.desk import DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import moment_at
from workers.store.users import Taken

Phone = Annotated[str, Meta(min_length=3, max_length=32, pattern=r"\A\+?[0-9][0-9 ()./-]*\Z")]
Email = Annotated[
    str, Meta(min_length=3, max_length=254, pattern=r"\A[^@\x00-\x20\x7f-\xa0]+@[^@\x00-\x20\x7f-\xa0]+\Z")
]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
AvatarUrl = Annotated[
    str, Meta(max_length=2048, pattern=r"\Ahttps://([A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,63}(:[0-9]{1,5})?(/[!-~]*)?\Z")
]
"""A picture on the web: a name with a domain, never an address of some network, no user, no other scheme. The server
never fetches it; clients do."""


class NewUser(msgspec.Struct, frozen=True):
    name: Name
    phone: Phone | None = None
    email: Email | None = None
    avatar_url: AvatarUrl | UnsetType = UNSET


class TokenRequest(msgspec.Struct, frozen=True):
    """`device_id` binds the token to one device."""

    user_id: Id
    device_id: DeviceId | None = None


class AccessToken(msgspec.Struct, frozen=True):
    access_token: str
    expires_at: datetime


@post(
    "/v1/users",
    guards=[admin_guard, shape_guard],
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Create an account",
)
async def create_user(data: JSONBody[NewUser], desk: DeskDependency) -> User:
    """201 with the account; 409 `conflict` when another account has this phone or email."""
    user = User(
        user_id=desk.new_id("usr"),
        phone=data.phone,
        email=data.email,
        name=data.name,
        avatar_url=data.avatar_url,
        created_at=moment_at(now_ms()),
        status=UserStatus.OFFLINE,
    )
    match await desk.store.users.create(user):
        case Taken(field=field):
            raise RestError(ErrorCode.CONFLICT, f"another account has this {field}")
        case created:
            return created


@post(
    "/v1/tokens",
    guards=[admin_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Issue an access token",
)
async def create_token(data: JSONBody[TokenRequest], desk: DeskDependency) -> AccessToken:
    """201 with a token for WebSocket and REST; 404 `not_found` for an unknown user."""
    if await desk.store.users.get(data.user_id) is None:
        raise RestError(ErrorCode.NOT_FOUND, "no such user")
    token, expires_ms = desk.tokens.sign(
        data.user_id, data.device_id, now_ms(), desk.settings.token_ttl_seconds, desk.new_id("tok")
    )
    return AccessToken(token, moment_at(expires_ms))
