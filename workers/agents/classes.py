"""Python agents: what such a class looks like, what it is given, and the table of those that this process may run.

A class is named in the settings (`TRIREME_AGENT_CLASSES=support=shop.support:Support,…`), never in a request: the
registry only says which of the names an agent's handler is. An instance lives as long as the role `agents`, and answers
all of its conversations.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Final, Protocol

from workers.settings import PREFIX, SettingError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from protocol.events import MessageReceivedEvent
    from workers.settings import Settings

BUILT_IN: Final = {"echo": "workers.agents.echo:Echo", "retrieval": "workers.agents.retrieval:Retrieval"}
_CLASS: Final = re.compile(r"([a-z][a-z0-9_-]{0,63})=([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


class Context:
    """What an agent may know and do beside the event. `intent`: what the message is about, "" where nobody looked."""

    def __init__(
        self,
        settings: Settings,
        agent_id: str,
        user_id: str,
        intent: str,
        progress: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self.settings = settings
        self.agent_id = agent_id
        self.user_id = user_id
        """Whose conversation with the agent it is."""
        self.intent = intent
        self._progress = progress

    async def progress(self, stage: str, text: str = "") -> None:
        """Tell the conversation how far it is: an `agent_progress` frame, never stored; too many are dropped."""
        await self._progress(stage, text)


class PythonAgent(Protocol):
    """A class of the role `agents`. Constructed without arguments."""

    async def reply(self, event: MessageReceivedEvent, context: Context) -> str | None:
        """The answer to a message, or None for none. It may be asked the same again after a crash: then the first
        answer that was committed stays."""


def class_names(settings: Settings) -> dict[str, str]:
    """Handler → `module:Class`. Raises SettingError."""
    named = dict(BUILT_IN)
    for text in filter(None, (part.strip() for part in settings.agent_classes.split(","))):
        found = _CLASS.fullmatch(text)
        if found is None:
            raise SettingError(f"{PREFIX}AGENT_CLASSES is malformed: {text[:60]!r} is not name=module:Class")
        named[found[1]] = f"{found[2]}:{found[3]}"
    return named


def make(path: str) -> PythonAgent:
    """An instance of `module:Class`. Raises SettingError where there is no such class."""
    module, _, name = path.partition(":")
    try:
        kind: Callable[[], PythonAgent] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"{PREFIX}AGENT_CLASSES: {path} cannot be imported: {error}") from error
    return kind()
