"""The pub/sub channels this gateway listens to, over a wire of their own.

Called by `broker.py`. `user:{id}` and `notification:{id}` are heard while the user has a connection here,
`presence:{id}` while somebody here watches that person. Nothing is remembered of what is subscribed: what the listener
holds says which channels are wanted, so after a reconnect all of them are asked for again. What was published in
between is lost; the listener is told that there was a gap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import structlog
import trio

from gateway.wire import Address, ReplyFailed, Wire, WireError, pack
from protocol import keys, records
from protocol.codec import JSON, MAX_FRAME_BYTES, decode_presence_change, decode_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

_log = structlog.get_logger(__name__)

_CHANNELS_AT_ONCE: Final = 1000
"""Channels per command: 40 KB, half a millisecond of Redis."""
_QUIET_SECONDS: Final = 1.0
"""With nothing to change the wire is still asked for a sign of life so often."""
_REFUSED_SECONDS: Final = 1.0
ASKS_WAITING: Final = 10_000
"""Questions of watchers that wait for their channels, some milliseconds long; past it one is dropped, and the watcher
asks again by itself."""
_USER: Final = keys.USER_CHANNEL_PREFIX.encode()
_NOTIFICATION: Final = keys.NOTIFICATION_PREFIX.encode()
_PRESENCE: Final = keys.PRESENCE_PREFIX.encode()


class Listener(Protocol):
    """Who wants to hear, and what: the hub. No method awaits or raises."""

    @property
    def users(self) -> Collection[str]:
        """Users with a connection here."""

    @property
    def watched(self) -> Collection[str]:
        """People somebody here watches."""

    def signalled(self, user_id: str, signal: records.UserSignal) -> None:
        """Something was said to this user's connections."""

    def presence_changed(self, user_id: str, change: records.PresenceChange) -> None:
        """Somebody came, went, or may no longer be watched."""

    def heard_again(self) -> None:
        """All channels are heard, after a time when none was: what was said in it is lost."""


class Subscriptions:
    """Keeps the subscriptions equal to what the listener wants. `run` keeps it going; no other method awaits."""

    def __init__(
        self, address: Address, deadline_seconds: float, ask: Callable[[records.PresenceQuery], object]
    ) -> None:
        """`ask` hands a query over whose channels are heard by now."""
        self.wire = Wire(
            address,
            "channels",
            max_outstanding=4,
            deadline_seconds=deadline_seconds,
            on_connected=self._connected,
            on_push=self._pushed,
        )
        self.undecodable = 0
        """Messages that were none of ours."""
        self._ask = ask
        self._listener: Listener
        self._due = trio.Event()
        self._users: set[str] = set()
        self._people: set[str] = set()
        self._asks: list[records.PresenceQuery] = []
        self._everything = False

    @property
    def waiting(self) -> int:
        """Changes and questions of the next turn."""
        return len(self._users) + len(self._people) + len(self._asks)

    def user_changed(self, user_id: str) -> None:
        """This user's first connection came, or the last one went."""
        if self.wire.connected:
            self._users.add(user_id)
            self._due.set()

    def person_changed(self, user_id: str) -> None:
        """This person's first watcher came, or the last one went."""
        if self.wire.connected:
            self._people.add(user_id)
            self._due.set()

    def ask_when_heard(self, query: records.PresenceQuery) -> None:
        """Ask once every change after the answer is sure to be heard. Lost with the wire: the gap is told."""
        if self.wire.connected and len(self._asks) < ASKS_WAITING:
            self._asks.append(query)
            self._due.set()

    async def run(self, listener: Listener) -> None:
        """Until cancelled."""
        self._listener = listener
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.wire.run, name="redis-channels")
            nursery.start_soon(self._keep_up, name="subscriptions")

    def _connected(self, _info: dict[str, str]) -> None:
        self._everything = True
        self._due.set()

    async def _keep_up(self) -> None:
        while True:
            with trio.move_on_after(_QUIET_SECONDS):
                await self._due.wait()
            await self.wire.wait_connected()
            self._due = trio.Event()
            try:
                await self._subscribe()
            except ReplyFailed as error:
                _log.warning("subscriptions_refused", reason=str(error))
                self._everything = True  # what was taken for this turn is not known any more
                await trio.sleep(_REFUSED_SECONDS)
            except WireError:
                await trio.lowlevel.checkpoint()  # all of it again as soon as there is a connection

    async def _subscribe(self) -> None:
        """What has changed since the last time, in as few commands as it takes. Raises WireError."""
        listener = self._listener
        everything, self._everything = self._everything, False
        users, self._users = self._users, set()
        people, self._people = self._people, set()
        asks, self._asks = self._asks, []
        if everything:
            users.update(listener.users)
            people.update(listener.watched)
        wanted: dict[bytes, list[str]] = {b"SUBSCRIBE": [], b"UNSUBSCRIBE": []}
        for user_id in users:
            command = b"SUBSCRIBE" if user_id in listener.users else b"UNSUBSCRIBE"
            wanted[command] += (keys.user_channel(user_id), keys.notification_channel(user_id))
        for user_id in people:
            wanted[b"SUBSCRIBE" if user_id in listener.watched else b"UNSUBSCRIBE"].append(keys.presence(user_id))
        for command, channels in wanted.items():
            for chunk in _chunks(channels):
                self.wire.tell(pack(command, *chunk))
                await self.wire.call("PING")  # its answer comes behind theirs
        if not users and not people:
            await self.wire.call("PING")
        for query in asks:
            self._ask(query)
        if everything:
            listener.heard_again()

    def _pushed(self, push: Sequence[Any]) -> None:
        if push[0] != b"message":
            return
        try:
            self._take(push[1], push[2])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.undecodable += 1
            _log.warning("message_undecodable", channel=repr(push[1])[:100], size_bytes=len(push[2]))

    def _take(self, channel: bytes, payload: bytes) -> None:
        """Raises msgspec.DecodeError for what is none of ours."""
        if channel.startswith(_PRESENCE):
            self._listener.presence_changed(channel[len(_PRESENCE) :].decode(), decode_presence_change(payload))
            return
        signal = decode_signal(payload)
        if isinstance(signal, records.PushJob):
            return  # of what the connections have been sent already; for whoever reaches devices that have none
        if isinstance(signal, records.Tell):
            if len(signal.frame) > MAX_FRAME_BYTES:
                raise msgspec.ValidationError("a frame over the limit")
            JSON.decode_server(bytes(signal.frame))
        elif not channel.startswith(_USER):
            raise msgspec.ValidationError("a notification can only tell")
        prefix = _USER if channel.startswith(_USER) else _NOTIFICATION
        self._listener.signalled(channel[len(prefix) :].decode(), signal)


def _chunks(channels: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(channels), _CHANNELS_AT_ONCE):
        yield channels[start : start + _CHANNELS_AT_ONCE]
