"""One call of an agent, whatever it is: a Python class of this process, or a webhook.

Called by the runner. *Raises*: nothing for whatever an agent does wrong: `Failure` says it. *Cancellation*: the
agent may have been asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import structlog

from protocol.codec import MAX_CONTENT_BYTES
from protocol.errors import ErrorCode
from protocol.limits import check_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protocol.models import Agent
    from workers.agents.classes import Context, PythonAgent
    from workers.store.agent_tasks import Task

log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """What the agent says; None: nothing."""

    text: str | None


class Failure(NamedTuple):
    """One line about what went wrong. `is_final`: another try would end the same. `is_away`: nobody answered."""

    reason: str
    is_final: bool = False
    is_away: bool = False


class Caller(Protocol):
    """How agents of one kind are asked."""

    async def call(self, agent: Agent, task: Task, context: Context) -> Answer | Failure:
        """Ask once."""


class PythonCaller:
    """Agents whose class is in this process."""

    def __init__(self, agents: Mapping[str, PythonAgent]) -> None:
        """`agents`: handler → instance."""
        self._agents = agents

    async def call(self, agent: Agent, task: Task, context: Context) -> Answer | Failure:
        """See `Caller.call`."""
        found = self._agents.get(str(agent.handler))
        if found is None:
            return Failure(f"no class {agent.handler!r} in this process (TRIREME_AGENT_CLASSES)", is_final=True)
        try:
            text = await found.reply(task.event, context)
        except Exception as error:
            log.warning("agent_raised", agent_id=agent.agent_id, message_id=task.message_id, exc_info=error)
            return Failure(f"the agent raised {type(error).__name__}")
        return judged(text)


def judged(text: object) -> Answer | Failure:
    """Is this something to say? An empty answer is none."""
    if text is None or text == "":
        return Answer(None)
    if not isinstance(text, str):
        return Failure(f"the answer is no text but {type(text).__name__}", is_final=True)
    refused = check_content(text, MAX_CONTENT_BYTES)
    if refused is not None:
        code, message = refused
        return Failure(_TOO_LARGE if code is ErrorCode.TOO_LARGE else message, is_final=True)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Failure("the answer holds a lone surrogate", is_final=True)
    return Answer(text)


_TOO_LARGE: Final = f"the answer is over {MAX_CONTENT_BYTES} bytes"
