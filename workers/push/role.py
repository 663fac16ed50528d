"""Role `push`: take what is due, tell it, write down that it was told. Any number of processes may carry it.

An entry is claimed with a lease and let go when all is done, so a process that dies leaves it to the next; what it had
told already may be told a second time. What a provider does not take now becomes an entry of its own for that device,
until the message is too old. Nothing of it is a dead letter: nobody wants to be told of yesterday.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from workers import metrics, push_queue, revocation
from workers.broker import BrokerUnavailable
from workers.push import repair
from workers.push.adapters import Gone, Retry
from workers.push.dispatch import Dispatch
from workers.push.looks import Looks, epoch_ms
from workers.push.providers import open_adapters
from workers.push_queue import Due
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import TaskGroup

    from workers.broker import Broker
    from workers.push.looks import Ready
    from workers.settings import Settings
    from workers.store import Store
    from workers.store.push_tokens import PushToken

POLL_SECONDS: Final = 0.25
"""Between two looks at what is due: nobody tells, and one costs Redis some microseconds."""
BATCH: Final = 100
"""Entries of one claim: looked at together, told each by itself."""
IN_HAND: Final = 200
"""Jobs that one process is telling; with as many it claims no more, and others may."""
LEASE_MS: Final = 20_000
"""Longer than a look and a telling (`TELL_SECONDS`) take together; what a dead process had in hand waits for its end.
"""
TELL_SECONDS: Final = 12.0
"""For all devices of one user; who has not been reached by then is tried again."""
SOONEST_AGAIN_SECONDS: Final = 5.0
LATEST_AGAIN_SECONDS: Final = 300.0
"""A device that was not reached is tried again when the message is twice as old, within these."""
_PAUSE_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)


async def run(settings: Settings, store: Store, broker: Broker, stopping: anyio.Event) -> None:
    """Tell people until `stopping`; then finish what is in hand. *Cancellation*: what is in hand is due again when its
    lease ends."""
    async with open_adapters(settings) as adapters, anyio.create_task_group() as upkeep:
        log.info("push_adapters", kinds=sorted(adapters))
        office = Office(settings, store, broker, Dispatch(adapters))
        upkeep.start_soon(repair.keep_whole, store, broker, name="push repair")
        await office.serve(stopping)
        upkeep.cancel_scope.cancel()


class Office:
    """Claims, and tells each claim in a task of its own."""

    def __init__(self, settings: Settings, store: Store, broker: Broker, dispatch: Dispatch) -> None:
        self._store = store
        self._broker = broker
        self._dispatch = dispatch
        self._ttl_ms = settings.push_ttl_seconds * 1000
        self._looks = Looks(store, round(settings.push_after_seconds * 1000), self._ttl_ms)
        self._in_hand = 0
        self._room = anyio.Event()

    async def serve(self, stopping: anyio.Event) -> None:
        """Until `stopping`, and all in hand is told."""
        async with anyio.create_task_group() as group:
            while not stopping.is_set():
                wait = 0.0
                try:
                    if not await self.take(group):
                        wait = POLL_SECONDS
                except (BrokerUnavailable, StoreUnavailable) as error:
                    log.warning("push_waits", error=str(error)[:200])
                    wait = _PAUSE_SECONDS
                while self._in_hand >= IN_HAND:
                    self._room = anyio.Event()
                    await self._room.wait()
                with anyio.move_on_after(wait):
                    await stopping.wait()

    async def take(self, group: TaskGroup) -> bool:
        """Claim a batch, look at it, and have it told in this group; False where nothing was due. Raises
        BrokerUnavailable, StoreUnavailable: what was claimed is due again when its lease ends."""
        now_ms = _now_ms()
        lease_ms = now_ms + LEASE_MS
        dues = await push_queue.claim(self._broker, now_ms, lease_ms, BATCH)
        if not dues:
            return False
        looked = await self._looks.look(dues, now_ms)
        tokens = await self._store.push_tokens.of({ready.due.user_id for ready in looked.ready})
        kept = {ready.due for ready in looked.ready}
        await push_queue.finish(self._broker, [due for due in dues if due not in kept], lease_ms, looked.early)
        for ready in looked.ready:
            self._in_hand += 1
            metrics.PUSH_IN_HAND.set(self._in_hand)
            group.start_soon(self._tell, ready, tokens.get(ready.due.user_id, ()), lease_ms)
        return True

    async def _tell(self, ready: Ready, tokens: Sequence[PushToken], lease_ms: int) -> None:
        due, job = ready.due, ready.job
        try:
            wanted = [token for token in tokens if due.device_id in ("", token.device_id)]
            if not due.device_id:
                await push_queue.announce(self._broker, due.user_id, job)
                metrics.PUSH_LOOKS.labels("job").inc()
                metrics.PUSH_SECONDS.observe((_now_ms() - ready.said_ms) / 1000)
            again = await self._tell_devices(ready, wanted)
            await self._store.pushes.told({(due.user_id, due.conversation_id): job.sequence_number})
            await push_queue.finish(self._broker, [due], lease_ms, again)
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("push_left", user_id=due.user_id, error=str(error)[:200])
        except Exception:
            # The boundary of one job: what it cannot stand must not keep the others from theirs.
            log.exception("push_failed", user_id=due.user_id, conversation_id=due.conversation_id)
        finally:
            self._in_hand -= 1
            metrics.PUSH_IN_HAND.set(self._in_hand)
            self._room.set()

    async def _tell_devices(self, ready: Ready, tokens: Sequence[PushToken]) -> dict[Due, int]:
        """All at once; returns those that are to be tried again, and when."""
        waits = dict.fromkeys((token.device_id for token in tokens), 0.0)
        with anyio.move_on_after(TELL_SECONDS):
            async with anyio.create_task_group() as group:
                for token in tokens:
                    group.start_soon(self._tell_device, ready, token, waits)
        now_ms = _now_ms()
        due = ready.due
        again = {}
        for device_id, asked_seconds in waits.items():
            age_seconds = (now_ms - ready.said_ms) / 1000
            delay = max(asked_seconds, min(max(age_seconds, SOONEST_AGAIN_SECONDS), LATEST_AGAIN_SECONDS))
            at_ms = now_ms + round(delay * random.uniform(1.0, 1.2) * 1000)
            again[Due(due.user_id, due.conversation_id, device_id)] = at_ms
        return again

    async def _tell_device(self, ready: Ready, token: PushToken, waits: dict[str, float]) -> None:
        """Takes the device out of `waits` where it is not to be tried again."""
        try:
            seconds = await self._send(ready, token)
        except StoreUnavailable as error:
            log.warning("push_device_waits", user_id=token.user_id, error=str(error)[:200])
            return
        if seconds is None:
            del waits[token.device_id]
        else:
            waits[token.device_id] = seconds

    async def _send(self, ready: Ready, token: PushToken) -> float | None:
        """None, or the seconds that the provider asks us to wait. Raises StoreUnavailable."""
        registered_ms = epoch_ms(token.registered_at)
        if not await revocation.is_good(self._store, self._broker, token.user_id, token.device_id, registered_ms):
            # Revoked or logged out since, by somebody who did not get to remove it.
            await self._store.push_tokens.expired(token)
            return None
        left_seconds = (ready.said_ms + self._ttl_ms - _now_ms()) // 1000
        match await self._dispatch.send(token, ready.job, max(0, left_seconds)):
            case Retry(after_seconds=seconds):
                return seconds
            case Gone():
                log.info("push_token_gone", kind=token.kind, user_id=token.user_id, device_id=token.device_id)
                await self._store.push_tokens.expired(token)
        return None


def _now_ms() -> int:
    """The one place where this role reads the clock."""
    return time.time_ns() // 1_000_000
