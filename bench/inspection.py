"""The end of a replayed room: what the HTTP API shows, what the log amounts to and what the room has done are the same.

Called by the replay when everybody has everything. Pages it reads go into the ledger too.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Final

import trio

from bench import journal
from protocol.models import EventKind, Role

if TYPE_CHECKING:
    from bench.folds import GroupState
    from bench.room import Room

HIDERS: Final = 5
"""So many of those who have deleted something for themselves read the whole log again, like the owner."""
ALL_PAGES: Final = 100


async def inspect(room: Room) -> list[str]:
    """What is not as it should be. Raises ApiError."""
    state = room.shared.ledger.group(room.conversation_id)
    found = [*_compare_log(room, state), *await _compare_conversation(room, state)]
    found += await _compare_people(room, state)
    found += await _compare_settings(room)
    hiders = room.pastimes.hiders[:HIDERS] if room.pastimes is not None else []
    for person in {room.owner, *hiders}:
        found += await _read_pages(room, person, ALL_PAGES)
    found += await _read_pages(room, list(room.members)[-1], 1)
    return [f"{room.transcript.name}: {text}" for text in found]


def _differ(what: str, shown: object, expected: object) -> list[str]:
    return [] if shown == expected else [f"{what}: {shown}, not {expected}"]


def _compare_log(room: Room, state: GroupState) -> list[str]:
    """Every step that the room was told has happened is an entry of the log, once, and there is no other."""
    users = room.users
    roles = {users[person]: room.roles.get(person, Role.MEMBER) for person in room.members}
    found = _differ("members in the log", list(state.participants.items()), list(roles.items()))
    found += _differ("title in the log", state.title, room.title)
    found += _differ("banned in the log", state.banned, {users[person] for person in room.banned})
    silenced = {user_id for user_id, until in state.silenced.items() if until}
    found += _differ("silenced in the log", silenced, {users[person] for person in room.silenced})
    if room.pastimes is not None:
        done = room.pastimes.counts
        for kind, times in (
            (EventKind.RENAMED, done.renamed),
            (EventKind.ROLES, done.roles),
            (EventKind.SILENCED, done.silenced),
            (EventKind.BANNED, done.banned),
            (EventKind.UNBANNED, done.unbanned + room.counts.refused_banned),
            (EventKind.LEFT, room.counts.left),
            (EventKind.ADDED, room.counts.joined - 1),
        ):
            found += _differ(f"{kind.value} entries in the log", state.kinds[kind], times)
    return found


async def _compare_conversation(room: Room, state: GroupState) -> list[str]:
    shown = await room.shared.api.overview(room.conversation_id, room.tokens[room.owner])
    found = _differ("participants of the API", shown["participants"], list(state.participants))
    found += _differ("title of the API", shown.get("title", ""), state.title)
    head = room.shared.ledger.head(room.conversation_id)
    return found + _differ("last sequence of the API", shown["last_sequence_number"], head)


async def _compare_people(room: Room, state: GroupState) -> list[str]:
    api, token = room.shared.api, room.tokens[room.owner]
    path = f"/v1/conversations/{room.conversation_id}"
    people = await api.items(f"{path}/participants", token)
    roles = {person["user_id"]: Role(person["role"]) for person in people}
    found = _differ("roles of the API", roles, state.participants)
    silenced = {
        person["user_id"]: _epoch_ms(person["silenced_until"]) for person in people if "silenced_until" in person
    }
    expected = {user_id: until for user_id, until in state.silenced.items() if until}
    found += _differ("silenced people of the API", silenced, expected)
    banned = {person["user_id"] for person in await api.items(f"{path}/bans", token)}
    return found + _differ("banned people of the API", banned, state.banned)


async def _compare_settings(room: Room) -> list[str]:
    """What members have arranged for themselves stands as the server last confirmed it."""
    if room.pastimes is None:
        return []
    found = []
    for person, settings in room.pastimes.arranged.items():
        if person in room.members:
            shown = await room.shared.api.overview(room.conversation_id, room.tokens[person])
            for name, value in settings.items():
                is_set = shown[name] is not None if name == "muted_until" else shown[name]
                found += _differ(f"{name} of {room.users[person]}", is_set, bool(value))
    return found


async def _read_pages(room: Room, person: int, pages: int) -> list[str]:
    """The messages as this member reads them: complete; what they look like is for the ledger to judge."""
    asked_at = trio.current_time()
    messages = await room.shared.api.messages(room.conversation_id, room.tokens[person], pages)
    room.shared.ledger.record(
        journal.Looked(
            at=trio.current_time(),
            user_id=room.users[person],
            device_id="api",
            connection=0,
            conversation_id=room.conversation_id,
            asked_at=asked_at,
            messages=messages,
        )
    )
    head = room.shared.ledger.head(room.conversation_id)
    expected = list(range(head, head - len(messages), -1))
    return _differ("messages of the API", [message.sequence_number for message in messages], expected)


def _epoch_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)
