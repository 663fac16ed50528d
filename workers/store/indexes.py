"""Every index of the system, as data. Called by the store when it opens.

The seed's indexes with the corrections of design.md section 6; each of them has its test.
"""

from __future__ import annotations

from typing import Final

from pymongo import ASCENDING, DESCENDING, IndexModel

from workers.store.device_keys import CLAIMED_SECONDS

DAY_SECONDS: Final = 86_400
SEQUENCE_INDEX: Final = "conversation_sequence"
SCOPED_KEY_INDEX: Final = "scoped_idempotency_key"
RETENTION_INDEX: Final = "retention"
SYSTEM_INDEX: Final = "system_messages"
"""Partial index over a group's system messages: its state is the fold of them."""
PLAIN_COLLECTIONS: Final = ("sequence_numbers", "device_lists", "webhooks")
"""Collections that need `_id` only. Made at start all the same: a snapshot read (`heads.py`) refuses a
collection that is younger than its snapshot."""


def index_models(retention_days: int) -> dict[str, list[IndexModel]]:
    """Collection → its indexes. `_id` is the seed's id everywhere, so no index repeats it (design.md section 6.1)."""
    return {
        **_log_indexes(retention_days),
        **_account_indexes(),
        **_agent_indexes(),
        "webhook_deliveries": _delivery_indexes(),
    }


def _message_indexes(retention_days: int) -> list[IndexModel]:
    return [
        IndexModel([("conversation_id", ASCENDING), ("sequence_number", ASCENDING)], name=SEQUENCE_INDEX, unique=True),
        IndexModel(
            [("conversation_id", ASCENDING), ("sender_id", ASCENDING), ("idempotency_key", ASCENDING)],
            name=SCOPED_KEY_INDEX,
            unique=True,
        ),
        IndexModel([("conversation_id", ASCENDING), ("timestamp", DESCENDING)], name="conversation_timestamp"),
        IndexModel([("created_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=retention_days * DAY_SECONDS),
        IndexModel(
            [("conversation_id", ASCENDING), ("sequence_number", ASCENDING)],
            name=SYSTEM_INDEX,
            partialFilterExpression={"type": "system"},
        ),
        IndexModel(
            [("target_message_id", ASCENDING)],
            name="target_message",
            partialFilterExpression={"target_message_id": {"$exists": True}},
        ),
        IndexModel(
            [("erase_at", ASCENDING)],
            name="disappearing",
            partialFilterExpression={"erase_at": {"$exists": True}},
        ),
        IndexModel(
            [("media_url", ASCENDING), ("_id", DESCENDING)],
            name="media",
            partialFilterExpression={"media_url": {"$exists": True}},
        ),
        IndexModel(
            [("event_due", ASCENDING)],
            name="outbox",
            partialFilterExpression={"event_due": {"$exists": True}},
        ),
    ]


def _log_indexes(retention_days: int) -> dict[str, list[IndexModel]]:
    return {
        "messages": _message_indexes(retention_days),
        "conversations": [
            IndexModel([("user_id", ASCENDING), ("agent_id", ASCENDING)], name="user_agent"),
        ],
        "memberships": [
            IndexModel([("user_id", ASCENDING), ("conversation_id", ASCENDING)], name="user_conversation"),
            IndexModel([("conversation_id", ASCENDING)], name="conversation"),
        ],
        "idempotency_keys": [
            IndexModel([("created_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=DAY_SECONDS),
        ],
        "dead_letter_queue": [
            IndexModel([("status", ASCENDING), ("next_retry_at", ASCENDING)], name="status_next_retry"),
            IndexModel([("created_at", DESCENDING)], name="newest"),
            IndexModel([("message._id", ASCENDING)], name="message"),
            IndexModel([("shard", ASCENDING)], name="shard"),
            IndexModel([("expires_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=0),
        ],
    }


def _delivery_indexes() -> list[IndexModel]:
    return [
        IndexModel(
            [("webhook_id", ASCENDING), ("place", ASCENDING)],
            name="queue",
            partialFilterExpression={"status": "pending"},
        ),
        IndexModel(
            [("webhook_id", ASCENDING), ("next_try_at", ASCENDING)],
            name="dead",
            partialFilterExpression={"status": "failed"},
        ),
        IndexModel([("webhook_id", ASCENDING), ("queued_at", DESCENDING), ("_id", DESCENDING)], name="newest"),
        IndexModel([("expires_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=0),
    ]


def _device_indexes() -> list[IndexModel]:
    return [
        IndexModel([("user_id", ASCENDING), ("device_id", ASCENDING)], name="user_device"),
        IndexModel(
            [("untold_since", ASCENDING)],
            name="untold",
            partialFilterExpression={"untold_since": {"$exists": True}},
        ),
        IndexModel(
            [("session_id", ASCENDING)],
            name="session",
            partialFilterExpression={"session_id": {"$exists": True}},
        ),
        IndexModel([("forget_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=0),
    ]


def _account_indexes() -> dict[str, list[IndexModel]]:
    return {
        "blocks": [
            IndexModel([("user_id", ASCENDING), ("blocked_id", ASCENDING)], name="user_blocked"),
            _unfinished_index(),
        ],
        "users": [
            IndexModel(
                [(field, ASCENDING)],
                name=f"unique_{field}",
                unique=True,
                partialFilterExpression={field: {"$type": "string"}},
            )
            for field in ("phone", "email", "phone_key", "email_key")
        ]
        + [
            _unfinished_index(),
        ],
        "devices": _device_indexes(),
        "verifications": [
            IndexModel([("verification_id", ASCENDING)], name="verification"),
            IndexModel([("expires_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=0),
        ],
        "push_tokens": _push_token_indexes(),
        "media_metadata": [
            IndexModel([("owner_id", ASCENDING), ("_id", ASCENDING)], name="owner"),
            IndexModel([("owner_id", ASCENDING), ("sha256", ASCENDING)], name="same_bytes"),
            IndexModel([("due_at", ASCENDING)], name="due"),
        ],
        "device_keys": [
            IndexModel([("user_id", ASCENDING), ("device_id", ASCENDING)], name="user_device"),
        ],
        "one_time_keys": [
            IndexModel(
                [("device", ASCENDING), ("generation", ASCENDING), ("free", ASCENDING), ("position", ASCENDING)],
                name="upload_order",
            ),
            IndexModel([("claimed_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=CLAIMED_SECONDS),
        ],
    }


def _agent_indexes() -> dict[str, list[IndexModel]]:
    return {
        "agents": [
            IndexModel([("capabilities", ASCENDING)], name="capability"),
            IndexModel(
                [("is_default", ASCENDING)],
                name="one_default",
                unique=True,
                partialFilterExpression={"is_default": True},
            ),
        ],
        "agent_tasks": [
            IndexModel(
                [("partition", ASCENDING), ("created_at", ASCENDING), ("_id", ASCENDING)],
                name="waiting",
                partialFilterExpression={"status": "waiting"},
            ),
            IndexModel([("forget_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=0),
        ],
    }


def _push_token_indexes() -> list[IndexModel]:
    return [
        IndexModel([("user_id", ASCENDING)], name="user"),
        IndexModel([("address_hash", ASCENDING)], name="unique_address", unique=True),
        IndexModel([("expires_at", ASCENDING)], name=RETENTION_INDEX, expireAfterSeconds=0),
    ]


def _unfinished_index() -> IndexModel:
    """What somebody began and has not ended, oldest first."""
    return IndexModel(
        [("unfinished_since", ASCENDING)],
        name="unfinished",
        partialFilterExpression={"unfinished_since": {"$exists": True}},
    )
