"""A key written twice is found wherever it stands and however it is written; nothing else is taken for one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import codec, frames
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.repetition import is_plain

PLAIN = codec.JSON.encode(
    {
        "type": "message",
        "client_message_id": "c1",
        "idempotency_key": "k",
        "payload": {"conversation_id": "c", "receiver_id": "r", "content": "x", "type": "text", "timestamp": 1},
    }
)


def refusal(data: bytes) -> ErrorCode | None:
    try:
        codec.JSON.decode(data)
    except RemoteProtocolError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.replace(b'"type":"text"', b'"type":"text","type":"image"'),
        PLAIN.replace(b'"content":"x"', b'"content" : "y" , "content":"x"'),
        PLAIN.replace(b'"content":"x"', rb'"c\u006fntent":"y","content":"x"'),
        PLAIN.replace(b'"client_message_id":"c1"', b'"idempotency_key":"other"'),
        PLAIN.replace(b'"content":"x"', rb'"content":"x\\","content":"\"y"'),
        b'{"type":"heartbeat","timestamp":1,"x":[{"a":{"b":1,"b":2}}]}',
        b'{"type":"goodbye","payload":{"a":1,"a":1}}',
    ],
)
def test_a_key_twice_is_no_frame(data: bytes) -> None:
    assert refusal(data) is ErrorCode.BAD_FRAME


@pytest.mark.parametrize(
    "content", ["", "x", ":", '":', '\\":"', '{"a":1,"a":2}', "\\", '\\\\"', "€:😀", "\n:\t", "a:b:c" * 50]
)
def test_no_content_is_mistaken_for_keys(content: str) -> None:
    body = json.loads(PLAIN)
    body["payload"]["content"] = content
    for data in (json.dumps(body), json.dumps(body, ensure_ascii=False), json.dumps(body, indent=2)):
        assert refusal(data.encode()) is None


class _Pairs(list[Any]):
    """An object as the pairs it is written as."""


def test_a_type_twice_is_refused_whatever_it_is() -> None:
    assert refusal(b'{"type":"heartbeat","type":"heartbeat","timestamp":1}') is not None
    assert refusal(b'{"type":"dance","type":"heartbeat","timestamp":1}') is not None


TEXTS = st.text(alphabet='ab:"\\/{}[], \u00e9\n', max_size=8)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(-9, 9), st.none(), st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(st.tuples(TEXTS, inner), max_size=3).map(_Pairs)),
    max_leaves=12,
)


def written(value: Any, spaced: bool) -> str:
    if isinstance(value, _Pairs):
        between, colon = (" , ", " : ") if spaced else (",", ":")
        return "{" + between.join(f"{json.dumps(key)}{colon}{written(part, spaced)}" for key, part in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(part, spaced) for part in value) + "]"
    return json.dumps(value)


def repeats(value: Any) -> bool:
    if isinstance(value, _Pairs):
        names = [key for key, _ in value]
        return len(set(names)) < len(names) or any(repeats(part) for _, part in value)
    return isinstance(value, list) and any(map(repeats, value))


@given(value=VALUES, spaced=st.booleans())
def test_it_is_found_in_any_json(value: Any, spaced: bool) -> None:
    data = f'{{"type":"heartbeat","timestamp":1,"more":{written(value, spaced)}}}'.encode()
    frame = msgspec.json.decode(data, type=frames.ClientFrame)
    assert is_plain(data, frame) is not repeats(value)
