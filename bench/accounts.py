"""Users, tokens and conversations for a load, made through the HTTP API as any program would make them.

Called by the load benches. Many requests at a time over a few kept-alive connections; nothing here is timed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx2
import msgspec

if TYPE_CHECKING:
    from protocol.models import ConversationType

AT_ONCE: Final = 16
"""Requests under way: enough to keep REST, worker and database busy, below any of their limits."""
REQUEST_SECONDS: Final = 30.0


class Account(msgspec.Struct, frozen=True):
    """A user with a token for one device."""

    user_id: str
    device_id: str
    token: str


class Community(msgspec.Struct, frozen=True):
    """`members[i]` are the accounts of conversation `conversations[i]`, in the order they were asked for."""

    conversations: list[str]
    members: list[list[Account]]


class SetupError(Exception):
    """The HTTP API refused or did not answer; the message says what."""


def create_community(rest_url: str, admin_token: str, kind: ConversationType, sizes: list[int]) -> Community:
    """One new conversation of `kind` with so many new users for each of `sizes`. Raises SetupError."""

    async def create() -> Community:
        return await _create_community(rest_url, admin_token, kind, sizes)

    return anyio.run(create)


async def _create_community(rest_url: str, admin_token: str, kind: ConversationType, sizes: list[int]) -> Community:
    limiter = anyio.CapacityLimiter(AT_ONCE)
    limits = httpx2.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx2.AsyncClient(base_url=rest_url, timeout=REQUEST_SECONDS, limits=limits) as client:
        accounts: list[list[Account | None]] = [[None] * size for size in sizes]
        conversations: list[str] = [""] * len(sizes)

        async def open_account(group: int, place: int) -> None:
            async with limiter:
                accounts[group][place] = await _open_account(client, admin_token, f"load {group}.{place}")

        async def open_conversation(group: int, members: list[Account]) -> None:
            async with limiter:
                body = {"type": kind.value, "participants": [account.user_id for account in members]}
                conversations[group] = (await _post(client, "/v1/conversations", body, members[0].token))["_id"]

        async with anyio.create_task_group() as tasks:
            for group, size in enumerate(sizes):
                for place in range(size):
                    tasks.start_soon(open_account, group, place)
        opened = [[account for account in members if account is not None] for members in accounts]
        async with anyio.create_task_group() as tasks:
            for group, members in enumerate(opened):
                tasks.start_soon(open_conversation, group, members)
    return Community(conversations, opened)


def create_talks(
    rest_url: str, admin_token: str, agent: dict[str, Any], users: int
) -> tuple[str, list[tuple[Account, str]]]:
    """A new agent, and so many new users with a conversation with it each: its id, and (account, conversation) pairs.
    Raises SetupError."""

    async def create() -> tuple[str, list[tuple[Account, str]]]:
        limiter = anyio.CapacityLimiter(AT_ONCE)
        talks: list[tuple[Account, str]] = []
        async with httpx2.AsyncClient(base_url=rest_url, timeout=REQUEST_SECONDS) as client:
            agent_id: str = (await _post(client, "/v1/agents", agent, admin_token))["agent"]["_id"]

            async def open_talk(number: int) -> None:
                async with limiter:
                    account = await _open_account(client, admin_token, f"asker {number}")
                    body = {"type": "1:1", "participants": [], "agent_id": agent_id}
                    talks.append((account, (await _post(client, "/v1/conversations", body, account.token))["_id"]))

            async with anyio.create_task_group() as tasks:
                for number in range(users):
                    tasks.start_soon(open_talk, number)
        return agent_id, talks

    return anyio.run(create)


async def _open_account(client: httpx2.AsyncClient, admin_token: str, name: str) -> Account:
    user = await _post(client, "/v1/users", {"name": name}, admin_token)
    device_id = "load-1"
    token = await _post(client, "/v1/tokens", {"user_id": user["_id"], "device_id": device_id}, admin_token)
    return Account(user["_id"], device_id, token["access_token"])


async def _post(client: httpx2.AsyncClient, path: str, body: dict[str, Any], token: str) -> dict[str, Any]:
    try:
        answer = await client.post(path, json=body, headers={"Authorization": f"Bearer {token}"})
    except httpx2.HTTPError as error:
        raise SetupError(f"POST {path}: {error!r}") from error
    if answer.status_code >= 300:
        raise SetupError(f"POST {path}: {answer.status_code} {answer.text[:200]}")
    created: dict[str, Any] = answer.json()
    return created
