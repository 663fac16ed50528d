"""A small run in memory, without a fault: two conversations as they are stored, and what their clients saw. The tests
break one thing of it at a time.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from protocol import codec, keys
from protocol.models import SYSTEM_SENDER, EventKind, Role, SystemEvent
from protocol.watermarks import NO_DIGEST, chain_digest, content_hash
from workers.audit import history
from workers.audit.snapshot import Document, Queues, Setting, ShardQueue, Snapshot, of_documents

if TYPE_CHECKING:
    from workers.audit.history import AnyEvent

START = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=10)
"""Recent: in a real database the TTL indexes are at work."""
GROUP = "conv_group"
PAIR = "conv_pair"
ANN, BEN, CID = "usr_ann", "usr_ben", "usr_cid"


def sha(content: str) -> str:
    return content_hash(content).hex()


class Scene:
    """`collections` as the store holds them, `events` as clients wrote them. `clock` is the run's, in seconds."""

    def __init__(self) -> None:
        self.collections: dict[str, list[Document]] = {
            name: []
            for name in (
                "messages",
                "conversations",
                "memberships",
                "sequence_numbers",
                "idempotency_keys",
                "dead_letter_queue",
            )
        }
        self.events: list[AnyEvent] = []
        self.clock = 100.0
        self.setting = Setting(taken_at=START + timedelta(minutes=5))
        self.queues = Queues(shards=[ShardQueue(shard=0, length=3, pending=0, unread=0, consumers=1)], ghosts=[])

    # --- what is stored ----------------------------------------------------------------------------------------------

    def documents(self, name: str, conversation_id: str) -> list[Document]:
        return [
            document
            for document in self.collections[name]
            if conversation_id in (document.get("conversation_id"), document["_id"])
        ]

    def message(self, conversation_id: str, sequence: int) -> Document:
        return next(d for d in self.documents("messages", conversation_id) if d["sequence_number"] == sequence)

    def membership(self, conversation_id: str, user_id: str) -> Document:
        return next(d for d in self.documents("memberships", conversation_id) if d["user_id"] == user_id)

    def only(self, name: str, conversation_id: str) -> Document:
        (document,) = self.documents(name, conversation_id)
        return document

    def create(self, conversation_id: str, kind: str, *participants: str) -> None:
        self.collections["conversations"].append(
            {
                "_id": conversation_id,
                "user_id": participants[0],
                "agent_id": "",
                "type": kind,
                "participants": list(participants),
                "last_sequence_number": 0,
                "created_at": START,
                "membership_seq": 0,
            }
        )
        counter = {"last_sequence_number": 0, "countable": 0, "digest": NO_DIGEST, "updated_at": START}
        self.collections["sequence_numbers"].append({"_id": conversation_id, **counter})
        for user_id in participants:
            self.join(
                conversation_id,
                user_id,
                1,
                Role.OWNER if user_id == participants[0] and kind == "group" else Role.MEMBER,
            )

    def join(self, conversation_id: str, user_id: str, join_seq: int, role: Role = Role.MEMBER) -> None:
        counted = self.only("sequence_numbers", conversation_id)["countable"]
        self.collections["memberships"].append(
            {
                "_id": f"{conversation_id}:{user_id}",
                "conversation_id": conversation_id,
                "user_id": user_id,
                "role": role.value,
                "join_seq": join_seq,
                "delivered_seq": join_seq - 1,
                "read_seq": join_seq - 1,
                "read_countable": counted,
                "devices": {},
            }
        )

    def append(self, conversation_id: str, sender: str, key: str, content: str, **fields: Any) -> Document:
        counter = self.only("sequence_numbers", conversation_id)
        sequence = counter["last_sequence_number"] + 1
        system = sender == SYSTEM_SENDER
        message_id = keys.new_message_id(int(START.timestamp() * 1000) + sequence, len(self.collections["messages"]), 0)
        digest = chain_digest(counter["digest"], message_id, sender, sequence, content_hash(content))
        at = START + timedelta(seconds=sequence)
        document = {
            "_id": message_id,
            "idempotency_key": key,
            "conversation_id": conversation_id,
            "sequence_number": sequence,
            "sender_id": sender,
            "receiver_id": "",
            "type": "system" if system else "text",
            "content": content,
            "timestamp": at,
            "status": "sent",
            "created_at": at,
            "digest": digest,
            "countable": counter["countable"] + (not system),
            **fields,
        }
        self.collections["messages"].append(document)
        counter |= {"last_sequence_number": sequence, "countable": document["countable"], "digest": digest}
        conversation = self.only("conversations", conversation_id)
        conversation["last_sequence_number"] = sequence
        if system:
            conversation["membership_seq"] = sequence
        else:
            record = {"_id": f"{conversation_id}:{sender}:{key}", "message_id": message_id, "created_at": at}
            self.collections["idempotency_keys"].append(record)
            self.read(conversation_id, sender, sequence)
        return document

    def system(self, conversation_id: str, kind: EventKind, actor: str, *targets: str, **fields: Any) -> Document:
        event = SystemEvent(event=kind, actor=actor, targets=list(targets), **fields)
        number = len(self.collections["messages"])
        return self.append(conversation_id, SYSTEM_SENDER, f"cmd-{number}", codec.encode_value(event).decode())

    def read(self, conversation_id: str, user_id: str, sequence: int) -> None:
        member = self.membership(conversation_id, user_id)
        member["read_seq"] = sequence
        member["read_countable"] = self.message(conversation_id, sequence)["countable"]

    # --- what clients saw --------------------------------------------------------------------------------------------

    def tick(self, seconds: float = 1.0) -> float:
        self.clock += seconds
        return self.clock

    def connect(self, user: str, conn: int = 1, dev: str = "d1") -> None:
        self.events.append(history.Connect(t=self.tick(), user=user, dev=dev, conn=conn, opened=self.clock - 0.5))
        self.events.append(history.Synced(t=self.tick(), user=user, dev=dev, conn=conn))

    def say(self, conversation_id: str, user: str, key: str, content: str) -> Document:
        """A message that is sent, stored and acknowledged."""
        self.events.append(
            history.Send(
                t=self.tick(),
                user=user,
                dev="d1",
                conn=1,
                conv=conversation_id,
                key=key,
                payload_sha=sha(content),
                canary=key,
            )
        )
        document = self.append(conversation_id, user, key, content)
        self.ack(document, user, key)
        return document

    def ack(self, document: Document, user: str, key: str) -> None:
        self.events.append(
            history.Ack(
                t=self.tick(),
                user=user,
                dev="d1",
                conn=1,
                conv=document["conversation_id"],
                key=key,
                mid=document["_id"],
                seq=document["sequence_number"],
            )
        )

    def show(self, document: Document, *users: str, origin: str = "live") -> None:
        """It is pushed to these users, whose devices confirm it."""
        system = document["sender_id"] == SYSTEM_SENDER
        canary = "" if system else document["idempotency_key"]
        original = document.get("content_hash") or sha(document["content"])
        conversation_id, sequence = document["conversation_id"], document["sequence_number"]
        row = history.Row(seq=sequence, mid=document["_id"], sha=original, canary=canary)
        for user in users:
            self.events.append(
                history.Push(
                    t=self.tick(),
                    user=user,
                    dev="d1",
                    conn=1,
                    conv=conversation_id,
                    rows=[row],
                    origin=origin,
                    first=sequence,
                    last=sequence,
                )
            )
            self.events.append(
                history.Dack(
                    t=self.tick(), user=user, dev="d1", conn=1, conv=conversation_id, seq=sequence, mid=row.mid
                )
            )
            member = self.membership(conversation_id, user)
            member["delivered_seq"] = sequence
            member["devices"]["d1"] = sequence

    def end(self) -> None:
        self.events.append(history.End(t=self.tick(60.0)))

    def add(self, event: AnyEvent) -> None:
        """One more event before the end, which is a minute later then."""
        end = self.events.pop()
        self.events += [event, msgspec.structs.replace(end, t=self.tick(60.0))]

    # --- the tests' hands --------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return of_documents(self.setting, self.collections, self.queues)

    def change(self, kind: type[AnyEvent], number: int, **fields: Any) -> None:
        """Give the event of this kind with this number other fields."""
        places = [index for index, event in enumerate(self.events) if isinstance(event, kind)]
        at = places[number]
        self.events[at] = msgspec.structs.replace(self.events[at], **fields)

    def drop(self, kind: type[AnyEvent], number: int) -> AnyEvent:
        """Take it out."""
        places = [index for index, event in enumerate(self.events) if isinstance(event, kind)]
        return self.events.pop(places[number])


def quiet_run() -> Scene:
    """A pair that talks, and a group that somebody joins and somebody leaves; a message is edited, one is deleted."""
    scene = Scene()
    for user in (ANN, BEN, CID):
        scene.connect(user)
    scene.create(PAIR, "1:1", ANN, BEN)
    for number in range(1, 6):
        author, reader = (ANN, BEN) if number % 2 else (BEN, ANN)
        scene.show(scene.say(PAIR, author, f"p{number}", f"pair {number}"), reader)
    scene.create(GROUP, "group", ANN, BEN)
    scene.show(scene.system(GROUP, EventKind.CREATED, ANN, ANN, BEN), ANN, BEN)
    scene.show(scene.say(GROUP, ANN, "g2", "group 2"), BEN)
    target = scene.say(GROUP, BEN, "g3", "group 3")
    scene.show(target, ANN)
    scene.join(GROUP, CID, 4)
    scene.show(scene.system(GROUP, EventKind.ADDED, ANN, CID), ANN, BEN, CID)
    _edit(scene, target)
    scene.show(scene.say(GROUP, CID, "g6", "group 6"), ANN, BEN)
    scene.show(scene.system(GROUP, EventKind.LEFT, BEN, BEN), ANN, BEN, CID)
    scene.membership(GROUP, BEN)["leave_seq"] = 7
    scene.only("conversations", GROUP)["participants"] = [ANN, CID]
    scene.show(scene.say(GROUP, ANN, "g8", "group 8"), CID)
    scene.end()
    return scene


def _edit(scene: Scene, target: Document) -> None:
    said = "group 3, better"
    send = history.Send(
        t=scene.tick(),
        user=BEN,
        dev="d1",
        conn=1,
        conv=GROUP,
        key="e5",
        payload_sha=sha(said),
        change="edited",
        target=target["_id"],
    )
    scene.events.append(send)
    event = SystemEvent(event=EventKind.EDITED, actor=BEN, targets=[target["_id"]], content=said)
    content = codec.encode_value(event).decode()
    entry = scene.append(
        GROUP, SYSTEM_SENDER, f"{BEN}:e5", content, target_message_id=target["_id"], content_hash=sha(content)
    )
    target |= {"content_hash": sha(target["content"]), "content": said, "edited_at": entry["created_at"]}
    target |= {"edited_seq": entry["sequence_number"], "changed_seq": entry["sequence_number"]}
    scene.ack(entry, BEN, "e5")
    scene.show(entry, ANN, BEN, CID)
