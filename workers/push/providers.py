"""Which kinds of token this installation can tell, and the adapters for them: what the settings configure."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx2

from workers.push.adapters import LogAdapter
from workers.push.webhook import WebhookAdapter
from workers.settings import DEV

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.push.adapters import Adapter
    from workers.settings import Settings


def kinds(settings: Settings) -> list[str]:
    """The kinds that are configured."""
    found = []
    if settings.env == DEV:
        found.append(LogAdapter.kind)
    if settings.push_webhook_url:
        found.append(WebhookAdapter.kind)
    return found


@asynccontextmanager
async def open_adapters(settings: Settings) -> AsyncIterator[dict[str, Adapter]]:
    """One for each of `kinds`; closes their connections on exit."""
    adapters: list[Adapter] = []
    # Deadlines stand at the call; trust_env off: no proxy variable may lead a job elsewhere.
    async with httpx2.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as client:
        if settings.env == DEV:
            adapters.append(LogAdapter())
        if settings.push_webhook_url:
            adapters.append(WebhookAdapter(client, settings.push_webhook_url, settings.push_webhook_secret))
        yield {adapter.kind: adapter for adapter in adapters}
