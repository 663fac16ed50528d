"""The registry of agents: the administrator's to change, everybody's to look through.

An agent's account is made with it, so that it can be in conversations. A user is shown what an agent is good for, not
where it runs.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from litestar import Response, delete, get, patch, post
from litestar.params import JSONBody, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from protocol.errors import ErrorCode
from protocol.models import AGENT_PREFIX, Agent, AgentKind, AgentStatus, User, UserStatus
from protocol.webhooks import SECRET_BYTES, secret_of
from workers.agents.classes import class_names
from workers.agents.registry import Registry
from workers.rest.access import actor_guard, admin_guard, shape_guard
from workers.rest.accounts import Deletion, end_account
from workers.rest.desk import Desk, DeskDependency, now_ms
from workers.rest.errors import RestError
from workers.rest.shapes import CallerRequest, Limit, Listing, PathId, moment_at
from workers.rest.users import AvatarUrl, Name
from workers.store.agents import DefaultTaken, Sought

if TYPE_CHECKING:
    from collections.abc import Mapping

CONCURRENCY_LIMIT: Final = 1000
LONGEST_SECONDS: Final = 300
Capability = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_.-]{0,63}\Z")]
Capabilities = Annotated[list[Capability], Meta(max_length=32)]
Description = Annotated[str, Meta(max_length=1000)]
AgentUrl = Annotated[str, Meta(max_length=2048, pattern=r"\Ahttps?://[!-~]+\Z")]
Handler = Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9_-]{0,63}\Z")]
Concurrency = Annotated[int, Meta(ge=1, le=CONCURRENCY_LIMIT)]
TimeoutSeconds = Annotated[float, Meta(ge=0.1, le=LONGEST_SECONDS)]
CapabilityQuery = Annotated[str | None, QueryParameter(pattern=r"\A[a-z0-9][a-z0-9_.-]{0,63}\Z", required=False)]
StatusQuery = Annotated[AgentStatus | None, QueryParameter(name="status", required=False)]
TextQuery = Annotated[str | None, QueryParameter(pattern=r"\A[^\x00-\x1f\x7f]{1,100}\Z", required=False)]
Cursor = Annotated[str | None, QueryParameter(pattern=r"\A[A-Za-z0-9_.:-]{1,64}\Z", required=False)]


class NewAgent(msgspec.Struct, frozen=True, kw_only=True):
    """A `webhook` needs a `url`, a `python` agent a `handler`; a `websocket` agent logs in with its own token."""

    name: Name
    description: Description = ""
    kind: AgentKind
    capabilities: Capabilities = []
    status: AgentStatus = AgentStatus.ENABLED
    is_default: bool = False
    url: AgentUrl | UnsetType = UNSET
    handler: Handler | UnsetType = UNSET
    concurrency: Concurrency = 10
    timeout_seconds: TimeoutSeconds = 30.0
    avatar_url: AvatarUrl | UnsetType = UNSET


class AgentChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is left out stays."""

    name: Name | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    capabilities: Capabilities | UnsetType = UNSET
    status: AgentStatus | UnsetType = UNSET
    is_default: bool | UnsetType = UNSET
    url: AgentUrl | UnsetType = UNSET
    handler: Handler | UnsetType = UNSET
    concurrency: Concurrency | UnsetType = UNSET
    timeout_seconds: TimeoutSeconds | UnsetType = UNSET


class CreatedAgent(msgspec.Struct, frozen=True):
    """`secret`: signs the calls of a webhook (Standard Webhooks); it is shown here and never again."""

    agent: Agent
    secret: str | UnsetType = UNSET


@post(
    "/v1/agents",
    guards=[admin_guard, shape_guard],
    opt={"errors": (ErrorCode.CONFLICT,)},
    summary="Register an agent",
)
async def create_agent(data: JSONBody[NewAgent], desk: DeskDependency) -> CreatedAgent:
    """201 with the agent, and the secret of a webhook. 409 `conflict` where another became the default meanwhile."""
    now = moment_at(now_ms())
    agent = Agent(
        agent_id=desk.new_id(AGENT_PREFIX.removesuffix("_")),
        name=data.name,
        description=data.description,
        kind=data.kind,
        status=data.status,
        capabilities=list(dict.fromkeys(data.capabilities)),
        is_default=data.is_default,
        url=data.url,
        handler=data.handler,
        concurrency=data.concurrency,
        timeout_seconds=data.timeout_seconds,
        created_at=now,
        updated_at=now,
    )
    await _check(desk, agent.kind, agent.url, agent.handler)
    account = User(
        user_id=agent.agent_id,
        phone=None,
        email=None,
        name=agent.name,
        avatar_url=data.avatar_url,
        created_at=now,
        status=UserStatus.OFFLINE,
    )
    await desk.store.users.create(account)
    secret = _new_secret() if agent.kind is AgentKind.WEBHOOK else ""
    try:
        await desk.store.agents.create(agent, secret)
    except DefaultTaken:
        raise _taken() from None
    return CreatedAgent(agent, secret or UNSET)


@get(
    "/v1/agents",
    guards=[actor_guard, shape_guard],
    opt={"query": ("capability", "status", "text", "cursor", "limit")},
    summary="Look through the agents",
)
async def list_agents(
    request: CallerRequest,
    desk: DeskDependency,
    capability: CapabilityQuery = None,
    agent_status: StatusQuery = None,
    text: TextQuery = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Listing[Agent]:
    """By id, oldest first. `text`: somewhere in name or description. Users are not shown `url` and `handler`."""
    agents, more = await desk.store.agents.page(Sought(capability, agent_status, text), cursor, limit)
    return Listing([_shown(agent, request) for agent in agents], more)


@get(
    "/v1/agents/{agent_id:str}",
    guards=[actor_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Read an agent",
)
async def read_agent(request: CallerRequest, agent_id: PathId, desk: DeskDependency) -> Agent:
    """404 `not_found` for an unknown id."""
    agent = await _registry(desk).get(agent_id)
    if agent is None:
        raise _unknown()
    return _shown(agent, request)


@patch(
    "/v1/agents/{agent_id:str}",
    guards=[admin_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND, ErrorCode.CONFLICT)},
    summary="Change an agent",
)
async def change_agent(agent_id: PathId, data: JSONBody[AgentChange], desk: DeskDependency) -> Agent:
    """The agent as it is then; every router heeds it at once. A disabled agent is not asked any more."""
    agent = await desk.store.agents.get(agent_id)
    if agent is None:
        raise _unknown()
    given = {field: value for field, value in msgspec.structs.asdict(data).items() if value is not UNSET}
    changed = msgspec.structs.replace(agent, **given)
    await _check(desk, changed.kind, changed.url, changed.handler)
    return await _change(desk, agent_id, msgspec.to_builtins(given))


@post(
    "/v1/agents/{agent_id:str}/secret",
    guards=[admin_guard, shape_guard],
    opt={"errors": (ErrorCode.NOT_FOUND, ErrorCode.CONFLICT)},
    summary="Give a webhook agent a new secret",
)
async def renew_secret(agent_id: PathId, desk: DeskDependency) -> CreatedAgent:
    """201 with the agent and its new secret; the old one signs nothing any more. 409 `conflict` for other kinds."""
    agent = await desk.store.agents.get(agent_id)
    if agent is None:
        raise _unknown()
    if agent.kind is not AgentKind.WEBHOOK:
        raise RestError(ErrorCode.CONFLICT, "only the calls of a webhook are signed")
    secret = _new_secret()
    return CreatedAgent(await _change(desk, agent_id, {"secret": secret}), secret)


@delete(
    "/v1/agents/{agent_id:str}",
    guards=[admin_guard, shape_guard],
    status_code=202,
    opt={"errors": (ErrorCode.NOT_FOUND,)},
    summary="Delete an agent",
)
async def delete_agent(agent_id: PathId, desk: DeskDependency) -> Response[Deletion]:
    """202: nobody asks it any more, and its account is deleted as a person's is. 404 for an unknown id."""
    if await desk.store.agents.get(agent_id) is None:
        raise _unknown()
    registry = _registry(desk)
    await registry.hold(agent_id)
    ended = await end_account(desk, agent_id)
    await desk.store.agents.delete(agent_id)
    await registry.hold(agent_id)
    return Response(ended, status_code=202)


async def _change(desk: Desk, agent_id: str, values: Mapping[str, Any]) -> Agent:
    registry = _registry(desk)
    await registry.hold(agent_id)
    try:
        changed = await desk.store.agents.change(agent_id, values, moment_at(now_ms()))
    except DefaultTaken:
        raise _taken() from None
    await registry.hold(agent_id)
    if changed is None:
        raise _unknown()
    return changed


async def _check(desk: Desk, kind: AgentKind, url: str | UnsetType, handler: str | UnsetType) -> None:
    """Does it say how it is reached, and only that, and may we go there? Raises RestError."""
    if (kind is AgentKind.WEBHOOK) is isinstance(url, UnsetType):
        raise RestError(ErrorCode.VALIDATION_FAILED, "url: a webhook has one, and nobody else")
    if (kind is AgentKind.PYTHON) is isinstance(handler, UnsetType):
        raise RestError(ErrorCode.VALIDATION_FAILED, "handler: a python agent has one, and nobody else")
    if not isinstance(url, UnsetType) and (refused := await desk.egress.check(url)):
        raise RestError(ErrorCode.VALIDATION_FAILED, f"url: {refused}")
    if not isinstance(handler, UnsetType) and handler not in class_names(desk.settings):
        raise RestError(ErrorCode.VALIDATION_FAILED, "handler: no class of this name here (TRIREME_AGENT_CLASSES)")


def _shown(agent: Agent, request: CallerRequest) -> Agent:
    if request.user.user_id is None:
        return agent
    return msgspec.structs.replace(agent, url=UNSET, handler=UNSET)


def _registry(desk: Desk) -> Registry:
    return Registry(desk.store, desk.broker)


def _new_secret() -> str:
    return secret_of(secrets.token_bytes(SECRET_BYTES))


def _unknown() -> RestError:
    return RestError(ErrorCode.NOT_FOUND, "no such agent")


def _taken() -> RestError:
    return RestError(ErrorCode.CONFLICT, "another agent was made the default at the same moment")
