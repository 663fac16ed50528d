"""The REST role's composition: routes, limits, the HTTP server, and the instance that waits for the shards' owners.

Routes are listed here and nowhere else.
"""

from __future__ import annotations

import secrets
import socket
from typing import TYPE_CHECKING, Final

import anyio
import structlog
from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide

from protocol import codec, keys, records, specification
from workers import orphans
from workers.breaker import Breakers, guarding
from workers.codes import Codes
from workers.egress import open_egress
from workers.instances import Instance
from workers.objects import Objects
from workers.push.providers import vapid_of
from workers.rest import (
    accounts,
    agents,
    blocks,
    conversations,
    dead_letters,
    deliveries,
    device_keys,
    devices,
    health,
    keyset,
    media,
    memberships,
    messages,
    openapi,
    participants,
    push_tokens,
    schema,
    search,
    sessions,
    traces,
    upkeep,
    users,
    webhooks,
)
from workers.rest.bodies import StrictRequest
from workers.rest.desk import Desk, now_ms
from workers.rest.edge import Edge
from workers.rest.errors import EXCEPTION_HANDLERS
from workers.rest.server import Server, open_server
from workers.senders import open_sender
from workers.settings import SettingError, Settings
from workers.tokens import KeyUnfit, Tokens

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Scope, Send

    from workers.broker import Broker
    from workers.store import Store

ROUTES: Final = [
    users.create_user,
    users.create_token,
    sessions.begin_verification,
    sessions.log_in,
    sessions.refresh,
    sessions.log_out,
    devices.list_devices,
    devices.revoke_device,
    devices.revoke_devices,
    push_tokens.read_push,
    push_tokens.put_token,
    push_tokens.read_token,
    push_tokens.delete_token,
    accounts.read_account,
    accounts.change_account,
    accounts.read_profile,
    accounts.export_account,
    accounts.delete_account,
    accounts.delete_user,
    agents.create_agent,
    agents.list_agents,
    agents.read_agent,
    agents.change_agent,
    agents.renew_secret,
    agents.delete_agent,
    keyset.read_keys,
    conversations.create_conversation,
    conversations.list_conversations,
    conversations.read_conversation,
    conversations.change_conversation,
    participants.list_participants,
    participants.add_participants,
    participants.change_participant,
    participants.remove_participant,
    participants.list_bans,
    participants.ban,
    participants.unban,
    memberships.change_settings,
    messages.list_messages,
    messages.send_message,
    messages.read_message,
    messages.list_receipts,
    messages.edit_message,
    messages.delete_message,
    messages.add_reaction,
    messages.remove_reaction,
    search.search_conversation,
    search.search_everywhere,
    media.create_media,
    media.list_media,
    media.read_media,
    media.resume_media,
    media.complete_media,
    media.delete_media,
    blocks.list_blocks,
    blocks.block,
    blocks.unblock,
    device_keys.put_identity,
    device_keys.add_one_time_keys,
    device_keys.list_own_keys,
    device_keys.list_user_keys,
    device_keys.claim_keys,
    dead_letters.list_dead_letters,
    dead_letters.count_dead_letters,
    dead_letters.read_dead_letter,
    dead_letters.replay_dead_letter,
    dead_letters.resolve_dead_letter,
    webhooks.create_webhook,
    webhooks.list_webhooks,
    webhooks.read_webhook,
    webhooks.change_webhook,
    webhooks.delete_webhook,
    webhooks.enable_webhook,
    webhooks.disable_webhook,
    webhooks.rotate_secret,
    webhooks.test_webhook,
    webhooks.replay_webhook,
    deliveries.list_deliveries,
    deliveries.replay_delivery,
    traces.trace_message,
    health.live,
    health.ready,
    health.metrics,
    schema.openapi_document,
    schema.asyncapi_document,
]

MAX_BODY_BYTES: Final = 1024 * 1024
"""A message of 48 KiB is up to 288 KiB of JSON, a list of names 64 KiB; read behind the guards only."""

log = structlog.get_logger(__name__)


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Serve HTTP until `stopping`, then finish the requests under way.

    Raises SettingError when the port or the key cannot be used. *Cancellation*: drops requests under way.
    """
    try:
        tokens = Tokens(settings.jwt_private_key)
    except KeyUnfit as error:
        raise SettingError(str(error)) from error
    if settings.push_vapid_private_key:
        vapid_of(settings)
    listener = open_listener(settings.rest_host, settings.rest_port)
    endpoint = settings.rest_url or f"http://{settings.rest_host}:{settings.rest_port}"
    info = records.InstanceInfo("rest", endpoint, 0, False)
    instance = Instance(broker, keys.new_id("rest", now_ms(), secrets.randbits(64)), info)
    async with (
        open_sender(settings) as sender,
        open_egress(settings.egress_allow) as egress,
        anyio.create_task_group() as group,
    ):
        objects = Objects(settings) if settings.s3_url else None
        desk = Desk(settings, store, broker, instance, tokens, Codes(settings, store, sender), objects, egress)
        await group.start(instance.run, name="rest instance")
        group.start_soon(upkeep.run, desk, name="rest upkeep")
        if objects is not None:
            group.start_soon(orphans.run, store, objects, settings.media_orphan_seconds, name="media sweep")
        app = Guarded(create_app(desk), Breakers(store.breaker, broker.breaker))
        edge = Edge(app, settings.body_seconds, behind_tls=endpoint.startswith("https:"))
        server = open_server(edge, settings)
        group.start_soon(_stop_server, server, stopping, name="rest stop")
        log.info("rest_serving", endpoint=endpoint, instance=instance.instance_id)
        await server.serve(sockets=[listener])
        group.cancel_scope.cancel()


def create_app(desk: Desk) -> Litestar:
    """The ASGI application over a desk. Opens nothing."""
    documents = schema.Documents(
        codec.encode_value(openapi.document(openapi.routes_of(ROUTES))), codec.encode_value(specification.asyncapi())
    )
    return Litestar(
        route_handlers=[schema.options_route(ROUTES), *ROUTES],
        dependencies={"desk": Provide(lambda: desk, sync_to_thread=False)},
        state=State({"desk": desk, "documents": documents}),
        exception_handlers=EXCEPTION_HANDLERS,
        request_max_body_size=MAX_BODY_BYTES,
        request_class=StrictRequest,
        openapi_config=None,
        logging_config=None,
        debug=False,
    )


class Guarded:
    """Around the application: what a request asks of the servers is guarded by their breakers."""

    def __init__(self, app: ASGIApp, breakers: Breakers) -> None:
        self._app = app
        self._breakers = breakers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with guarding(self._breakers):
            await self._app(scope, receive, send)


def open_listener(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises SettingError, one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingError(f"TRIREME_REST_PORT {port} cannot be opened on {host}: {error.strerror}") from error
    return listener


async def _stop_server(server: Server, stopping: anyio.Event) -> None:
    await stopping.wait()
    server.should_exit = True
