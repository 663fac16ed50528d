"""What every handler works with, and the clock and entropy of this role. Made once in `app.run`."""

from __future__ import annotations

import secrets
import time

import msgspec
from litestar.di import NamedDependency

from protocol import keys
from workers.broker import Broker
from workers.codes import Codes
from workers.egress import Egress
from workers.instances import Instance
from workers.objects import Objects
from workers.settings import Settings
from workers.store import Store
from workers.tokens import Tokens


def now_ms() -> int:
    """Epoch milliseconds: the one place where this role reads the clock."""
    return time.time_ns() // 1_000_000


class Desk(msgspec.Struct, frozen=True):
    """The seams and settings of the REST role."""

    settings: Settings
    store: Store
    broker: Broker
    instance: Instance
    tokens: Tokens
    codes: Codes
    objects: Objects | None
    """None: this installation has no media."""
    egress: Egress

    def new_id(self, prefix: str) -> str:
        """A fresh time-ordered id."""
        return keys.new_id(prefix, now_ms(), secrets.randbits(64))


DeskDependency = NamedDependency[Desk]
"""The desk as a handler asks for it."""
