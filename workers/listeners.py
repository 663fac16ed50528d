"""Who reads the stream `events`: apps by consumer groups of their own, and how long it is kept for them.

Asked by the ingest role (does anybody listen?) and by the events role, which trims the stream. To make a group is all
an app does to listen, and to destroy it is how it stops. Raises BrokerUnavailable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from protocol import keys
from workers.broker import GroupMissing

if TYPE_CHECKING:
    from workers.broker import Broker

KEPT_SECONDS: Final = 3600
"""How long an app may be away from the stream and miss nothing there, while fewer events than its bound are made."""


class Group(NamedTuple):
    """An app's consumer group. `lag`: events that it has not read; None where Redis cannot tell (some were trimmed)."""

    name: str
    lag: int | None
    pending: int


async def groups(broker: Broker) -> list[Group]:
    """Those of apps; the system's own is none."""
    try:
        found = await broker.command("XINFO", "GROUPS", keys.EVENTS)
    except GroupMissing:
        return []
    described = [_group(group) for group in found]
    return [group for group in described if group.name != keys.EVENTS_GROUP]


async def trim(broker: Broker, now_ms: int) -> None:
    """Drop what has been there for longer than it is kept; roughly: Redis frees whole blocks."""
    await broker.command("XTRIM", keys.EVENTS, "MINID", "~", max(now_ms - KEPT_SECONDS * 1000, 0))


def _group(row: object) -> Group:
    pairs = dict(zip(row[::2], row[1::2], strict=True)) if isinstance(row, list) else row
    assert isinstance(pairs, dict)
    fields = {name.decode() if isinstance(name, bytes) else name: value for name, value in pairs.items()}
    name, lag = fields["name"], fields.get("lag")
    return Group(
        name.decode(errors="replace") if isinstance(name, bytes) else str(name),
        lag if isinstance(lag, int) else None,
        int(fields["pending"]),
    )
