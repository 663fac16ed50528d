"""Every metric of the workers, units as suffixes, closed label sets, never an id as label.

Imported by the roles; `serve` opens the optional port of a worker process, the REST role shows the same registry at
`/metrics`.
"""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

import msgspec
from prometheus_client import Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_READ_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

# --- query role ------------------------------------------------------------------------------------------------------

QUERIES: Final = Counter("trireme_queries_total", "Reads answered for gateways", ["kind", "outcome"])
QUERY_SECONDS: Final = Histogram(
    "trireme_query_seconds", "From a query's decoding to its answer in hand", ["kind"], buckets=_READ_BUCKETS
)
ANSWERS_WAITING: Final = Gauge("trireme_query_answers_waiting", "Answers to publish")
QUERIES_UNDER_WAY: Final = Gauge("trireme_queries_under_way", "Reads for gateways at work now")

# --- ingest role -----------------------------------------------------------------------------------------------------

INGESTED: Final = Counter("trireme_ingested_total", "Log entries by what became of them", ["outcome"])
"""outcome: committed, duplicate, rejected, dead_letter, lost (trimmed while pending)."""
REPLAYS: Final = Counter("trireme_replays_total", "Dead letters tried again, by what became of it", ["outcome"])
"""outcome: resolved, failed (again), rejected (not allowed, so never again)."""
BATCH_MESSAGES: Final = Histogram(
    "trireme_ingest_batch_messages", "Messages per commit", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500)
)
COMMIT_SECONDS: Final = Histogram(
    "trireme_ingest_commit_seconds", "One majority-journalled insert", buckets=_READ_BUCKETS
)
COMMIT_RETRIES: Final = Counter("trireme_ingest_retries_total", "Batches planned again", ["reason"])
RECEIPTS: Final = Counter("trireme_receipts_total", "Receipts by what became of them", ["outcome"])
DELIVERIES: Final = Counter("trireme_deliveries_total", "Runs of messages times the users they are for")
ERASED: Final = Counter("trireme_erased_total", "Messages whose content has disappeared for good")
TYPING: Final = Counter("trireme_typing_total", "Typing signals by what became of them", ["outcome"])
"""outcome: told, refused, dropped."""
BURIED: Final = Counter("trireme_buried_instances_total", "Dead instances whose traces were removed here")
BREAKERS: Final = Gauge("trireme_breaker_state", "0 closed, 1 half-open, 2 open", ["service"])
"""service: mongodb, redis, webhook."""
BREAKER_REFUSALS: Final = Counter(
    "trireme_breaker_refusals_total", "Calls not made because a breaker was open", ["service"]
)
DEAD_LETTERS: Final = Gauge("trireme_dead_letters", "Dead letters, as of the last look of a retry role", ["status"])
KEYS_DROPPED: Final = Counter("trireme_idempotency_keys_dropped_total", "Keys not written while MongoDB refused them")
LANE_QUEUED: Final = Gauge("trireme_lane_queued_entries", "Entries read that wait for the writer", ["lane"])
LANE_MARKS: Final = Gauge("trireme_lane_marks_waiting", "Receipts read and not flushed", ["lane"])
LANE_KEYS: Final = Gauge("trireme_lane_keys_waiting", "Idempotency keys to write", ["lane"])
LANE_CONVERSATIONS: Final = Gauge("trireme_lane_conversations", "Conversations in memory", ["lane"])
"""lane: its number within the process, as many as `TRIREME_LANES`."""
REGISTRY_USERS: Final = Gauge("trireme_registry_users", "Users whose whereabouts are remembered")
SHARDS_HELD: Final = Gauge("trireme_shards_held", "Shards this process owns")

EVENTS: Final = Counter("trireme_events_total", "Events by what became of them", ["outcome"])
"""outcome: handed_over; found_again (in the outbox, among the former)."""

EVENTS_LAG: Final = Gauge("trireme_events_greatest_lag", "Events that an app's consumer group has not read, at most")

WEBHOOK_TRIES: Final = Counter("trireme_webhook_tries_total", "Requests to webhooks by their outcome", ["outcome"])
"""outcome: delivered, transient, permanent (not tried again), blocked (where nobody goes), gone (410)."""
WEBHOOK_SECONDS: Final = Histogram(
    "trireme_webhook_try_seconds", "From a request to a webhook to its outcome", buckets=(*_READ_BUCKETS, 10.0)
)
WEBHOOK_DELAY_SECONDS: Final = Histogram(
    "trireme_webhook_delay_seconds",
    "From an event's time to its arrival at a webhook",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0, 86_400.0),
)
WEBHOOKS_CARRIED: Final = Gauge("trireme_webhooks_carried", "Enabled webhooks that this process sends to")
WEBHOOKS_DISABLED: Final = Counter("trireme_webhooks_disabled_total", "Webhooks disabled from here", ["reason"])
"""reason: failed, gone, backlog, by_hand."""
WEBHOOKS_SPARED: Final = Gauge("trireme_webhook_hosts_spared", "Hosts of webhooks whose breaker is not closed")
WEBHOOK_WAITING: Final = Gauge("trireme_webhook_deliveries_waiting", "Deliveries queued for the webhooks carried here")
WEBHOOK_LONGEST: Final = Gauge("trireme_webhook_longest_queue", "Deliveries queued for one webhook, at most")

# --- agents role -----------------------------------------------------------------------------------------------------

AGENT_TASKS: Final = Counter("trireme_agent_tasks_total", "Messages for agents by what became of them", ["outcome"])
"""outcome: asked (written down), answered, silent, unanswerable (no agent), timeout, failed, refused (not a member)."""
AGENT_ROUTING_SECONDS: Final = Histogram(
    "trireme_agent_routing_seconds",
    "From a message's place in its log (before its commit) to the call of its agent, for those called at once",
    buckets=(0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 1.0),
)
AGENT_CALL_SECONDS: Final = Histogram("trireme_agent_call_seconds", "One call of an agent", buckets=_READ_BUCKETS)
AGENT_TASKS_IN_HAND: Final = Gauge("trireme_agent_tasks_in_hand", "Tasks that this process has taken and not finished")

# --- push role -------------------------------------------------------------------------------------------------------

PUSH_LOOKS: Final = Counter("trireme_push_looks_total", "Members who were behind, by what was found", ["outcome"])
"""outcome: job (made), heard (confirmed meanwhile), muted, stale, gone (no member now), early (looked at again)."""
PUSH_SENDS: Final = Counter(
    "trireme_push_sends_total", "Jobs handed to providers, by what they said", ["kind", "outcome"]
)
"""kind: see `rest.push_tokens`. outcome: delivered, gone (token removed), again (later), refused."""
PUSH_SECONDS: Final = Histogram(
    "trireme_push_seconds",
    "From a message to its push job",
    buckets=(3.5, 4, 5, 6, 8, 10, 15, 30, 60, 300, 3600),
)
PUSH_DUE: Final = Gauge("trireme_push_due", "Members to be looked at, as of the last look of a push role")
PUSH_IN_HAND: Final = Gauge("trireme_push_in_hand", "Jobs that this process is telling now")

# --- REST role -------------------------------------------------------------------------------------------------------

REST_REQUESTS: Final = Counter("trireme_rest_requests_total", "HTTP requests answered", ["method", "status"])
REST_SECONDS: Final = Histogram(
    "trireme_rest_request_seconds",
    "From the request's head to the end of its answer",
    ["method"],
    buckets=_READ_BUCKETS,
)
MEDIA_DELETED: Final = Counter("trireme_media_deleted_total", "Uploads removed by the sweep")
REST_CONNECTIONS: Final = Gauge("trireme_rest_connections", "HTTP connections open now")
REST_UNDER_WAY: Final = Gauge("trireme_rest_requests_under_way", "HTTP requests at work now")
REST_WAITING: Final = Gauge("trireme_rest_commands_waiting", "HTTP requests waiting for a shard owner")


class PortTaken(Exception):
    """The metrics port cannot be opened; one line."""


def serve(port: int, missing: Callable[[], Sequence[str]]) -> None:
    """Serve the registry, /health/live and /health/ready on a port of the loopback interface, from a thread of its own.

    `missing`: what readiness lacks. Raises PortTaken.
    """
    try:
        server = make_server("127.0.0.1", port, _pages(missing), ThreadingWSGIServer, _Silent)
    except OSError as error:
        raise PortTaken(f"TRIREME_WORKER_METRICS_PORT {port} cannot be opened: {error.strerror}") from error
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _pages(missing: Callable[[], Sequence[str]]) -> WSGIApplication:
    registry: WSGIApplication = make_wsgi_app()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if not path.startswith("/health/"):
            return registry(environ, start_response)
        lacking = list(missing()) if path == "/health/ready" else []
        status = "503 Service Unavailable" if lacking else "200 OK"
        body = {"status": "not_ready", "missing": lacking} if lacking else {"status": "ok"}
        start_response(status, [("Content-Type", "application/json")])
        return [msgspec.json.encode(body)]

    return answer


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Nobody reads who scraped."""
