"""What only the owner of a shard may say: the arguments of `lua/tell.lua`, which looks at the leases as it appends.

Made by a lane for receipts, each of which replaces the one before. An entry of a log needs none: its sequence is its
place, whoever tells it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from protocol import codec, keys, records

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fence(NamedTuple):
    """Whose word is told, and of which shards: where somebody else holds the lease of one by then, nothing is."""

    worker_id: str
    shards: list[int]

    def arguments(self, down: Mapping[str, list[records.DownItem]], limit: int) -> tuple[list[str], list[Any]]:
        """Keys and arguments of the script, for one record per instance and at most `limit` entries in its stream."""
        leases = [keys.lease(shard) for shard in self.shards]
        argv = [self.worker_id, len(leases), limit, keys.FIELD, *map(codec.encode_down, down.values())]
        return leases + [keys.down(instance_id) for instance_id in down], argv
