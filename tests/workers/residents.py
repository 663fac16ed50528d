"""People who log in over HTTP as their devices do: the code is read off the development sender's log line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from structlog.testing import capture_logs

if TYPE_CHECKING:
    from tests.workers.seeding import Rest


class Resident(msgspec.Struct):
    """One device's tokens."""

    user_id: str
    access_token: str
    refresh_token: str


async def code_for(rest: Rest, **target: str) -> dict[str, str]:
    """A verification and its code, as the body of a login wants them."""
    with capture_logs() as lines:
        begun = await rest.call("POST", "/v1/verifications", None, target)
    assert begun.status_code == 202, begun.text
    (line,) = [line for line in lines if line["event"] == "verification_code"]
    return {"verification_id": begun.json()["verification_id"], "code": line["code"]}


async def log_in(rest: Rest, device_id: str = "phone-1", name: str = "Ann", **target: str) -> Resident:
    """A device that has logged in, with an account by then."""
    body: dict[str, Any] = {**await code_for(rest, **target), "device_id": device_id, "name": name}
    answer = await rest.call("POST", "/v1/sessions", None, body)
    assert answer.status_code == 201, answer.text
    login = answer.json()
    return Resident(login["user"]["_id"], login["access_token"], login["refresh_token"])
