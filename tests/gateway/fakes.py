"""The hub's two neighbours as fakes that record: a transport below it, a broker behind it. And what tests wait with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import OKPKey

from gateway.admission import Admission, PublicKeys
from gateway.arrivals import Arrivals
from gateway.hub import Hub
from protocol import codec, dev_keys, records
from protocol.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.connection import Connection
    from gateway.receipts import Mark
    from gateway.registry import Attachment
    from gateway.transport import Outgoing
    from protocol.errors import CloseCode, ErrorCode

WALL_SECONDS = 1_800_000_000


async def eventually(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 3.0) -> None:
    """Return once the condition, plain or to be awaited, holds. Raises trio.TooSlowError after `seconds`."""
    with trio.fail_after(seconds):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await trio.sleep(0.01)


def token(user_id: str = "usr_a", key: str = dev_keys.PRIVATE_JWK, algorithm: str = "Ed25519", **claims: Any) -> str:
    """A token of the dev key, good for an hour after `WALL_SECONDS`; claims that are None are left out."""
    merged = {"sub": user_id, "exp": WALL_SECONDS + 3600, "iat": WALL_SECONDS, "jti": "j", **claims}
    present = {name: value for name, value in merged.items() if value is not None}
    signing = OKPKey.import_key(msgspec.json.decode(key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # "EdDSA" is the deprecated name of the same signature
        return jwt.encode({"alg": algorithm}, present, signing, algorithms=[algorithm])


class FakeTransport:
    """Implements `transport.Transport`; `broken` raises on every write."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.outgoing: list[Outgoing] = []
        self.pings = 0
        self.resumed = 0
        self.closed: CloseCode | None = None
        self.broken = False

    def send_nowait(self, outgoing: Outgoing) -> None:
        assert self.closed is None, "written after close"
        if self.broken:
            raise RuntimeError("a bug in one connection")
        self.outgoing.append(outgoing)
        self.sent.append(msgspec.json.decode(outgoing.json))

    def ping_nowait(self) -> None:
        assert self.closed is None, "pinged after close"
        self.pings += 1

    def close_nowait(self, code: CloseCode) -> None:
        assert self.closed is None, "closed twice"
        self.closed = code

    def resume_nowait(self) -> None:
        assert self.closed is None, "resumed after close"
        self.resumed += 1

    def take(self) -> list[dict[str, Any]]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent


class FakeBroker:
    """Implements `broker.Broker`; `refuses` answers every publish and ask with that code."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        """Everything in order: (method, argument)."""
        self.refuses: ErrorCode | None = None
        self.lacks: list[str] = []

    def publish(self, record: records.SendMessage | records.ChangeMessage) -> ErrorCode | None:
        self.log.append(("publish", record))
        return self.refuses

    def signal(self, record: records.Typing) -> None:
        self.log.append(("signal", record))

    def ask(self, query: records.Query) -> ErrorCode | None:
        self.log.append(("ask", query))
        return self.refuses

    def watch(self, user_id: str) -> None:
        self.log.append(("watch", user_id))

    def acknowledge(self, mark: Mark) -> None:
        self.log.append(("acknowledge", mark))

    def attach(self, attachment: Attachment) -> None:
        self.log.append(("attach", attachment))

    def detach(self, attachment: Attachment) -> None:
        self.log.append(("detach", attachment))

    def refresh(self, attachments: Sequence[Attachment]) -> None:
        self.log.append(("refresh", list(attachments)))

    def redeem(self, connection: int, session_token: str) -> ErrorCode | None:
        self.log.append(("redeem", (connection, session_token)))
        return self.refuses

    def missing(self) -> list[str]:
        return self.lacks

    def take(self, method: str) -> list[Any]:
        """The arguments of every call of `method` since the last `take` of it."""
        taken = [argument for name, argument in self.log if name == method]
        self.log = [entry for entry in self.log if entry[0] != method]
        return taken


class House:
    """A hub between its two fakes, at `now` seconds; clients come in by `open`."""

    def __init__(
        self,
        limits: Limits | None = None,
        devices_per_user: int = 8,
        arrivals: Arrivals | None = None,
        opening_sessions: int = 2000,
    ) -> None:
        self.now = 1000.0
        self.broker = FakeBroker()
        self.hub = Hub(
            "gw_test",
            self.broker,
            Admission(PublicKeys(dev_keys.PUBLIC_JWK), 10),
            limits or Limits(),
            devices_per_user,
            arrivals or Arrivals(1_000_000, 1_000_000),
            opening_sessions=opening_sessions,
            clock=lambda: self.now,
            wall_ms=lambda: int((WALL_SECONDS + self.now - 1000.0) * 1000),
            pages=lambda path: None,
        )

    def connect(self, remote: str = "10.0.0.1", *, binary: bool = False) -> tuple[Connection, FakeTransport]:
        """A client that has not authenticated yet."""
        transport = FakeTransport()
        frame_codec = codec.MSGPACK if binary else codec.JSON
        assert self.hub.let_in(remote, self.now) == 0.0
        return self.hub.connected(transport, frame_codec, remote, self.now), transport

    def send(self, connection: Connection, frame: dict[str, Any]) -> None:
        """One frame from the client."""
        encode = msgspec.msgpack.encode if connection.codec.binary else msgspec.json.encode
        connection.receive(encode(frame), self.now)

    def auth(self, connection: Connection, user_id: str = "usr_a", device_id: str = "d1", **extra: Any) -> None:
        """The client's first frame, with a good token unless `extra` brings another."""
        payload = {
            "user_id": user_id,
            "auth_token": token(user_id),
            "device_id": device_id,
            "platform": "test",
            "app_version": "1",
            **extra,
        }
        self.send(connection, {"type": "auth", "payload": payload})

    def open(
        self,
        user_id: str = "usr_a",
        device_id: str = "d1",
        heads: dict[str, int] | None = None,
        *,
        binary: bool = False,
    ) -> tuple[Connection, FakeTransport]:
        """A live client whose cursors stand at `heads` of its conversations; nothing recorded of its opening."""
        connection, transport = self.connect(binary=binary)
        self.auth(connection, user_id, device_id)
        answer = [records.OpenHead(name, head, head, b"\0" * 16) for name, head in (heads or {}).items()]
        self.hub.route([records.OpenAnswer(connection.session.connection, 0, answer)])
        transport.take()
        transport.outgoing.clear()
        transport.resumed = 0
        self.broker.log.clear()
        return connection, transport

    def pass_time(self, seconds: float) -> None:
        """Let the clock run, with a step of the timer role each second."""
        ends = self.now + seconds
        while self.now < ends:
            self.now = min(self.now + 1.0, ends)
            for timed in self.hub.wheel.expire(self.now):
                timed.expired(self.now)
            self.hub.sweep(self.now)


def message(key: str = "k1", conversation_id: str = "conv_1", content: str = "hello") -> dict[str, Any]:
    """A client's `message` frame."""
    payload = {
        "conversation_id": conversation_id,
        "receiver_id": "",
        "content": content,
        "type": "text",
        "timestamp": 1,
    }
    return {"type": "message", "client_message_id": f"c-{key}", "idempotency_key": key, "payload": payload}


def delivery(users: list[str], first: int, last: int | None = None, *, skip: int = 0) -> records.Delivery:
    """Committed messages of conv_1."""
    through = first if last is None else last
    frame = msgspec.json.encode({"type": "messages", "payload": {"conversation_id": "conv_1", "to": through}})
    return records.Delivery("conv_1", first, through, users, skip, frame)
