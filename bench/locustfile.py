"""Locust's WebSocket user: connect, authenticate, send, await the ack and the delivery, confirm, read; now and then
edit, react, type, and watch whether the other is there.

Run by `python -m bench locust`, or by hand (`TRIREME_REST_URL` and `TRIREME_ADMIN_TOKEN` name the stack, `--host` its
gateway). Locust patches the standard library through gevent: nothing else imports this file, and it imports no server
code.
"""

from locust import User, constant_pacing, events, task  # first: it patches what the others import

import json
import os
import secrets
import time
import urllib.request
from typing import Any

import websocket

RECEIVE_SECONDS = 10.0
PACING_SECONDS = 0.25
CONTENT = "x" * 120
TYPING_SECONDS = 3.5
"""Typing is passed on at most once in 3 s."""


def call_rest(path: str, body: dict[str, Any], token: str) -> dict[str, Any]:
    """POST to the HTTP API. Raises urllib.error.URLError."""
    request = urllib.request.Request(
        os.environ.get("TRIREME_REST_URL", "http://127.0.0.1:8080") + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=RECEIVE_SECONDS) as answer:
        created: dict[str, Any] = json.load(answer)
    return created


class Phone:
    """One device on one socket, used from one greenlet."""

    def __init__(self, url: str, name: str) -> None:
        admin = os.environ.get("TRIREME_ADMIN_TOKEN", "dev-admin")
        self.user_id: str = call_rest("/v1/users", {"name": name}, admin)["_id"]
        grant = call_rest("/v1/tokens", {"user_id": self.user_id, "device_id": "locust-1"}, admin)
        self.token: str = grant["access_token"]
        self._url = url
        self._socket: Any = None

    def connect(self) -> None:
        """Open and authenticate, until the backlog is complete."""
        self._socket = websocket.create_connection(self._url, timeout=RECEIVE_SECONDS, subprotocols=["trireme.v1.json"])
        payload = {"user_id": self.user_id, "auth_token": self.token, "device_id": "locust-1"}
        self.send({"type": "auth", "payload": {**payload, "platform": "locust", "app_version": "1"}})
        self.wait_for("sync_complete")

    def send(self, frame: dict[str, Any]) -> None:
        self._socket.send(json.dumps(frame))

    def wait_for(self, tag: str) -> dict[str, Any]:
        """The next frame with this tag; others are passed over, refusals raise ConnectionError."""
        return self.wait_for_both(tag)[tag]

    def wait_for_both(self, *tags: str) -> dict[str, dict[str, Any]]:
        """The next frame with each of these tags, in whatever order they come; otherwise as `wait_for`."""
        found: dict[str, dict[str, Any]] = {}
        while len(found) < len(tags):
            frame: dict[str, Any] = json.loads(self._socket.recv())
            if frame["type"] in tags:
                found[frame["type"]] = frame
            elif frame["type"] in ("error", "auth_error"):
                raise ConnectionError(json.dumps(frame))
        return found

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class Talker(User):
    """Two phones of a 1:1 conversation: one sends, the other confirms and reads; `count` is where their log stands."""

    wait_time = constant_pacing(PACING_SECONDS)

    def on_start(self) -> None:
        url = f"{(self.host or '').replace('http', 'ws', 1)}/v1/ws"
        self.mark = secrets.token_hex(6)
        self.count = 0
        self.alice, self.bob = Phone(url, f"alice {self.mark}"), Phone(url, f"bob {self.mark}")
        body = {"type": "1:1", "participants": [self.alice.user_id, self.bob.user_id]}
        self.conversation_id = call_rest("/v1/conversations", body, self.alice.token)["_id"]
        self.last_id = ""
        self.typed_at = 0.0
        for phone in (self.alice, self.bob):
            self.timed("connect", phone.connect)

    def on_stop(self) -> None:
        self.alice.close()
        self.bob.close()

    @task(20)
    def talk(self) -> None:
        """One message from send to delivered and read."""
        self.count += 1
        now_ms = time.time_ns() // 1_000_000
        frame = {
            "type": "message",
            "client_message_id": str(self.count),
            "idempotency_key": f"{self.mark}-{self.count}",
            "payload": {
                "conversation_id": self.conversation_id,
                "receiver_id": self.bob.user_id,
                "content": CONTENT,
                "type": "text",
                "timestamp": now_ms,
            },
        }
        self.timed("send to ack", lambda: self.send_and_check(frame))
        self.timed("ack to delivered", lambda: self.confirm(self.bob.wait_for("messages"), now_ms))
        self.timed("confirm to read receipt", self.await_read)

    def send_and_check(self, frame: dict[str, Any]) -> None:
        """The n-th message of this conversation is acknowledged with sequence n."""
        self.alice.send(frame)
        ack = self.alice.wait_for("message_ack")
        self.last_id = ack["payload"]["message_id"]
        if ack["payload"]["sequence_number"] != self.count:
            raise ValueError(f"message {self.count} acked as {ack['payload']['sequence_number']}")

    @task(2)
    def react(self) -> None:
        """The other one reacts to the last message, and takes it back."""
        if self.last_id:
            for op in ("add", "remove"):
                self.change("reaction", self.bob, {"emoji": "+1", "op": op})

    @task(1)
    def edit(self) -> None:
        """The last message is changed."""
        if self.last_id:
            self.change("message_edit", self.alice, {"content": f"{CONTENT}{self.count}"})

    def change(self, tag: str, actor: Phone, fields: dict[str, str]) -> None:
        """A change of the last message: an entry of the log, for both, with the next sequence."""
        self.count += 1
        named = {
            "idempotency_key": f"{self.mark}-{self.count}",
            "conversation_id": self.conversation_id,
            "message_id": self.last_id,
        }
        other = self.bob if actor is self.alice else self.alice
        self.timed(tag, lambda: self.send_change(actor, {"type": tag, "payload": {**named, **fields}}))
        self.timed(f"{tag} to delivered", lambda: self.check_change(other.wait_for("messages")))

    def send_change(self, actor: Phone, frame: dict[str, Any]) -> None:
        actor.send(frame)
        got = actor.wait_for_both("message_ack", "messages")
        if got["message_ack"]["payload"]["sequence_number"] != self.count:
            raise ValueError(f"change {self.count} acked as {got['message_ack']['payload']['sequence_number']}")
        self.check_change(got["messages"])

    def check_change(self, pushed: dict[str, Any]) -> None:
        got = [(row["sequence_number"], row["target_message_id"]) for row in pushed["payload"]["messages"]]
        if got != [(self.count, self.last_id)]:
            raise ValueError(f"expected change {self.count}, got {[sequence for sequence, _ in got]}")

    @task(1)
    def write_slowly(self) -> None:
        """The other one sees that somebody is typing."""
        if time.monotonic() - self.typed_at < TYPING_SECONDS:
            return
        self.typed_at = time.monotonic()
        payload = {"conversation_id": self.conversation_id, "state": "start"}
        self.alice.send({"type": "typing", "payload": payload})
        self.timed("typing", lambda: self.bob.wait_for("typing"))
        self.alice.send({"type": "typing", "payload": {**payload, "state": "stop"}})
        self.timed("typing stopped", lambda: self.bob.wait_for("typing"))

    @task(1)
    def look_who_is_there(self) -> None:
        """Watch the other one, and stop watching."""
        payload = {"user_ids": [self.alice.user_id]}
        self.bob.send({"type": "presence_subscribe", "payload": payload})
        self.timed("presence", self.await_presence)
        self.bob.send({"type": "presence_unsubscribe", "payload": payload})

    def await_presence(self) -> None:
        status = self.bob.wait_for("presence")["payload"]["status"]
        if status != "online":
            raise ValueError(f"alice is connected and said to be {status}")

    def confirm(self, pushed: dict[str, Any], now_ms: int) -> None:
        """Deliver and read what was pushed, which must be exactly the message just sent."""
        got = [(row["sequence_number"], row["content"]) for row in pushed["payload"]["messages"]]
        if got != [(self.count, CONTENT)]:
            raise ValueError(f"expected sequence {self.count}, got {[sequence for sequence, _ in got]}")
        message_id = pushed["payload"]["messages"][0]["_id"]
        self.bob.send({"type": "delivery_ack", "message_id": message_id, "timestamp": now_ms})
        self.bob.send({"type": "read_receipt", "message_ids": [message_id], "timestamp": now_ms})

    def await_read(self) -> None:
        """The receipt that says the message just sent is read; the one that says delivered comes with it or before."""
        while self.alice.wait_for("receipt_update")["payload"].get("read_through", 0) < self.count:
            pass

    def timed(self, name: str, action: Any) -> None:
        """Report one step to locust; what it raises is a failure of that step."""
        began = time.perf_counter()
        failure: Exception | None = None
        try:
            action()
        except (OSError, ValueError, KeyError, websocket.WebSocketException) as error:
            failure = error
        elapsed_ms = (time.perf_counter() - began) * 1000
        fire: Any = events.request.fire
        fire(request_type="WS", name=name, response_time=elapsed_ms, response_length=0, exception=failure, context={})
