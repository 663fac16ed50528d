"""Which kinds of token this installation can tell, and the adapters for them: what the settings configure."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx2

from workers.egress import open_egress
from workers.push.adapters import KeyUnfit, LogAdapter
from workers.push.apns import ApnsAdapter
from workers.push.fcm import FcmAdapter
from workers.push.web_push import Vapid, WebPushAdapter
from workers.push.webhook import WebhookAdapter
from workers.settings import DEV, PREFIX, SettingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.egress import Egress
    from workers.push.adapters import Adapter
    from workers.settings import Settings


def kinds(settings: Settings) -> list[str]:
    """The kinds that are configured."""
    configured = {
        LogAdapter.kind: settings.env == DEV,
        WebPushAdapter.kind: settings.push_vapid_private_key,
        FcmAdapter.kind: settings.push_fcm_credentials,
        ApnsAdapter.kind: settings.push_apns_key,
        WebhookAdapter.kind: settings.push_webhook_url,
    }
    return [kind for kind, is_so in configured.items() if is_so]


def vapid_of(settings: Settings) -> Vapid:
    """Who we are to Web Push services. Raises SettingError."""
    try:
        return Vapid(settings.push_vapid_private_key, settings.push_vapid_subject)
    except KeyUnfit as error:
        raise SettingError(f"{PREFIX}PUSH_VAPID_PRIVATE_KEY: {error}") from error


@asynccontextmanager
async def open_adapters(settings: Settings) -> AsyncIterator[dict[str, Adapter]]:
    """One for each of `kinds`; closes their connections on exit. Raises SettingError for a key that is none."""
    # Deadlines stand at the call; trust_env off: no proxy variable may lead a job elsewhere.
    async with (
        open_egress(settings.egress_allow) as egress,
        httpx2.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as client,
        httpx2.AsyncClient(timeout=None, follow_redirects=False, trust_env=False, http2=True) as http2,
    ):
        yield {kind: _adapter(kind, settings, egress, client, http2) for kind in kinds(settings)}


def _adapter(
    kind: str, settings: Settings, egress: Egress, client: httpx2.AsyncClient, http2: httpx2.AsyncClient
) -> Adapter:
    match kind:
        case WebPushAdapter.kind:
            return WebPushAdapter(egress, vapid_of(settings))
        case FcmAdapter.kind:
            return _fcm(settings, client)
        case ApnsAdapter.kind:
            return _apns(settings, http2)
        case WebhookAdapter.kind:
            return WebhookAdapter(client, settings.push_webhook_url, settings.push_webhook_secret)
        case _:
            return LogAdapter()


def _fcm(settings: Settings, client: httpx2.AsyncClient) -> FcmAdapter:
    try:
        return FcmAdapter(client, settings.push_fcm_credentials, settings.push_fcm_url)
    except KeyUnfit as error:
        raise SettingError(f"{PREFIX}PUSH_FCM_CREDENTIALS: {error}") from error


def _apns(settings: Settings, client: httpx2.AsyncClient) -> ApnsAdapter:
    try:
        return ApnsAdapter(
            client,
            settings.push_apns_key,
            settings.push_apns_key_id,
            settings.push_apns_team_id,
            settings.push_apns_topic,
            settings.push_apns_url,
        )
    except KeyUnfit as error:
        raise SettingError(f"{PREFIX}PUSH_APNS_KEY: {error}") from error
