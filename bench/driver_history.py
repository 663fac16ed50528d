"""What the load driver's connections say and see, written down for the auditor: `bench direct --history FILE`.

Called by `driver` where it was asked for: each message costs it four lines then, so its figures are not those of a
driver without.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.tally import MARK_DIGITS
from protocol.watermarks import content_hash
from workers.audit import history

if TYPE_CHECKING:
    from bench import templates


class DriverHistory:
    """The history of one driver process. `run` makes its marks nobody else's."""

    def __init__(self, path: str, run: str) -> None:
        self._writer = history.HistoryWriter(Path(path))
        self.write = self._writer.write
        self._run = run

    def key(self, mark: int) -> str:
        """The idempotency key of a message, and its canary."""
        return f"{self._run}-{mark:0{MARK_DIGITS}}"

    def end(self) -> None:
        """Everybody has listened until now, with nothing left to say."""
        self.write(history.End(t=time.perf_counter()))


class ConnectionHistory:
    """One connection's part of it: a device's only one."""

    def __init__(self, whole: DriverHistory, user_id: str, device_id: str, conversation_id: str, other: str) -> None:
        self._whole = whole
        self._write = whole.write
        self._user_id = user_id
        self._device_id = device_id
        self._conversation_id = conversation_id
        self._other = other
        self._opened_at = time.perf_counter()

    def sent(self, mark: int, content_bytes: int) -> None:
        content = f"{mark:0{MARK_DIGITS}}".ljust(content_bytes, "x")
        key = self._whole.key(mark)
        self._write(
            history.Send(
                t=time.perf_counter(),
                user=self._user_id,
                dev=self._device_id,
                conn=1,
                conv=self._conversation_id,
                key=key,
                payload_sha=content_hash(content).hex(),
                canary=key,
            )
        )

    def acked(self, mark: int, payload: templates.AckPayload) -> None:
        self._write(
            history.Ack(
                t=time.perf_counter(),
                user=self._user_id,
                dev=self._device_id,
                conn=1,
                conv=self._conversation_id,
                key=self._whole.key(mark),
                mid=payload.message_id,
                seq=payload.sequence_number,
            )
        )

    def pushed(self, payload: templates.MessagesPayload, marks: list[int]) -> None:
        """`marks`: of its rows; below 0 for one of nobody."""
        rows = [
            history.Row(
                seq=row.sequence_number,
                mid=row.message_id,
                sha=content_hash(row.content).hex(),
                canary=self._whole.key(mark) if mark >= 0 else "",
            )
            for row, mark in zip(payload.messages, marks, strict=True)
        ]
        self._write(
            history.Push(
                t=time.perf_counter(),
                user=self._user_id,
                dev=self._device_id,
                conn=1,
                conv=self._conversation_id,
                rows=rows,
                origin=payload.origin,
                first=payload.from_sequence,
                last=payload.to_sequence,
            )
        )

    def confirmed(self, message_id: str, sequence: int) -> None:
        self._write(
            history.Dack(
                t=time.perf_counter(),
                user=self._user_id,
                dev=self._device_id,
                conn=1,
                conv=self._conversation_id,
                seq=sequence,
                mid=message_id,
            )
        )

    def receipt(self, payload: templates.ReceiptPayload) -> None:
        self._write(
            history.Receipt(
                t=time.perf_counter(),
                user=self._user_id,
                dev=self._device_id,
                conn=1,
                conv=self._conversation_id,
                of=self._other,
                delivered=payload.delivered_through,
                read=payload.read_through,
                group=not self._other,
            )
        )

    def refused(self, mark: int | None, payload: templates.ErrorPayload) -> None:
        self._write(
            history.Error(
                t=time.perf_counter(),
                user=self._user_id,
                dev=self._device_id,
                conn=1,
                code=payload.code,
                retryable=payload.retryable,
                conv="" if mark is None else self._conversation_id,
                key="" if mark is None else self._whole.key(mark),
            )
        )

    def connected(self) -> None:
        now = time.perf_counter()
        self._write(history.Connect(t=now, user=self._user_id, dev=self._device_id, conn=1, opened=self._opened_at))

    def synced(self) -> None:
        self._write(history.Synced(t=time.perf_counter(), user=self._user_id, dev=self._device_id, conn=1))

    def closed(self) -> None:
        self._write(history.Close(t=time.perf_counter(), user=self._user_id, dev=self._device_id, conn=1))
