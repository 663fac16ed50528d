"""The rows of `bounds.py` about webhooks and agents."""

from __future__ import annotations

from typing import Final

from bench.bound import Bound

_APPS: Final = "Webhooks and agents"

_EGRESS: Final = "tests/workers/test_egress.py::"
_EVENTS: Final = "tests/workers/test_events.py::"
_WEBHOOKS: Final = "tests/workers/test_webhooks.py::"

APPS: Final = (
    Bound(
        room=_APPS,
        where="workers.broker:EVENTS_LIMIT",
        unit="events in the stream",
        past="the oldest go; the outbox has what nobody confirmed, and the log all of them",
        gauge="trireme_events_greatest_lag",
        test=_EVENTS + "test_the_stream_keeps_its_newest_and_drops_what_is_older_than_it_is_kept",
    ),
    Bound(
        room=_APPS,
        where="workers.listeners:KEPT_SECONDS",
        unit="s in the stream",
        past="the oldest go",
        gauge="trireme_events_greatest_lag",
        test=_EVENTS + "test_the_stream_keeps_its_newest_and_drops_what_is_older_than_it_is_kept",
    ),
    Bound(
        room=_APPS,
        where="protocol.webhooks:LIMIT",
        unit="webhooks",
        past="`conflict`: no more can be registered",
        gauge="trireme_webhooks_carried",
        test=_WEBHOOKS + "test_there_are_as_many_webhooks_as_may_be_and_no_more",
        holds=("workers.webhooks.couriers.Couriers._couriers", "workers.webhooks.couriers.Couriers._breakers"),
    ),
    Bound(
        room=_APPS,
        where="workers.webhooks.courier:AT_ONCE",
        unit="requests to one webhook",
        past="wait for one of them",
        no_gauge="`trireme_webhook_try_seconds` grows where they hang",
        test=_WEBHOOKS + "test_no_more_requests_at_once_than_the_bound",
    ),
    Bound(
        room=_APPS,
        where="workers.webhooks.courier:WINDOW",
        unit="deliveries of one webhook",
        past="stay in MongoDB",
        gauge="trireme_webhook_longest_queue",
        test=_WEBHOOKS + "test_a_webhook_that_hangs_has_no_more_in_memory_than_its_window",
    ),
    Bound(
        room=_APPS,
        where="workers.settings:Settings.webhook_backlog",
        unit="deliveries of one webhook in MongoDB",
        past="the webhook is disabled, with a notice; what waits is kept for a week",
        gauge="trireme_webhook_longest_queue",
        test=_WEBHOOKS + "test_a_queue_past_its_bound_disables_and_one_at_it_does_not",
    ),
    Bound(
        room=_APPS,
        where="workers.webhooks.courier:REPLAY_AHEAD",
        unit="deliveries",
        past="the replay waits",
        gauge="trireme_webhook_longest_queue",
        test=_WEBHOOKS + "test_a_replay_waits_behind_a_long_queue",
    ),
    Bound(
        room=_APPS,
        where="workers.egress:LOOKUPS",
        unit="names",
        past="wait for a thread; their calls fail at their deadlines",
        no_gauge="a failure at the deadline is counted where the call is made",
        test=_EGRESS + "test_names_that_hang_hold_no_more_threads_than_the_bound",
    ),
)
