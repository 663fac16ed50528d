"""`python -m workers audit`: reads MongoDB by majority, Redis and the clients' histories, and says what is broken.

Live or after a run. Only reads, so it may run beside anything. Exit status 0: clean, 1: violations, 2: something could
not be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from workers.audit.auditor import Auditor
from workers.audit.history import BadLine, read_histories
from workers.audit.report import Findings, Report, lines
from workers.audit.snapshot import ENTRY_FIELDS, DeadLetter, Document, Head, KeyRecord, Setting, letter_key
from workers.audit.spool import SHARES, Spool, share_of
from workers.audit.streams import HIGH_WATER, read_queues
from workers.audit.timeline import Timeline
from workers.broker import BrokerUnavailable, open_broker
from workers.settings import SettingError, load_settings
from workers.store import Store, StoreUnfit, open_store
from workers.store.errors import StoreUnavailable
from workers.store.evidence import retention_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workers.audit.evidence import ConversationEvidence
    from workers.audit.logs import LogAudit
    from workers.broker import Broker
    from workers.settings import Settings

AT_ONCE: Final = 64
"""Conversations read at one moment: a round trip each would cost more than their messages."""
LOOK_AGAIN_SECONDS: Final = 2.0
"""What a flush is behind (1 s) and a majority behind that. A violation counts when it is still there then."""
LOOKED_AT_AGAIN: Final = 1000
TOLD_EVERY_SECONDS: Final = 5.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m workers audit", description="Check every invariant of a system.")
    parser.add_argument(
        "--history", type=Path, nargs="+", default=[], metavar="FILE", help="what clients saw (JSON lines)"
    )
    parser.add_argument("--conversation", metavar="ID", help="only this one, and nothing beside it")
    parser.add_argument("--live", action="store_true", help="messages are on their way: judge what has settled")
    parser.add_argument("--no-redis", action="store_true", help="MongoDB only: Redis is gone by now")
    parser.add_argument("--high-water", type=int, default=HIGH_WATER, metavar="N", help="TRIREME_INGEST_HIGH_WATER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Audit what the settings in `environ` name. Returns the exit status."""
    args = parse(arguments)
    try:
        # As in the Procfile. What else `dev` means is about secrets, and this needs none.
        settings = load_settings({"TRIREME_ENV": "dev", **environ}, ["audit"])
        report = anyio.run(audit, settings, args, backend_options={"use_uvloop": True})
    except (SettingError, StoreUnavailable, StoreUnfit, BrokerUnavailable, OSError) as error:
        _tell(f"cannot be read: {error}")
        return 2
    sys.stdout.write("\n".join(lines(report)) + "\n")
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if not report.is_clean:
        return 1
    return 2 if report.unread_lines else 0


def _tell(text: str) -> None:
    sys.stderr.write(f"audit: {text}\n")


async def audit(settings: Settings, args: argparse.Namespace) -> Report:
    """One audit of what the settings name. Raises StoreUnavailable, StoreUnfit, BrokerUnavailable, OSError."""
    started_at = anyio.current_time()
    with Spool() as spool:
        timeline = Timeline() if args.history else None
        bad: list[BadLine] = []
        if timeline is not None:
            bad = spool.fill(read_histories(args.history), timeline)
            _tell(f"{spool.events} events of {len(spool.conversation_ids)} conversations in the history")
        async with (
            open_store(settings.mongodb_url, as_it_is=True) as store,
            open_broker(settings.redis_url) as broker,
        ):
            run = AuditRun(store, None if args.no_redis else broker, args, timeline, spool)
            auditor, findings = await run.run()
    counts = {"events": spool.events, **findings.counts}
    return Report(
        mode="live" if args.live else "settled",
        taken_at=auditor.setting.taken_at.isoformat(),
        seconds=round(anyio.current_time() - started_at, 3),
        counts={name: value for name, value in counts.items() if value},
        judged=sorted(auditor.judged, key=_in_order),
        unjudged=findings.unjudged,
        violations=findings.violations,
        found=dict(findings.found),
        # What a killed client was writing it has not acted upon.
        unread_lines=[f"{line.path} line {line.number} is no event: {line.reason}" for line in bad if not line.torn],
    )


def _in_order(invariant: str) -> tuple[bool, int, str]:
    digits = "".join(filter(str.isdigit, invariant))
    return not digits, int(digits or 0), invariant


class AuditRun:
    """One audit of one database."""

    def __init__(
        self, store: Store, broker: Broker | None, args: argparse.Namespace, timeline: Timeline | None, spool: Spool
    ) -> None:
        self._store = store
        self._broker = broker
        self._args = args
        self._timeline = timeline
        self._spool = spool
        self._indexes: dict[str, list[Document]] = {}
        self._told_at = anyio.current_time()
        self._started_at = self._told_at

    async def run(self) -> tuple[Auditor, Findings]:
        """Everything. Raises StoreUnavailable, BrokerUnavailable."""
        self._indexes = await self._store.evidence.indexes()
        auditor = await self._auditor()
        only: str | None = self._args.conversation
        ids = [only] if only else await self._store.evidence.conversation_ids()
        await self._read_logs(auditor, {*ids, *(self._spool.conversation_ids if not only else ())})
        if only:
            auditor.findings.unjudged["the rest"] = f"only {only} was asked for"
        else:
            await self._read_rest(auditor)
        findings = auditor.finish()
        suspects = {conversation_id for _, conversation_id in findings.places} - {""}
        if suspects:
            await self._look_again(findings, suspects)
        return auditor, findings

    async def _auditor(self) -> Auditor:
        setting = Setting(
            taken_at=await self._store.evidence.now(),
            settled=not self._args.live,
            retention_seconds=retention_seconds(self._indexes),
        )
        return Auditor(setting, self._timeline)

    async def _read_logs(self, auditor: Auditor, conversation_ids: set[str]) -> None:
        """Share by share of the history: the evidence of one is in memory at a time."""
        shares: dict[int, list[str]] = {}
        for name in sorted(conversation_ids):
            shares.setdefault(share_of(name) if self._timeline is not None else 0, []).append(name)
        for number in range(SHARES):
            names = shares.get(number, [])
            found: dict[str, ConversationEvidence] = {}
            if self._timeline is not None and names:
                found = auditor.gather(self._spool.share(number, conversation_ids))
            for start in range(0, len(names), AT_ONCE):
                await self._read_some(auditor, names[start : start + AT_ONCE], found)

    async def _read_some(self, auditor: Auditor, names: list[str], found: dict[str, ConversationEvidence]) -> None:
        evidence = {name: found.get(name) or auditor.evidence(name) for name in names}
        logs: dict[str, LogAudit] = {}
        async with self._store.evidence.moment(self._indexes) as moment:
            for stored in await moment.heads(names):
                head = Head(
                    conversation_id=stored.conversation_id,
                    conversation=stored.conversation,
                    counter=stored.counter,
                    memberships=stored.memberships,
                )
                logs[stored.conversation_id] = auditor.begin(head, evidence[stored.conversation_id])
            async for batch in moment.entries(names, ENTRY_FIELDS):
                for document in batch:
                    logs[document["conversation_id"]].take(document)
                self._tell_progress(auditor)
        for name, log in logs.items():
            auditor.end(log, evidence[name])

    def _tell_progress(self, auditor: Auditor) -> None:
        now = anyio.current_time()
        if now - self._told_at >= TOLD_EVERY_SECONDS:
            self._told_at = now
            messages = auditor.findings.counts["messages"]
            _tell(f"{messages} messages, {messages / (now - self._started_at):.0f}/s")

    async def _read_rest(self, auditor: Auditor) -> None:
        auditor.take_indexes(self._indexes)
        async for batch in self._store.evidence.keys():
            for record, message in batch:
                auditor.take_key(KeyRecord(record=record, message=message))
        async for document in self._store.evidence.dead_letters():
            key = letter_key(document)
            message_id = None if key is None else await self._store.evidence.message_id(*key)
            auditor.take_dead_letter(DeadLetter(document=document, message_id=message_id))
        if self._broker is None:
            auditor.findings.unjudged["I12, I16"] = "Redis was not asked (--no-redis)"
        else:
            auditor.take_queues(await read_queues(self._broker, self._args.high_water, _tell))

    async def _look_again(self, findings: Findings, suspects: set[str]) -> None:
        """What is in flight is no violation: only what is found twice counts."""
        again = set(sorted(suspects)[:LOOKED_AT_AGAIN])
        _tell(f"{len(suspects)} conversations look broken: looking again in {LOOK_AGAIN_SECONDS:.0f} s")
        await anyio.sleep(LOOK_AGAIN_SECONDS)
        second = await self._auditor()
        await self._read_logs(second, again)
        findings.replace(again, second.findings)
