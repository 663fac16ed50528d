"""Keys of devices for end-to-end encryption: uploaded by their owner, listed and claimed by those who write to them.

The server checks whose keys they are and gives every one-time key away once; what is encrypted with them it cannot
read. Whoever removes a device calls `retire`.
"""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from litestar import Response, get, post, put
from litestar.background_tasks import BackgroundTask
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from protocol import codec, frames, records
from protocol.errors import ErrorCode
from protocol.frames import DeviceId
from protocol.models import Id
from protocol.prekeys import PublicKey, Purpose, SignedKey, signed_bytes
from workers.broker import BrokerUnavailable
from workers.rest.access import Caller, check_good, shape_guard, user_guard
from workers.rest.allowances import spend
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.errors import ErrorDetail, RestError
from workers.rest.shapes import CallerRequest, Limit, PathId, moment_at
from workers.store.device_keys import (
    STORED_LIMIT,
    Added,
    AnotherKey,
    Full,
    Identity,
    IdentityMoved,
    KeyDevice,
    Stored,
    TooManyDevices,
)
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workers.broker import Broker
    from workers.store import Store

ANNOUNCED_LIMIT: Final = 10_000
"""Most people who are told of one change; the others see the version when they next ask for the list."""
_HOUR: Final = 3600
_PAGE: Final = 100

PathDevice = Annotated[str, PathParameter(pattern=r"\A[A-Za-z0-9._:-]{1,64}\Z")]
DeviceCursor = Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9._:-]{1,64}\Z", required=False)]

log = structlog.get_logger(__name__)


class NewIdentity(msgspec.Struct, frozen=True):
    """`identity_key`: Curve25519. `signing_key`: Ed25519; it signs every prekey (`protocol.prekeys.signed_bytes`): the
    UTF-8 of `trireme.prekey.v1`, user id, device id, identity key, `one_time` or `fallback`, key id and key, with a NUL
    between them."""

    identity_key: PublicKey
    signing_key: PublicKey
    fallback_key: SignedKey


class NewOneTimeKeys(msgspec.Struct, frozen=True):
    keys: Annotated[list[SignedKey], Meta(min_length=1, max_length=100)]


class KeyCount(msgspec.Struct, frozen=True):
    """One-time keys of the device that nobody has claimed."""

    count: int


class OwnDevice(msgspec.Struct, frozen=True):
    """`one_time_keys`: how many nobody has claimed."""

    device_id: str
    identity_key: str
    signing_key: str
    fallback_key_id: str
    one_time_keys: int


class OwnDevices(msgspec.Struct, frozen=True):
    """One page. `version`: of the device list; it grows with every device added, changed or removed."""

    version: int
    items: list[OwnDevice]
    next_cursor: str | None


class StoredDevice(msgspec.Struct, frozen=True):
    """The device as it is now. `version`: of the user's device list; it has grown where the identity is a new one."""

    version: int
    device: OwnDevice


class ForeignDevice(msgspec.Struct, frozen=True):
    device_id: str
    identity_key: str
    signing_key: str


class ForeignDevices(msgspec.Struct, frozen=True):
    """One page. `version`: of the device list; it grows with every device added, changed or removed."""

    version: int
    items: list[ForeignDevice]
    next_cursor: str | None


class NamedDevice(msgspec.Struct, frozen=True):
    user_id: Id
    device_id: DeviceId


class Claim(msgspec.Struct, frozen=True):
    """No device is named twice."""

    devices: Annotated[list[NamedDevice], Meta(min_length=1, max_length=100, extra_json_schema={"uniqueItems": True})]


class ClaimedKey(msgspec.Struct, frozen=True):
    """One device's keys, or `error`. `fallback`: the key may be given to others too."""

    user_id: str
    device_id: str
    identity_key: str | UnsetType = UNSET
    signing_key: str | UnsetType = UNSET
    key: SignedKey | UnsetType = UNSET
    fallback: bool | UnsetType = UNSET
    error: ErrorDetail | UnsetType = UNSET


class ClaimedKeys(msgspec.Struct, frozen=True):
    """In the order they were asked for."""

    items: list[ClaimedKey]


# --- one's own devices -----------------------------------------------------------------------------------------------


@put(
    "/v1/keys/{device_id:str}",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.FORBIDDEN, ErrorCode.CONFLICT, ErrorCode.RATE_LIMITED)},
    summary="Set the identity and fallback key of an own device",
)
async def put_identity(
    request: CallerRequest, device_id: PathDevice, data: JSONBody[NewIdentity], desk: DeskDependency
) -> Response[StoredDevice]:
    """The device as it is now, and the device list's version.

    Another identity drops the device's one-time keys. 400 for a wrong signature, 403 `forbidden` for a token of another
    device, 409 `conflict` for one device too many.
    """
    user_id = owner_of(request, device_id)
    await spend(desk, "key_identity", user_id, desk.settings.key_uploads_per_hour, _HOUR)
    device = KeyDevice(user_id, device_id, data.identity_key, data.signing_key, data.fallback_key, 0, False)
    _check_signatures(device, Purpose.FALLBACK, [data.fallback_key])
    identity = Identity(data.identity_key, data.signing_key, data.fallback_key)
    limit = desk.settings.devices_per_account
    match await desk.store.device_keys.put(user_id, device_id, identity, moment_at(now_ms()), limit):
        case TooManyDevices():
            raise RestError(ErrorCode.CONFLICT, f"at most {limit} devices of a user have keys")
        case Stored(version=version, changed=changed, left=left):
            await stay_revoked(desk, request.user, device_id)
            task = BackgroundTask(announce, desk.store, desk.broker, user_id, device_id, version) if changed else None
            return Response(StoredDevice(version, _own(device, left)), background=task)


@post(
    "/v1/keys/{device_id:str}/one-time",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": (ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.RATE_LIMITED)},
    summary="Upload one-time keys of an own device",
)
async def add_one_time_keys(
    request: CallerRequest, device_id: PathDevice, data: JSONBody[NewOneTimeKeys], desk: DeskDependency
) -> KeyCount:
    """How many there are now; all are stored or none. A key uploaded before is left as it is, claimed or not.

    400 for a wrong signature, 404 `not_found` for a device without an identity, 409 `conflict` for a key id that has
    another key, and for more than 500 keys.
    """
    user_id = owner_of(request, device_id)
    await spend(desk, "key_one_time", user_id, desk.settings.key_uploads_per_hour, _HOUR)
    device = (await desk.store.device_keys.find([(user_id, device_id)])).get((user_id, device_id))
    if device is None:
        raise RestError(ErrorCode.NOT_FOUND, "this device has no identity key yet")
    _check_signatures(device, Purpose.ONE_TIME, data.keys)
    match await desk.store.device_keys.add_one_time(device, data.keys, moment_at(now_ms())):
        case AnotherKey(key_id=key_id):
            raise RestError(ErrorCode.CONFLICT, f"{key_id}: this id has another key")
        case Full(left=left):
            raise RestError(ErrorCode.CONFLICT, f"at most {STORED_LIMIT} one-time keys are kept, {left} are there")
        case IdentityMoved():
            raise RestError(ErrorCode.CONFLICT, "the device has another identity by now")
        case Added(left=left):
            return KeyCount(left)


@get(
    "/v1/keys",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit")},
    summary="List the caller's devices with keys",
)
async def list_own_keys(
    request: CallerRequest, desk: DeskDependency, cursor: DeviceCursor = None, limit: Limit = 50
) -> OwnDevices:
    """By device id."""
    store = desk.store.device_keys
    version = await store.version(request.user.user)
    devices, more = await store.listed(request.user.user, cursor or "", limit)
    lefts = await store.counts(devices)
    return OwnDevices(version, [_own(device, left) for device, left in zip(devices, lefts, strict=True)], more)


def _own(device: KeyDevice, left: int) -> OwnDevice:
    return OwnDevice(device.device_id, device.identity_key, device.signing_key, device.fallback_key.key_id, left)


async def stay_revoked(desk: Desk, caller: Caller, device_id: str) -> None:
    """A revocation that ended while something of the device was written has missed it: it goes again. One that comes
    later finds it, for it voids the tokens first. Raises RestError."""
    try:
        await check_good(desk, caller)
    except RestError:
        await retire(desk.store, desk.broker, caller.user, device_id)
        raise


def owner_of(request: CallerRequest, device_id: str) -> str:
    """The caller, whose device this is. Raises RestError for a token of another device."""
    bound_to = request.user.device_id
    if bound_to is not None and bound_to != device_id:
        raise RestError(ErrorCode.FORBIDDEN, "this token is another device's")
    return request.user.user


def _check_signatures(device: KeyDevice, purpose: Purpose, keys: Iterable[SignedKey]) -> None:
    signer = Ed25519PublicKey.from_public_bytes(b64decode(device.signing_key + "="))
    for key in keys:
        signed = signed_bytes(device.user_id, device.device_id, device.identity_key, purpose, key.key_id, key.key)
        try:
            signer.verify(b64decode(key.signature + "=="), signed)
        except InvalidSignature:
            raise RestError(ErrorCode.VALIDATION_FAILED, f"{key.key_id}: the signature is not right") from None


# --- others' devices -------------------------------------------------------------------------------------------------


@get(
    "/v1/users/{user_id:str}/keys",
    guards=[user_guard, shape_guard],
    opt={"query": ("cursor", "limit"), "errors": (ErrorCode.NOT_FOUND,)},
    summary="List a user's devices with keys",
)
async def list_user_keys(
    request: CallerRequest, user_id: PathId, desk: DeskDependency, cursor: DeviceCursor = None, limit: Limit = 50
) -> ForeignDevices:
    """By device id. 404 `not_found` for a user who is unknown, or who blocks the caller."""
    if await _hidden(desk, request.user.user, {user_id}):
        raise RestError(ErrorCode.NOT_FOUND, "no such user")
    # The version first: a change in between is then seen as one that is still to come.
    version = await desk.store.device_keys.version(user_id)
    devices, more = await desk.store.device_keys.listed(user_id, cursor or "", limit)
    items = [ForeignDevice(device.device_id, device.identity_key, device.signing_key) for device in devices]
    return ForeignDevices(version, items, more)


@post(
    "/v1/keys/claim",
    guards=[user_guard, shape_guard],
    status_code=200,
    opt={"errors": (ErrorCode.RATE_LIMITED,)},
    summary="Take a prekey of each of these devices",
)
async def claim_keys(request: CallerRequest, data: JSONBody[Claim], desk: DeskDependency) -> ClaimedKeys:
    """One one-time key per device, in upload order, each given away once; the fallback key where none is left, or where
    this device's were claimed too often of late.

    Not idempotent: a repeated request takes other keys. Devices that are unknown, have no keys or belong to somebody
    who blocks the caller have the error `not_found`. 429 `rate_limited` for who claims too often.
    """
    claimer = request.user.user
    names = [(device.user_id, device.device_id) for device in data.devices]
    if len(set(names)) < len(names):
        raise RestError(ErrorCode.VALIDATION_FAILED, "devices: one is named twice")
    await spend(desk, "key_claimer", claimer, desk.settings.key_claims_per_minute, 60)
    hidden = await _hidden(desk, claimer, {user_id for user_id, _ in names})
    known = await desk.store.device_keys.find(name for name in names if name[0] not in hidden)
    return ClaimedKeys([await _claim(desk, claimer, name, known.get(name)) for name in names])


async def _claim(desk: Desk, claimer: str, name: tuple[str, str], device: KeyDevice | None) -> ClaimedKey:
    if device is None:
        return ClaimedKey(*name, error=ErrorDetail(ErrorCode.NOT_FOUND, "no such device with keys"))
    store = desk.store.device_keys
    key = await store.claim(device, moment_at(now_ms())) if await _may_drain(desk, claimer, device) else None
    left = await store.running_low(device)
    if left is not None:
        payload = frames.KeysLowPayload(device_id=device.device_id, remaining=left)
        await desk.broker.notify_user(device.user_id, _tell(frames.KeysLow(payload=payload), device.device_id))
    chosen = device.fallback_key if key is None else key
    return ClaimedKey(*name, device.identity_key, device.signing_key, chosen, key is None)


async def _may_drain(desk: Desk, claimer: str, device: KeyDevice) -> bool:
    """Neither one claimer nor all together empty a device: past these limits there is the fallback key."""
    limits = desk.settings
    take = desk.broker.spend
    pair = f"{claimer}\0{device.name}"
    if await take("key_pair", pair, limits.key_claims_per_pair_per_hour, _HOUR):
        return False
    return not await take("key_device", device.name, limits.key_claims_per_device_per_hour, _HOUR)


async def _hidden(desk: Desk, caller: str, user_ids: set[str]) -> set[str]:
    """Those who are not there for the caller."""
    unknown = await desk.store.users.unknown(user_ids)
    return unknown | await desk.store.blocks.who_blocks(caller, user_ids - unknown)


# --- changes of the device list --------------------------------------------------------------------------------------


async def retire(store: Store, broker: Broker, user_id: str, device_id: str) -> None:
    """A device was removed or revoked: it gets no push any more, its keys go, and others hear of that. Nothing where it
    had neither.

    Raises StoreUnavailable: do it again.
    """
    await store.push_tokens.remove(user_id, device_id)
    version = await store.device_keys.forget(user_id, device_id)
    if version is not None:
        await announce(store, broker, user_id, device_id, version)


async def announce(store: Store, broker: Broker, user_id: str, device_id: str, version: int) -> None:
    """Tell everybody who shares a conversation with the user, and the user's other devices, that the list has changed.

    At most once: whoever is offline, or beyond `ANNOUNCED_LIMIT`, finds the new version when asking for the list.
    """
    payload = frames.IdentityChangedPayload(user_id=user_id, device_id=device_id, version=version)
    frame = frames.IdentityChanged(payload=payload)
    try:
        after: str | None = ""
        while after is not None:
            own, after = await store.device_keys.listed(user_id, after, _PAGE)
            for other in own:
                if other.device_id != device_id:
                    await broker.notify_user(user_id, _tell(frame, other.device_id))
        told = {user_id}
        async for people in store.device_keys.neighbours(user_id):
            for person in sorted(people - told)[: ANNOUNCED_LIMIT - len(told)]:
                told.add(person)
                await broker.notify_user(person, _tell(frame))
            if len(told) >= ANNOUNCED_LIMIT:
                log.warning("identity_change_not_told_to_all", user_id=user_id, told=len(told))
                return
    except (StoreUnavailable, BrokerUnavailable) as error:
        log.warning("identity_change_untold", user_id=user_id, error=str(error))


def _tell(frame: frames.ServerFrame, device_id: str = "") -> records.Tell:
    return records.Tell(msgspec.Raw(codec.JSON.encode(frame)), device_id)
