"""Loaded by schemathesis (`conformance` names it as its hooks): whoever logs out or goes is somebody made for it.

Otherwise the one user of the run would be logged out by an early request, and all later ones be refused.
"""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import httpx2
import schemathesis

if TYPE_CHECKING:
    from schemathesis.hooks import HookContext

ENDING: Final = frozenset(("DELETE /v1/devices", "DELETE /v1/devices/{device_id}", "DELETE /v1/sessions/current"))
"""Routes after which the token that called them is no longer good."""

REMOVING: Final = "DELETE /v1/users/{user_id}"
"""The administrator's: whoever is named is gone."""

_numbers = count(1)


@schemathesis.hook
def before_call(context: HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Only where the request has the good token: what is sent to be refused stays as it is."""
    star = f"Bearer {os.environ['TRIREME_USER_TOKEN']}"
    if case.operation.label in ENDING and case.headers.get("Authorization") == star:
        case.headers["Authorization"] = f"Bearer {_understudy()[1]}"
    if case.operation.label == REMOVING and str(case.path_parameters.get("user_id")).startswith("usr_"):
        case.path_parameters["user_id"] = _understudy()[0]


@schemathesis.hook
def map_body(context: HookContext, body: Any) -> Any:
    """JSON Schema calls 1.0 an integer; our codecs do not, on either door."""
    if isinstance(body, float) and body.is_integer():
        return int(body)
    if isinstance(body, list):
        return [map_body(context, item) for item in body]
    if isinstance(body, dict):
        return {name: map_body(context, value) for name, value in body.items()}
    return body


def _understudy() -> tuple[str, str]:
    """Id and token of a new user."""
    admin = {"Authorization": f"Bearer {os.environ['TRIREME_ADMIN_TOKEN']}"}
    with httpx2.Client(base_url=os.environ["TRIREME_REST_URL"], headers=admin, timeout=10) as api:
        user = api.post("/v1/users", json={"name": f"Understudy {next(_numbers)}"}).raise_for_status().json()
        body = {"user_id": user["_id"], "device_id": "phone-1"}
        token: str = api.post("/v1/tokens", json=body).raise_for_status().json()["access_token"]
    return user["_id"], token
