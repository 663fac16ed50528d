"""Receipts on their way into the log: collected per shard for a few milliseconds, so that many marks make one stream
entry.

Called by `broker.py`. Marks only ever move watermarks forward, so one may be written twice or late without harm.
"""

from __future__ import annotations

from protocol import keys, records

Mark = records.DeliveredMark | records.ReadMark


class ReceiptCollector:
    """Marks by shard, at most `bound` of them. No method awaits."""

    def __init__(self, shards: int, bound: int) -> None:
        self.unknown_ids = 0
        """Marks dropped because their message id is none of ours."""
        self.dropped = 0
        """Marks dropped because the bound was reached: the next cumulative receipt of the same reader makes up for
        them."""
        self.waiting = 0
        self._shards = shards
        self._bound = bound
        self._delivered: dict[int, list[records.DeliveredMark]] = {}
        self._read: dict[int, list[records.ReadMark]] = {}

    def add(self, mark: Mark) -> None:
        """Take one mark; unknown ids and overflow are counted."""
        if self.waiting >= self._bound:
            self.dropped += 1
        elif type(mark) is records.DeliveredMark:
            shard = keys.shard_of_message(mark.message_id, self._shards)
            if shard is None:
                self.unknown_ids += 1
                return
            self._delivered.setdefault(shard, []).append(mark)
            self.waiting += 1
        elif type(mark) is records.ReadMark:
            self._add_read(mark)

    def _add_read(self, mark: records.ReadMark) -> None:
        """A read receipt may name messages of several conversations, and so of several shards."""
        by_shard: dict[int, list[str]] = {}
        for message_id in mark.message_ids:
            shard = keys.shard_of_message(message_id, self._shards)
            if shard is None:
                self.unknown_ids += 1
            else:
                by_shard.setdefault(shard, []).append(message_id)
        for shard, message_ids in by_shard.items():
            self._read.setdefault(shard, []).append(records.ReadMark(mark.user_id, mark.device_id, message_ids))
            self.waiting += 1

    def take(self) -> list[tuple[int, records.Receipts]]:
        """Everything collected so far, one record per shard."""
        delivered, self._delivered = self._delivered, {}
        read, self._read = self._read, {}
        self.waiting = 0
        return [
            (shard, records.Receipts(delivered.get(shard, []), read.get(shard, [])))
            for shard in delivered.keys() | read.keys()
        ]

    def put_back(self, shard: int, receipts: records.Receipts) -> None:
        """A record that could not be written waits for the next flush, within the bound."""
        marks = len(receipts.delivered) + len(receipts.read)
        if self.waiting + marks > self._bound:
            self.dropped += marks
            return
        self._delivered.setdefault(shard, []).extend(receipts.delivered)
        self._read.setdefault(shard, []).extend(receipts.read)
        self.waiting += marks
