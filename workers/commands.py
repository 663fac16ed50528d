"""What the commands of `python -m workers` share: both seams opened for one errand, lines and tables for a terminal.

A command is a module with `main(arguments, environ) -> exit status`; the table of them is in `__main__.py`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import anyio

from workers.broker import Broker, BrokerUnavailable, open_broker
from workers.settings import SettingError, load_settings
from workers.store import Store, StoreUnfit, open_store
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


class Table:
    """Rows under headings, columns as wide as they need to be."""

    def __init__(self, *headings: str) -> None:
        self._headings = headings
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: object) -> None:
        """One row; a cell's line breaks and control characters are shown, not obeyed."""
        self.rows.append(tuple("".join(c if c.isprintable() else "?" for c in str(cell)) for cell in cells))

    def __str__(self) -> str:
        lines = [self._headings, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self._headings))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def say(line: str) -> None:
    """What was asked for."""
    sys.stdout.write(line + "\n")


def complain(line: str) -> None:
    """What the operator has to mend."""
    sys.stderr.write(f"workers: {line}\n")


def open_seams(environ: Mapping[str, str], errand: Callable[[Store, Broker], Awaitable[int]]) -> int:
    """Run an errand on the servers that the settings name; its exit status, or 2 with one line."""

    async def run() -> int:
        settings = load_settings(environ, ())
        async with (
            open_store(settings.mongodb_url, settings.message_retention_days, as_it_is=True) as store,
            open_broker(settings.redis_url) as broker,
        ):
            await broker.ping()
            return await errand(store, broker)

    try:
        return anyio.run(run)
    except (SettingError, StoreUnfit) as error:
        complain(str(error))
    except StoreUnavailable as error:
        complain(f"MongoDB does not answer: {str(error)[:200]}")
    except BrokerUnavailable as error:
        complain(f"Redis does not answer: {str(error)[:200]}")
    return 2
