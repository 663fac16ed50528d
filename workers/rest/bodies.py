"""The body of a request, read as strictly as a frame: a number in quotes is no number. Where `data` comes from.

The framework would decode first and convert then, leniently, as it must for query parameters.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request

from protocol.errors import ErrorCode
from workers.rest.access import check_still_good
from workers.rest.errors import RestError


class StrictRequest(Request[Any, Any, Any]):
    """A request whose JSON is decoded straight into the type its handler takes."""

    async def json(self) -> Any:
        """The handler's `data`. Raises RestError."""
        field = self.route_handler.parsed_data_field
        assert field is not None, "the framework asks for JSON where a handler takes data"
        body = await self.body()
        await check_still_good(self)
        try:
            return msgspec.json.decode(body, type=field.annotation)
        except msgspec.ValidationError as error:
            raise RestError(ErrorCode.VALIDATION_FAILED, str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RestError(ErrorCode.VALIDATION_FAILED, f"the body is no JSON: {error}") from None
