"""A member's own order of things in a conversation: archived, pinned, muted. Nobody else sees it."""

from __future__ import annotations

import msgspec
from litestar import patch
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from protocol import codec, frames, records
from protocol.errors import ErrorCode
from workers.rest.access import shape_guard, user_guard
from workers.rest.conversations import not_found
from workers.rest.desk import DeskDependency, now_ms
from workers.rest.shapes import CallerRequest, Moment, PathId, clamped, moment_at, ms_of
from workers.store.memberships import OwnSettings


class SettingsChange(msgspec.Struct, frozen=True):
    """What is left out stays. `muted_until`: null ends it."""

    archived: bool | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    muted_until: Moment | UnsetType | None = UNSET


@patch(
    "/v1/conversations/{conversation_id:str}/settings",
    guards=[user_guard, shape_guard],
    opt={"errors": (ErrorCode.CONVERSATION_NOT_FOUND,)},
    summary="Archive, pin or mute a conversation",
)
async def change_settings(
    request: CallerRequest, conversation_id: PathId, data: JSONBody[SettingsChange], desk: DeskDependency
) -> OwnSettings:
    """200 with the settings as they are then; the caller's devices get a `conversation_update`."""
    user_id, now = request.user.user, now_ms()
    values: dict[str, object] = {}
    events = []
    if not isinstance(data.archived, UnsetType):
        values["archived"] = True if data.archived else None
        events.append(frames.ConversationEvent.ARCHIVED)
    if not isinstance(data.pinned, UnsetType):
        values["pinned_at"] = moment_at(now) if data.pinned else None
        events.append(frames.ConversationEvent.PINNED)
    if not isinstance(data.muted_until, UnsetType):
        values["muted_until"] = None if data.muted_until is None else clamped(data.muted_until)
        events.append(frames.ConversationEvent.MUTED)
    settings = await desk.store.memberships.arrange(conversation_id, user_id, values)
    if settings is None:
        raise not_found()
    for event in events:
        frame = _update(conversation_id, event, settings, now)
        await desk.broker.signal_user(user_id, records.Tell(msgspec.Raw(frame)))
    return settings


def _update(conversation_id: str, event: frames.ConversationEvent, settings: OwnSettings, now: int) -> bytes:
    payload = frames.ConversationUpdatePayload(
        conversation_id=conversation_id,
        event=event,
        version=now,
        muted_until=0 if settings.muted_until is None else ms_of(settings.muted_until),
        pinned=settings.pinned,
        archived=settings.archived,
    )
    return codec.JSON.encode(frames.ConversationUpdate(payload=payload))
