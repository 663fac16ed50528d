"""What the store seam raises instead of the driver's exceptions, and what it tells the breaker of a request."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pymongo.errors import ConnectionFailure, ExecutionTimeout, InvalidOperation, PyMongoError, WTimeoutError

from workers.breaker import BreakerOpen, guarded

if TYPE_CHECKING:
    from collections.abc import Iterator

_AWAY = (ConnectionFailure, ExecutionTimeout, WTimeoutError)
"""Nobody answers, or not in time. Anything else is an answer, however bad: an input that the server does not like must
not open the breaker for everybody."""


class StoreUnavailable(Exception):
    """MongoDB is away, failing over or without a majority: try again later."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn any driver failure of a read or an idempotent write into `StoreUnavailable`; for a request also what its
    breaker says: that it need not be tried."""
    breakers = guarded()
    breaker = None if breakers is None else breakers.mongodb
    if breaker is not None:
        try:
            breaker.admit()
        except BreakerOpen:
            raise StoreUnavailable("MongoDB was away lately") from None
    try:
        yield
    except InvalidOperation:
        # A bug of ours: no use trying again.
        raise
    except PyMongoError as error:
        if breaker is not None:
            (breaker.failed if isinstance(error, _AWAY) else breaker.succeeded)()
        raise StoreUnavailable(str(error)) from error
    if breaker is not None:
        breaker.succeeded()
