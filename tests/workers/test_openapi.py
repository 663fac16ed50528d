"""The OpenAPI document: valid, complete, as exact as what judges the requests; and the small print that it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from litestar import get
from litestar.params import QueryParameter
from openapi_spec_validator import OpenAPIV31SpecValidator

from protocol import specification
from protocol.errors import ErrorCode
from tests.workers.seeding import Rest, refusal
from workers.rest import app, health, keyset, openapi, schema

if TYPE_CHECKING:
    from litestar.handlers import HTTPRouteHandler

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:EdDSA is deprecated")]

ROUTES = openapi.routes_of(app.ROUTES)
DOCUMENT = openapi.document(ROUTES)
HIDDEN = {health.metrics, keyset.read_keys, schema.openapi_document, schema.asyncapi_document}


def operation(method: str, path: str) -> Any:
    return DOCUMENT["paths"][path][method.lower()]


def codes(method: str, path: str) -> dict[str, list[str]]:
    """Status → error codes."""
    found = {}
    for status, response in operation(method, path)["responses"].items():
        body = response.get("content", {}).get("application/json", {}).get("schema", {})
        if "error" in body.get("properties", {}):
            found[status] = body["properties"]["error"]["properties"]["code"]["enum"]
    return found


def test_the_document_is_valid_openapi() -> None:
    problems = [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()]
    assert problems == []


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    documented = {(method.upper(), path) for path, found in DOCUMENT["paths"].items() for method in found}
    assert documented == {(route.method, route.path) for route in ROUTES}
    assert len(ROUTES) == len(set(app.ROUTES) - HIDDEN)
    names = [found["operationId"] for methods in DOCUMENT["paths"].values() for found in methods.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_route_has_words_and_errors_of_the_table(route: openapi.Route) -> None:
    assert route.summary
    assert route.meaning
    for status, refusals in route.refusals.items():
        assert refusals
        for code in refusals:
            assert status == code.http_status or (code, status) in {
                (ErrorCode.VALIDATION_FAILED, 408),
                (ErrorCode.VALIDATION_FAILED, 415),
            }
    assert all(200 <= status < 300 or status == 503 for status in route.answers)


def test_a_route_answers_the_statuses_it_can_and_no_others() -> None:
    assert set(operation("GET", "/health/live")["responses"]) == {"200"}
    assert codes("GET", "/v1/conversations/{conversation_id}") == {
        "400": ["validation_failed"],
        "401": ["unauthorized", "revoked"],
        "404": ["conversation_not_found"],
        "500": ["internal"],
        "503": ["storage_unavailable"],
    }
    assert set(operation("POST", "/v1/conversations")["responses"]) >= {"200", "201", "408", "413", "415"}
    assert codes("POST", "/v1/conversations")["409"] == ["conflict", "group_full", "idempotency_conflict"]


def test_who_may_call_is_said_by_the_guards() -> None:
    assert operation("POST", "/v1/users")["security"] == [{"admin": []}]
    assert operation("GET", "/v1/conversations")["security"] == [{"user": []}]
    assert operation("POST", "/v1/conversations")["security"] == [{"user": []}, {"admin": []}]
    assert operation("GET", "/health/ready")["security"] == []
    assert DOCUMENT["components"]["securitySchemes"]["user"]["scheme"] == "bearer"


def test_bodies_and_parameters_have_the_bounds_that_are_checked() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["NewUser"]["required"] == ["name"]
    assert schemas["NewUser"]["properties"]["name"] == {"type": "string", "minLength": 1, "maxLength": 128}
    assert schemas["NewConversation"]["properties"]["participants"]["items"] == {
        "type": "string",
        "minLength": 1,
        "maxLength": 64,
    }
    assert schemas["User"]["properties"]["phone"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert schemas["User"]["properties"]["created_at"] == {"type": "string", "format": "date-time"}
    named = {found["name"]: found for found in operation("GET", "/v1/conversations")["parameters"]}
    assert named["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 50}
    header = {found["name"]: found for found in operation("POST", "/v1/conversations")["parameters"]}["Idempotency-Key"]
    assert (header["in"], header["required"]) == ("header", False)
    assert header["schema"]["pattern"].startswith("^")


PATTERN = re.compile(r'pattern=r"([^"]*)"')


@pytest.mark.parametrize("package", ["protocol", "workers/rest"])
def test_patterns_mean_the_same_here_and_in_the_document(package: str) -> None:
    """`$` lets a newline pass here and not there; `\\s`, `\\d` and `\\w` know other characters."""
    root = Path(app.__file__).parents[2]
    found = [pattern for path in (root / package).rglob("*.py") for pattern in PATTERN.findall(path.read_text())]
    assert found
    for pattern in found:
        assert pattern.startswith(r"\A"), pattern
        assert pattern.endswith(r"\Z"), pattern
        assert re.search(r"\\[sdwSDW]", pattern) is None, pattern


def test_a_query_parameter_that_opt_forgets_is_found() -> None:
    @get("/forgetful", opt={"query": ("limit",)})
    async def forgetful(cursor: Annotated[str | None, QueryParameter(required=False)] = None) -> None:
        """Says one thing and takes another."""

    handler: HTTPRouteHandler = forgetful
    with pytest.raises(ValueError, match="cursor"):
        openapi.routes_of([handler])


# --- what is served --------------------------------------------------------------------------------------------------


async def test_both_documents_are_served_to_everybody(rest: Rest) -> None:
    for path in ("/schema", "/schema/openapi.json"):
        found = await rest.client.get(path)
        assert (found.status_code, found.headers["content-type"]) == (200, "application/json")
        assert found.json() == DOCUMENT
    asyncapi = await rest.client.get("/schema/asyncapi.json")
    assert asyncapi.json() == specification.asyncapi()


async def test_every_answer_has_the_same_headers(rest: Rest) -> None:
    for method, path in (
        ("GET", "/health/live"),
        ("GET", "/v1/conversations"),
        ("GET", "/nowhere"),
        ("PUT", "/metrics"),
    ):
        answer = await rest.client.request(method, path)
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], path
        assert answer.headers.get_list("cache-control") == ["no-store"], path


async def test_allow_names_every_method_of_a_path(rest: Rest) -> None:
    expected = {"/v1/conversations": {"GET", "POST", "OPTIONS"}, "/v1/conversations/c": {"GET", "PATCH", "OPTIONS"}}
    for path, methods in expected.items():
        for method, status in (("OPTIONS", 204), ("TRACE", 405)):
            answer = await rest.client.request(method, path)
            assert answer.status_code == status
            assert {name.strip() for name in answer.headers["allow"].split(",")} == methods


@pytest.mark.parametrize(
    "body",
    [
        {"type": "group", "participants": "[]"},
        {"type": "group", "participants": [1]},
        {"type": "group", "participants": [], "title": None},
        {"type": "group", "participants": [], "title": 7},
        [],
        None,
    ],
)
async def test_a_body_is_not_bent_into_shape(rest: Rest, body: Any) -> None:
    _, token = await rest.user("Ann")
    content = {"json": body} if body is not None else {"content": b"null"}
    answer = await rest.client.post(
        "/v1/conversations",
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        **content,
    )
    assert refusal(answer) == (400, "validation_failed")


async def test_a_null_in_the_query_is_not_an_absent_one(rest: Rest) -> None:
    _, token = await rest.user("Ann")
    for value in ("null", "NULL"):
        answer = await rest.call("GET", f"/v1/conversations?archived={value}", token)
        assert refusal(answer) == (400, "validation_failed")
