"""The composition root: opens everything, runs the named roles in one nursery, drains.

Called by `__main__` and by tests. Who opens, closes: the listener, the wires and every accepted socket end with
`run_gateway`.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.admission import Admission, PublicKeys
from gateway.arrivals import Arrivals
from gateway.broker import RedisBroker
from gateway.hub import Hub
from gateway.metrics import GatewayCollector, Page, Pages
from gateway.migration import Migration
from gateway.timers import Job, TimerRole
from gateway.wire import WireError
from protocol.errors import CloseCode

if TYPE_CHECKING:
    import ssl

    from gateway.settings import Settings
    from gateway.transport import Host, TransportLimits, TransportServer

_log = structlog.get_logger(__name__)

_BACKLOG: Final = 4096
"""A reconnect storm waits in the kernel instead of being refused (capped by net.core.somaxconn)."""
_MIGRATION_SHARE: Final = 2 / 3
"""The first part of the drain window: the clients are told one after the other to go elsewhere (protocol.md)."""
_CLOSE_SHARE: Final = 0.125
"""The last part of the drain window, at most a second, belongs to close handshakes and to leaving Redis."""
_HOLD_SHARE: Final = 1 / 6
_HOLD_SECONDS: Final = 2.0
"""Before the closes nobody's frames are taken any more, so long at most: acks of what was sent take a fraction of it.
"""
_POLL_SECONDS: Final = 0.02


def wall_ms() -> int:
    """Epoch milliseconds: the gateway's one look at the wall clock."""
    return time.time_ns() // 1_000_000


def open_listener(host: str, port: int) -> socket.socket:
    """A listening socket that several gateways of this machine may share (SO_REUSEPORT). Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def stop_listening(listener: socket.socket) -> None:
    """Connections go to others who share the port, or are refused, from now on; the socket stays the caller's to close.

    Without this the kernel would go on handing this process its share of them, to wait in a queue nobody reads.
    """
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def open_transport(
    kind: str, host: Host, limits: TransportLimits, tls: ssl.SSLContext | None = None
) -> TransportServer:
    """The transport by its setting. Imported only when used: each brings its own WebSocket library.

    `tls` is for the trio-websocket one alone; `load_settings` has seen to that.
    """
    if kind == "epoll":
        from gateway.epoll import EpollServer  # noqa: PLC0415 -- Linux only

        return EpollServer(host, limits)
    from gateway.trio_ws import TrioWebSocketServer  # noqa: PLC0415 -- not loaded by the default

    return TrioWebSocketServer(host, limits, tls)


class Gateway:
    """Every role of one gateway process, put together. `run` is the whole life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.instance_id = f"gw_{os.urandom(10).hex()}"
        """Fresh at every start, so an old down stream is never mistaken for ours."""
        self.broker = RedisBroker(
            settings.address,
            self.instance_id,
            shards=settings.shards,
            endpoint=settings.endpoint,
            max_outstanding=settings.redis_outstanding,
            max_receipts=settings.receipts_waiting,
            high_water=settings.ingest_high_water,
            max_backlog=settings.ingest_backlog,
            deadline_seconds=settings.redis_deadline_seconds,
            wall_ms=wall_ms,
        )
        self.hub = Hub(
            self.instance_id,
            self.broker,
            Admission(PublicKeys(settings.jwt_public_key), settings.auth_failures_per_minute),
            settings.limits,
            settings.devices_per_user,
            Arrivals(settings.connections_per_second, settings.unauthenticated_connections),
            opening_sessions=settings.opening_sessions,
            clock=trio.current_time,
            wall_ms=wall_ms,
            pages=self._answer_page,
        )
        self.transport = open_transport(settings.gateway_transport, self.hub, settings.transport_limits, settings.tls)
        self.timers = TimerRole(
            self.hub.wheel, [Job("transport_sweep", self.transport.sweep), Job("hub_sweep", self.hub.sweep)]
        )
        collector = GatewayCollector(self.hub, self.broker, self.transport, self.timers)
        self.pages = Pages(collector, self.missing)

    def missing(self) -> list[str]:
        """What readiness lacks."""
        return [*self.broker.missing(), *(["not_draining"] if self.hub.draining else [])]

    def _answer_page(self, path: str) -> Page | None:
        return self.pages.answer(path)

    async def run(
        self,
        stopping: trio.Event,
        listener: socket.socket,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stopping` is set, then drain. `listener` stays the caller's.

        *Raises* BrokerRefused when Redis was set up differently. *Cancellation*: ends at once, without draining.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self.transport.serve, listener, name="transport")
            nursery.start_soon(self.timers.run, name="timers")
            nursery.start_soon(self._start_broker, nursery, task_status, name="broker-start")
            await stopping.wait()
            with trio.move_on_after(self.settings.drain_seconds):
                await self._drain(listener)
            nursery.cancel_scope.cancel()
        _log.info("gateway_stopped", instance=self.instance_id)

    async def _start_broker(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        """Health is served meanwhile; clients that come too early are told `server_busy`."""
        await nursery.start(self.broker.run, self.hub, name="broker")
        _log.info(
            "gateway_ready",
            instance=self.instance_id,
            endpoint=self.settings.endpoint,
            transport=self.settings.gateway_transport,
        )
        task_status.started()

    async def _drain(self, listener: socket.socket) -> None:
        """Let nobody in, send everybody elsewhere, see every window empty, close with 1012, leave Redis clean."""
        started = trio.current_time()
        self.hub.draining = True
        self.transport.stop_accepting()
        stop_listening(listener)
        self.broker.announce_draining()
        _log.info("drain_started", connections=self.hub.load, in_flight=self.hub.in_flight)
        seconds = self.settings.drain_seconds
        reserve = min(1.0, seconds * _CLOSE_SHARE)
        migration = Migration(self.hub, self.broker, wall_ms)
        with trio.move_on_after(seconds - reserve):
            await migration.run(seconds * _MIGRATION_SHARE)
            held = min(_HOLD_SECONDS, seconds * _HOLD_SHARE)
            await migration.see_off(started + seconds - reserve - held - trio.current_time())
            self.hub.holding = True
            while self.hub.in_flight or self.broker.receipts.waiting or self.hub.migrating:
                await trio.sleep(_POLL_SECONDS)
                self.hub.retire(trio.current_time())
        left_behind = self.hub.in_flight
        stayed = self.hub.load
        self.hub.close_all(CloseCode.RESTART)
        self.transport.close_all(CloseCode.RESTART)
        with trio.move_on_after(reserve * 0.8):
            try:
                await self.broker.leave()
            except WireError as error:
                _log.warning("lease_left_to_expire", reason=str(error))
            while self.transport.connections:  # noqa: ASYNC110 -- as above
                await trio.sleep(_POLL_SECONDS)
        _log.info(
            "drain_ended",
            told=migration.told,
            stayed=stayed,
            in_flight=left_behind,
            seconds=round(trio.current_time() - started, 3),
        )
