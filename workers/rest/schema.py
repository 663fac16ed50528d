"""What this server speaks, as machines read it: the OpenAPI document of HTTP, the AsyncAPI document of the WebSocket.

Open to everybody: both say what the source says.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State

from workers.rest.openapi import JSON

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
