"""How load is applied: the phases of the load driver.

`Closed` keeps a window of unacknowledged messages per sender, `Paced` sends by the clock whatever comes back, `Rounds`
fills a gateway whose workers stand still, `Settle` waits for what such rounds left open. A phase counts what is missing
and sets `over` when nothing is.
"""

from __future__ import annotations

import time
from bisect import insort
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from bench.figures import Latencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.driver import Connection, Load

PACE_SECONDS = 0.002
"""Step of the open loop: what became due since the last step is sent at once; latency counts from the due time."""
AGAIN_SECONDS = 0.25
"""Between two tries of what a flood leaves refused: the gateway looks so often at how far the workers are."""
ROUNDS_IN_FLIGHT = 2
"""So that the gateway never waits for the driver between rounds."""

monotonic = time.perf_counter


class Phase:
    """Counts down what `messages` new messages still owe: acks, deliveries to all others, receipts for all senders."""

    def __init__(self, load: Load, messages: int) -> None:
        self.load = load
        self.messages = messages
        self.over = anyio.Event()
        self.failed = False
        self.began = self.delivered_at = self.ended = monotonic()
        self.ack, self.delivery, self.receipt = Latencies(), Latencies(), Latencies()
        self.acks_left = messages
        self.receipts_left = messages if load.receipts else 0
        self.deliveries_left = 0
        self.message_frames = 0
        """`messages` frames that carried the deliveries: several messages of a conversation may share one."""

    takes_refusals = False
    """Is an `overloaded` an answer like another? Otherwise it is a violation."""

    def start(self) -> None:
        """Begin to send."""

    def refused(self, connection: Connection, count: int, retry_after_ms: int) -> None:
        """A message was answered with `overloaded`."""

    def heartbeat(self) -> None:
        """A `heartbeat_ack` came."""

    def acked(self, connection: Connection, count: int) -> None:
        now = monotonic()
        if not connection.is_noise:
            self.ack.add(now - connection.reader.intended[count])
        self.acks_left -= 1
        if self.acks_left <= 0:
            self._check(now)

    def delivered(self, member: int, count: int) -> None:
        """Somebody else got message `count` of `member`."""
        now = monotonic()
        sender = self.load.connections[member]
        if not sender.is_noise:
            self.delivery.add(now - sender.reader.intended[count])
        self.deliveries_left -= 1
        if self.deliveries_left <= 0:
            self._check(now)

    def receipted(self, connection: Connection, covered: Sequence[int]) -> None:
        now = monotonic()
        intended = connection.reader.intended
        for count in covered:
            self.receipt.add(now - intended[count])
        self.receipts_left -= len(covered)
        if self.receipts_left <= 0 and self.load.receipts:
            self._check(now)

    def fail(self) -> None:
        """Something broke that will not repair itself: waiting for the rest would only wait for the deadline."""
        self.failed = True
        self.ended = monotonic()
        self.over.set()

    def _check(self, now: float) -> None:
        if self.acks_left <= 0 and self.deliveries_left <= 0:
            if self.delivered_at == self.began:
                self.delivered_at = now
            if self.receipts_left <= 0 and not self.failed:
                self.ended = now
                self.over.set()

    def result(self) -> dict[str, Any]:
        """The figures of this phase; `finished` False when its deadline or a failure ended it."""
        if not self.over.is_set():
            self.ended = monotonic()
        return {
            "messages": self.messages,
            "finished": self.over.is_set() and not self.failed,
            "seconds": self.ended - self.began,
            "delivered_seconds": self.delivered_at - self.began,
            "acks_left": self.acks_left,
            "deliveries_left": self.deliveries_left,
            "receipts_left": self.receipts_left,
            "message_frames": self.message_frames,
            "ack_ms": self.ack.summary_ms(),
            "delivered_ms": self.delivery.summary_ms(),
            "receipt_ms": self.receipt.summary_ms(),
        }

    def _owe(self, senders: Sequence[Connection]) -> None:
        """Everyone in a conversation but the sender gets each message; senders take turns, so this is exact."""
        members: dict[int, int] = {}
        for connection in self.load.connections:
            log = id(connection.reader.log)
            members[log] = members.get(log, 0) + 1
        others = [members[id(sender.reader.log)] - 1 for sender in senders]
        whole, rest = divmod(self.messages, len(senders))
        self.deliveries_left = whole * sum(others) + sum(others[:rest])

    def _begin(self) -> None:
        self.began = self.delivered_at = self.ended = monotonic()


class ClosedPhase(Phase):
    """Each sender keeps `window` messages in flight and sends its share."""

    def __init__(self, load: Load, messages: int, window: int) -> None:
        super().__init__(load, messages)
        self._window = window
        self._quota: dict[Connection, int] = {}

    def start(self) -> None:
        senders = [connection for connection in self.load.connections if connection.sends]
        self._owe(senders)
        whole, rest = divmod(self.messages, len(senders))
        self._quota = {sender: whole + (place < rest) for place, sender in enumerate(senders)}
        self._begin()
        for sender in senders:
            self._fill(sender)

    def _fill(self, sender: Connection) -> None:
        quota = self._quota[sender]
        while quota and sender.in_flight < self._window:
            quota -= 1
            sender.send_message(monotonic())
        self._quota[sender] = quota

    def acked(self, connection: Connection, count: int) -> None:
        super().acked(connection, count)
        self._fill(connection)


class PacedPhase(Phase):
    """Message k is due k / rate seconds after the start, from the senders in turn."""

    def __init__(self, load: Load, messages: int, rate: float) -> None:
        super().__init__(load, messages)
        self._rate = rate
        self._sent = 0
        self._senders: list[Connection] = []

    def start(self) -> None:
        self._senders = [connection for connection in self.load.connections if connection.sends]
        self._owe(self._senders)
        self._begin()
        self._step()

    def _step(self) -> None:
        if self.over.is_set():
            return
        due = min(self.messages, int((monotonic() - self.began) * self._rate) + 1)
        senders = self._senders
        for number in range(self._sent, due):
            senders[number % len(senders)].send_message(self.began + number / self._rate)
        self._sent = due
        if due < self.messages:
            self.load.call_later(PACE_SECONDS, self._step)


class FloodPhase(Phase):
    """Sends by the clock for some seconds, whatever is refused; over when everything that was sent has its answer.

    A sender whose message was refused says it again when its next turn comes, before anything new: what comes behind it
    in its conversation would be refused too. Latencies count from when it was really written: what is measured is the
    server's answer, and a client that is not let in has nothing to be late with.
    """

    takes_refusals = True

    def __init__(self, load: Load, rate: float, seconds: float) -> None:
        super().__init__(load, 0)
        self._rate = rate
        self._seconds = seconds
        self._refusal = Latencies()
        self._untold = 0
        self._acks: list[int] = []
        """Of each second since the start."""
        self._sending = True
        self._again: dict[Connection, list[int]] = {}
        """What was refused, in the order of its first sending."""

    def start(self) -> None:
        self._senders = [connection for connection in self.load.connections if connection.sends]
        members: dict[int, int] = {}
        for connection in self.load.connections:
            members[id(connection.reader.log)] = members.get(id(connection.reader.log), 0) + 1
        self._others = {sender: members[id(sender.reader.log)] - 1 for sender in self._senders}
        self.receipts_left = 0
        self._begin()
        self._step()

    def _step(self) -> None:
        elapsed = monotonic() - self.began
        due = int(min(elapsed, self._seconds) * self._rate)
        senders = self._senders
        for number in range(self.messages, due):
            self._send(senders[number % len(senders)])
        self.messages = due
        self._sending = elapsed < self._seconds
        if self._sending and not self.over.is_set():
            self.load.call_later(PACE_SECONDS, self._step)
        else:
            self._finish()

    def _send(self, sender: Connection) -> None:
        self.acks_left += 1
        self.deliveries_left += self._others[sender]
        if again := self._again.get(sender):
            sender.send_again(again.pop(0), monotonic())
        else:
            sender.send_message(monotonic())

    def _finish(self) -> None:
        """Until nothing that was refused is left to say again."""
        for sender, again in self._again.items():
            for _ in range(len(again)):
                self.messages += 1
                self._send(sender)
        if self.acks_left > 0 and not self.over.is_set():
            self.load.call_later(AGAIN_SECONDS, self._finish)
        else:
            self._check(monotonic())

    def acked(self, connection: Connection, count: int) -> None:
        second = int(monotonic() - self.began)
        self._acks.extend([0] * (second + 1 - len(self._acks)))
        self._acks[second] += 1
        super().acked(connection, count)

    def refused(self, connection: Connection, count: int, retry_after_ms: int) -> None:
        now = monotonic()
        self._refusal.add(now - connection.reader.intended[count])
        self._untold += retry_after_ms <= 0
        insort(self._again.setdefault(connection, []), count)
        self.acks_left -= 1
        self.deliveries_left -= self._others[connection]
        self._check(now)

    def _check(self, now: float) -> None:
        if not self._sending and not any(self._again.values()):
            super()._check(now)

    def result(self) -> dict[str, Any]:
        refusals = len(self._refusal.samples_seconds)
        return super().result() | {
            "refused": refusals,
            "refused_ms": self._refusal.summary_ms(),
            "refused_without_wait": self._untold,
            "acks_of_seconds": self._acks,
            "drained_seconds": max(0.0, self.ended - self.began - self._seconds),
        }


class RoundsPhase(Phase):
    """One message per sender and round, each round closed by one heartbeat, whose answer says the session took them."""

    def start(self) -> None:
        self._senders = [connection for connection in self.load.connections if connection.sends]
        self._owe(self._senders)
        self._sent = self._rounds_open = 0
        self._begin()
        for _ in range(ROUNDS_IN_FLIGHT):
            self._round()

    def _round(self) -> None:
        if self._sent >= self.messages:
            return
        senders = self._senders[: self.messages - self._sent]
        now = monotonic()
        for sender in senders:
            sender.send_message(now)
        self._sent += len(senders)
        self._rounds_open += 1
        senders[-1].send_heartbeat()

    def heartbeat(self) -> None:
        self._rounds_open -= 1
        self._round()
        if self._rounds_open == 0:
            self.ended = monotonic()
            self.over.set()


class SettlePhase(Phase):
    """Waits until all that the phase before it left open has come."""

    def __init__(self, load: Load, before: Phase) -> None:
        super().__init__(load, before.messages)
        self.acks_left, self.receipts_left = before.acks_left, before.receipts_left
        self.deliveries_left = before.deliveries_left

    def start(self) -> None:
        self._begin()
        self._check(monotonic())


# --- the commands that ask for them ----------------------------------------------------------------------------------


class Closed(msgspec.Struct, tag="closed", tag_field="do"):
    messages: int
    window: int
    timeout_seconds: float

    def phase(self, load: Load, before: Phase) -> Phase:
        return ClosedPhase(load, self.messages, self.window)


class Paced(msgspec.Struct, tag="paced", tag_field="do"):
    messages: int
    rate: float
    timeout_seconds: float

    def phase(self, load: Load, before: Phase) -> Phase:
        return PacedPhase(load, self.messages, self.rate)


class Flood(msgspec.Struct, tag="flood", tag_field="do"):
    rate: float
    seconds: float
    timeout_seconds: float

    def phase(self, load: Load, before: Phase) -> Phase:
        return FloodPhase(load, self.rate, self.seconds)


class Rounds(msgspec.Struct, tag="rounds", tag_field="do"):
    messages: int
    timeout_seconds: float

    def phase(self, load: Load, before: Phase) -> Phase:
        return RoundsPhase(load, self.messages)


class Settle(msgspec.Struct, tag="settle", tag_field="do"):
    timeout_seconds: float

    def phase(self, load: Load, before: Phase) -> Phase:
        return SettlePhase(load, before)


PhaseCommand = Closed | Paced | Flood | Rounds | Settle
