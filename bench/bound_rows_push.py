"""The rows of `bounds.py` about pushes."""

from __future__ import annotations

from typing import Final

from bench.bound import Bound

_PUSHES: Final = "Pushes"

_PUSH: Final = "tests/workers/test_push.py::"
_DISPATCH: Final = "tests/workers/test_push_dispatch.py::"

PUSHES: Final = (
    Bound(
        room=_PUSHES,
        where="workers.push_queue:DUE_LIMIT",
        unit="members",
        past="those that have waited longest go, and are told of the next message",
        gauge="trireme_push_due",
        test=_PUSH + "test_what_waits_is_bounded_and_the_oldest_go",
    ),
    Bound(
        room=_PUSHES,
        where="workers.push_queue:JOBS_LIMIT",
        unit="jobs in the stream",
        past="the oldest go",
        no_gauge="a copy for whoever reads it; devices are told all the same",
        test=_PUSH + "test_the_stream_of_jobs_keeps_its_newest",
    ),
    Bound(
        room=_PUSHES,
        where="workers.push.role:IN_HAND",
        unit="jobs",
        past="nothing is claimed; others may",
        gauge="trireme_push_in_hand",
        test=_PUSH + "test_no_more_jobs_are_in_hand_than_the_bound_and_one_batch",
    ),
    Bound(
        room=_PUSHES,
        where="workers.push.dispatch:SENDS_AT_ONCE",
        unit="requests to providers",
        past="wait for one of them",
        gauge="trireme_push_in_hand",
        test=_DISPATCH + "test_no_more_requests_at_once_than_the_bound",
    ),
    Bound(
        room=_PUSHES,
        where="workers.push.dispatch:PROVIDERS",
        unit="providers",
        past="the one that was used longest ago is forgotten",
        no_gauge="a kilobyte each",
        test=_DISPATCH + "test_providers_are_remembered_in_bounded_number",
        holds=("workers.push.dispatch.Dispatch._breakers",),
    ),
)
