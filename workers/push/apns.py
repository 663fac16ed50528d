"""Kind `apns`: Apple devices by the Apple Push Notification service, HTTP/2 with tokens.

One POST for each job to `/3/device/{token}`: an alert whose text is the app's own (`loc-key`), the badge, the ids;
collapsed by conversation, kept by Apple until it is too old. The provider token is an ES256 JWT that Apple wants
renewed after 20 to 60 minutes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import anyio
import httpx2
import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from workers.push.adapters import Gone, KeyUnfit, Outcome, Refused, Retry, outcome_of
from workers.push.web_push import topic_of

if TYPE_CHECKING:
    from protocol.records import PushJob
    from workers.store.push_tokens import PushToken

SERVICE: Final = "https://api.push.apple.com"
LOC_KEY: Final = "NEW_MESSAGE"
"""The app's `Localizable.strings` has the text; none of it is ours, none of it is in the push."""
_RENEW_SECONDS: Final = 2700.0
_STALE_TOKEN: Final = frozenset(("ExpiredProviderToken", "InvalidProviderToken"))


class _Reason(msgspec.Struct, frozen=True):
    reason: str = ""


_reason = msgspec.json.Decoder(_Reason)


class ApnsAdapter:
    """See `adapters.Adapter`."""

    kind = "apns"

    def __init__(
        self,
        client: httpx2.AsyncClient,
        private_key: str,
        key_id: str,
        team_id: str,
        topic: str,
        service: str = SERVICE,
    ) -> None:
        """`client` speaks HTTP/2. `private_key`: the PEM of a .p8 file. `topic`: the bundle id. Raises KeyUnfit."""
        try:
            self._key = ECKey.import_key(private_key)
            if not self._key.is_private or self._key.curve_name != "P-256":
                raise KeyUnfit("it is no P-256 private key")
        except (JoseError, ValueError) as error:
            raise KeyUnfit("it is no P-256 private key in PEM form") from error
        self._client = client
        self._key_id = key_id
        self._team_id = team_id
        self._topic = topic
        self._service = service
        self._token = ""
        self._renew_at = 0.0

    def provider(self, token: PushToken) -> str:
        """See `Adapter.provider`."""
        return self.kind

    async def send(self, token: PushToken, job: PushJob, ttl_seconds: int) -> Outcome:
        """See `Adapter.send`."""
        now_seconds = time.time_ns() // 1_000_000_000
        headers = {
            "authorization": f"bearer {self._provider_token(now_seconds)}",
            "apns-topic": self._topic,
            "apns-push-type": "alert",
            "apns-priority": "10",
            "apns-expiration": str(now_seconds + ttl_seconds),
            "apns-collapse-id": topic_of(job.conversation_id),
            "content-type": "application/json",
        }
        body = msgspec.json.encode(payload(job))
        try:
            answer = await self._client.post(f"{self._service}/3/device/{token.address}", content=body, headers=headers)
        except httpx2.TransportError as error:
            return Retry(type(error).__name__)
        return self._judge(answer)

    def _judge(self, answer: httpx2.Response) -> Outcome:
        reason = _reason_of(answer)
        if reason in _STALE_TOKEN:
            self._renew_at = 0.0
            return Retry(reason)
        outcome = outcome_of(answer.status_code, answer.headers)
        # Only 410 is about the device. 400 may be a wrong topic or environment: nobody's token is forgotten for it.
        if isinstance(outcome, Gone | Refused) and answer.status_code != 410:
            return Refused(f"status {answer.status_code} {reason}".rstrip())
        return outcome

    def _provider_token(self, now_seconds: int) -> str:
        if anyio.current_time() >= self._renew_at:
            header = {"alg": "ES256", "kid": self._key_id}
            claims = {"iss": self._team_id, "iat": now_seconds}
            self._token = jwt.encode(header, claims, self._key, algorithms=["ES256"])
            self._renew_at = anyio.current_time() + _RENEW_SECONDS
        return self._token


def payload(job: PushJob) -> dict[str, object]:
    """What the device gets. `mutable-content`: the app may fetch and decrypt what there is before it shows anything."""
    aps = {
        "alert": {"loc-key": LOC_KEY},
        "badge": job.badge,
        "sound": "default",
        "mutable-content": 1,
        "thread-id": job.conversation_id,
    }
    return {"aps": aps, **msgspec.structs.asdict(job)}


def _reason_of(answer: httpx2.Response) -> str:
    """Apple's own word for an error, "" where there is none."""
    if answer.is_success:
        return ""
    try:
        return _reason.decode(answer.content).reason
    except msgspec.DecodeError:
        return ""
