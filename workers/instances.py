"""The REST role as an instance: its lease, its down stream, and the requests that wait for what comes on it.

An instance lives as long as its lease `instance:{id}`; records for it come on `down:{id}`, which it creates itself,
because nobody writes to a stream that is not there.
"""

from __future__ import annotations

from typing import Final

import anyio
import anyio.abc
import msgspec
import structlog

from protocol import codec, records
from workers import metrics
from workers.broker import Broker, BrokerUnavailable

RENEW_SECONDS: Final = 3.0
"""Three renewals within the lease's 10 s."""
_BLOCK_MS: Final = 2000
_RETRY_SECONDS: Final = 0.5
WAITING_LIMIT: Final = 10_000
"""Requests waiting at once. Each holds an HTTP connection, so the server's own limit is met first."""

log = structlog.get_logger(__name__)


class TooManyWaiting(Exception):
    """The bound on waiting requests is reached: overloaded."""


class _Waiting:
    __slots__ = ("answered", "outcome")

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.outcome: records.CommandOutcome | None = None


class Instance:
    """One instance that sends commands and messages, and waits for what became of them."""

    def __init__(self, broker: Broker, instance_id: str, info: records.InstanceInfo) -> None:
        self.instance_id = instance_id
        self.info = info
        self._broker = broker
        self._waiting: dict[str, _Waiting] = {}
        self._renewed_at = float("-inf")

    @property
    def alive(self) -> bool:
        """False when the lease was not renewed in time: records for us may be thrown away."""
        return anyio.current_time() - self._renewed_at < 3 * RENEW_SECONDS

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the lease and read the down stream until cancelled, then take both away."""
        try:
            await self._renew()
            async with anyio.create_task_group() as group:
                group.start_soon(self._keep_lease, name="instance lease")
                group.start_soon(self._read, name="instance down stream")
                task_status.started()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                try:
                    await self._broker.remove_instance(self.instance_id)
                except BrokerUnavailable as error:
                    log.warning("instance_not_removed", error=str(error))

    async def _renew(self) -> None:
        """Renew the lease and see that the stream exists: an empty entry costs less than asking what Redis lost."""
        try:
            await self._broker.renew_instance(self.instance_id, self.info)
            await self._broker.create_down(self.instance_id)
            self._renewed_at = anyio.current_time()
        except BrokerUnavailable as error:
            log.warning("instance_not_renewed", error=str(error))

    async def _keep_lease(self) -> None:
        while True:
            await anyio.sleep(RENEW_SECONDS if self.alive else _RETRY_SECONDS)
            await self._renew()

    async def _read(self) -> None:
        last = b"0"
        while True:
            try:
                entries = await self._broker.read_down(self.instance_id, last, _BLOCK_MS)
                for entry_id, payload in entries:
                    self._resolve(payload)
                    last = entry_id
                if entries:
                    await self._broker.trim_down(self.instance_id, last)
            except BrokerUnavailable as error:
                log.warning("down_unreadable", error=str(error))
                # Redis may come back empty, with ids that start anywhere: read what there is from the beginning.
                last = b"0"
                await anyio.sleep(_RETRY_SECONDS)

    def _resolve(self, payload: bytes) -> None:
        try:
            items = codec.decode_down(payload)
        except msgspec.DecodeError as error:
            log.error("down_record_unreadable", error=str(error), size_bytes=len(payload))
            return
        for item in items:
            if isinstance(item, records.CommandOutcome):
                waiting = self._waiting.get(item.request)
                if waiting is not None:
                    waiting.outcome = item
                    waiting.answered.set()

    async def command(
        self,
        shard: int,
        record: records.GroupCommand | records.SendMessage | records.ChangeMessage | records.LookAtAccount,
        timeout_seconds: float,
    ) -> records.CommandOutcome | None:
        """Append a command to its shard and wait for its outcome; None when none came in time (it may yet take effect).

        Raises BrokerUnavailable when it could not be appended, TooManyWaiting.
        """
        if len(self._waiting) >= WAITING_LIMIT:
            raise TooManyWaiting
        waiting = self._waiting[record.request] = _Waiting()
        try:
            with metrics.REST_WAITING.track_inprogress(), anyio.move_on_after(timeout_seconds):
                await self._broker.append_ingest(shard, record)
                await waiting.answered.wait()
        finally:
            del self._waiting[record.request]
        return waiting.outcome
