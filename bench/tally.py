"""The load driver's compact ledger: every message checked, at a few list operations each.

`driver` tells it what each connection saw; it says what was lost, doubled, out of order, contradicted, or went back.
A *mark* is the number a message carries at the front of its content and as its client_message_id: member × 10^8 +
count. Never does I/O.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MARK_DIGITS: Final = 14
"""Six for the member, eight for the count of its messages."""
COUNTS: Final = 10**8
REFUSED: Final = -1
"""In the place of a sequence: the server said that it has not taken this message."""
NO_MARK: Final = -1
"""A message of no member: a system message of the log."""
SHOWN_VIOLATIONS: Final = 50
"""More than these are counted, not spelled out."""


class Violations:
    """What broke the contract; the first ones in words, all of them counted."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, kind: str, detail: str) -> None:
        """`kind`: lost, doubled, out of order, ack contradicted, receipt backwards, refused, closed, unexpected."""
        self.count += 1
        if len(self._shown) < SHOWN_VIOLATIONS:
            self._shown.append(f"{kind}: {detail}")

    def listed(self) -> list[str]:
        more = self.count - len(self._shown)
        return [*self._shown, *([f"and {more} more"] if more else [])]


class Log:
    """One conversation as its connections saw it. Who sees a position first writes it down; all others must agree."""

    __slots__ = ("_violations", "conversation_id", "ids", "marks")

    def __init__(self, conversation_id: str, violations: Violations) -> None:
        self.conversation_id = conversation_id
        self.ids: list[str | None] = []
        self.marks = array("q")
        self._violations = violations

    def observe(self, sequence: int, message_id: str, mark: int) -> None:
        """Somebody saw this message at this position."""
        ids = self.ids
        position = sequence - 1
        if position == len(ids):
            ids.append(message_id)
            self.marks.append(mark)
            return
        while position >= len(ids):
            ids.append(None)
            self.marks.append(NO_MARK)
        known = ids[position]
        if known is None:
            ids[position] = message_id
            self.marks[position] = mark
        elif known != message_id or self.marks[position] != mark:
            self._violations.add(
                "ack contradicted",
                f"{self.conversation_id} sequence {sequence} is {known} and {message_id}",
            )


class Reader:
    """What one connection saw of its conversation, and what it sent there."""

    __slots__ = ("_violations", "acked", "holes", "index", "intended", "last", "log", "read", "receipted", "through")

    def __init__(self, index: int, log: Log, violations: Violations) -> None:
        self.index = index
        self.log = log
        self.last = 0
        """Greatest sequence seen in a `messages` frame."""
        self.holes: set[int] = set()
        """Smaller ones that were not: allowed only where they are messages of its own, which come back as acks."""
        self.intended = array("d")
        """When each message of its own was due to be sent, monotonic seconds; the place in the array is its count."""
        self.acked = array("q")
        """The sequence each was acknowledged with; 0: not yet, or `REFUSED`."""
        self.receipted = 0
        """How many of its own messages, from the first on, a receipt has covered."""
        self.through = 0
        """Greatest `delivered_through` told to it."""
        self.read = 0
        self._violations = violations

    def saw(self, sequence: int, message_id: str, mark: int) -> bool:
        """One row of a `messages` frame. True when it is in order and new."""
        self.log.observe(sequence, message_id, mark)
        last = self.last
        if sequence == last + 1:
            self.last = sequence
            return True
        if sequence > last:
            self.holes.update(range(last + 1, sequence))
            self.last = sequence
            return True
        kind = "out of order" if sequence in self.holes else "doubled"
        self.holes.discard(sequence)
        self._violations.add(kind, f"{self._name()} got sequence {sequence} after {last}")
        return False

    def sends(self, intended: float) -> int:
        """One more message of its own goes out. Returns its count."""
        self.intended.append(intended)
        self.acked.append(0)
        return len(self.acked) - 1

    def sends_again(self, count: int, intended: float) -> None:
        """The same message as before, which was refused."""
        self.intended[count] = intended
        self.acked[count] = 0

    def ack(self, mark: int, sequence: int, message_id: str) -> int | None:
        """A `message_ack`. Returns the message's count where this is its first ack."""
        member, count = divmod(mark, COUNTS)
        if member != self.index or count >= len(self.acked):
            self._violations.add("ack contradicted", f"{self._name()} got an ack for mark {mark}, which it never sent")
            return None
        known = self.acked[count]
        if known:
            same = known == sequence and self.log.ids[sequence - 1] == message_id
            self._violations.add(
                "doubled" if same else "ack contradicted",
                f"{self._name()} message {count} acked as sequence {known}, then {sequence}",
            )
            return None
        self.log.observe(sequence, message_id, mark)
        self.acked[count] = sequence
        return count

    def refuse(self, mark: int) -> int | None:
        """An `error` for a message. Returns its count where it is the first answer to it."""
        member, count = divmod(mark, COUNTS)
        if member != self.index or count >= len(self.acked) or self.acked[count]:
            self._violations.add("ack contradicted", f"{self._name()} got an error for mark {mark}")
            return None
        self.acked[count] = REFUSED
        return count

    def receipt(self, delivered_through: int, read_through: int) -> range:
        """A `receipt_update`. Returns the counts of own messages it is the first to cover."""
        if delivered_through < self.through or read_through < self.read:
            self._violations.add(
                "receipt backwards",
                f"{self._name()} was told {self.through}/{self.read}, then {delivered_through}/{read_through}",
            )
        self.through = max(self.through, delivered_through)
        self.read = max(self.read, read_through)
        first = count = self.receipted
        acked = self.acked
        while count < len(acked) and acked[count] and acked[count] <= self.through:
            count += 1
        self.receipted = count
        return range(first, count)

    def check(self, receipts: bool) -> None:
        """Everything is over: what is missing is lost, receipts too where they are asked for."""
        add = self._violations.add
        unacked = [count for count, sequence in enumerate(self.acked) if not sequence]
        if unacked:
            add("lost", f"{self._name()} never got an ack for {len(unacked)} messages, first {unacked[0]}")
        own = set(self.acked)
        missing = [sequence for sequence in self.holes if sequence not in own]
        missing += [sequence for sequence in range(self.last + 1, len(self.log.ids) + 1) if sequence not in own]
        if missing:
            add("lost", f"{self._name()} never got {len(missing)} messages, first sequence {min(missing)}")
        if self.through > len(self.log.ids):
            add("receipt backwards", f"{self._name()} was told {self.through} of {len(self.log.ids)} are delivered")
        if receipts and self.receipted < len(self.acked):
            add(
                "lost",
                f"{self._name()} got delivery receipts for {self.receipted} of {len(self.acked)} messages, "
                f"delivered_through {self.through}",
            )

    def _name(self) -> str:
        return f"{self.log.conversation_id} member {self.index}"


def check_logs(logs: Iterable[Log], readers: list[Reader], violations: Violations) -> None:
    """Every position 1..last is one message, and every message with a mark stands where its ack says, nowhere else."""
    for log in logs:
        for position, (message_id, mark) in enumerate(zip(log.ids, log.marks, strict=True)):
            sequence = position + 1
            if message_id is None:
                violations.add("lost", f"{log.conversation_id} sequence {sequence} was seen by nobody")
            elif mark != NO_MARK:
                member, count = divmod(mark, COUNTS)
                acked = readers[member].acked if member < len(readers) else ()
                if count >= len(acked):
                    violations.add("unexpected", f"{log.conversation_id} sequence {sequence} was never sent")
                elif acked[count] not in (0, sequence):
                    violations.add(
                        "doubled", f"{log.conversation_id} message {mark} stands at {acked[count]} and {sequence}"
                    )


def check_all(logs: Iterable[Log], readers: list[Reader], violations: Violations, receipts: bool = True) -> None:
    """The final verdict over all conversations and connections; every message needs its receipt if `receipts`."""
    check_logs(logs, readers, violations)
    for reader in readers:
        reader.check(receipts)
