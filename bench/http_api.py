"""The HTTP API as the replay and the system tests use it: users, tokens, groups, membership. Refusals are values.

Runs on trio and asyncio alike.
"""

from __future__ import annotations

import secrets
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import httpx2
import msgspec

from protocol.errors import ErrorCode
from protocol.models import Role, StoredMessage

if TYPE_CHECKING:
    from types import TracebackType

REQUEST_SECONDS: Final = 30.0
CONNECTIONS: Final = 16
ATTEMPTS: Final = 4


class ApiError(Exception):
    """The API did not answer, or not as documented."""


class Refusal(msgspec.Struct, frozen=True):
    """An error body `{error: {code, message}}` with its HTTP status."""

    status: int
    code: ErrorCode
    message: str


class _Error(msgspec.Struct):
    code: ErrorCode
    message: str


class _ErrorBody(msgspec.Struct):
    error: _Error


class HttpApi:
    """One keep-alive client of the API. Use it with `async with`."""

    def __init__(self, rest_url: str, admin_token: str) -> None:
        limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        self._client = httpx2.AsyncClient(base_url=rest_url, timeout=REQUEST_SECONDS, limits=limits)
        self._admin_token = admin_token
        self._name = secrets.token_hex(8)
        self._numbers = count(1)

    async def __aenter__(self) -> HttpApi:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def create_user(self, name: str) -> str:
        """The new user's id. Raises ApiError."""
        user: str = (await self._demand("POST", "/v1/users", self._admin_token, {"name": name}))["_id"]
        return user

    async def create_token(self, user_id: str, device_id: str) -> str:
        """Raises ApiError."""
        body = {"user_id": user_id, "device_id": device_id}
        token: str = (await self._demand("POST", "/v1/tokens", self._admin_token, body))["access_token"]
        return token

    async def create_conversation(self, kind: str, participants: list[str], token: str) -> str:
        """The id of a new `group`, or of the `1:1` conversation of these two. Raises ApiError."""
        body = {"type": kind, "participants": participants}
        conversation: str = (await self._demand("POST", "/v1/conversations", token, body))["_id"]
        return conversation

    async def add_participants(self, conversation_id: str, user_ids: list[str], token: str) -> Refusal | None:
        """None: they are in. Raises ApiError."""
        path = f"/v1/conversations/{conversation_id}/participants"
        answer = await self.call("POST", path, token, {"user_ids": user_ids})
        return answer if isinstance(answer, Refusal) else None

    async def remove_participant(self, conversation_id: str, user_id: str, token: str) -> Refusal | None:
        """None: the user is out. Raises ApiError."""
        answer = await self.call("DELETE", f"/v1/conversations/{conversation_id}/participants/{user_id}", token)
        return answer if isinstance(answer, Refusal) else None

    async def rename(self, conversation_id: str, title: str, token: str) -> Refusal | None:
        """None: that is its title. Raises ApiError, as all of these do."""
        return await self._change("PATCH", f"/v1/conversations/{conversation_id}", token, {"title": title})

    async def set_role(self, conversation_id: str, user_id: str, role: Role, token: str) -> Refusal | None:
        """None: that is the role."""
        path = f"/v1/conversations/{conversation_id}/participants/{user_id}"
        return await self._change("PATCH", path, token, {"role": role.value})

    async def silence(self, conversation_id: str, user_id: str, until: str | None, token: str) -> Refusal | None:
        """None: the member is silenced until then (RFC 3339), or may speak again."""
        path = f"/v1/conversations/{conversation_id}/participants/{user_id}"
        return await self._change("PATCH", path, token, {"silenced_until": until})

    async def ban(self, conversation_id: str, user_id: str, token: str) -> Refusal | None:
        """None: the user is out and stays out."""
        return await self._change("PUT", f"/v1/conversations/{conversation_id}/bans/{user_id}", token)

    async def unban(self, conversation_id: str, user_id: str, token: str) -> Refusal | None:
        """None: the user may be added again."""
        return await self._change("DELETE", f"/v1/conversations/{conversation_id}/bans/{user_id}", token)

    async def arrange(self, conversation_id: str, settings: dict[str, object], token: str) -> Refusal | None:
        """None: the caller's own settings (archived, pinned, muted_until) are these."""
        return await self._change("PATCH", f"/v1/conversations/{conversation_id}/settings", token, settings)

    async def _change(self, method: str, path: str, token: str, body: object = None) -> Refusal | None:
        answer = await self.call(method, path, token, body)
        return answer if isinstance(answer, Refusal) else None

    async def overview(self, conversation_id: str, token: str) -> dict[str, Any]:
        """The conversation as the caller sees it. Raises ApiError, also where the caller is not in it."""
        return await self._demand("GET", f"/v1/conversations/{conversation_id}", token)

    async def items(self, path: str, token: str, pages: int = 100) -> list[dict[str, Any]]:
        """The items of a list, page by page. Raises ApiError."""
        items: list[dict[str, Any]] = []
        cursor = ""
        for _ in range(pages):
            page = await self._demand("GET", f"{path}?limit=100{cursor}", token)
            items += page["items"]
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        return items

    async def messages(self, conversation_id: str, token: str, pages: int) -> list[StoredMessage]:
        """What the caller may see, newest first: so many pages of 100. Raises ApiError."""
        items = await self.items(f"/v1/conversations/{conversation_id}/messages", token, pages)
        return msgspec.convert(items, list[StoredMessage])

    async def call(self, method: str, path: str, token: str, body: object = None) -> dict[str, Any] | Refusal:
        """The answer's object ({} where it has no body), or the refusal.

        What got no answer, or one that promises nothing (503), is asked again with the same `Idempotency-Key`.
        Raises ApiError.
        """
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": f"{self._name}-{next(self._numbers)}"}
        attempt = 1
        while True:
            try:
                answer = await self._client.request(method, path, json=body, headers=headers)
            except httpx2.TransportError as error:
                if attempt == ATTEMPTS:
                    raise ApiError(f"{method} {path}: {error!r}") from error
            else:
                if answer.status_code != 503 or attempt == ATTEMPTS:
                    return _read(method, path, answer)
            attempt += 1

    async def _demand(self, method: str, path: str, token: str, body: object = None) -> dict[str, Any]:
        answer = await self.call(method, path, token, body)
        if isinstance(answer, Refusal):
            raise ApiError(f"{method} {path}: {answer.status} {answer.code.value} {answer.message}")
        return answer


def _read(method: str, path: str, answer: httpx2.Response) -> dict[str, Any] | Refusal:
    try:
        if answer.status_code < 300:
            return msgspec.json.decode(answer.content or b"{}", type=dict[str, Any])
        refused = msgspec.json.decode(answer.content, type=_ErrorBody).error
        return Refusal(answer.status_code, refused.code, refused.message)
    except msgspec.DecodeError as error:
        raise ApiError(f"{method} {path}: {answer.status_code} {answer.text[:200]}") from error
