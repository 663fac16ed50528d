"""All metrics of the gateway, and its health pages.

Called by `server.py`. The hot path only counts in plain integers; they are read here when somebody asks. Label sets are
closed: no id of a user, device or conversation is ever a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.broker import RedisBroker
    from gateway.hub import Hub
    from gateway.timers import TimerRole
    from gateway.transport import TransportServer

_JSON: Final = "application/json"


class Page(msgspec.Struct, frozen=True):
    """Implements `transport.HttpAnswer`."""

    status: int
    content_type: str
    body: bytes


class GatewayCollector(Collector):
    """Reads the counters of every role at scrape time."""

    def __init__(self, hub: Hub, broker: RedisBroker, transport: TransportServer, timers: TimerRole) -> None:
        self._hub = hub
        self._broker = broker
        self._transport = transport
        self._timers = timers

    def collect(self) -> Iterator[Metric]:
        """One family per metric."""
        for name, text, value in self._counters():
            yield CounterMetricFamily(f"gateway_{name}", text, value)
        for name, text, gauge in self._gauges():
            yield GaugeMetricFamily(f"gateway_{name}", text, gauge)
        refusals = CounterMetricFamily("gateway_auth_refused", "auth_error frames sent at the door", labels=["code"])
        for code, refused in self._hub.refusals.items():
            refusals.add_metric([code.value], refused)
        yield refusals
        connects = CounterMetricFamily("gateway_redis_connects", "connections made to Redis", labels=["wire"])
        up = GaugeMetricFamily("gateway_redis_up", "1 while connected", labels=["wire"])
        outstanding = GaugeMetricFamily("gateway_redis_outstanding", "commands without an answer", labels=["wire"])
        unsent = GaugeMetricFamily("gateway_redis_unsent_bytes", "bytes for a socket that is full", labels=["wire"])
        for wire in (self._broker.commands, self._broker.down, self._broker.channels.wire):
            connects.add_metric([wire.name], wire.connects)
            up.add_metric([wire.name], float(wire.connected))
            outstanding.add_metric([wire.name], wire.outstanding)
            unsent.add_metric([wire.name], wire.unsent_bytes)
        yield from (connects, up, outstanding, unsent)

    def _counters(self) -> Iterator[tuple[str, str, int]]:
        counts, transport, receipts = self._hub.counts, self._transport, self._broker.receipts
        yield "accepted", "TCP connections taken", transport.accepted
        yield "handshakes_refused", "connections that never became a WebSocket", transport.handshakes_refused
        yield "received_bytes", "bytes from clients", transport.bytes_in
        yield "sent_bytes", "bytes to clients", transport.bytes_out
        yield "received_frames", "data messages from clients", transport.frames_in
        yield "sent_frames", "data messages to clients", transport.frames_out
        isolated = transport.isolated_errors + counts.isolated_errors + self._timers.failed_jobs
        yield "isolated_errors", "bugs that ended one connection or sweep; must stay 0", isolated
        yield "published", "client messages handed to Redis", counts.published
        yield "publish_failures", "client messages answered with a retryable error", counts.publish_failures
        yield "outcomes", "acks and refusals from the workers", counts.outcomes
        yield "deliveries", "live frames written to recipients", counts.deliveries
        yield "catch_ups", "live frames dropped for a connection that was behind", counts.catch_ups
        yield "pages", "backlog pages from the workers", counts.pages
        yield "repairs", "lost pushes the sweep found", counts.repairs
        yield "turned_away", "WebSockets refused because their address opens too many", counts.turned_away
        yield "replaced", "connections ended by a newer one of the same device", counts.replaced
        yield "migrated", "clients let in by the session token of a migration frame", counts.migrated
        yield "receipts_unknown", "receipts for ids that are none of ours", receipts.unknown_ids
        yield "receipts_dropped", "receipts past the bound while Redis was away", receipts.dropped
        yield "down_undecodable", "down entries that could not be read", self._broker.undecodable
        yield "signals", "things said on the channels of users", counts.signals
        yield "presence_told", "presence frames to watchers", self._hub.presence.told
        yield "channel_undecodable", "channel messages that were none of ours", self._broker.channels.undecodable

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        hub, broker = self._hub, self._broker
        yield "connections", "sockets in hand, in any stage", self._transport.connections
        yield "users", "users with a live session here", len(self._hub.users)
        yield "watched_people", "people whose presence somebody here watches", len(self._hub.presence.people)
        yield "in_flight", "messages without an outcome", self._hub.in_flight
        yield "receipts_waiting", "receipts not yet handed over", self._broker.receipts.waiting
        yield "backlog_entries", "entries no worker has settled", self._broker.workload.entries
        yield "shard_backlog_entries", "greatest backlog of a shard", self._broker.workload.greatest
        yield (
            "greatest_in_flight",
            "messages without an outcome of the connection that has most",
            hub.greatest_in_flight,
        )
        yield "opening_sessions", "clients with a good token that wait for a worker", len(hub.opening)
        yield "retiring_connections", "connections whose client has gone on elsewhere", hub.retiring
        yield "user_budgets", "users whose rate is kept", hub.budgets
        yield "suspected_heads", "conversations that may have lost a push", hub.heads.suspects
        yield "presence_questions", "watchers who may ask again", hub.presence.questions
        yield "channel_changes_waiting", "subscriptions and questions of the next turn", broker.channels.waiting
        yield "detaches_waiting", "registrations to take back when Redis is there", broker.detaches_waiting
        tokens, failed, unknown = hub.remembered
        yield "verified_tokens", "tokens verified within the last minute", tokens
        yield "failed_addresses", "addresses whose failures are counted", failed
        yield "unknown_addresses", "addresses with connections that have shown no token", unknown
        buffered = self._transport.buffered
        yield "outbox_bytes", "bytes that clients have not taken", buffered.outbox_bytes
        yield "greatest_outbox_bytes", "the same of the connection that has most", buffered.greatest_outbox_bytes
        yield "greatest_outbox_frames", "frames likewise", buffered.greatest_outbox_frames
        yield "greatest_held_bytes", "bytes read and held while a window is full", buffered.greatest_held_bytes
        yield "loop_late_seconds", "how late the last timer step began", self._timers.late_seconds


class Pages:
    """Plain HTTP on the gateway's port: /health/live, /health/ready, /metrics."""

    def __init__(self, collector: Collector, missing: Callable[[], list[str]]) -> None:
        """`missing`: what readiness still lacks."""
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._missing = missing

    def answer(self, path: str) -> Page | None:
        """See `transport.Host.answer_http`."""
        if path == "/health/live":
            return Page(200, _JSON, b'{"status":"live"}')
        if path == "/health/ready":
            missing = self._missing()
            if missing:
                return Page(503, _JSON, msgspec.json.encode({"status": "not_ready", "missing": missing}))
            return Page(200, _JSON, b'{"status":"ready"}')
        if path == "/metrics":
            return Page(200, CONTENT_TYPE_LATEST, generate_latest(self._registry))
        return None
