"""What an audit says: the invariants by name, each violation with its evidence, what was judged and what was not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Set

INVARIANTS: Final = {
    "I1": "an acknowledged message is one document, with the id, sequence and content that were acknowledged",
    "I2": "sequences are floor..last without a hole or a repeat, and `sequence_numbers` ends there",
    "I2b": "a (conversation, sequence) is the same message to everybody, always",
    "I3": "a device gets every message it may see, each conversation in order",
    "I4": "all acks of one key say the same",
    "I5": "nobody is shown what is outside of their stays",
    "I5b": "no answer reaches somebody else's question",
    "I6": "an unread count is the number of countable messages of others behind the read mark",
    "I7": "what was sent after an ack, or later on the same connection, has a later sequence",
    "I8": "every document was sent by somebody who was in the conversation, with this content",
    "I9": "receipts only go forward, and only over what a device or reader has confirmed",
    "I10": "a key has one outcome: acknowledged or refused for good",
    "I11": "a retransmit is answered within 2 s, with every visible message of the range, once, ascending",
    "I12": "what entered the ingest streams has come out of them: nothing pending, nothing unread",
    "I13": "a dead letter is of no stored message, a resolved one is; retries within their bounds",
    "I14": "30 s after the last fault every key has an outcome; 10 s after a commit every online device has it",
    "I15": "a drain moves its clients in time, and a session token lets in once",
    "I16": "every buffer keeps within its bound",
    "I17": "one key, two payloads: the later one is refused, the first one stays",
    "I18": "5 s after a revocation nothing more comes",
    "I19": "nobody without a connection is shown online for more than 20 s",
    "I20": "no clock moves a message: commit times of a log never go back",
    "digest": "each digest is the chain over the entry before it and this one",
    "countable": "each entry counts the countable ones up to it",
    "projection": "memberships and conversations are what the log's system messages amount to",
    "effects": "each message is what the changes in the log have made of it",
    "counters": "what is counted and flushed about a conversation agrees with its log",
    "keys": "an idempotency record names the message with that key",
    "indexes": "the unique indexes are there, and unique",
    "shape": "every document can be read as what it is",
}
"""I1..I20 are those of reliability.md section 5; the words are what the database alone must agree on."""

KEPT: Final = 100
"""Violations of one invariant kept with their evidence; the rest are counted."""


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """`invariant`: a key of `INVARIANTS`. `evidence`: what was found, ready to be looked up."""

    invariant: str
    statement: str
    conversation_id: str = ""
    evidence: dict[str, Any] = {}

    def __str__(self) -> str:
        where = f" [{self.conversation_id}]" if self.conversation_id else ""
        shown = ", ".join(f"{name}={value}" for name, value in self.evidence.items())
        return f"{self.invariant}{where}: {self.statement}{f' ({shown})' if shown else ''}"


class Findings:
    """Collects violations and counts while an audit goes on."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.found: Counter[str] = Counter()
        """Violations by invariant, those without kept evidence too."""
        self.places: Counter[tuple[str, str]] = Counter()
        """The same by (invariant, conversation)."""
        self.counts: Counter[str] = Counter()
        """conversations, messages, events, sends, acks, pushes, … audited."""
        self.unjudged: dict[str, str] = {}
        """Invariant, or a part of it → why it was not judged."""

    def add(self, invariant: str, statement: str, conversation_id: str = "", **evidence: Any) -> None:
        """One more violation."""
        assert invariant in INVARIANTS, invariant
        self.found[invariant] += 1
        self.places[invariant, conversation_id] += 1
        if self.found[invariant] <= KEPT:
            violation = Violation(
                invariant=invariant, statement=statement, conversation_id=conversation_id, evidence=evidence
            )
            self.violations.append(violation)

    def replace(self, conversation_ids: Set[str], other: Findings) -> None:
        """What was found in these conversations is what another look has found."""
        for place in [place for place in self.places if place[1] in conversation_ids]:
            self.found[place[0]] -= self.places.pop(place)
        for place in [place for place in other.places if place[1] in conversation_ids]:
            self.places[place] = other.places[place]
            self.found[place[0]] += other.places[place]
        self.found = +self.found
        again = [violation for violation in other.violations if violation.conversation_id in conversation_ids]
        self.violations = again + [one for one in self.violations if one.conversation_id not in conversation_ids]


class Report(msgspec.Struct, kw_only=True):
    """The result of an audit. `judged`: invariants that the data at hand could show broken."""

    mode: str
    taken_at: str
    seconds: float
    counts: dict[str, int]
    judged: list[str]
    unjudged: dict[str, str]
    violations: list[Violation]
    found: dict[str, int]
    unread_lines: list[str] = []

    @property
    def is_clean(self) -> bool:
        return not self.found


def lines(report: Report) -> list[str]:
    """The report as an operator reads it."""
    told = [str(violation) for violation in report.violations]
    for invariant, times in sorted(report.found.items()):
        shown = sum(violation.invariant == invariant for violation in report.violations)
        if times > shown:
            told.append(f"{invariant}: and {times - shown} more")
    told += [f"history: {line}" for line in report.unread_lines]
    counted = ", ".join(f"{value} {name}" for name, value in report.counts.items())
    rate = report.counts.get("messages", 0) / report.seconds if report.seconds else 0
    told.append(f"audited ({report.mode}): {counted or 'nothing'}; {report.seconds:.1f} s, {rate:.0f} messages/s")
    told.append(f"judged: {' '.join(report.judged)}")
    told += [f"not judged: {name}: {why}" for name, why in report.unjudged.items()]
    if report.is_clean:
        told.append("clean: no violation")
    else:
        summary = ", ".join(f"{times} {invariant}" for invariant, times in sorted(report.found.items()))
        told.append(f"VIOLATED: {summary}")
        told += [f"  {name}: {INVARIANTS[name]}" for name in sorted(report.found)]
    return told
