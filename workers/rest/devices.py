"""An account's devices: listed, and revoked at once wherever they are connected."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import msgspec
from litestar import delete, get
from litestar.params import PathParameter, QueryParameter

from protocol.errors import ErrorCode
from workers import revocation
from workers.rest.access import shape_guard, user_guard
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.device_keys import DeviceCursor, retire
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, Limit, Listing

PathDevice = Annotated[str, PathParameter(pattern=r"\A[A-Za-z0-9._:-]{1,64}\Z")]


class Keep(StrEnum):
    """Which device stays logged in."""

    CURRENT = "current"
    NONE = "none"


class ShownDevice(msgspec.Struct, frozen=True):
    """`last_seen` is exact to an hour. `current`: the one that asks."""

    device_id: str
    platform: str
    name: str
    created_at: datetime
    last_seen: datetime
    current: bool


@get(
    "/v1/devices",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit")},
    summary="List one's devices",
)
async def list_devices(
    request: CallerRequest, desk: DeskDependency, cursor: DeviceCursor = None, limit: Limit = 50
) -> Listing[ShownDevice]:
    """The caller's devices by id; those that were revoked or logged out are not among them."""
    found, more = await desk.store.devices.listed(request.user.user, cursor or "", limit)
    own = request.user.device_id
    items = [ShownDevice(**msgspec.structs.asdict(device), current=device.device_id == own) for device in found]
    return Listing(items, more)


@delete(
    "/v1/devices/{device_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Revoke a device",
)
async def revoke_device(request: CallerRequest, device_id: PathDevice, desk: DeskDependency) -> None:
    """204; its tokens are void, its connections end, its keys are gone. Also for one that was revoked before."""
    if not await end_device(desk, request.user.user, device_id, has_token=device_id == request.user.device_id):
        raise RestError(ErrorCode.NOT_FOUND, "no such device")


@delete(
    "/v1/devices",
    guards=[user_guard, shape_guard],
    opt={"query": ("keep",), "errors": (ErrorCode.FORBIDDEN,)},
    summary="Revoke all devices, or all others",
)
async def revoke_devices(
    request: CallerRequest,
    desk: DeskDependency,
    keep: Annotated[Keep, QueryParameter()],
) -> None:
    """204. `keep=current` leaves the one that asks; 403 for that with a token that is bound to no device."""
    user_id, own = request.user.user, request.user.device_id
    if keep is Keep.CURRENT and own is None:
        raise RestError(ErrorCode.FORBIDDEN, "this token is bound to no device")
    kept = own if keep is Keep.CURRENT else None
    devices = [device_id for device_id in await key_devices(desk, user_id) if device_id != kept]
    await revocation.revoke_others(desk.store, desk.broker, user_id, kept, now_ms())
    for device_id in devices:
        await retire(desk.store, desk.broker, user_id, device_id)
    await desk.store.push_tokens.forget_others(user_id, kept)


async def key_devices(desk: Desk, user_id: str) -> list[str]:
    """The devices of a user that have keys."""
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        page, after = await desk.store.device_keys.listed(user_id, after, 100)
        found += [device.device_id for device in page]
    return found


async def end_device(desk: Desk, user_id: str, device_id: str, *, has_token: bool = False) -> bool:
    """Void a device's tokens, end its connections, drop its keys; False for one that was never there.

    `has_token`: it is there, for it asks.
    """
    there = await revocation.revoke_device(desk.store, desk.broker, user_id, device_id, now_ms(), has_token=has_token)
    await retire(desk.store, desk.broker, user_id, device_id)
    return there
