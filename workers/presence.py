"""Who is here, as workers see to it: watchers are answered, dead gateways buried, accounts told when somebody was seen.

`look` answers for the query role; `keep` runs in every ingest process, and it does not matter how many there are. A
gateway that has died cannot take its users' registrations back: whoever finds its lease ended does it, so that they
are offline within 15 s of its death.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from protocol import keys, records
from protocol.models import Presence, UserStatus
from workers import metrics
from workers.broker import Broker, BrokerUnavailable
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from workers.store import Store

LOOK_SECONDS: Final = 2.0
SEEN_AT_ONCE: Final = 1000
"""Accounts written per look: 500 a second and worker."""

log = structlog.get_logger(__name__)


async def look(store: Store, broker: Broker, query: records.PresenceQuery) -> records.PresenceAnswer:
    """How those are whom this user may watch. Raises StoreUnavailable, BrokerUnavailable."""
    allowed = await store.contacts.watchable(query.user_id, query.user_ids)
    known = await broker.presences(list(allowed))
    people = []
    for user_id, last_seen_ms in allowed.items():
        shown = known.get(user_id) or Presence(status=UserStatus.OFFLINE, last_seen=last_seen_ms)
        people.append(records.Watched(user_id, shown.status, shown.last_seen))
    refused = [user_id for user_id in dict.fromkeys(query.user_ids) if user_id not in allowed]
    return records.PresenceAnswer(query.connection, people, refused)


async def keep(store: Store, broker: Broker) -> None:
    """Bury who has died and write down who was seen, until cancelled."""
    waiting: list[str] = []
    while True:
        try:
            await bury_dead(broker)
            waiting = waiting or await broker.take_seen(SEEN_AT_ONCE)
            if waiting:
                await store.contacts.note_seen(await broker.presences(waiting))
                waiting = []
        except (BrokerUnavailable, StoreUnavailable) as error:
            log.warning("presence_upkeep_waits", error=str(error)[:200])
        await anyio.sleep(LOOK_SECONDS)


async def bury_dead(broker: Broker) -> None:
    """Every instance whose lease has ended. Raises BrokerUnavailable; may be repeated, and by several at once."""
    for instance_id in await broker.dead_instances():
        died_ms = _now_ms() - keys.INSTANCE_TTL_SECONDS * 1000
        while (left := await broker.bury(instance_id, died_ms)) > 0:
            log.info("instance_users_left", instance=instance_id, left=left)
        if left == 0:
            metrics.BURIED.inc()
            log.info("instance_buried", instance=instance_id)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
