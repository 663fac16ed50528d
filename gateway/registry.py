"""Who is connected where, as all processes see it: `connection:{user}`, `presence:{user}`, `users:{instance}` in Redis.

Called by `broker.py`. The three steps are Lua scripts, since each reads before it writes and gateways race for a
device; the scripts lie in `lua/`, a function here for each. It never decides who may connect.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.wire import pack
from protocol import keys
from protocol.codec import encode_value
from protocol.models import ConnectionRegistry, Presence, UserStatus

if TYPE_CHECKING:
    from collections.abc import Sequence


class Attachment(msgspec.Struct, frozen=True, gc=False):
    """One authenticated connection: what its registry entry says. `since_ms` is the epoch time of its
    authentication."""

    user_id: str
    device_id: str
    connection: int
    since_ms: int


def _script(name: str) -> str:
    return files("gateway").joinpath("lua", f"{name}.lua").read_text()


class RegistryScripts:
    """The packed commands for one instance. EVAL, not EVALSHA: an emptied Redis has forgotten every script."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._users: Final = keys.users(instance_id)
        self._attach: Final = _script("attach")
        self._detach: Final = _script("detach")
        self._refresh: Final = _script("refresh")

    def _entry(self, attachment: Attachment) -> bytes:
        return encode_value(
            ConnectionRegistry(
                instance_id=self._instance_id,
                connection_id=str(attachment.connection),
                timestamp=attachment.since_ms,
            )
        )

    def attach(self, attachment: Attachment) -> bytes:
        """The reply is the JSON of the entry that was replaced, or None."""
        return pack(
            "EVAL",
            self._attach,
            4,
            keys.connection(attachment.user_id),
            keys.presence(attachment.user_id),
            self._users,
            keys.SEEN,
            attachment.device_id,
            self._entry(attachment),
            _presence(UserStatus.ONLINE, attachment.since_ms),
            keys.CONNECTION_TTL_SECONDS,
            keys.PRESENCE_TTL_SECONDS,
            attachment.user_id,
            attachment.since_ms,
            keys.SEEN_LIMIT,
        )

    def detach(self, attachment: Attachment, wall_ms: int) -> bytes:
        """The reply is 1 when the user has no device left anywhere."""
        return pack(
            "EVAL",
            self._detach,
            4,
            keys.connection(attachment.user_id),
            keys.presence(attachment.user_id),
            self._users,
            keys.SEEN,
            attachment.device_id,
            self._instance_id,
            str(attachment.connection),
            _presence(UserStatus.OFFLINE, wall_ms),
            keys.PRESENCE_TTL_SECONDS,
            attachment.user_id,
            wall_ms,
            keys.SEEN_LIMIT,
        )

    def refresh(self, attachments: Sequence[Attachment], wall_ms: int) -> bytes:
        """All of one user's connections here; `attachments` is not empty."""
        user_id = attachments[0].user_id
        fields: list[str | bytes] = []
        for attachment in attachments:
            fields += (attachment.device_id, self._entry(attachment))
        return pack(
            "EVAL",
            self._refresh,
            3,
            keys.connection(user_id),
            keys.presence(user_id),
            self._users,
            _presence(UserStatus.ONLINE, wall_ms),
            keys.CONNECTION_TTL_SECONDS,
            keys.PRESENCE_TTL_SECONDS,
            user_id,
            *fields,
        )


def _presence(status: UserStatus, wall_ms: int) -> bytes:
    return encode_value(Presence(status=status, last_seen=wall_ms))
