"""What an operator's tools ask: alive, ready, metrics. They say nothing about anybody; the metrics are for this
machine, and for whoever has the administrator's token."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from msgspec import UNSET, UnsetType
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from workers.readiness import missing
from workers.rest.access import metrics_guard
from workers.rest.desk import DeskDependency


class Health(msgspec.Struct, frozen=True):
    """`missing`: mongodb, redis, instance (this process' lease, by which others answer it)."""

    status: str
    missing: list[str] | UnsetType = UNSET


@get("/health/live", summary="Is the process alive")
async def live() -> Health:
    """200 while the event loop turns."""
    return Health("ok")


@get("/health/ready", opt={"answers": {503: Health}}, summary="Can requests be served")
async def ready(desk: DeskDependency) -> Response[Health]:
    """503 while MongoDB, Redis or this instance's lease is away."""
    lacking = [*await missing(desk.store, desk.broker), *([] if desk.instance.alive else ["instance"])]
    if lacking:
        return Response(Health("not_ready", lacking), status_code=503)
    return Response(Health("ok"))


@get("/metrics", media_type="text/plain", include_in_schema=False, guards=[metrics_guard])
async def metrics() -> Response[bytes]:
    """The process' registry in Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
