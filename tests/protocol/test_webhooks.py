"""Who hears what, how a request is signed, and when the next try is due."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import standardwebhooks

from protocol import events, webhooks
from protocol.models import MessageType
from protocol.webhooks import Delivery, DeliveryStatus, EventType, Mode, Webhook, WebhookStatus

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
WEBHOOK = Webhook(
    webhook_id="whk_1",
    app="crm",
    url="https://hook.example/",
    mode=Mode.STRUCTURED,
    types=[],
    conversation_ids=[],
    agent_ids=[],
    status=WebhookStatus.ENABLED,
    created_at=NOW,
    updated_at=NOW,
)
RECEIVED = events.message_received(
    events.MessageReceivedEvent(
        message_id="msg_1",
        idempotency_key="k",
        conversation_id="conv_1",
        sender_id="usr_a",
        receiver_id="usr_b",
        sequence_number=7,
        message_type=MessageType.TEXT,
        content="x",
        timestamp=NOW,
    )
)
ANSWERED = events.agent_response(
    "msg_2",
    events.AgentResponseEvent(
        idempotency_key="k", conversation_id="conv_1", user_id="a", agent_id="bot", response="y", timestamp=NOW
    ),
)
DISABLED = events.webhook_disabled(
    events.WebhookDisabledEvent(
        webhook_id="whk_2", app="crm", url="https://h.example/", reason="gone", failing_since=None, timestamp=NOW
    )
)


@pytest.mark.parametrize(
    ("wishes", "heard"),
    [
        ({}, "RA"),
        ({"types": [EventType.MESSAGE_RECEIVED]}, "R"),
        ({"types": [EventType.AGENT_RESPONSE]}, "A"),
        ({"types": [EventType.WEBHOOK_DISABLED]}, "D"),
        ({"types": list(EventType)}, "RAD"),
        ({"types": list(EventType), "webhook_id": "whk_2"}, "RA"),
        ({"conversation_ids": ["conv_1", "conv_2"]}, "RA"),
        ({"conversation_ids": ["conv_2"]}, ""),
        ({"agent_ids": ["bot"]}, "RA"),
        ({"agent_ids": ["other"]}, ""),
        ({"agent_ids": ["usr_b", "usr_c"]}, "R"),
        ({"agent_ids": ["bot"], "conversation_ids": ["conv_2"]}, ""),
    ],
)
def test_who_hears_what(wishes: dict[str, object], heard: str) -> None:
    webhook = msgspec.structs.replace(WEBHOOK, **wishes)
    said: dict[str, events.Event] = {"R": RECEIVED, "A": ANSWERED, "D": DISABLED}
    assert "".join(letter for letter, event in said.items() if webhook.wants(event, "bot")) == heard


def test_a_conversation_without_an_agent_is_nobodys_who_asked_for_one() -> None:
    assert not msgspec.structs.replace(WEBHOOK, agent_ids=["bot"]).wants(RECEIVED, "")


def test_a_secret_is_shown_and_read() -> None:
    secret = webhooks.secret_of(b"k" * webhooks.SECRET_BYTES)
    assert secret == "whsec_" + base64.b64encode(b"k" * 32).decode()
    assert webhooks.key_of(secret) == b"k" * 32
    with pytest.raises(ValueError, match=r"."):
        webhooks.key_of("whsec_no base64")


def test_the_signature_is_the_one_of_the_specifications_example() -> None:
    """standard-webhooks/standard-webhooks, the values of its reference libraries' own test."""
    key = webhooks.key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = webhooks.signature([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_library_takes_what_is_signed_with_either_of_two_keys_and_nothing_else() -> None:
    now = str(int(datetime.now(UTC).timestamp()))
    old, new, other = b"o" * 32, b"n" * 32, b"x" * 32
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": now,
        "webhook-signature": webhooks.signature([new, old], "msg_1", now, b"{}"),
    }
    for key in (old, new):
        assert standardwebhooks.Webhook(key).verify(b"{}", headers) == {}
    for key, body, changes in (
        (other, b"{}", {}),
        (new, b"[]", {}),
        (new, b"{}", {"webhook-id": "msg_2"}),
        (new, b"{}", {"webhook-timestamp": str(int(now) - 1)}),
        (new, b"{}", {"webhook-timestamp": str(int(now) - 600)}),
        (new, b"{}", {"webhook-signature": "v1," + base64.b64encode(bytes(32)).decode()}),
    ):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(key).verify(body, {**headers, **changes})


def test_the_first_tries_are_200_and_400_ms_apart_and_never_more_than_10_s() -> None:
    assert [webhooks.quick_retry_seconds(tries) for tries in (1, 2, 3, 6, 7, 20)] == [0.2, 0.4, 0.8, 6.4, 10.0, 10.0]


def test_a_dead_letter_is_tried_again_ever_more_rarely_for_five_days() -> None:
    delivery = Delivery(
        delivery_id="d", webhook_id="w", event_id="e", event_type=EventType.MESSAGE_RECEIVED, conversation_id="c",
        status=DeliveryStatus.FAILED, queued_at=NOW,
    )  # fmt: skip
    at: datetime | None = NOW
    waits: list[float] = []
    while at is not None:
        before = at
        at = webhooks.slow_retry_at(delivery, webhooks.TRIES + len(waits), before)
        if at is not None:
            waits.append((at - before).total_seconds() / 60)
    assert waits[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 360]
    assert set(waits[9:]) == {360}
    assert NOW + timedelta(days=4, hours=18) < before <= NOW + timedelta(days=5)
