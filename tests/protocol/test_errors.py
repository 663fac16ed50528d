"""The code tables: complete, retry and reconnect as the protocol says."""

from __future__ import annotations

import pickle

from protocol.errors import AuthErrorCode, CloseCode, ErrorCode, Reconnect, RemoteProtocolError


def test_exactly_these_errors_may_be_retried() -> None:
    retryable = {code.value for code in ErrorCode if code.retryable}
    assert retryable == {
        "rate_limited",
        "storage_unavailable",
        "overloaded",
        "queued_for_retry",
        "slow_consumer",
        "internal",
    }


def test_the_codes_of_the_protocol_are_all_there() -> None:
    named = (
        "bad_frame unknown_type validation_failed conversation_not_found forbidden muted group_full "
        "idempotency_conflict rate_limited too_large storage_unavailable overloaded replaced slow_consumer internal"
    )
    assert set(named.split()) <= {code.value for code in ErrorCode}
    named = (
        "auth_required invalid_token expired_token user_mismatch revoked device_limit rate_limited draining server_busy"
    )
    assert set(named.split()) <= {code.value for code in AuthErrorCode}


def test_what_a_client_does_after_each_close() -> None:
    reconnect = {int(code): code.reconnect for code in CloseCode}
    assert {code: reconnect[code] for code in (4400, 4401, 4408, 4409, 1009, 4429, 4503, 4508, 1012, 1001)} == {
        4400: Reconnect.NO,
        4401: Reconnect.NO,
        4408: Reconnect.YES,
        4409: Reconnect.NO,
        1009: Reconnect.NO,
        4429: Reconnect.LATER,
        4503: Reconnect.LATER,
        4508: Reconnect.YES,
        1012: Reconnect.JITTERED,
        1001: Reconnect.YES,
    }


def test_close_codes_and_reasons_may_go_on_the_wire() -> None:
    for code in CloseCode:
        assert code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1011, 1012) or 4000 <= code <= 4999
        assert len(code.reason.encode()) <= 123


def test_http_statuses_are_client_or_server_errors() -> None:
    assert all(400 <= code.http_status < 600 for code in ErrorCode)
    assert all(code.http_status in (429, 500, 503) for code in ErrorCode if code.retryable)


def test_codes_are_found_by_value_and_survive_a_copy() -> None:
    assert ErrorCode("group_full") is ErrorCode.GROUP_FULL  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(CloseCode.AUTH)) is CloseCode.AUTH


def test_a_refusal_carries_what_was_readable() -> None:
    error = RemoteProtocolError(ErrorCode.BAD_FRAME, "no", client_message_id="c1")
    assert (str(error), error.code, error.client_message_id, error.idempotency_key) == (
        "no",
        ErrorCode.BAD_FRAME,
        "c1",
        None,
    )
