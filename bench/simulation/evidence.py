"""What the auditor (`workers.audit`) is shown of a world: the journals of its phones as a history, its twins as a
snapshot. Called by `universe` when everything has come to rest.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from bench import journal
from bench.folds import committed_hash
from bench.simulation.network import EPOCH_MS
from bench.simulation.streams import Stream
from protocol import keys
from protocol.watermarks import content_hash
from workers.audit import history
from workers.audit.snapshot import Queues, Setting, ShardQueue, Snapshot, of_documents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.simulation.keyspace import Keyspace
    from bench.simulation.replica_set import ReplicaSet

_EPOCH: Final = datetime.fromtimestamp(EPOCH_MS / 1000, UTC)


def history_of(events: Iterable[journal.Event], group: str) -> Iterator[history.AnyEvent]:
    """The events of the phones as the auditor knows them. `group`: the conversation that is one."""
    places: dict[tuple[str, str], str] = {}
    for event in events:
        if isinstance(event, journal.Sent):
            places[event.user_id, event.idempotency_key] = event.conversation_id
        told = _told(event, group, places)
        if told is not None:
            yield told


def _told(event: journal.Event, group: str, places: dict[tuple[str, str], str]) -> history.AnyEvent | None:
    match event:
        case journal.Connected():
            return history.Connect(**_stamp(event), opened=event.opened_at)
        case journal.Closed():
            return history.Close(**_stamp(event), code=event.code)
        case journal.Rewound():
            return history.Sync(**_stamp(event))
        case journal.Synced():
            return history.Synced(**_stamp(event))
        case journal.Pushed():
            return _pushed(event)
        case journal.Receipt():
            return _receipt(event, group)
        case journal.Confirmed():
            place = event.conversation_id
            return history.Dack(**_stamp(event), conv=place, seq=event.sequence_number, mid=event.message_id)
        case journal.Read():
            return history.Rack(**_stamp(event), conv=event.conversation_id, seq=event.sequence_number)
        case journal.Asked():
            first, last = event.from_sequence, event.to_sequence
            return history.Ask(**_stamp(event), conv=event.conversation_id, first=first, last=last)
    return _said(event, places)


def _said(event: journal.Event, places: dict[tuple[str, str], str]) -> history.AnyEvent | None:
    """A send, and what became of it."""
    match event:
        case journal.Sent():
            return history.Send(
                **_stamp(event),
                conv=event.conversation_id,
                key=event.idempotency_key,
                payload_sha=content_hash(event.content).hex(),
                change="" if event.change is None else event.change.value,
                target=event.target,
            )
        case journal.Acked():
            return history.Ack(
                **_stamp(event),
                conv=event.conversation_id,
                key=event.idempotency_key,
                mid=event.message_id,
                seq=event.sequence_number,
                duplicate=event.duplicate,
            )
        case journal.Refused():
            key = event.idempotency_key or ""
            return history.Error(
                **_stamp(event),
                code=event.code.value,
                retryable=event.retryable,
                conv=event.conversation_id or places.get((event.user_id, key), ""),
                key=key,
            )
    return None


def _stamp(event: journal.Event) -> dict[str, Any]:
    return {"t": event.at, "user": event.user_id, "dev": event.device_id, "conn": event.connection}


def _pushed(event: journal.Pushed) -> history.Push:
    payload = event.payload
    return history.Push(
        **_stamp(event),
        conv=payload.conversation_id,
        rows=[
            history.Row(
                seq=message.sequence_number,
                mid=message.message_id if isinstance(message.message_id, str) else "",
                sha=committed_hash(message),
            )
            for message in payload.messages
        ],
        origin=payload.origin if isinstance(payload.origin, str) else "live",
        first=payload.from_sequence if isinstance(payload.from_sequence, int) else 0,
        last=payload.to_sequence if isinstance(payload.to_sequence, int) else 0,
        expired=payload.expired_through if isinstance(payload.expired_through, int) else 0,
        more=payload.has_more is True,
    )


def _receipt(event: journal.Receipt, group: str) -> history.Receipt:
    payload = event.payload
    return history.Receipt(
        **_stamp(event),
        conv=payload.conversation_id,
        of=payload.user_id,
        delivered=payload.delivered_through if isinstance(payload.delivered_through, int) else 0,
        read=payload.read_through if isinstance(payload.read_through, int) else 0,
        group=payload.conversation_id == group,
    )


def snapshot_of(replica_set: ReplicaSet, keyspace: Keyspace, shards: int, now: float) -> Snapshot:
    """What a majority holds, and the streams, of a world at rest. `now`: seconds of its clock."""
    collections = {name: list(documents.values()) for name, documents in replica_set.committed.items()}
    setting = Setting(taken_at=_EPOCH + timedelta(seconds=now))
    return of_documents(setting, collections, queues_of(keyspace, shards))


def queues_of(keyspace: Keyspace, shards: int) -> Queues:
    """How far the ingest streams have been read and acknowledged."""
    return Queues(shards=[_queue(keyspace, shard) for shard in range(shards)])


def _queue(keyspace: Keyspace, shard: int) -> ShardQueue:
    stream = keyspace.find(keys.ingest(shard).encode(), Stream)
    group = None if stream is None else stream.groups.get(keys.INGEST_GROUP.encode())
    if stream is None or group is None:
        return ShardQueue(shard=shard, length=0, pending=0, unread=0, consumers=0)
    unread = sum(place > group.last for place in stream.entries)
    consumers = len({holder for holder, _, _ in group.pending.values()})
    return ShardQueue(
        shard=shard, length=len(stream.entries), pending=len(group.pending), unread=unread, consumers=consumers
    )
