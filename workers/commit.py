"""Persist in order: the one commit point of the system, and the heart of its promise. Called by a lane of the ingest
role.

`Committer.commit` takes a batch of log entries of one lane and returns when each has an outcome. The insert of the
documents (majority, journal) is the only commit point. After anything but a clean success the touched states are
dropped, keys are looked up by majority read, and the whole batch is planned again: no number is ever burnt or repeated
(reliability.md section 10.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import structlog

from protocol import codec, frames, records
from protocol.errors import ErrorCode
from protocol.models import DLQErrorType
from workers import metrics
from workers.dead_letters import dead_letter, dead_letter_id, unplaced
from workers.plan import Entry, Plan, Planner
from workers.receipts import Place, RecentPlaces
from workers.store.errors import StoreUnavailable
from workers.store.messages import DocumentRefused, Found, Key, KeyTaken, SequenceTaken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.conversations import Conversations, Owned
    from workers.store import Store

FIRST_BACKOFF_SECONDS = 0.1
LONGEST_BACKOFF_SECONDS = 5.0
SEQUENCE_RACE_SECONDS = 0.05
"""Another writer's insert is in flight: its outcome shows within a journal write or two (reliability.md section
10.2).
"""

log = structlog.get_logger()


class Committer:
    """Commits batches of one lane. Single writer of the conversations in `conversations` while it holds their
    leases.
    """

    def __init__(self, store: Store, conversations: Conversations, recent: RecentPlaces) -> None:
        self._store = store
        self._conversations = conversations
        self._recent_places = recent
        self._planner = Planner(conversations)

    async def commit(self, entries: Sequence[Entry], now_ms: int) -> Plan:
        """Give every entry its outcome; returns what to tell and whom. Waits as long as MongoDB is away.

        *Cancellation*: safe anywhere; what was inserted is found by key when the entries are read again.
        """
        batch = list(entries)
        touched = {entry.conversation_id for entry in batch}
        look_up = any(entry.redelivered for entry in batch)
        backoff = FIRST_BACKOFF_SECONDS
        buried: list[tuple[str, records.DownItem]] = []
        while True:
            plan = Plan()
            try:
                plan = await self._plan(batch, look_up, now_ms)
                if plan.created:
                    await self._store.conversations.create(plan.created)
                if plan.documents:
                    with metrics.COMMIT_SECONDS.time():
                        await self._store.messages.append(plan.documents)
                for owned, projection in plan.projections.values():
                    await projection.write(self._store.conversations, owned)
                plan.outcomes += buried
                self._remember(plan)
                return plan
            except KeyTaken:
                metrics.COMMIT_RETRIES.labels("key_taken").inc()
                await anyio.sleep(0 if not look_up else SEQUENCE_RACE_SECONDS)
            except SequenceTaken as error:
                metrics.COMMIT_RETRIES.labels("sequence_taken").inc()
                log.warning("sequence_taken", reason=str(error))
                await anyio.sleep(SEQUENCE_RACE_SECONDS)
            except DocumentRefused as error:
                metrics.COMMIT_RETRIES.labels("document_refused").inc()
                message_id = plan.documents[error.index]["_id"]
                entry = next(entry for entry in batch if entry.message_id == message_id)
                buried.append(await self.bury(entry, str(error), now_ms))
                batch.remove(entry)
            except StoreUnavailable as error:
                metrics.COMMIT_RETRIES.labels("outcome_unknown").inc()
                log.warning("commit_outcome_unknown", error=str(error)[:200], retry_seconds=backoff)
                await anyio.sleep(backoff)
                backoff = min(backoff * 2, LONGEST_BACKOFF_SECONDS)
            except BaseException:
                self._conversations.forget(touched)
                raise
            self._conversations.forget(touched)
            look_up = True

    async def _plan(self, batch: Sequence[Entry], look_up: bool, now_ms: int) -> Plan:
        await self._conversations.load({entry.conversation_id: entry.shard for entry in batch})
        doubted = batch if look_up else [entry for entry in batch if self._from_stranger(entry)]
        found: dict[Key, Found] = {}
        if doubted:
            found = await self._store.messages.find_keys(entry.key for entry in doubted)
        replies = await self._find_reply_targets(batch)
        return self._planner.plan(batch, found, replies, now_ms)

    def _from_stranger(self, entry: Entry) -> bool:
        """Is the sender no member? Then it may be the retry of a message it sent while it was one, which has its
        ack.
        """
        owned = self._conversations.get(entry.conversation_id)
        record = entry.record
        return isinstance(record, records.SendMessage) and owned is not None and record.sender_id not in owned.members

    async def _find_reply_targets(self, batch: Sequence[Entry]) -> dict[str, Place]:
        wanted: dict[str, Place] = {}
        unknown = []
        for entry in batch:
            if isinstance(entry.record, records.SendMessage) and (target := entry.record.reply_to_message_id):
                place = self._recent_places.get(target)
                if place is None:
                    unknown.append(target)
                else:
                    wanted[target] = place
        if unknown:
            for message_id, at in (await self._store.messages.locate(unknown)).items():
                wanted[message_id] = Place(at.conversation_id, at.sequence_number, at.countable)
        return wanted

    def _remember(self, plan: Plan) -> None:
        """The plan is durable: keys and places are known, senders have read what they wrote."""
        for item, document in zip(plan.committed, plan.documents, strict=True):
            message = item.message
            sequence, countable = message.sequence_number, document["countable"]
            owned = self._conversations.get(message.conversation_id)
            if owned is not None:
                self._note_own(owned, message.sender_id, sequence, countable)
            self._recent_places.put(document["_id"], Place(message.conversation_id, sequence, countable))
        self._planner.remember(plan)
        if plan.documents:
            metrics.INGESTED.labels("committed").inc(len(plan.documents))
            metrics.BATCH_MESSAGES.observe(len(plan.documents))

    def _note_own(self, owned: Owned, sender_id: str, sequence: int, countable: int) -> None:
        sender = owned.members.get(sender_id)
        if sender is None:
            return
        reads_others = sender.read < sequence - 1
        if owned.sent(sender_id, sequence, countable) is not None:
            key = (owned.conversation_id, sender_id)
            self._conversations.lazy[key] = sender
            if reads_others:
                self._conversations.replied.add(key)

    async def bury(self, entry: Entry, reason: str, now_ms: int) -> tuple[str, records.DownItem]:
        """A message the store refuses for its own reason becomes a dead letter; returns what its sender is told."""
        record = entry.record
        message = None
        if isinstance(record, records.SendMessage):
            message = unplaced(record, entry.message_id, now_ms)
        await self._store.messages.bury(
            dead_letter_id(*entry.key), dead_letter(reason, DLQErrorType.STORAGE_FAILED, now_ms, message=message)
        )
        metrics.INGESTED.labels("dead_letter").inc()
        log.error("message_buried", conversation_id=entry.conversation_id, reason=reason[:200])
        if isinstance(record, records.SendMessage):
            frame = frames.error_frame(
                ErrorCode.VALIDATION_FAILED,
                "the message cannot be stored",
                client_message_id=record.client_message_id or None,
                idempotency_key=record.idempotency_key,
                conversation_id=record.conversation_id,
            )
            return record.instance, records.Outcome(record.connection, record.idempotency_key, codec.JSON.encode(frame))
        return record.instance, records.CommandOutcome(
            record.request, ErrorCode.VALIDATION_FAILED, "the command cannot be stored", b""
        )
