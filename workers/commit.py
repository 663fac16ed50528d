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

from protocol import records
from protocol.models import DLQErrorType, MessageType
from workers import metrics
from workers.plan import Entry, Plan, Planner, Read
from workers.receipts import Place, RecentPlaces
from workers.store.errors import StoreUnavailable
from workers.store.messages import DocumentRefused, Found, Key, KeyTaken, SequenceTaken, from_ms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workers.conversations import Conversations, Owned
    from workers.dead_letters import DeadLetters
    from workers.interest import Interest
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

    def __init__(
        self,
        store: Store,
        conversations: Conversations,
        recent: RecentPlaces,
        dead_letters: DeadLetters,
        edit_seconds: int,
        interest: Interest,
    ) -> None:
        self._store = store
        self._dead_letters = dead_letters
        self._conversations = conversations
        self._recent_places = recent
        self._planner = Planner(conversations, edit_seconds, interest)

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
                await self._project(plan)
                plan.outcomes += buried
                self._remember(batch, plan)
                await self._dead_letters.settle(batch, plan, now_ms)
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
                buried += await self._dead_letters.bury(batch, entry, str(error), DLQErrorType.STORAGE_FAILED, now_ms)
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

    async def _project(self, plan: Plan) -> None:
        """What the documents mean outside the log, before anybody hears of them."""
        if plan.projections:
            projected = [projection.through(owned) for owned, projection in plan.projections.values()]
            await self._store.conversations.apply(projected)
        if plan.joined:
            # Behind the stays: an account that changes meanwhile finds them, or is found changed here.
            await self._conversations.look(plan.joined)

    async def _plan(self, batch: Sequence[Entry], look_up: bool, now_ms: int) -> Plan:
        await self._conversations.load({entry.conversation_id: entry.shard for entry in batch})
        doubted = batch if look_up else [entry for entry in batch if self._is_doubtful(entry)]
        found: dict[Key, Found] = {}
        if doubted:
            found = await self._store.messages.find_keys(entry.key for entry in doubted)
            self._forget_behind(found)
        replies = await self._find_reply_targets(batch)
        changed = {entry.record.message_id for entry in batch if isinstance(entry.record, records.ChangeMessage)}
        targets = await self._store.changes.targets(list(changed)) if changed else {}
        uses = [
            (entry.record.sender_id, entry.record.media_url)
            for entry in batch
            if isinstance(entry.record, records.SendMessage) and entry.record.media_url is not None
        ]
        media = await self._store.media.usable(uses, from_ms(now_ms)) if uses else {}
        looks = [entry.record for entry in batch if isinstance(entry.record, records.LookAtAccount)]
        if looks:
            await self._look(looks)
        # Again where they were dropped during the reads: a conversation that is not here is refused for good.
        await self._conversations.load({entry.conversation_id: entry.shard for entry in batch})
        plan = self._planner.plan(batch, Read(found, replies, targets, media), now_ms)
        if plan.doubts:
            # One read for all of them, however many are refused; none for what is accepted: its insert would notice.
            keys = [] if look_up else [doubt.entry.key for doubt in plan.doubts]
            found = await self._store.messages.find_keys(keys)
            if self._forget_behind(found):
                self._conversations.forget({entry.conversation_id for entry in batch})  # the plan has counted on
                return await self._plan(batch, True, now_ms)
            self._planner.settle_doubts(plan, found)
        return plan

    def _forget_behind(self, found: Mapping[Key, Found]) -> bool:
        """Forget conversations whose log goes further than is known here: an insert whose outcome nobody knew was
        confirmed after they were loaded, and before its key was looked up. What it means, and where the log ends, is
        read again. Was there one?"""
        behind = set()
        for (conversation_id, *_), hit in found.items():
            owned = self._conversations.get(conversation_id)
            if owned is not None and owned.last < hit.sequence_number:
                behind.add(conversation_id)
        if behind:
            log.warning("log_goes_further", conversations=len(behind))
            self._conversations.forget(behind)
        return bool(behind)

    def _is_doubtful(self, entry: Entry) -> bool:
        """May this be the retry of what has its ack, without the insert noticing? A change or command that would now
        find nothing to do, or is no longer allowed. Of messages only those that would be refused: `Plan.doubts`.
        """
        is_of_log = not isinstance(entry.record, records.SendMessage | records.LookAtAccount)
        return is_of_log and not self._planner.knows(entry)

    async def _look(self, records_: Sequence[records.LookAtAccount]) -> None:
        """Heed what accounts say now. Who begins or ceases to hide what they read has their marks written at once:
        which of them were shown could not be told later."""
        whose = [
            (owned, (record.user_id,))
            for record in records_
            if (owned := self._conversations.get(record.conversation_id)) is not None
        ]
        changed = await self._conversations.look(whose)
        await self._store.marks.flush_marks([member.watermarks(owned.conversation_id) for owned, member in changed])

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
                wanted[message_id] = Place(at.conversation_id, at.sequence_number, at.countable, at.replyable)
        return wanted

    def _remember(self, batch: Sequence[Entry], plan: Plan) -> None:
        """The plan is durable: keys and places are known, senders have read what they wrote."""
        for item, document in zip(plan.committed, plan.documents, strict=True):
            message = item.message
            sequence, countable = message.sequence_number, document["countable"]
            # Forgotten meanwhile or not: once the head is flushed, no load finds again that its sender has read so far.
            owned = self._conversations.get(message.conversation_id) or plan.owned[message.conversation_id]
            self._note_own(owned, message.sender_id, sequence, countable)
            is_system = message.message_type is MessageType.SYSTEM
            self._recent_places.put(document["_id"], Place(message.conversation_id, sequence, countable, not is_system))
        for message_id in plan.deleted:
            if (place := self._recent_places.get(message_id)) is not None:
                self._recent_places.put(message_id, place._replace(replyable=False))
        self._planner.remember(batch, plan)
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
