"""How an own device is told when it has no connection: registered, shown, taken away.

A push carries ids and a badge, never content. Apps register whenever they start: what is not registered again for some
weeks is forgotten, and so is what the provider says is gone.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import msgspec
import structlog
from litestar import delete, get, put
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from protocol.errors import ErrorCode
from workers.push.adapters import LogAdapter
from workers.push.apns import ApnsAdapter
from workers.push.fcm import FcmAdapter
from workers.push.providers import kinds, vapid_of
from workers.push.web_push import WebPushAdapter, check_keys
from workers.push.webhook import WebhookAdapter
from workers.rest.access import shape_guard, user_guard
from workers.rest.allowances import spend
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.device_keys import PathDevice, owner_of, stay_revoked
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, moment_at
from workers.store.push_tokens import PushToken

log = structlog.get_logger(__name__)

_HOUR = 3600
OpaqueToken = Annotated[str, Meta(pattern=r"\A[!-~]{1,4096}\Z")]


class NewLogToken(msgspec.Struct, frozen=True, tag_field="kind", tag="log"):
    """Development: pushes are written into the log."""


class NewWebhookToken(msgspec.Struct, frozen=True, tag_field="kind", tag="webhook"):
    """Whatever the operator's program knows the device by."""

    token: OpaqueToken


class NewFcmToken(msgspec.Struct, frozen=True, tag_field="kind", tag="fcm"):
    """A registration token of Firebase Cloud Messaging."""

    token: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_:.-]{1,4096}\Z")]


class NewApnsToken(msgspec.Struct, frozen=True, tag_field="kind", tag="apns"):
    """A device token of Apple's, hexadecimal."""

    token: Annotated[str, Meta(pattern=r"\A([0-9A-Fa-f]{2}){16,200}\Z")]


class SubscriptionKeys(msgspec.Struct, frozen=True):
    """Base64url: the device's point of P-256, and 16 bytes that only it and we know."""

    p256dh: Annotated[str, Meta(min_length=1, max_length=128)]
    auth: Annotated[str, Meta(min_length=1, max_length=64)]


class Subscription(msgspec.Struct, frozen=True):
    """What `PushSubscription.toJSON()` gives; `expirationTime` is not looked at."""

    endpoint: Annotated[str, Meta(min_length=1, max_length=2048)]
    keys: SubscriptionKeys


class NewWebPushToken(msgspec.Struct, frozen=True, tag_field="kind", tag="web_push"):
    """A subscription of a browser, made with the key of `GET /v1/push`."""

    subscription: Subscription


NewToken = NewLogToken | NewWebhookToken | NewFcmToken | NewApnsToken | NewWebPushToken


class ShownToken(msgspec.Struct, frozen=True):
    """`expires_at`: unless the device registers again."""

    device_id: str
    kind: str
    registered_at: datetime
    expires_at: datetime


class PushOffer(msgspec.Struct, frozen=True):
    """The kinds of token that this installation takes. `application_server_key`: what browsers subscribe with."""

    kinds: list[str]
    application_server_key: str | UnsetType = UNSET


@get("/v1/push", guards=[user_guard, shape_guard], summary="Read how devices can be told")
async def read_push(desk: DeskDependency) -> PushOffer:
    """What a client has to know before it registers."""
    offered = kinds(desk.settings)
    is_web = WebPushAdapter.kind in offered
    return PushOffer(offered, vapid_of(desk.settings).public_key if is_web else UNSET)


@put(
    "/v1/devices/{device_id:str}/push",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.FORBIDDEN, ErrorCode.CONFLICT, ErrorCode.RATE_LIMITED)},
    summary="Register an own device for pushes",
)
async def put_token(
    request: CallerRequest, device_id: PathDevice, data: JSONBody[NewToken], desk: DeskDependency
) -> ShownToken:
    """The token as it is kept, in place of the device's earlier one. Whoever else registered the same has it no longer.

    400 for a kind that this installation does not tell, 403 `forbidden` for a token of another device, 409 `conflict`
    for one device too many.
    """
    user_id = owner_of(request, device_id)
    await spend(desk, "push_tokens", user_id, desk.settings.push_registrations_per_hour, _HOUR)
    token = await _token(desk, user_id, device_id, data)
    limit = desk.settings.devices_per_account
    if not await desk.store.push_tokens.put(token, limit):
        raise RestError(ErrorCode.CONFLICT, f"at most {limit} devices of a user are told")
    await stay_revoked(desk, request.user, device_id)
    log.info("push_registered", user_id=user_id, device_id=device_id, kind=token.kind)
    return _shown(token)


async def _token(desk: Desk, user_id: str, device_id: str, data: NewToken) -> PushToken:
    """Raises RestError for what cannot be told."""
    p256dh = auth = ""
    match data:
        case NewLogToken():
            kind, address = LogAdapter.kind, f"{user_id}:{device_id}"
        case NewWebhookToken(token=address):
            kind = WebhookAdapter.kind
        case NewFcmToken(token=address):
            kind = FcmAdapter.kind
        case NewApnsToken(token=address):
            kind, address = ApnsAdapter.kind, address.lower()
        case NewWebPushToken(subscription=Subscription(endpoint=address, keys=keys)):
            kind, p256dh, auth = WebPushAdapter.kind, keys.p256dh, keys.auth
    if kind not in (offered := kinds(desk.settings)):
        said = ", ".join(offered) or "none"
        raise RestError(ErrorCode.VALIDATION_FAILED, f"kind: {kind} is not configured here; there are: {said}")
    if kind == WebPushAdapter.kind:
        await _check_subscription(desk, address, p256dh, auth)
    now = moment_at(now_ms())
    return PushToken(
        user_id=user_id,
        device_id=device_id,
        kind=kind,
        address=address,
        p256dh=p256dh,
        auth=auth,
        registered_at=now,
        expires_at=now + timedelta(days=desk.settings.push_token_days),
    )


async def _check_subscription(desk: Desk, endpoint: str, p256dh: str, auth: str) -> None:
    """Raises RestError where nobody could be told by it."""
    if reason := check_keys(p256dh, auth):
        raise RestError(ErrorCode.VALIDATION_FAILED, f"subscription.{reason}")
    if reason := await desk.egress.check(endpoint):
        raise RestError(ErrorCode.VALIDATION_FAILED, f"subscription.endpoint: {reason}")


@get(
    "/v1/devices/{device_id:str}/push",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND)},
    summary="Read how an own device is told",
)
async def read_token(request: CallerRequest, device_id: PathDevice, desk: DeskDependency) -> ShownToken:
    """404 `not_found` for a device that is not registered, or whose token is gone."""
    token = await desk.store.push_tokens.get(owner_of(request, device_id), device_id)
    if token is None:
        raise RestError(ErrorCode.NOT_FOUND, "this device is not registered for pushes")
    return _shown(token)


@delete(
    "/v1/devices/{device_id:str}/push",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.FORBIDDEN, ErrorCode.NOT_FOUND)},
    summary="End the pushes to an own device",
)
async def delete_token(request: CallerRequest, device_id: PathDevice, desk: DeskDependency) -> None:
    """204; 404 `not_found` for a device that is not registered."""
    if not await desk.store.push_tokens.remove(owner_of(request, device_id), device_id):
        raise RestError(ErrorCode.NOT_FOUND, "this device is not registered for pushes")


def _shown(token: PushToken) -> ShownToken:
    return ShownToken(token.device_id, token.kind, token.registered_at, token.expires_at)
