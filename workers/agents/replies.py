"""What agents say, on its way into the log: the same ingest as everybody's messages, each under a key of its own.

The key of an answer is made from the message that it answers, so an answer that is given again is the same message, and
of two different ones the first stays. Nobody repeats it but this room: it appends until it has seen what became of it.

*Cancellation*: the answer may be on its way; the task stays, and whoever takes it up meets the answer under its key.
"""

from __future__ import annotations

import random
import secrets
import time
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
import structlog

from protocol import codec, frames, keys, records
from protocol.errors import ErrorCode
from protocol.models import MessageType
from workers.broker import Broker, BrokerUnavailable
from workers.instances import Instance, TooManyWaiting
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.store import Store
    from workers.store.agent_tasks import Task

DECIDED_SECONDS: Final = 10.0
"""How long the owner of a conversation has for an entry, before it is appended again under the same key."""
_FIRST_RETRY_SECONDS: Final = 0.1
_LONGEST_RETRY_SECONDS: Final = 5.0
_DEVICE: Final = "agents"

log = structlog.get_logger(__name__)


def reply_key(message_id: str) -> str:
    """The idempotency key of the answer to a message; a bot that answers by itself uses the same."""
    return f"reply:{message_id}"


class Replies:
    """The voice of the agents of this process."""

    def __init__(self, store: Store, broker: Broker, instance: Instance, shards: int) -> None:
        self._store = store
        self._broker = broker
        self._instance = instance
        self._shards = shards

    async def say(self, task: Task, speaker_id: str, text: str) -> ErrorCode | None:
        """Say it in the conversation, once and for all. None when it is in the log, or why it never will be."""
        is_pair = task.conversation_id == keys.direct_conversation_id(task.event.sender_id, speaker_id)
        refused = await self._decided(self._message(task, speaker_id, text, None if is_pair else task.message_id))
        if refused is ErrorCode.VALIDATION_FAILED and not is_pair:
            # The message it answers may have been deleted since: then it stands for itself.
            refused = await self._decided(self._message(task, speaker_id, text, None))
        # Another answer to the same message is in the log already.
        return None if refused is ErrorCode.IDEMPOTENCY_CONFLICT else refused

    def _message(self, task: Task, speaker_id: str, text: str, reply_to: str | None) -> records.SendMessage:
        return records.SendMessage(
            self._instance.instance_id,
            0,
            speaker_id,
            _DEVICE,
            task.conversation_id,
            "",
            reply_key(task.message_id),
            "",
            text,
            MessageType.TEXT,
            None,
            reply_to,
            now_ms(),
            False,
            _new_request(),
        )

    async def give_up(self, task: Task, speaker_id: str, *, in_time: bool) -> None:
        """Tell the conversation, in its log, that this message gets no answer."""
        record = records.ChangeConversation(
            self._instance.instance_id,
            _new_request(),
            f"agent:{task.message_id}",
            task.conversation_id,
            speaker_id,
            records.AgentNotice(task.message_id, in_time),
        )
        refused = await self._decided(record)
        if refused is not None:
            log.info("agent_notice_refused", message_id=task.message_id, code=refused.value)

    async def _decided(self, record: records.SendMessage | records.ChangeConversation) -> ErrorCode | None:
        shard = keys.shard_of(record.conversation_id, self._shards)
        delay = _FIRST_RETRY_SECONDS
        while True:
            outcome = None
            try:
                outcome = await self._instance.command(shard, record, DECIDED_SECONDS)
            except (BrokerUnavailable, TooManyWaiting) as error:
                log.warning("agent_reply_waits", conversation_id=record.conversation_id, error=str(error)[:200])
            if outcome is not None and (outcome.code is None or not outcome.code.retryable):
                return outcome.code
            await anyio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(delay * 2, _LONGEST_RETRY_SECONDS)

    # --- while it works: lost where nobody listens -------------------------------------------------------------------

    async def type(self, task: Task, speaker_id: str, *, started: bool) -> None:
        """The agent writes, or has stopped."""
        shard = keys.shard_of(task.conversation_id, self._shards)
        try:
            await self._broker.append_ingest(shard, records.Typing(speaker_id, task.conversation_id, started))
        except BrokerUnavailable as error:
            log.info("agent_typing_lost", error=str(error)[:200])

    async def progress(self, task: Task, speaker_id: str, stage: str, text: str) -> None:
        """An `agent_progress` frame for everybody else in the conversation who is online."""
        payload = frames.AgentProgressPayload(
            conversation_id=task.conversation_id,
            agent_id=speaker_id,
            stage=stage,
            text=text or msgspec.UNSET,
            message_id=task.message_id,
        )
        tell = records.Tell(msgspec.Raw(codec.JSON.encode(frames.AgentProgress(payload=payload))))
        try:
            members = await self._store.agent_tasks.participants(task.conversation_id)
            if speaker_id in members:
                for user_id in members:
                    if user_id != speaker_id:
                        await self._broker.notify_user(user_id, tell)
        except (StoreUnavailable, BrokerUnavailable) as error:
            log.info("agent_progress_lost", error=str(error)[:200])


def now_ms() -> int:
    """Epoch milliseconds: the one place where this role reads the clock."""
    return time.time_ns() // 1_000_000


def _new_request() -> str:
    return keys.new_id("req", now_ms(), secrets.randbits(64))
