"""What an operator's tools ask: alive, ready, metrics. They say nothing about anybody; the metrics are for this
machine, and for whoever has the administrator's token."""

from __future__ import annotations

import anyio
import msgspec
from litestar import Response, get
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from workers.broker import BrokerUnavailable
from workers.rest.access import metrics_guard
from workers.rest.desk import DeskDependency
from workers.store.errors import StoreUnavailable

_READY_SECONDS = 2.0


class Health(msgspec.Struct, frozen=True):
    status: str


@get("/health/live", summary="Is the process alive")
async def live() -> Health:
    """200 while the event loop turns."""
    return Health("ok")


@get("/health/ready", opt={"answers": {503: Health}}, summary="Can requests be served")
async def ready(desk: DeskDependency) -> Response[Health]:
    """503 while MongoDB, Redis or this instance's lease is away."""
    try:
        with anyio.fail_after(_READY_SECONDS):
            await desk.store.ping()
            await desk.broker.ping()
    except (StoreUnavailable, BrokerUnavailable, TimeoutError):
        return Response(Health("unavailable"), status_code=503)
    if not desk.instance.alive:
        return Response(Health("no_lease"), status_code=503)
    return Response(Health("ok"))


@get("/metrics", media_type="text/plain", include_in_schema=False, guards=[metrics_guard])
async def metrics() -> Response[bytes]:
    """The process' registry in Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
