"""Transport 1: one Trio task, one epoll set, every client socket.

An epoll file descriptor can itself be polled, so the reactor sleeps in `wait_readable(epoll)`, then serves a bounded
number of ready sockets in a plain loop. A connection is a state machine (`epoll_connection.py`), not a task. Called
by `server.py` (serve, drain) and `timers.py` (sweep). Linux only; `trio_ws.py` is the portable one.

A connection is forgotten here or in `sweep`, never inside a `Transport` method, so `Link.lost` is not called in the
middle of the hub's own loops.
"""

from __future__ import annotations

import errno
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from gateway.epoll_connection import Connection, Reactor
from gateway.transport import Buffered, Host, TransportLimits, TransportServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from protocol.errors import CloseCode

_GATHER_SECONDS: Final = 0.002
"""Between the starts of two turns of a busy reactor; an idle one turns at once. Waking up costs three tasks about
60 us, however few messages there are to handle."""
_OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class EpollServer(TransportServer):
    """See `transport.TransportServer`."""

    def __init__(self, host: Host, limits: TransportLimits) -> None:
        super().__init__(host, limits)
        self._reactor: Reactor | None = None
        self._listener: socket.socket | None = None
        self._listening = False

    @property
    def connections(self) -> int:
        """See the base class."""
        return len(self._reactor.connections) if self._reactor is not None else 0

    @property
    def buffered(self) -> Buffered:
        """See the base class."""
        found = Buffered()
        if self._reactor is not None:
            for connection in self._reactor.connections.values():
                found = connection.add_to(found)
        return found

    async def serve(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See the base class."""
        listener.setblocking(False)
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            # Linux hands it down to accepted sockets: a system call less per connection.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with select.epoll() as epoll:
            self._reactor = reactor = Reactor(self, epoll)
            self._listener = listener
            self._resume_accepting()
            task_status.started()
            try:
                turned_at = 0.0
                while True:
                    await trio.lowlevel.wait_readable(epoll.fileno())
                    now = trio.current_time()
                    if now - turned_at < _GATHER_SECONDS:
                        await trio.sleep_until(turned_at + _GATHER_SECONDS)
                        now = trio.current_time()
                    self._turn(reactor, now)
                    turned_at = now
            finally:
                self.stop_accepting()
                for connection in list(reactor.connections.values()):
                    self._guard(connection, connection.lose)
                self._reactor = None

    def _turn(self, reactor: Reactor, now: float) -> None:
        """Serve what is ready, at most `limits.ready_sockets`; new connections last, so that a reused file descriptor
        is never mistaken for the one that was ready."""
        accepting = False
        connections = reactor.connections
        listening_fd = self._listener.fileno() if self._listener is not None else -1
        for fd, events in reactor.epoll.poll(0, self.limits.ready_sockets):
            connection = connections.get(fd)
            if connection is None:
                accepting = accepting or fd == listening_fd
                continue
            try:
                connection.handle(events, now)
            except Exception as error:  # noqa: BLE001 - the boundary of one connection (R1)
                self.isolate(error, connection.fail)
        if reactor.unsettled:
            self._settle(reactor)
        if accepting:
            self._accept(reactor, now)

    def _settle(self, reactor: Reactor) -> None:
        while reactor.unsettled:
            unsettled, reactor.unsettled = reactor.unsettled, []
            for connection in unsettled:
                self._guard(connection, connection.settle)

    def _guard(self, connection: Connection, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the boundary of one connection (R1)
            self.isolate(error, connection.fail)

    # --- accepting ---------------------------------------------------------------------------------------------------

    def _accept(self, reactor: Reactor, now: float) -> None:
        listener = self._listener
        for _ in range(self.limits.accept_burst):
            if listener is None:
                return
            try:
                sock, _address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    # The listener stays readable; watching it would be a busy loop. The next sweep tries again.
                    self._pause_accepting()
                    return
                continue  # that connection ended before it was accepted
            sock.setblocking(False)
            connection = Connection(reactor, sock, now)
            reactor.connections[connection.fd] = connection
            reactor.epoll.register(connection.fd, select.EPOLLIN)
            self.accepted += 1

    def _pause_accepting(self) -> None:
        if self._listening and self._listener is not None and self._reactor is not None:
            self._reactor.epoll.unregister(self._listener.fileno())
            self._listening = False

    def _resume_accepting(self) -> None:
        if not self._listening and self._listener is not None and self._reactor is not None:
            self._reactor.epoll.register(self._listener.fileno(), select.EPOLLIN)
            self._listening = True

    def stop_accepting(self) -> None:
        """See the base class."""
        self._pause_accepting()
        self._listener = None

    # --- deadlines and the end ---------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """See the base class."""
        reactor = self._reactor
        if reactor is None:
            return
        for connection in reactor.shaking.expired(now):
            self._guard(connection, connection.lose)
        for connection in reactor.closing.expired(now):
            self._guard(connection, connection.abort)
        for connection in reactor.stuck.expired(now):
            self._guard(connection, connection.give_up)
        for connection in reactor.unfinished.expired(now):
            self._guard(connection, connection.time_out)
        self._settle(reactor)
        self._resume_accepting()

    def close_all(self, code: CloseCode) -> None:
        """See the base class."""
        if self._reactor is not None:
            for connection in list(self._reactor.connections.values()):
                self._guard(connection, partial(connection.close_nowait, code))
