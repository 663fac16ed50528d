"""The WebSocket protocol as an AsyncAPI 3 document, read off the frames and the codes.

Called by the REST role, which serves it, and by `bench reference`, which prints it as tables. Holds no state.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec
import msgspec.inspect

from protocol import codec, frames
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterable

PATH: Final = "/v1/ws"
CLIENT_FRAMES: Final[tuple[type[frames.Frame], ...]] = get_args(frames.ClientFrame)
SERVER_FRAMES: Final[tuple[type[frames.Frame], ...]] = get_args(frames.ServerFrame)

_SCHEMAS: Final = "#/components/schemas/{name}"
_MESSAGES: Final = "#/components/messages/"
_CHANNEL: Final = "#/channels/connection"
_ABOUT: Final = (
    "Durable, gap-free, ordered messages between people and software agents. A client sends `auth` first and sends "
    "what it wants from `auth_success` on; unknown fields are ignored on both sides. Every frame is one message: text "
    f"with `{codec.SUBPROTOCOL_JSON}`, binary with `{codec.SUBPROTOCOL_MSGPACK}`, of at most {codec.MAX_FRAME_BYTES} "
    "bytes. `x-errors` of a frame: the codes of the `error` frame that may answer it."
)


def tag_of(kind: type[frames.Frame]) -> str:
    """The frame's `type`."""
    return str(kind.__struct_config__.tag)


def meaning_of(kind: type[frames.Frame]) -> str:
    """What the docstrings of the frame and of its payload say, in one line; empty where the names say everything."""
    payload = next((field.type for field in msgspec.structs.fields(kind) if field.name == "payload"), None)
    payloads = [kind for kind in get_args(payload) or (payload,) if isinstance(kind, type)]
    said = [_own_words(part) for part in (kind, *payloads) if issubclass(part, msgspec.Struct)]
    return " ".join(words for words in said if words)


def _own_words(kind: type[msgspec.Struct]) -> str:
    """The docstring of the class or, for a payload, of what it extends."""
    for part in kind.__mro__:
        if part in (frames.Frame, msgspec.Struct):
            break
        if part.__dict__.get("__doc__"):
            return " ".join(inspect.cleandoc(part.__dict__["__doc__"]).split())
    return ""


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3 document, the same for the same code."""
    messages, schemas = _messages()
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Trireme", "version": "1", "description": _ABOUT},
        "defaultContentType": "application/json",
        "servers": {
            "gateway": {
                "host": "{host}",
                "protocol": "ws",
                "variables": {"host": {"default": "localhost:8765", "description": "Where a gateway listens."}},
            }
        },
        "channels": {"connection": _channel(messages)},
        "operations": {
            "receive": _operation("receive", "What a client sends.", CLIENT_FRAMES),
            "send": _operation("send", "What the server sends.", SERVER_FRAMES),
        },
        "components": {"messages": messages, "schemas": schemas},
        "x-error-codes": {
            code.value: {"retryable": code.retryable, "httpStatus": code.http_status} for code in ErrorCode
        },
        "x-auth-error-codes": [code.value for code in AuthErrorCode],
        "x-close-codes": {
            str(code.value): {"reason": code.reason, "reconnect": code.reconnect.value} for code in CloseCode
        },
    }


def _channel(messages: dict[str, Any]) -> dict[str, Any]:
    subprotocols = [codec.SUBPROTOCOL_JSON, codec.SUBPROTOCOL_MSGPACK]
    headers = {"type": "object", "properties": {"Sec-WebSocket-Protocol": {"type": "string", "enum": subprotocols}}}
    return {
        "address": PATH,
        "title": "One connection of one device",
        "messages": {name: {"$ref": _MESSAGES + name} for name in messages},
        "servers": [{"$ref": "#/servers/gateway"}],
        "bindings": {"ws": {"method": "GET", "headers": headers, "bindingVersion": "0.1.0"}},
        "x-subprotocols": {
            subprotocols[0]: {"contentType": "application/json", "opcode": "text"},
            subprotocols[1]: {"contentType": "application/vnd.msgpack", "opcode": "binary"},
        },
    }


def _operation(action: str, summary: str, kinds: Iterable[type[frames.Frame]]) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": _CHANNEL},
        "summary": summary,
        "messages": [{"$ref": f"{_CHANNEL}/messages/{kind.__name__}"} for kind in kinds],
    }


def _messages() -> tuple[dict[str, Any], dict[str, Any]]:
    """Every frame as a message, by class name (`typing` goes both ways), and the schemas they refer to."""
    kinds = [*CLIENT_FRAMES, *SERVER_FRAMES]
    described, schemas = describe(kinds)
    messages: dict[str, Any] = {}
    for kind, schema in zip(kinds, described, strict=True):
        message: dict[str, Any] = {"name": tag_of(kind), "title": tag_of(kind), "payload": schema}
        if meaning := meaning_of(kind):
            message["description"] = meaning
        if kind in frames.REFUSALS:
            message["x-errors"] = [code.value for code in refusals_of(kind)]
        messages[kind.__name__] = message
    return messages, schemas


def refusals_of(kind: type[frames.Frame]) -> list[ErrorCode]:
    """The codes that may answer a client frame, in the table's order."""
    return [code for code in ErrorCode if code in frames.REFUSALS[kind]]


def describe(kinds: Iterable[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The JSON Schema of each type, and the components that these refer to, by name."""
    kinds = list(kinds)
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS)
    for name, field in _times(msgspec.inspect.multi_type_info(kinds)):
        schema = components[name]["properties"][field]
        for part in schema.get("anyOf", [schema]):
            if part.get("type") == "string":
                part["format"] = "date-time"
    return [_portable(schema) for schema in schemas], {name: _portable(components[name]) for name in sorted(components)}


def _times(kinds: Iterable[msgspec.inspect.Type]) -> list[tuple[str, str]]:
    """(struct, field) of every time. msgspec leaves their format out, since it would take one without an offset."""
    found = []
    waiting, seen = list(kinds), set[type]()
    while waiting:
        match waiting.pop():
            case msgspec.inspect.StructType(cls=cls, fields=fields) if cls not in seen:
                seen.add(cls)
                waiting += [field.type for field in fields]
                found += [(cls.__name__, field.encode_name) for field in fields if _is_time(field.type)]
            case msgspec.inspect.UnionType(types=types):
                waiting += types
            case msgspec.inspect.Metadata(type=kind):
                waiting.append(kind)
            case msgspec.inspect.CollectionType(item_type=kind) | msgspec.inspect.DictType(value_type=kind):
                waiting.append(kind)
            case _:
                pass
    return found


def _is_time(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.UnionType):
        return all(isinstance(part, (msgspec.inspect.DateTimeType, msgspec.inspect.NoneType)) for part in kind.types)
    return isinstance(kind, msgspec.inspect.DateTimeType)


def _portable(schema: Any) -> Any:
    """The same schema with patterns as ECMA 262 writes them (there `^` and `$` stand for the very ends)."""
    if isinstance(schema, list):
        return [_portable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    portable = {name: _portable(value) for name, value in schema.items()}
    if isinstance(pattern := schema.get("pattern"), str):
        portable["pattern"] = pattern.replace(r"\A", "^").replace(r"\Z", "$")
    if isinstance(description := schema.get("description"), str):
        portable["description"] = inspect.cleandoc(description)
    return portable
