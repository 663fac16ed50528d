"""Kind `fcm`: Android and web apps by Firebase Cloud Messaging, HTTP v1.

One POST for each job to `/v1/projects/{project}/messages:send`: a data message (the app decides what it shows) of high
priority, collapsed by conversation. We are a service account: a signed assertion (RFC 7523) buys an access token, an
hour each.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Final

import anyio
import httpx2
import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey
from msgspec import Meta

from workers.push.adapters import Delivered, Gone, KeyUnfit, Outcome, Refused, Retry, outcome_of, retry_after

if TYPE_CHECKING:
    from protocol.records import PushJob
    from workers.store.push_tokens import PushToken

SERVICE: Final = "https://fcm.googleapis.com"
_SCOPE: Final = "https://www.googleapis.com/auth/firebase.messaging"
_GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_ASSERTION_SECONDS: Final = 3600
_EARLY_SECONDS: Final = 120.0
"""So long before its end an access token is replaced: a try with it ends in time."""
_FORM: Final = "application/x-www-form-urlencoded"
_Text = Annotated[str, Meta(min_length=1)]


class Credentials(msgspec.Struct, frozen=True):
    """What a service account's JSON file says, as far as it is needed."""

    client_email: _Text
    private_key: _Text
    project_id: Annotated[str, Meta(pattern=r"\A[a-z0-9:.-]{1,64}\Z")]
    token_uri: Annotated[str, Meta(pattern=r"\Ahttps?://\S+\Z")] = "https://oauth2.googleapis.com/token"


class _Access(msgspec.Struct, frozen=True):
    access_token: str
    expires_in: float


class _Detail(msgspec.Struct, frozen=True):
    error_code: str = msgspec.field(name="errorCode", default="")


class _Error(msgspec.Struct, frozen=True):
    details: list[_Detail] = []


class _Failure(msgspec.Struct, frozen=True):
    error: _Error


class _NoAccess(Exception):
    """The token service did not give us one; carries what became of the try."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


_access = msgspec.json.Decoder(_Access)
_failure = msgspec.json.Decoder(_Failure)


class FcmAdapter:
    """See `adapters.Adapter`."""

    kind = "fcm"

    def __init__(self, client: httpx2.AsyncClient, credentials: str, service: str = SERVICE) -> None:
        """`credentials`: the JSON of a service account. Raises KeyUnfit."""
        try:
            self._account = msgspec.json.decode(credentials, type=Credentials)
            self._key = RSAKey.import_key(self._account.private_key)
        except (msgspec.DecodeError, JoseError, ValueError) as error:
            raise KeyUnfit(f"it is no JSON of a service account: {type(error).__name__}") from error
        self._client = client
        self._url = f"{service}/v1/projects/{self._account.project_id}/messages:send"
        self._bearer = ""
        self._good_until = 0.0
        self._asking = anyio.Lock()

    def provider(self, token: PushToken) -> str:
        """See `Adapter.provider`."""
        return self.kind

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """See `Adapter.send`."""
        try:
            bearer = await self._token()
            answer = await self._client.post(
                self._url,
                content=msgspec.json.encode({"message": message(token, job, ttl_seconds)}),
                headers={"authorization": f"Bearer {bearer}", "content-type": "application/json"},
            )
        except _NoAccess as error:
            return error.outcome
        except httpx2.TransportError as error:
            return Retry(type(error).__name__)
        return self._judge(answer)

    def _judge(self, answer: httpx2.Response) -> Outcome:
        if answer.status_code == 401:
            self._good_until = 0.0
            return Retry("status 401")
        code = _code_of(answer)
        if code == "UNREGISTERED":
            return Gone()
        outcome = outcome_of(answer.status_code, answer.headers)
        # 404 without that code is about the project: no reason to forget anybody's token.
        if isinstance(outcome, Gone | Refused):
            return Refused(f"status {answer.status_code} {code}".rstrip())
        return outcome

    async def _token(self) -> str:
        """The access token, asked for once by whoever comes first. Raises _NoAccess, TransportError."""
        async with self._asking:
            if anyio.current_time() < self._good_until:
                return self._bearer
            account = self._account
            now = time.time_ns() // 1_000_000_000
            claims = {
                "iss": account.client_email,
                "scope": _SCOPE,
                "aud": account.token_uri,
                "iat": now,
                "exp": now + _ASSERTION_SECONDS,
            }
            assertion = jwt.encode({"alg": "RS256", "typ": "JWT"}, claims, self._key, algorithms=["RS256"])
            answer = await self._client.post(
                account.token_uri,
                content=f"grant_type={_GRANT}&assertion={assertion}".replace(":", "%3A"),
                headers={"content-type": _FORM},
            )
            outcome = outcome_of(answer.status_code, answer.headers)
            if not isinstance(outcome, Delivered):
                # Whatever it is, it is not about this device.
                reason = f"the token service says {answer.status_code}"
                raise _NoAccess(Retry(reason, retry_after(answer.headers)))
            try:
                access = _access.decode(answer.content)
            except msgspec.DecodeError:
                raise _NoAccess(Retry("the token service says nothing we understand")) from None
            self._bearer = access.access_token
            self._good_until = anyio.current_time() + access.expires_in - _EARLY_SECONDS
            return self._bearer


def message(token: PushToken, job: PushJob, ttl_seconds: int) -> dict[str, object]:
    """The `message` of the request; FCM's data values are text."""
    return {
        "token": token.address,
        "data": {name: str(value) for name, value in msgspec.structs.asdict(job).items()},
        "android": {"collapse_key": job.conversation_id, "priority": "high", "ttl": f"{ttl_seconds}s"},
    }


def _code_of(answer: httpx2.Response) -> str:
    """FCM's own code of an error, "" where there is none."""
    if answer.is_success:
        return ""
    try:
        return next((detail.error_code for detail in _failure.decode(answer.content).error.details), "")
    except msgspec.DecodeError:
        return ""
