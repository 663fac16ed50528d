"""`bench reference`: the tables of every frame, route, code and shape, written to `docs/reference.md` from the code.

It reads nothing but the two documents that the HTTP API serves (AsyncAPI, OpenAPI), so what is printed is what is
served.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protocol import specification
from workers.rest import app, openapi

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
COMMAND: Final = "uv run python -m bench reference"
_LONG: Final = 100_000
"""Bounds from here on read better as powers, or not at all."""
_HEADER: Final = f"""# Reference

Every frame, every route and every code, written by `{COMMAND}` from the code; a test compares. The same as
machines read it: `GET /schema/asyncapi.json` (AsyncAPI 3) and `GET /schema/openapi.json` (OpenAPI 3.1).

`name?` may be left out. Numbers after a string or list are its length, after a number its bounds.
"""
_FRAMES: Final = """## Frames

On `/v1/ws`. A client frame that cannot be served is answered by an `error` frame with one of its codes (besides
`auth_error` for a token that is no good, `bad_frame` and `unknown_type` for what is no frame).
"""
_ROUTES: Final = """
## Routes

Errors are `{"error": {"code", "message"}}`. A known path may also answer 405 `method_not_allowed`, an unknown one
answers 404 `not_found`.
"""
_ERRORS: Final = """
## Error codes

`retryable`: the same request may succeed later.
"""
_CLOSES: Final = """
## Close codes

`reconnect`: at once (yes), after a pause that grows (later), or after one drawn at random (jittered).
"""
_SHAPES: Final = """
## Shapes

What frames and routes refer to.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents", type=Path, metavar="DIR", help="write asyncapi.json and openapi.json there instead"
    )


def main(args: argparse.Namespace) -> int:
    """Write the page, or the two documents."""
    if args.documents is None:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
        print(f"{PAGE.name} written")
        return 0
    args.documents.mkdir(parents=True, exist_ok=True)
    for name, document in zip(("asyncapi", "openapi"), documents(), strict=True):
        (args.documents / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    return 0


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The AsyncAPI and the OpenAPI document."""
    return specification.asyncapi(), openapi.document(openapi.routes_of(app.ROUTES))


def page() -> str:
    """The whole page."""
    asyncapi, http = documents()
    shapes = {**asyncapi["components"]["schemas"], **http["components"]["schemas"]}
    parts = [
        _HEADER,
        _FRAMES,
        *_table(("frame", "direction", "fields", "meaning", "errors"), _frames(asyncapi)),
        _ROUTES,
        *_table(("route", "caller", "parameters and body", "success", "errors", "meaning"), _routes(http)),
        _ERRORS,
        *_table(("code", "HTTP status", "retryable", "answers the frames"), _codes(asyncapi)),
        "\nOf `auth_error`: " + ", ".join(f"`{code}`" for code in asyncapi["x-auth-error-codes"]) + ".",
        _CLOSES,
        *_table(("code", "reason", "reconnect"), _closes(asyncapi)),
        _SHAPES,
        *_table(("shape", "fields", "meaning"), _shapes(asyncapi, http["components"]["schemas"], shapes)),
    ]
    return "\n".join(parts) + "\n"


def _table(titles: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _frames(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    schemas = document["components"]["schemas"]
    for operation, direction in (("receive", "client → server"), ("send", "server → client")):
        for reference in document["operations"][operation]["messages"]:
            message = document["components"]["messages"][_name(reference)]
            fields = _fields(schemas[_name(message["payload"])], schemas)
            errors = ", ".join(f"`{code}`" for code in message.get("x-errors", ()))
            yield f"`{message['name']}`", direction, fields, message.get("description", ""), errors


def _routes(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            inputs = [
                f"{taken['in']} `{taken['name']}`{'' if taken['required'] else '?'} {_kind(taken['schema'])}"
                for taken in operation.get("parameters", ())
            ]
            if "requestBody" in operation:
                inputs.append("body " + _content(operation["requestBody"]))
            answers, errors = [], []
            for status, response in operation["responses"].items():
                detail = _error_codes(response)
                if detail:
                    errors.append(f"{status} " + ", ".join(f"`{code}`" for code in detail))
                else:
                    answers.append(f"{status} {_content(response)}".strip())
            callers = " or ".join(name for requirement in operation["security"] for name in requirement)
            yield (
                f"`{method.upper()} {path}`",
                callers or "anybody",
                "<br>".join(inputs),
                "<br>".join(answers),
                "<br>".join(errors),
                _line(f"{operation['summary']}. {operation['description']}"),
            )


def _error_codes(response: dict[str, Any]) -> list[str]:
    schema = response.get("content", {}).get(openapi.JSON, {}).get("schema", {})
    if "error" not in schema.get("properties", {}):
        return []
    codes: list[str] = schema["properties"]["error"]["properties"]["code"]["enum"]
    return codes


def _content(holder: dict[str, Any]) -> str:
    return " or ".join(_kind(media["schema"]) for media in holder.get("content", {}).values())


def _codes(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    answered: dict[str, list[str]] = {code: [] for code in document["x-error-codes"]}
    for message in document["components"]["messages"].values():
        for code in message.get("x-errors", ()):
            answered[code].append(f"`{message['name']}`")
    for code, row in document["x-error-codes"].items():
        yield f"`{code}`", str(row["httpStatus"]), "yes" if row["retryable"] else "no", ", ".join(answered[code])


def _closes(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for code, row in document["x-close-codes"].items():
        yield code, row["reason"], row["reconnect"]


def _shapes(document: dict[str, Any], of_routes: dict[str, Any], shapes: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """All but the frames and those payloads that no route has: they are told in full where the frame is."""
    told = {_name(message["payload"]) for message in document["components"]["messages"].values()}
    told |= {_name(found) for name in told if "$ref" in (found := shapes[name]["properties"].get("payload", {}))}
    for name in sorted(shapes.keys() - (told - of_routes.keys())):
        shape = shapes[name]
        fields = _fields(shape, shapes) if "properties" in shape else _kind(shape)
        yield f'<a id="{name.lower()}"></a>{name}', fields, _line(shape.get("description", ""))


def _fields(shape: dict[str, Any], shapes: dict[str, Any], prefix: str = "") -> str:
    lines = []
    for name, schema in shape["properties"].items():
        if name == "type" and len(schema.get("enum", ())) == 1:
            continue
        mark = "" if name in shape.get("required", ()) else "?"
        if name == "payload" and "$ref" in schema:
            lines.append(_fields(shapes[_name(schema)], shapes, prefix="payload."))
            continue
        lines.append(f"`{prefix}{name}`{mark} {_kind(schema)}")
    return "<br>".join(lines)


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    words = _words(schema)
    return words if schema.get("default") in (None, "", {}) else f"{words}, default {json.dumps(schema['default'])}"


def _words(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_words(part) for part in schema["anyOf"])
    match schema.get("type"):
        case "string":
            pattern = f" `{schema['pattern']}`" if "pattern" in schema else ""
            return str(schema.get("format", "string")) + _span(schema, "minLength", "maxLength") + pattern
        case "integer" | "number" as kind:
            return str(kind) + _span(schema, "minimum", "maximum")
        case "array":
            return f"list{_span(schema, 'minItems', 'maxItems')} of {_words(schema.get('items', {}))}"
        case "object" if "additionalProperties" in schema:
            values = schema["additionalProperties"]
            most = _span(schema, "minProperties", "maxProperties")
            return f"map{most} to {_words(values)}" if isinstance(values, dict) else f"map{most}"
        case None:
            return "anything"
        case other:
            return str(other)


def _span(schema: dict[str, Any], least: str, most: str) -> str:
    low, high = schema.get(least), schema.get(most)
    if low is None and high is None:
        return ""
    if high is None or low == high:
        return f" {low}" if low == high else f" from {low}"
    return f" {low or 0}–{_bound(high)}"


def _bound(value: int) -> str:
    power = value.bit_length() - 1
    return f"2^{power}" if value > _LONG and value == 1 << power else str(value)


def _name(reference: dict[str, Any]) -> str:
    return str(reference.get("$ref", "")).rsplit("/", 1)[-1]


def _line(text: str) -> str:
    return " ".join(text.split()).removesuffix(" .")
