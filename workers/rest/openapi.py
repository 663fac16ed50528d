"""The HTTP API as an OpenAPI 3.1 document, read off the route handlers; `app.create_app` and `bench reference` call it.

Schemas come from msgspec, which also judges the requests, so the document promises what the server checks. What a route
cannot say by its signature it says in `opt`: `query` (its query parameters), `errors` (its own error codes), `answers`
(further successes, status → type).
"""

from __future__ import annotations

import inspect
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args, get_origin, get_type_hints

import msgspec
from litestar import Response
from litestar.params import BodyKwarg, HeaderParameter, ParameterKwarg, PathParameter, QueryParameter

from protocol.errors import ErrorCode
from protocol.specification import describe
from workers.rest import access
from workers.rest.errors import MESSAGE_LIMIT
from workers.rest.shapes import IDEMPOTENCY_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from litestar.handlers import HTTPRouteHandler

JSON: Final = "application/json"
CALLERS: Final[dict[Any, tuple[str, ...]]] = {
    access.admin_guard: ("admin",),
    access.operator_guard: ("admin",),
    access.user_guard: ("user",),
    access.actor_guard: ("user", "admin"),
}
"""Guard → whose token opens the route."""

_SCHEMES: Final = {
    "user": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A user's access token, the same as for the WebSocket.",
    },
    "admin": {
        "type": "http",
        "scheme": "bearer",
        "description": "The administrator's token (setting `TRIREME_ADMIN_TOKEN`).",
    },
}
_IN: Final = {PathParameter: "path", QueryParameter: "query", HeaderParameter: "header"}
_BOUNDS: Final = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")
_PATH_TYPE: Final = re.compile(r"\{(\w+)(?::\w+)?\}")
_HEADERS: Final = {
    "X-Content-Type-Options": {"required": True, "schema": {"const": "nosniff"}},
    "Cache-Control": {"required": True, "schema": {"const": "no-store"}},
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
    "Retry-After": {
        "required": True,
        "description": "Seconds",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
}
_COMMON: Final = ("X-Content-Type-Options", "Cache-Control")
_ABOUT: Final = (
    "Accounts, conversations and their messages over HTTP, by the same rules as over the WebSocket "
    "(`/schema/asyncapi.json`). Unknown fields of a body are ignored, and so should those of an answer be."
)

Refusals = dict[int, tuple[ErrorCode, ...]]


class Parameter(msgspec.Struct, frozen=True):
    """`place`: path, query or header. `kind`: a type that msgspec can describe."""

    name: str
    place: str
    kind: Any
    required: bool
    default: Any = msgspec.NODEFAULT


class Route(msgspec.Struct, frozen=True):
    """One operation as its handler declares it. `answers`: successes and the type of their body, None without one."""

    method: str
    path: str
    name: str
    summary: str
    meaning: str
    callers: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    body: Any
    answers: dict[int, Any]
    refusals: Refusals
    media_type: str = JSON


def template_of(path: str) -> str:
    """A handler's path without the types of its parameters."""
    return _PATH_TYPE.sub(r"{\1}", path)


def routes_of(handlers: Iterable[HTTPRouteHandler]) -> list[Route]:
    """The public operations, by path and method. Raises ValueError for a route that hides something."""
    found = [_route(handler) for handler in handlers if handler.include_in_schema is not False]
    return sorted(found, key=lambda route: (route.path, route.method))


def _route(handler: HTTPRouteHandler) -> Route:
    (path,), (method,) = handler.paths, handler.http_methods
    hints = get_type_hints(handler.fn, include_extras=True)
    callers = tuple(caller for guard in handler.guards or () for caller in CALLERS.get(guard, ()))
    body, parameters = None, []
    for name, hint in hints.items():
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if any(isinstance(mark, BodyKwarg) for mark in marks):
            body = get_args(hint)[0]
        parameters += [
            _parameter(name, get_args(hint)[0], mark, handler) for mark in marks if isinstance(mark, ParameterKwarg)
        ]
    declared = {parameter.name for parameter in parameters if parameter.place == "query"}
    if declared != set(handler.opt.get("query", ())):
        raise ValueError(f"{method} {path}: opt['query'] is not what its signature says: {sorted(declared)}")
    answer = hints["return"]
    if get_origin(answer) is Response:
        (answer,) = get_args(answer)
    return Route(
        method=str(method),
        path=template_of(path),
        name=handler.fn.__name__,
        summary=handler.summary or "",
        meaning=inspect.getdoc(handler.fn) or "",
        callers=callers,
        parameters=tuple(parameters),
        body=body,
        answers={
            handler.status_code: None if answer in (None, type(None)) else answer,
            **handler.opt.get("answers", {}),
        },
        refusals=_refusals(handler, callers, parameters, body),
        media_type=str(handler.media_type or JSON),
    )


def _parameter(name: str, kind: Any, mark: ParameterKwarg, handler: HTTPRouteHandler) -> Parameter:
    bounds = {bound: value for bound in _BOUNDS if (value := getattr(mark, bound)) is not None}
    present = tuple(part for part in get_args(kind) if part is not type(None))
    if present:
        # An absent parameter is None for the handler; nobody can send a null.
        (kind,) = present
    default = inspect.signature(handler.fn).parameters[name].default
    required = isinstance(mark, PathParameter) or default is inspect.Parameter.empty
    return Parameter(
        name=getattr(mark, "name", None) or name,
        place=_IN[type(mark)],
        kind=Annotated[kind, msgspec.Meta(**bounds)] if bounds else kind,
        required=required,
        default=msgspec.NODEFAULT if required or default is None else default,
    )


def _refusals(
    handler: HTTPRouteHandler, callers: tuple[str, ...], parameters: Sequence[Parameter], body: Any
) -> Refusals:
    """Status → codes: what the route declares, and what follows from who may call and what is read."""
    pairs = {(code.http_status, code) for code in handler.opt.get("errors", ())}
    if callers:
        pairs.add((401, ErrorCode.UNAUTHORIZED))
    if access.operator_guard in (handler.guards or ()):
        pairs |= {(401, ErrorCode.REVOKED), (404, ErrorCode.NOT_FOUND)}
    if "user" in callers:
        pairs.add((401, ErrorCode.REVOKED))
    if parameters or body is not None or access.shape_guard in (handler.guards or ()):
        pairs.add((400, ErrorCode.VALIDATION_FAILED))
    if any(parameter.name == IDEMPOTENCY_KEY for parameter in parameters):
        pairs.add((409, ErrorCode.IDEMPOTENCY_CONFLICT))
    if body is not None:
        pairs |= {
            (408, ErrorCode.VALIDATION_FAILED),
            (413, ErrorCode.TOO_LARGE),
            (415, ErrorCode.VALIDATION_FAILED),
        }
    if callers or parameters or body is not None:
        pairs |= {(503, ErrorCode.STORAGE_UNAVAILABLE), (500, ErrorCode.INTERNAL)}
    return {
        status: tuple(code for code in ErrorCode if (status, code) in pairs)
        for status in sorted({status for status, _ in pairs})
    }


# --- the document ----------------------------------------------------------------------------------------------------


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes, the same for the same code."""
    kinds = [kind for route in routes for kind in _kinds(route)]
    described, components = describe(kinds)
    schemas = iter(described)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trireme", "version": "1", "description": _ABOUT},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components, "headers": _HEADERS, "securitySchemes": _SCHEMES},
    }


def _kinds(route: Route) -> list[Any]:
    """The types of an operation, in the order in which `_operation` takes their schemas."""
    kinds = [parameter.kind for parameter in route.parameters]
    if route.body is not None:
        kinds.append(route.body)
    return kinds + [kind for kind in route.answers.values() if kind is not None]


def _operation(route: Route, schemas: Iterator[dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "description": route.meaning,
        "security": [{caller: []} for caller in route.callers],
    }
    parameters = [_written_parameter(parameter, next(schemas)) for parameter in route.parameters]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": next(schemas)}}}
    responses = {}
    for status, kind in route.answers.items():
        responses[status] = _response(HTTPStatus(status).phrase, _COMMON)
        if kind is not None:
            responses[status]["content"] = {route.media_type: {"schema": next(schemas)}}
    for status, codes in route.refusals.items():
        responses[status] = _refusal(status, codes)
    operation["responses"] = {str(status): responses[status] for status in sorted(responses)}
    return operation


def _written_parameter(parameter: Parameter, schema: dict[str, Any]) -> dict[str, Any]:
    if parameter.default is not msgspec.NODEFAULT:
        schema = {**schema, "default": parameter.default}
    return {"name": parameter.name, "in": parameter.place, "required": parameter.required, "schema": schema}


def _response(description: str, headers: Iterable[str]) -> dict[str, Any]:
    named = {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
    return {"description": description, "headers": named}


def _refusal(status: int, codes: Sequence[ErrorCode]) -> dict[str, Any]:
    headers = [*_COMMON]
    if status == 401:
        headers.append("WWW-Authenticate")
    if all(code.retryable for code in codes):
        headers.append("Retry-After")
    response = _response(f"{HTTPStatus(status).phrase}: {', '.join(codes)}", headers)
    detail = {
        "type": "object",
        "required": ["code", "message"],
        "properties": {
            "code": {"enum": [code.value for code in codes]},
            "message": {"type": "string", "maxLength": MESSAGE_LIMIT},
        },
    }
    schema = {"type": "object", "required": ["error"], "properties": {"error": detail}}
    response["content"] = {JSON: {"schema": schema}}
    return response
