"""What one simulated device has said without having been told its fate: messages, and changes of messages.

Used by `client.Client`; pure state. The same key goes again until an ack or a permanent refusal settles it. In one
conversation everything goes in the order in which it was first said: what waits to be said again holds back what is
behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from protocol import frames
from protocol.models import EventKind, MessagePayload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.client import Habits

SendFrame = frames.Message | frames.MessageEdit | frames.MessageDelete | frames.MessageReaction


class Pending(msgspec.Struct, kw_only=True):
    """A send whose fate is not known. `on_the_way`: it counts against the window, and at `due_at` it goes again without
    having had an answer; else it waits, until then at least.

    `change` None: a message, and `content` what it says; else what is done to `target`, and `content` the new content
    or the emoji.
    """

    frame: SendFrame
    conversation_id: str
    idempotency_key: str
    content: str
    change: EventKind | None = None
    target: str = ""
    attempts: int = 0
    on_the_way: bool = False
    due_at: float = 0.0


class Sends:
    """All pending sends of a device, in order, within the window and the pace the server taught it."""

    def __init__(self, device_id: str, habits: Habits) -> None:
        self.pending: dict[str, Pending] = {}
        self._device_id = device_id
        self._habits = habits
        self._on_the_way = 0
        self._count = 0
        self._period = 0.0
        self._next_at = 0.0

    # --- what may be said --------------------------------------------------------------------------------------------

    def message(self, payload: MessagePayload, idempotency_key: str | None) -> str:
        """Queue a message. Returns its key."""
        name = self._name()
        frame = frames.Message(client_message_id=name, idempotency_key=idempotency_key or name, payload=payload)
        return self._add(frame, frame.idempotency_key, payload.conversation_id, payload.content, None, "")

    def edit(self, conversation_id: str, message_id: str, content: str) -> str:
        """Queue a new content for a message. Returns the key."""
        name = self._name()
        payload = frames.EditPayload(
            client_message_id=name,
            idempotency_key=name,
            conversation_id=conversation_id,
            message_id=message_id,
            content=content,
        )
        frame = frames.MessageEdit(payload=payload)
        return self._add(frame, name, conversation_id, content, EventKind.EDITED, message_id)

    def delete(self, conversation_id: str, message_id: str, scope: frames.DeleteScope) -> str:
        """Queue the deletion of a message. Returns the key."""
        name = self._name()
        payload = frames.DeletePayload(
            client_message_id=name,
            idempotency_key=name,
            conversation_id=conversation_id,
            message_id=message_id,
            scope=scope,
        )
        change = EventKind.DELETED if scope is frames.DeleteScope.ALL else EventKind.HIDDEN
        return self._add(frames.MessageDelete(payload=payload), name, conversation_id, "", change, message_id)

    def react(self, conversation_id: str, message_id: str, emoji: str, op: frames.ReactionOp) -> str:
        """Queue a reaction, or taking one back. Returns the key."""
        name = self._name()
        payload = frames.ReactionPayload(
            client_message_id=name,
            idempotency_key=name,
            conversation_id=conversation_id,
            message_id=message_id,
            emoji=emoji,
            op=op,
        )
        change = EventKind.REACTED if op is frames.ReactionOp.ADD else EventKind.UNREACTED
        return self._add(frames.MessageReaction(payload=payload), name, conversation_id, emoji, change, message_id)

    def _name(self) -> str:
        self._count += 1
        return f"{self._device_id}-{self._count}"

    def _add(
        self, frame: SendFrame, key: str, conversation_id: str, content: str, change: EventKind | None, target: str
    ) -> str:
        pending = Pending(
            frame=frame,
            conversation_id=conversation_id,
            idempotency_key=key,
            content=content,
            change=change,
            target=target,
        )
        self.pending[key] = pending
        return key

    # --- coming and going --------------------------------------------------------------------------------------------

    def take(self, now: float) -> list[Pending]:
        """Whatever the window and the learned pace let through; it is on the way now."""
        taken = []
        for pending in self._waiting():
            if self._on_the_way >= self._habits.window or now < self._next_at:
                break
            if now < pending.due_at:
                continue
            pending.attempts += 1
            pending.on_the_way = True
            pending.due_at = now + self._habits.retry_seconds
            self._on_the_way += 1
            self._next_at = now + self._period
            taken.append(pending)
        return taken

    def _waiting(self) -> Iterator[Pending]:
        """Whatever nothing else has to go before, as long as what is given is taken."""
        if self._on_the_way == len(self.pending):
            return
        held: set[str] = set()
        for pending in self.pending.values():
            if pending.on_the_way or pending.conversation_id in held:
                continue
            yield pending
            if not pending.on_the_way:
                held.add(pending.conversation_id)

    def requeue(self) -> None:
        """The connection is new: everything goes again."""
        for pending in self.pending.values():
            self._put_back(pending, 0.0)

    def requeue_due(self, now: float) -> None:
        """What has waited for its answer long enough goes again."""
        for pending in self.pending.values():
            if pending.on_the_way and now >= pending.due_at:
                self._put_back(pending, now)

    def _put_back(self, pending: Pending, due_at: float) -> None:
        self._on_the_way -= pending.on_the_way
        pending.on_the_way = False
        pending.due_at = due_at

    def settle(self, key: str) -> Pending | None:
        """Its fate is known. None where it was known already."""
        pending = self.pending.pop(key, None)
        if pending is not None:
            self._on_the_way -= pending.on_the_way
        return pending

    def postpone(self, key: str, wait: float, now: float, *, slow_down: bool) -> None:
        """The server asked for this one again later; `slow_down`: and for fewer of them."""
        self._put_back(self.pending[key], now + wait)
        if slow_down:
            # One token's time, so that the bucket is met once and not once for each message behind it.
            self._period = max(self._period, min(1.0, wait * 1.1))
            self._next_at = max(self._next_at, now + wait)

    def deadline(self) -> float:
        """When something is due to go; infinity where nothing is."""
        times = [pending.due_at for pending in self.pending.values() if pending.on_the_way]
        if self._on_the_way < self._habits.window:
            times.extend(max(pending.due_at, self._next_at) for pending in self._waiting())
        return min(times, default=float("inf"))

    def has_any(self, conversation_id: str) -> bool:
        """Is the fate of something said there not known yet?"""
        return any(pending.conversation_id == conversation_id for pending in self.pending.values())
