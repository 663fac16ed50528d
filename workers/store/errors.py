"""What the store seam raises instead of the driver's exceptions."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pymongo.errors import InvalidOperation, PyMongoError

if TYPE_CHECKING:
    from collections.abc import Iterator


class StoreUnavailable(Exception):
    """MongoDB is away, failing over or without a majority: try again later."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn any driver failure of a read or an idempotent write into `StoreUnavailable`."""
    try:
        yield
    except InvalidOperation:
        # A bug of ours: no use trying again.
        raise
    except PyMongoError as error:
        raise StoreUnavailable(str(error)) from error
