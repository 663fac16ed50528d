"""What this server speaks, as machines read it: the OpenAPI document of HTTP, the AsyncAPI document of the WebSocket.

Open to everybody: both say what the source says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from litestar import Request, Response, get, route
from litestar.datastructures import State
from litestar.enums import HttpMethod

from workers.rest.openapi import JSON, template_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from litestar.handlers import HTTPRouteHandler

AnyRequest = Request[Any, Any, State]


class Documents(msgspec.Struct, frozen=True):
    """Both documents as JSON; made once, by `app.create_app`."""

    openapi: bytes
    asyncapi: bytes


@get(["/schema", "/schema/openapi.json"], include_in_schema=False)
async def openapi_document(request: AnyRequest) -> Response[bytes]:
    """The HTTP API, OpenAPI 3.1."""
    documents: Documents = request.app.state.documents
    return Response(documents.openapi, media_type=JSON)


@get("/schema/asyncapi.json", include_in_schema=False)
async def asyncapi_document(request: AnyRequest) -> Response[bytes]:
    """The WebSocket protocol, AsyncAPI 3."""
    documents: Documents = request.app.state.documents
    return Response(documents.asyncapi, media_type=JSON)


def options_route(handlers: Iterable[HTTPRouteHandler]) -> HTTPRouteHandler:
    """`OPTIONS` of every path: 204 with the methods it has. The framework's own names the first method only."""
    methods: dict[str, set[str]] = {}
    paths = set[str]()
    for handler in handlers:
        paths |= handler.paths
        for path in handler.paths:
            methods.setdefault(template_of(path), {"OPTIONS"}).update(map(str, handler.http_methods))

    @route(sorted(paths), http_method=HttpMethod.OPTIONS, status_code=204, include_in_schema=False)
    async def read_options(request: AnyRequest) -> Response[None]:
        """Which methods this path has."""
        return Response(None, headers={"Allow": ", ".join(sorted(methods[request.scope["path_template"]]))})

    return read_options
