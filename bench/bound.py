"""What a row of `bounds.py` says. Rows are in `bound_rows.py`, `bound_rows_apps.py` and `bound_rows_push.py`."""

from __future__ import annotations

import msgspec


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """`where`: `module:CONSTANT` or `module:Struct.field`. `holds`: the containers it bounds.

    `no_gauge`: why there is none. `reason`: where the words in the code are about something else.
    """

    room: str
    where: str
    unit: str
    past: str
    test: str
    gauge: str = ""
    no_gauge: str = ""
    reason: str = ""
    holds: tuple[str, ...] = ()
