"""The echo agent: says what it was told. For trying the system out, and for measuring what comes around an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocol.events import MessageReceivedEvent
    from workers.agents.classes import Context


class Echo:
    """Answers with the content of the message, byte for byte: of an encrypted conversation with its ciphertext."""

    async def reply(self, event: MessageReceivedEvent, context: Context) -> str | None:
        """See `classes.PythonAgent.reply`."""
        return event.content or None
