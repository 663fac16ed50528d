"""The rows of `bounds.py`: which settings and constants are bounds, and what each of them holds back."""

from __future__ import annotations

from typing import Final

import msgspec


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """`where`: `module:CONSTANT` or `module:Struct.field`. `holds`: the containers it bounds.

    `no_gauge`: why there is none. `reason`: where the words in the code are about something else.
    """

    room: str
    where: str
    unit: str
    past: str
    test: str
    gauge: str = ""
    no_gauge: str = ""
    reason: str = ""
    holds: tuple[str, ...] = ()


_CONNECTION: Final = "One connection"
_GATEWAY: Final = "A gateway"
_LANE: Final = "A worker"
_REST: Final = "The HTTP API"
_REDIS: Final = "Redis"

_PRESSURE: Final = "tests/gateway/test_transports_pressure.py::"
_BUFFERS: Final = "tests/gateway/test_buffers.py::"
_BROKER: Final = "tests/gateway/test_broker.py::"
_SMALL: Final = "tests/gateway/test_small_bounds.py::"
_SESSION: Final = "tests/protocol/test_session.py::"
_SOCIAL: Final = "tests/protocol/test_session_social.py::"
_BOUNDS: Final = "tests/workers/test_lane_bounds.py::"
_WORKER: Final = "tests/workers/test_small_bounds.py::"
_SERVER: Final = "tests/workers/test_rest_server.py::"

BOUNDS: Final = (
    Bound(
        room=_CONNECTION,
        where="protocol.limits:Limits.window",
        unit="messages",
        past="the socket is not read; pings and closes are answered",
        gauge="gateway_greatest_in_flight",
        test=_SESSION + "test_w79_a_full_window_blocks_until_an_outcome",
        holds=("protocol.session.Session.in_flight",),
    ),
    Bound(
        room=_CONNECTION,
        where="gateway.transport:TransportLimits.outbox_bytes",
        unit="bytes",
        past="lag: live frames are dropped and the log is paged again; at twice the bound the peer is cut off",
        gauge="gateway_greatest_outbox_bytes",
        test=_BUFFERS + "test_an_outbox_says_once_that_its_bound_is_passed",
        reason="protocol.md: a phone's screenful of history; 50 slow readers cost 50 MiB",
        holds=("gateway.buffers.Outbox._chunks",),
    ),
    Bound(
        room=_CONNECTION,
        where="gateway.transport:TransportLimits.outbox_frames",
        unit="frames",
        past="as for the bytes",
        gauge="gateway_greatest_outbox_frames",
        test=_BUFFERS + "test_frames_are_bounded_too",
    ),
    Bound(
        room=_CONNECTION,
        where="gateway.transport:TransportLimits.stuck_seconds",
        unit="s",
        past="the connection is cut off (4508 where it can still be said)",
        no_gauge="`gateway_outbox_bytes` falls",
        test=_PRESSURE + "test_a_stuck_outbox_ends_the_connection",
        holds=("gateway.buffers.Deadlines._due",),
    ),
    Bound(
        room=_CONNECTION,
        where="gateway.transport:TransportLimits.held_bytes",
        unit="bytes",
        past="the socket is not read",
        gauge="gateway_greatest_held_bytes",
        test=_PRESSURE + "test_reading_stops_at_the_bound_and_goes_on_without_loss",
        holds=("gateway.buffers.Held._messages", "gateway.epoll_connection.Connection._rest"),
    ),
    Bound(
        room=_CONNECTION,
        where="gateway.transport:TransportLimits.max_message_bytes",
        unit="bytes",
        past="closed with 1009, from the frame's header",
        no_gauge="a connection's own, see `gateway_connections`",
        test="tests/gateway/test_transports.py::test_a_fragmented_message_may_be_exactly_at_the_limit_with_a_ping_inside",
        holds=("gateway.websocket.FrameReader._message",),
    ),
    Bound(
        room=_CONNECTION,
        where="gateway.transport:TransportLimits.max_fragments",
        unit="frames of one message",
        past="closed with 1009",
        no_gauge="they are joined at once",
        test="tests/gateway/test_transports.py::test_1024_fragments_pass_and_one_more_does_not",
    ),
    Bound(
        room=_CONNECTION,
        where="protocol.limits:Limits.watched_people",
        unit="people",
        past="`validation_failed`",
        gauge="gateway_watched_people",
        test="tests/gateway/test_presence.py::test_more_than_the_limit_is_refused_as_a_whole_and_by_name",
        holds=(
            "gateway.presence._Watcher.people",
            "gateway.presence._Watcher.outstanding",
            "gateway.presence._Watcher.untold",
        ),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.settings:Settings.ingest_backlog",
        unit="entries",
        past="`overloaded` with `retry_after_ms`, in the same turn of the loop",
        gauge="gateway_backlog_entries",
        test=_BROKER + "test_a_backlog_past_its_bound_refuses_every_shard_before_the_next_look_at_redis",
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.settings:Settings.ingest_high_water",
        unit="entries",
        past="`overloaded` for that shard",
        gauge="gateway_shard_backlog_entries",
        test=_BROKER + "test_a_shard_past_its_high_water_mark_takes_no_message_and_the_others_do",
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.settings:Settings.opening_sessions",
        unit="sessions",
        past="`server_busy` with `retry_after_ms`, 4503",
        gauge="gateway_opening_sessions",
        test="tests/gateway/test_hub.py::test_who_comes_while_too_many_wait_for_a_worker_is_told_to_come_back",
        holds=("gateway.hub.Hub.opening",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.settings:Settings.redis_outstanding",
        unit="commands",
        past="`overloaded`",
        gauge="gateway_redis_outstanding",
        test=_BROKER + "test_too_many_outstanding_messages_are_overloaded",
        holds=("gateway.wire.Wire._slots",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.wire:MAX_UNSENT_BYTES",
        unit="bytes",
        past="`overloaded`",
        gauge="gateway_redis_unsent_bytes",
        test=_SMALL + "test_bytes_that_redis_does_not_take_are_bounded",
        holds=("gateway.wire.Wire._output",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.settings:Settings.receipts_waiting",
        unit="receipts",
        past="dropped and counted; the reader's next one covers them",
        gauge="gateway_receipts_waiting",
        test=_BROKER + "test_receipts_past_the_bound_are_dropped_and_counted",
        holds=("gateway.receipts.ReceiptCollector._delivered", "gateway.receipts.ReceiptCollector._read"),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.broker:PENDING_DETACHES",
        unit="registrations",
        past="the newest is left to its own lifetime",
        gauge="gateway_detaches_waiting",
        test=_BROKER + "test_detaches_are_kept_up_to_a_bound_while_redis_is_away",
        holds=("gateway.broker.RedisBroker._detaches",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.broker:DOWN_ENTRIES",
        unit="entries of one read",
        past="the stream keeps them",
        no_gauge="they are routed at once",
        test=_SMALL + "test_a_gateway_reads_a_bounded_number_of_down_entries_at_once",
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.subscriptions:ASKS_WAITING",
        unit="questions",
        past="dropped; the watcher asks again",
        gauge="gateway_channel_changes_waiting",
        test="tests/gateway/test_subscriptions.py::test_questions_wait_in_bounded_number",
        holds=("gateway.subscriptions.Subscriptions._asks",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.presence:PEOPLE_LIMIT",
        unit="people",
        past="`overloaded`",
        gauge="gateway_watched_people",
        test="tests/gateway/test_presence.py::test_a_gateway_watches_a_bounded_number_of_people",
        holds=(
            "gateway.presence.Presence.people",
            "gateway.presence.Presence._due",
            "gateway.presence._Person.watchers",
            "gateway.subscriptions.Subscriptions._people",
        ),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.admission:VERIFIED_TOKENS",
        unit="tokens",
        past="the oldest is verified again",
        gauge="gateway_verified_tokens",
        test=_SMALL + "test_verified_tokens_are_remembered_up_to_a_bound",
        holds=("gateway.admission.Admission._verified",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.arrivals:ADDRESSES",
        unit="addresses",
        past="the one that came longest ago is forgotten",
        gauge="gateway_failed_addresses",
        test="tests/gateway/test_arrivals.py::test_addresses_are_forgotten_so_that_nothing_grows",
        holds=("gateway.arrivals.Arrivals._seconds", "gateway.admission.Admission._failures"),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.settings:Settings.unauthenticated_connections",
        unit="connections of one address",
        past="429",
        gauge="gateway_unknown_addresses",
        test="tests/gateway/test_arrivals.py::test_w17_the_201st_that_nobody_knows_has_to_wait_until_one_of_them_is_known",
        holds=("gateway.arrivals.Arrivals._unknown",),
    ),
    Bound(
        room=_GATEWAY,
        where="gateway.sweep:SUSPECTS",
        unit="conversations of connections",
        past="the oldest is dropped; the next round finds it",
        gauge="gateway_suspected_heads",
        test=_SMALL + "test_suspected_heads_are_bounded",
        holds=("gateway.sweep.HeadSweep._suspects",),
    ),
    Bound(
        room=_LANE,
        where="workers.consumer:QUEUE_BATCHES",
        unit="batches read ahead",
        past="the stream keeps them; nothing is trimmed",
        gauge="trireme_lane_queued_entries",
        test=_BOUNDS + "test_with_mongodb_away_a_lane_reads_no_more_than_its_bound_over_all_shards",
        holds=(
            "workers.consumer.Lane._queue",
            "workers.shard_log.ShardLog.outstanding",
            "workers.shard_log.ShardLog.done",
        ),
    ),
    Bound(
        room=_LANE,
        where="workers.consumer:BATCH_BYTES",
        unit="bytes of content",
        past="the rest is the next commit's",
        gauge="trireme_lane_queued_entries",
        test=_BOUNDS + "test_a_commit_holds_a_bounded_number_of_bytes",
    ),
    Bound(
        room=_LANE,
        where="workers.consumer:MARKS_WAITING",
        unit="receipts",
        past="nothing is read until a flush succeeds",
        gauge="trireme_lane_marks_waiting",
        test=_BOUNDS + "test_receipts_that_cannot_be_flushed_stop_the_reading",
        holds=(
            "workers.consumer.Lane._unflushed",
            "workers.receipts.Receipts._incoming",
            "workers.receipts.Receipts._moved",
            "workers.receipts.Receipts.delivered_ids",
            "workers.conversations.Conversations.dirty",
            "workers.conversations.Member.devices",
        ),
    ),
    Bound(
        room=_LANE,
        where="workers.consumer:KEYS_WAITING",
        unit="keys",
        past="the oldest are dropped and counted; the messages' index answers",
        gauge="trireme_lane_keys_waiting",
        test=_BOUNDS + "test_keys_that_cannot_be_written_are_dropped_past_the_bound_and_their_messages_still_answer",
        holds=("workers.consumer.Lane._keys",),
    ),
    Bound(
        room=_LANE,
        where="workers.settings:Settings.conversations",
        unit="conversations of a lane",
        past="those that were quiet longest are forgotten",
        gauge="trireme_lane_conversations",
        test=_BOUNDS + "test_the_bound_on_conversations_is_met_exactly",
        holds=(
            "workers.conversations.Conversations._owned",
            "workers.conversations.Conversations.lazy",
            "workers.conversations.Conversations.replied",
            "workers.consumer.Lane._heads",
        ),
    ),
    Bound(
        room=_LANE,
        where="workers.conversations:INBOXED",
        unit="ids of a member",
        past="the oldest leave the inbox when their user comes",
        no_gauge="within `trireme_lane_conversations`",
        test="tests/workers/test_conversations.py::"
        "test_the_memory_of_an_inbox_is_bounded_and_its_newest_leave_it_with_their_receipt",
        holds=("workers.conversations.Owned.inboxed",),
    ),
    Bound(
        room=_LANE,
        where="workers.conversations:OWN_SENDS",
        unit="messages of a member",
        past="the next delivery_ack moves the mark",
        no_gauge="within `trireme_lane_conversations`",
        test=_WORKER + "test_own_sends_are_remembered_up_to_a_bound",
        holds=("workers.conversations.Member.own",),
    ),
    Bound(
        room=_LANE,
        where="workers.receipts:RECENT_MESSAGES",
        unit="places of a generation",
        past="the older generation is looked up in MongoDB",
        no_gauge="fixed after some minutes of load",
        test=_WORKER + "test_places_are_remembered_for_two_generations",
        holds=("workers.receipts.RecentPlaces._young", "workers.receipts.RecentPlaces._old"),
    ),
    Bound(
        room=_LANE,
        where="workers.plan:RECENT_KEYS",
        unit="keys of a generation",
        past="the unique index answers",
        no_gauge="fixed after some minutes of load",
        test=_WORKER + "test_keys_are_remembered_for_two_generations",
        holds=("workers.plan.Planner._recent_keys", "workers.plan.Planner._older_keys"),
    ),
    Bound(
        room=_LANE,
        where="workers.typists:WAITING_LIMIT",
        unit="signals of one tick",
        past="dropped and counted",
        no_gauge='`trireme_typing_total{outcome="dropped"}` counts',
        test=_WORKER + "test_typing_signals_of_one_tick_are_bounded",
        holds=("workers.typists.Typists._latest",),
    ),
    Bound(
        room=_LANE,
        where="workers.delivery:REGISTRY_LIMIT",
        unit="users",
        past="all are forgotten and asked again",
        gauge="trireme_registry_users",
        test=_WORKER + "test_whereabouts_are_remembered_up_to_a_bound",
        holds=("workers.delivery.Registry._where",),
    ),
    Bound(
        room=_LANE,
        where="workers.settings:Settings.queries",
        unit="reads",
        past="they wait in the stream",
        gauge="trireme_queries_under_way",
        test=_WORKER + "test_reads_under_way_are_bounded",
    ),
    Bound(
        room=_LANE,
        where="workers.query:ANSWERS",
        unit="answers",
        past="reads wait for Redis",
        gauge="trireme_query_answers_waiting",
        test=_WORKER + "test_answers_wait_in_a_bounded_stream",
        holds=("workers.query.run()",),
    ),
    Bound(
        room=_REST,
        where="workers.settings:Settings.rest_connections",
        unit="connections",
        past="503 `overloaded`, `Retry-After`",
        gauge="trireme_rest_connections",
        test=_SERVER + "test_the_fourth_of_three_connections_is_told_to_come_back",
    ),
    Bound(
        room=_REST,
        where="workers.rest.server:MAX_HEAD_BYTES",
        unit="bytes",
        past="431",
        no_gauge="within `trireme_rest_connections`",
        test=_SERVER + "test_a_head_has_a_size_a_number_of_lines_and_a_target_within_bounds",
        reason="of a request's head, as the gateway's (reliability.md W-09)",
    ),
    Bound(
        room=_REST,
        where="workers.settings:Settings.head_seconds",
        unit="s",
        past="408",
        gauge="trireme_rest_connections",
        test=_SERVER + "test_who_connects_and_sends_nothing_or_slowly_is_answered_408_in_time",
    ),
    Bound(
        room=_REST,
        where="workers.rest.app:MAX_BODY_BYTES",
        unit="bytes",
        past="413",
        gauge="trireme_rest_requests_under_way",
        test="tests/workers/test_rest.py::test_bodies_are_small_plain_json",
    ),
    Bound(
        room=_REST,
        where="workers.settings:Settings.body_seconds",
        unit="s",
        past="408",
        gauge="trireme_rest_requests_under_way",
        test="tests/workers/test_rest.py::test_a_body_that_never_ends_is_cut_off",
    ),
    Bound(
        room=_REST,
        where="workers.instances:WAITING_LIMIT",
        unit="requests",
        past="503 `overloaded`",
        gauge="trireme_rest_commands_waiting",
        test=_WORKER + "test_requests_that_wait_for_an_owner_are_bounded",
        holds=("workers.instances.Instance._waiting",),
    ),
    Bound(
        room=_REDIS,
        where="protocol.keys:INBOX_LIMIT",
        unit="ids of a user",
        past="the oldest go",
        no_gauge="an accelerator; the log is the truth",
        test=_WORKER + "test_an_inbox_keeps_its_newest",
    ),
    Bound(
        room=_REDIS,
        where="protocol.keys:SEEN_LIMIT",
        unit="users",
        past="written when they come or go again",
        no_gauge="a worker empties it every second",
        test=_SMALL + "test_users_who_were_seen_wait_in_bounded_number",
    ),
    Bound(
        room=_REDIS,
        where="workers.broker:QUERY_LIMIT",
        unit="queries",
        past="the oldest go; whoever asked asks again",
        gauge="gateway_opening_sessions",
        test=_WORKER + "test_the_stream_of_queries_keeps_its_newest",
        reason="a lost query is asked again, so its stream may be capped",
    ),
    Bound(
        room=_REDIS,
        where="workers.broker:DOWN_LIMIT",
        unit="entries of a gateway",
        past="the oldest go; the sweep repairs what they held",
        no_gauge="a gateway that reads has none",
        test=_WORKER + "test_the_stream_of_a_gateway_that_does_not_read_keeps_its_newest",
    ),
)

_BATCH: Final = "lives as long as one batch (`TRIREME_BATCH`, `BATCH_BYTES`)"
_CONNECTIONS: Final = "one for each connection, which are bounded by the file descriptors: past them accepting pauses"
_USERS: Final = "one for each user with a connection here"
_ROUND: Final = "a copy of the ids of those who are here"
_OF_USER: Final = "as many as its user has conversations"
_SHARDS: Final = "as many as there are shards"
_DRAIN: Final = "of a drain: the connections there are"

OTHERS: Final = {
    "gateway.arrivals.TrustedProxies._networks": "what the setting names",
    "gateway.broker.RedisBroker._info": "Redis' own fields",
    "gateway.epoll_connection.Reactor.connections": _CONNECTIONS,
    "gateway.epoll_connection.Reactor.unsettled": _CONNECTIONS,
    "gateway.hub.Hub._budgets": "one for each user who was here within the last minute",
    "gateway.hub.Hub._connections": _CONNECTIONS,
    "gateway.hub.Hub._retiring": _CONNECTIONS,
    "gateway.hub.Hub.users": _USERS,
    "gateway.migration.Migration._handled": _DRAIN,
    "gateway.migration.Migration._waiting": _DRAIN,
    "gateway.migration.Neighbours._known": "the gateways there are",
    "gateway.migration.Neighbours._present": "the gateways there are",
    "gateway.presence.Presence._ask_again": "one for each watcher",
    "gateway.presence.Presence._round": _ROUND,
    "gateway.presence.Presence._watchers": _CONNECTIONS,
    "gateway.subscriptions.Subscriptions._users": _USERS,
    "gateway.sweep.HeadSweep._round": _ROUND,
    "gateway.sweep.RegistrySweep._round": _ROUND,
    "gateway.sweep.TokenSweep._round": _ROUND,
    "gateway.sweep.TokenSweep._unproven": _CONNECTIONS,
    "gateway.timers.TimerWheel._buckets": _CONNECTIONS,
    "gateway.trio_ws.TrioWebSocketServer._connections": _CONNECTIONS,
    "protocol.backlog.Backlog.behind": _OF_USER,
    "protocol.backlog.Sync.early": _OF_USER,
    "protocol.backlog.Sync.heads": _OF_USER,
    "protocol.session.Session._resume": "at most 500 conversations, by the frame (`protocol.frames.Cursors`)",
    "workers.consumer.Lane._committing": _BATCH,
    "workers.consumer.Lane._inbox": "what was committed within a second, at most what is read ahead",
    "workers.consumer.Lane._logs": _SHARDS,
    "workers.consumer.Lane._new_shards": _SHARDS,
    "workers.consumer.Lane._unrepaired": _SHARDS,
    "workers.dead_letters._Known._letters": "dead letters that wait for their replay, which end after 7 days",
    "workers.dead_letters._Known._places": "dead letters that wait for their replay, which end after 7 days",
    "workers.lease.Leases._adopted": _SHARDS,
    "workers.lease.Leases._until": _SHARDS,
    "workers.store.audience.Audience._least": "the members of one conversation, for one answer",
    "workers.store.changes.Target.hidden_by": "the members of one conversation",
}
"""Containers whose size follows from something else."""

EXEMPT: Final = {
    "workers.audit.": "a command that ends: it holds what it judges",
    "workers.commands.": "a command that ends",
    "workers.plan.Plan.": _BATCH,
    "workers.projection.Projection.": _BATCH,
}
"""Prefixes of containers, likewise."""
