"""The rows of `bounds.py` about webhooks and agents."""

from __future__ import annotations

from typing import Final

from bench.bound import Bound

_APPS: Final = "Webhooks and agents"

_EGRESS: Final = "tests/workers/test_egress.py::"

APPS: Final = (
    Bound(
        room=_APPS,
        where="workers.egress:LOOKUPS",
        unit="names",
        past="wait for a thread; their calls fail at their deadlines",
        no_gauge="a failure at the deadline is counted where the call is made",
        test=_EGRESS + "test_names_that_hang_hold_no_more_threads_than_the_bound",
    ),
)
