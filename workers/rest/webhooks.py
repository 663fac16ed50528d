"""Webhooks of apps, for the administrator: who is sent which events, and how they fare. Nobody else learns of them: to
a user's token these routes do not exist.

A secret is shown once, by whoever makes it. A URL that leads where nobody may go is refused here, and again whenever it
is called (`workers/egress.py`).
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import structlog
from litestar import delete, get, patch, post
from litestar.params import JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from protocol import events, webhooks
from protocol.errors import ErrorCode
from protocol.webhooks import (
    App,
    DeliveryStatus,
    Ids,
    Mode,
    Reason,
    Span,
    Types,
    Url,
    Webhook,
    WebhookStatus,
)
from workers import metrics
from workers.rest.access import operator_guard, shape_guard
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import Limit, Listing, Moment, PathId, QueryId, clamped, moment_at
from workers.webhooks.call import Verdict, call

if TYPE_CHECKING:
    from datetime import datetime

COUNTED: Final = 100_001
"""Deliveries are counted as far as that."""

AppQuery = Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)]
log = structlog.get_logger(__name__)


class NewWebhook(msgspec.Struct, kw_only=True, frozen=True):
    """What an app asks for. Empty lists let everything through; without `types` it hears every message."""

    app: App
    url: Url
    mode: Mode = Mode.STRUCTURED
    types: Types = msgspec.field(default_factory=list)
    conversation_ids: Ids = msgspec.field(default_factory=list)
    agent_ids: Ids = msgspec.field(default_factory=list)


class WebhookChange(msgspec.Struct, kw_only=True, frozen=True):
    """What is left out stays."""

    app: App | UnsetType = UNSET
    url: Url | UnsetType = UNSET
    mode: Mode | UnsetType = UNSET
    types: Types | UnsetType = UNSET
    conversation_ids: Ids | UnsetType = UNSET
    agent_ids: Ids | UnsetType = UNSET


class WebhookSecret(msgspec.Struct, frozen=True):
    """`secret` is shown here and never again."""

    webhook: Webhook
    secret: str


class WebhookState(msgspec.Struct, frozen=True):
    """`waiting`: deliveries in the queue. `dead_letters`: those that failed. Both are counted to 100,001."""

    webhook: Webhook
    waiting: int
    dead_letters: int


class TestOutcome(msgspec.Struct, frozen=True):
    """`status`: what the webhook answered, null for nothing. `reason`: one line, "" where it arrived."""

    delivered: bool
    status: int | None
    reason: str


class ReplaySpan(msgspec.Struct, frozen=True):
    """Messages made at `since` or later, and before `until`."""

    since: Moment
    until: Moment


@post(
    "/v1/webhooks",
    guards=[operator_guard, shape_guard],
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Register a webhook",
)
async def create_webhook(data: JSONBody[NewWebhook], desk: DeskDependency) -> WebhookSecret:
    """201 with its secret. 400 `validation_failed` for a URL that is not called: no https, or an address that is not
    public. 409 `conflict` where there are as many webhooks as may be. To a user's token: 404 `not_found`, as all routes
    of webhooks."""
    await _check(desk, data.url)
    now = _now()
    webhook = Webhook(
        webhook_id=desk.new_id("whk"),
        app=data.app,
        url=data.url,
        mode=data.mode,
        types=_distinct(data.types),
        conversation_ids=_distinct(data.conversation_ids),
        agent_ids=_distinct(data.agent_ids),
        status=WebhookStatus.ENABLED,
        created_at=now,
        updated_at=now,
    )
    key = secrets.token_bytes(webhooks.SECRET_BYTES)
    if not await desk.store.webhooks.create(webhook, key):
        raise RestError(ErrorCode.CONFLICT, f"there are {webhooks.LIMIT} webhooks, which is as many as may be")
    log.info("webhook_created", webhook=webhook.webhook_id, app=webhook.app)
    return WebhookSecret(webhook, webhooks.secret_of(key))


@get(
    "/v1/webhooks",
    guards=[operator_guard, shape_guard],
    opt={"query": ("app", "cursor", "limit")},
    summary="List webhooks",
)
async def list_webhooks(
    desk: DeskDependency, app: AppQuery = None, cursor: QueryId = None, limit: Limit = 50
) -> Listing[Webhook]:
    """Oldest first, of one app or of all."""
    page, more = await desk.store.webhooks.page(app, cursor or "", limit)
    return Listing(page, more)


@get("/v1/webhooks/{webhook_id:str}", guards=[operator_guard, shape_guard], summary="Read a webhook")
async def read_webhook(webhook_id: PathId, desk: DeskDependency) -> WebhookState:
    """With how much waits for it, and how much could not be delivered."""
    webhook = _known(await desk.store.webhooks.get(webhook_id))
    count = desk.store.deliveries.count
    return WebhookState(
        webhook,
        await count(webhook_id, DeliveryStatus.PENDING, COUNTED),
        await count(webhook_id, DeliveryStatus.FAILED, COUNTED),
    )


@patch("/v1/webhooks/{webhook_id:str}", guards=[operator_guard, shape_guard], summary="Change a webhook")
async def change_webhook(webhook_id: PathId, data: JSONBody[WebhookChange], desk: DeskDependency) -> Webhook:
    """In force within seconds, for what waits as well; the filter for what is said from then on."""
    changes = {
        name: _distinct(value) if isinstance(value, list) else value
        for name, value in msgspec.to_builtins(data).items()
    }
    if not changes:
        return _known(await desk.store.webhooks.get(webhook_id))
    if isinstance(data.url, str):
        await _check(desk, data.url)
    return _known(await desk.store.webhooks.change(webhook_id, changes, _now()))


@delete("/v1/webhooks/{webhook_id:str}", guards=[operator_guard, shape_guard], summary="Delete a webhook")
async def delete_webhook(webhook_id: PathId, desk: DeskDependency) -> None:
    """204. What waits for it goes with it."""
    if not await desk.store.webhooks.delete(webhook_id):
        raise _unknown()
    await desk.store.deliveries.forget(webhook_id)
    log.info("webhook_deleted", webhook=webhook_id)


@post(
    "/v1/webhooks/{webhook_id:str}/enable",
    guards=[operator_guard, shape_guard],
    status_code=200,
    summary="Enable a webhook again",
)
async def enable_webhook(webhook_id: PathId, desk: DeskDependency) -> Webhook:
    """It gets events again, first what waited when it was disabled. What was said meanwhile: see replay."""
    return _known(await desk.store.webhooks.enable(webhook_id, _now()))


@post(
    "/v1/webhooks/{webhook_id:str}/disable",
    guards=[operator_guard, shape_guard],
    status_code=200,
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Disable a webhook",
)
async def disable_webhook(webhook_id: PathId, desk: DeskDependency) -> Webhook:
    """Nothing more is sent or queued; what waits is kept for a week. 409 `conflict` where it is disabled already."""
    webhook = await desk.store.webhooks.disable(webhook_id, Reason.BY_HAND, _now())
    if webhook is None:
        _known(await desk.store.webhooks.get(webhook_id))
        raise RestError(ErrorCode.CONFLICT, "it is disabled already")
    metrics.WEBHOOKS_DISABLED.labels(Reason.BY_HAND.value).inc()
    log.info("webhook_disabled", webhook=webhook_id, app=webhook.app, reason=Reason.BY_HAND.value)
    return webhook


@post(
    "/v1/webhooks/{webhook_id:str}/rotate-secret",
    guards=[operator_guard, shape_guard],
    status_code=200,
    summary="Rotate a webhook's secret",
)
async def rotate_secret(webhook_id: PathId, desk: DeskDependency) -> WebhookSecret:
    """A new secret; for 24 hours requests are signed with the one before as well."""
    key = secrets.token_bytes(webhooks.SECRET_BYTES)
    webhook = _known(await desk.store.webhooks.rotate(webhook_id, key, _now()))
    log.info("webhook_secret_rotated", webhook=webhook_id)
    return WebhookSecret(webhook, webhooks.secret_of(key))


@post(
    "/v1/webhooks/{webhook_id:str}/test",
    guards=[operator_guard, shape_guard],
    status_code=200,
    summary="Send a webhook a test event",
)
async def test_webhook(webhook_id: PathId, desk: DeskDependency) -> TestOutcome:
    """One request with a `trireme.webhook.test.v1`, now, whether it is enabled or not; 200 says what came of it."""
    now = _now()
    registered = await desk.store.webhooks.signing(webhook_id, now)
    if registered is None:
        raise _unknown()
    event = events.webhook_test(desk.new_id("evt"), events.WebhookTestEvent(webhook_id=webhook_id, timestamp=now))
    outcome = await call(desk.egress, registered, event, now)
    return TestOutcome(outcome.verdict is Verdict.DELIVERED, outcome.status, outcome.reason)


@post(
    "/v1/webhooks/{webhook_id:str}/replay",
    guards=[operator_guard, shape_guard],
    status_code=202,
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Send a webhook a span of the log again",
)
async def replay_webhook(webhook_id: PathId, data: JSONBody[ReplaySpan], desk: DeskDependency) -> Webhook:
    """202: what it wants of that span is queued page by page while it is enabled, under the ids it had before; `replay`
    is null again when all is. 409 `conflict` while another span is being replayed."""
    since, until = clamped(data.since), min(clamped(data.until), _now())
    if since >= until:
        raise RestError(ErrorCode.VALIDATION_FAILED, "`since` must be before `until`, and in the past")
    webhook = await desk.store.webhooks.begin_replay(webhook_id, Span(since=since, until=until))
    if webhook is None:
        _known(await desk.store.webhooks.get(webhook_id))
        raise RestError(ErrorCode.CONFLICT, "a replay is under way")
    return webhook


async def _check(desk: Desk, url: str) -> None:
    reason = await desk.egress.check(url)
    if reason:
        raise RestError(ErrorCode.VALIDATION_FAILED, f"url: {reason}")


def _distinct(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _known(webhook: Webhook | None) -> Webhook:
    if webhook is None:
        raise _unknown()
    return webhook


def _unknown() -> RestError:
    return RestError(ErrorCode.NOT_FOUND, "no such webhook")


def _now() -> datetime:
    return moment_at(now_ms())
