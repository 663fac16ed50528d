"""The WebSocket protocol as an AsyncAPI 3 document, read off the frames and the codes.

Called by the REST role, which serves it, and by `bench reference`, which prints it as tables. Holds no state.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

_SCHEMAS: Final = "#/components/schemas/{name}"
_ANCHORS: Final = re.compile(r"\\A|\\Z")


def describe(kinds: Iterable[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The JSON Schema of each type, and the components that these refer to, by name."""
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS)
    return [_portable(schema) for schema in schemas], {name: _portable(components[name]) for name in sorted(components)}


def _portable(schema: Any) -> Any:
    """The same schema with patterns as ECMA 262 writes them: there `^` and `$` stand for the very ends."""
    if isinstance(schema, dict):
        return {
            name: _ANCHORS.sub(lambda found: "^" if found[0] == r"\A" else "$", value)
            if name == "pattern" and isinstance(value, str)
            else _portable(value)
            for name, value in schema.items()
        }
    if isinstance(schema, list):
        return [_portable(item) for item in schema]
    return schema
