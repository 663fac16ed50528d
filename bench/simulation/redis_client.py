"""`redis.asyncio.Redis` on the Valkey twin, as far as `workers.broker.Broker` uses it.

Each command has a connection of its own from the pool, so two commands of one process may overtake each other; those of
a pipeline keep their order. A lost request or reply raises ConnectionError, and the command may have been executed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis.exceptions
import trio

from bench.simulation.keyspace import Refusal
from bench.simulation.network import OWNER, Answer
from bench.simulation.valkey import INVALIDATE, SERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.simulation.network import Network, Process
    from bench.simulation.valkey import Valkey

Command = tuple[Any, ...]


class TwinRedis:
    """One client of one worker process."""

    def __init__(self) -> None:
        self.server: Valkey = SERVER.get()
        self.network: Network = self.server.network
        self.owner: Process | None = OWNER.get()

    def set_response_callback(self, _command: str, _callback: Any) -> None:
        """Replies come as the server gives them anyway."""

    async def execute_command(self, *command: Any, **_options: Any) -> Any:
        """One command. Raises as redis-py does."""
        (reply,) = await self.exchange([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """These commands on one connection; errors among the replies are exceptions."""
        if self.owner is not None and not self.owner.alive:
            raise redis.exceptions.ConnectionError("the process is dead")
        asked = _Exchange(self, commands)
        asked.start()
        replies: list[Any] = await asked.answer.wait()
        return replies

    def register_script(self, text: bytes) -> _Script:
        """See `Redis.register_script`."""
        return _Script(self, text)

    def pipeline(self, transaction: bool) -> _Pipeline:
        """See `Redis.pipeline`; no transactions here."""
        assert not transaction
        return _Pipeline(self)

    def pubsub(self) -> _PubSub:
        """See `Redis.pubsub`."""
        return _PubSub(self)

    def client(self) -> _Single:
        """See `Redis.client`: one connection."""
        return _Single(self)

    async def aclose(self) -> None:
        """Nothing is held."""


class _Exchange:
    """Commands on their way there, one after the other, and the replies on their way back. Implements `valkey.Peer`."""

    def __init__(self, client: TwinRedis, commands: Sequence[Command]) -> None:
        self._client = client
        self._commands = list(commands)
        self._replies: list[Any] = []
        self.answer = Answer()

    @property
    def open(self) -> bool:
        """See `Peer.open`."""
        return self.answer.awaited

    def start(self) -> None:
        """They leave."""
        server, network = self._client.server, self._client.network
        if server.down:
            network.at(network.delay(), None, self._fail, "Connection refused")
            return
        server.peers[self] = None
        if self._commands[-1][0] == "EVAL":
            network.pass_by(self._client.owner, "write")
        network.at(network.delay(), None, self._arrive)

    def _arrive(self) -> None:
        server, network = self._client.server, self._client.network
        if self not in server.peers:
            return
        if server.stalled_until > network.now:
            network.at_time(server.stalled_until, None, self._arrive)
            return
        count = len(self._commands)
        if server.faults.lost and network.rng.random() < server.faults.lost * count:
            executed = network.rng.randint(0, count)
            network.note("redis", "lost", self._commands[0][0], f"{executed} of {count} executed")
            for command in self._commands[:executed]:
                self._execute(command)
            self.broken()
            return
        for command in self._commands:
            self._execute(command)

    def _execute(self, command: Command) -> None:
        name, *arguments = [_bytes(word) for word in command]
        self._client.server.execute(self, name, arguments)

    def answered(self, reply: Any) -> None:
        """See `Peer.answered`."""
        name = self._commands[len(self._replies)][0]
        self._replies.append(_error(reply) if isinstance(reply, Refusal) else _shape(name, reply))
        server, network = self._client.server, self._client.network
        if len(self._replies) == len(self._commands) and self in server.peers:
            server.leave(self)
            network.at(network.delay(), None, self.answer.give, self._replies)

    def pushed(self, channel: bytes, payload: Any) -> None:
        """Nobody listens on such a connection."""

    def broken(self) -> None:
        """See `Peer.broken`."""
        self._client.server.leave(self)
        self._client.network.at(self._client.network.delay(), None, self._fail, "Connection closed by server.")

    def _fail(self, reason: str) -> None:
        self.answer.give(error=redis.exceptions.ConnectionError(reason))


class _Script:
    """See `redis.commands.core.AsyncScript`."""

    def __init__(self, client: TwinRedis, text: bytes) -> None:
        self._client = client
        self._text = text

    async def __call__(self, keys: Sequence[Any], args: Sequence[Any], client: _Pipeline | None = None) -> Any:
        command = ("EVAL", self._text, len(keys), *keys, *args)
        if client is not None:
            client.execute_command(*command)
            return None
        return await self._client.execute_command(*command)


class _Pipeline:
    """See `redis.asyncio.client.Pipeline`."""

    def __init__(self, client: TwinRedis) -> None:
        self._client = client
        self._commands: list[Command] = []

    async def __aenter__(self) -> _Pipeline:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    def execute_command(self, *command: Any) -> _Pipeline:
        """Later, in order."""
        self._commands.append(command)
        return self

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """All of them."""
        if not self._commands:
            return []
        replies = await self._client.exchange(self._commands)
        if raise_on_error:
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies


class _Single:
    """One connection that tracks keys for another."""

    def __init__(self, client: TwinRedis) -> None:
        self._client = client
        self.connection: _Single | None = self
        self._tracking: _PubSub | None = None

    async def execute_command(self, *command: Any) -> Any:
        """CLIENT TRACKING or PING."""
        if self._tracking is not None and not self._tracking.is_up:
            raise redis.exceptions.ConnectionError("Connection closed by server.")
        if command[:3] == ("CLIENT", "TRACKING", "ON"):
            _, _, _, _, listener_id, _, _, prefix = command
            await self._client.execute_command("PING")
            self._tracking = _PubSub.of(self._client.server, listener_id)
            self._tracking.tracked_by(prefix.encode())
            return b"OK"
        return await self._client.execute_command(*command)

    async def disconnect(self, *, nowait: bool) -> None:
        """It tracks no longer."""

    async def aclose(self) -> None:
        """The same."""


class _PubSub:
    """A connection that listens. Implements `valkey.Peer`."""

    def __init__(self, client: TwinRedis) -> None:
        self._client = client
        client.server.listeners += 1
        self._number = client.server.listeners
        self._mail: list[Any] = []
        self._news = trio.Event()
        self._heard_until = 0.0
        self.is_up = False
        self.open = True

    @staticmethod
    def of(server: Valkey, number: int) -> _PubSub:
        """The connection with this id."""
        for peer in server.peers:
            if isinstance(peer, _PubSub) and peer.number == number:
                return peer
        raise redis.exceptions.ResponseError("The client ID you want redirect to does not exist")

    @property
    def number(self) -> int:
        """CLIENT ID."""
        return self._number

    def tracked_by(self, prefix: bytes) -> None:
        """What changes under this prefix is told here."""
        self._client.server.track(self, self, prefix)

    async def connect(self) -> None:
        """Raises ConnectionError."""
        await self._client.execute_command("PING")
        self._client.server.peers[self] = None
        self.is_up = True
        if self._client.owner is not None:
            self._client.owner.on_kill.append(self._hang_up)

    @property
    def connection(self) -> _PubSub:
        return self

    async def send_command(self, *_command: Any) -> None:
        """CLIENT ID."""

    async def read_response(self) -> int:
        """Its answer."""
        await self._client.execute_command("PING")
        return self.number

    async def subscribe(self, channel: str) -> None:
        """To invalidations, which come by `pushed`."""
        assert channel.encode() == INVALIDATE

    async def get_message(self, ignore_subscribe_messages: bool, timeout: float) -> dict[str, Any] | None:  # noqa: ASYNC109 -- redis-py's
        """See `PubSub.get_message`."""
        with trio.move_on_after(timeout):
            while not self._mail and self.is_up:
                self._news = trio.Event()
                await self._news.wait()
        if self._mail:
            return {"data": self._mail.pop(0)}
        if not self.is_up:
            raise redis.exceptions.ConnectionError("Connection closed by server.")
        return None

    def answered(self, reply: Any) -> None:
        """See `Peer.answered`."""

    def pushed(self, channel: bytes, payload: Any) -> None:
        """See `Peer.pushed`."""
        network = self._client.network
        self._heard_until = max(self._heard_until, network.now + network.delay())
        network.at_time(self._heard_until, self._client.owner, self._take, payload)

    def _take(self, payload: Any) -> None:
        self._mail.append(payload)
        self._news.set()

    def broken(self) -> None:
        """See `Peer.broken`."""
        network = self._client.network
        network.at(network.delay(), self._client.owner, self._hang_up)

    def _hang_up(self) -> None:
        self.is_up = False
        self._client.server.leave(self)
        self._news.set()

    async def aclose(self) -> None:
        """The client closes it."""
        self.open = False
        self._hang_up()


def _bytes(word: Any) -> bytes:
    return word if type(word) is bytes else str(word).encode()


def _error(refusal: Refusal) -> Exception:
    text = str(refusal)
    if text.startswith("OOM"):
        return redis.exceptions.OutOfMemoryError(text.removeprefix("OOM "))
    return redis.exceptions.ResponseError(text.removeprefix("ERR "))


def _shape(name: Any, reply: Any) -> Any:
    """As redis-py hands it on over RESP2, where that is not the reply itself."""
    match name:
        case "XREAD" | "XREADGROUP":
            return None if reply is None else [[key, entries] for key, entries in reply.items()]
        case "SMEMBERS":
            return set(reply)
        case "SET" | "PING" | "LTRIM":
            return None if reply is None else True
    return reply
