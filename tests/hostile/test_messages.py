"""W-55 to W-75, the frames that are wrong in themselves: each gets its error, and the session goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from protocol import codec
from tests.hostile.answers import answer
from tests.hostile.rows import BOTH, Row, by_row, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio


def says(*sent: bytes | dict[str, Any]) -> Play:
    """The answer to each of these frames, then whether the session still lives: the answer to a heartbeat."""

    async def play(scene: Scene) -> list[str | int]:
        user_id = await scene.people.user()
        async with scene.talk() as talk:
            await talk.log_in(user_id, scene.people.tokens[user_id])
            got = []
            for data in (*sent, {"type": "heartbeat", "timestamp": 1}):
                await talk.send_bytes(data if isinstance(data, bytes) else codec.JSON.encode(data))
                got.append(await answer(talk, scene))
        return got

    return play


async def msgpack_garbage(scene: Scene) -> list[str | int]:
    user_id = await scene.people.user()
    got: list[str | int] = []
    async with scene.talk(codec.MSGPACK) as talk:
        await talk.log_in(user_id, scene.people.tokens[user_id])
        for data in (
            b"\xc1",
            b"\xdf\xff\xff\xff\xff",
            b"\x93\x01",
            b"\x81\xa4type\xa5",
            codec.MSGPACK.encode({"type": "heartbeat", "timestamp": 1}),
        ):
            await talk.send_bytes(data)
            got.append(await answer(talk, scene))
    return got


def soft(row_id: str, sent: str, code: str, *data: bytes | dict[str, Any], transports: tuple[str, ...] = BOTH) -> Row:
    """Each of these frames is refused with this code, and the session goes on."""
    return Row(row_id, sent, [*[code] * len(data), "heartbeat_ack"], says(*data), transports)


def message_of(payload: dict[str, Any] | None = None, **top: object) -> dict[str, Any]:
    """A message to a conversation nobody knows, with changes."""
    body = {"conversation_id": "conv_nobody", "content": "x", "type": "text", "timestamp": 1} | (payload or {})
    found = {"type": "message", "idempotency_key": "k", "payload": body} | top
    return {name: value for name, value in found.items() if value is not None}


def sends(changes: dict[str, Any], **top: object) -> Play:
    """(The answer to a message of a pair's conversation with changes, the sequence numbers stored)."""

    async def play(scene: Scene) -> tuple[str | int, list[int]]:
        user_id, other = await scene.people.user(), await scene.people.user()
        conversation_id = await scene.people.direct(user_id, other)
        async with scene.talk() as talk:
            await talk.log_in(user_id, scene.people.tokens[user_id])
            frame = message_of({"conversation_id": conversation_id} | changes, **top)
            await talk.send_bytes(json.dumps(frame).encode())
            return await answer(talk, scene), scene.house.sequences(conversation_id)

    return play


def not_sent(row_id: str, sent: str, code: str, changes: dict[str, Any], **top: object) -> Row:
    """A message that is refused and not stored."""
    return Row(row_id, sent, (code, []), sends(changes, **top))


def is_sent(row_id: str, sent: str, changes: dict[str, Any], because: str = "", **top: object) -> Row:
    """A message that is stored in spite of it."""
    return Row(row_id, sent, ("ack", [1]), sends(changes, **top), because=because)


def asked(**fields: object) -> dict[str, Any]:
    return {"type": "retransmit", "conversation_id": "conv_nobody", "from_sequence": 1, "to_sequence": 2} | fields


STRINGS: Final = ("conversation_id", "receiver_id", "content", "type", "media_url", "reply_to_message_id")
INJECTIONS: Final = ({"$ne": None}, {"$gt": ""}, ["a"])
NESTED: Final = b"[" * 10_000
HUGE: Final = "T" * 1000
OTHER_HOSTS: Final = (
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "gopher://evil",
    "javascript:alert(1)",
    "//evil",
    "https://user@evil",
    "https://127.0.0.1",
    "http://[::ffff:7f00:1]",
    "https://xn--trireme-cva.example/a",
    "/v1/media/med_1\r\nX: y",
    "/v1/media/" + "m" * 2049,
    "/v1/media/../users/me",
    "https://trireme.example/v1/media/med_" + "0" * 27,
)

ROWS: Final = [
    Row("W-55", "no MessagePack where it is spoken", [*["bad_frame"] * 4, "heartbeat_ack"], msgpack_garbage, BOTH),
    soft(
        "W-55",
        "no JSON, an array, a string, nothing, a BOM",
        "bad_frame",
        b"not json",
        b"[1,2]",
        b'"x"',
        b"",
        b'\xef\xbb\xbf{"type":"goodbye"}',
    ),
    soft("W-56", "10,000 nested brackets", "bad_frame", NESTED, b'{"type":"heartbeat","timestamp":' + NESTED),
    soft(
        "W-56",
        "10,000 nested objects in a field nobody knows",
        "bad_frame",
        b'{"type":"heartbeat","timestamp":1,"x":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
    ),
    soft("W-56", "1e400 in a field nobody knows", "bad_frame", b'{"type":"heartbeat","timestamp":1,"x":1e400}'),
    Row(
        "W-56",
        "1e400 as a timestamp",
        ["validation_failed", "heartbeat_ack"],
        says(b'{"type":"heartbeat","timestamp":1e400}'),
        BOTH,
        because="it is a JSON number; what it is not is fit for the field",
    ),
    soft(
        "W-56",
        "NaN and Infinity",
        "bad_frame",
        b'{"type":"heartbeat","timestamp":NaN}',
        b'{"type":"heartbeat","timestamp":-Infinity}',
    ),
    soft(
        "W-56",
        "a key twice",
        "bad_frame",
        b'{"type":"heartbeat","timestamp":1,"timestamp":2}',
        json.dumps(message_of()).encode().replace(b'"content"', b'"content": "y", "content"'),
        b'{"type":"heartbeat","timestamp":1,"x":{"a":1,"a":2}}',
        rb'{"type":"heartbeat","timestamp":1,"x":"\":\"","x":"\\"}',
    ),
    soft(
        "W-56",
        "a lone surrogate",
        "bad_frame",
        rb'{"type":"goodbye","payload":{"a":"\ud800"}}',
        json.dumps(message_of({"content": "\ud800"})).encode(),
    ),
    soft(
        "W-57",
        "unknown types",
        "unknown_type",
        {"type": "dance"},
        {},
        {"type": 7},
        {"type": "auth_success", "payload": {}},
    ),
    Row(
        "W-58",
        "a field nobody knows",
        ["heartbeat_ack", "heartbeat_ack"],
        says({"type": "heartbeat", "timestamp": 1, "x": {"y": [1]}}),
        BOTH,
    ),
    *(
        soft("W-59", f"an object for {name}", "validation_failed", *(message_of({name: value}) for value in INJECTIONS))
        for name in STRINGS
    ),
    soft(
        "W-59",
        "an object for idempotency_key",
        "validation_failed",
        *(message_of(idempotency_key=value) for value in INJECTIONS),
    ),
    soft(
        "W-59",
        "an object for message_id",
        "validation_failed",
        *({"type": "delivery_ack", "message_id": value, "timestamp": 1} for value in INJECTIONS),
    ),
    soft(
        "W-59",
        "an object among ids",
        "validation_failed",
        *({"type": "read_receipt", "message_ids": [value], "timestamp": 1} for value in INJECTIONS),
    ),
    soft(
        "W-59",
        "an object for a range's conversation",
        "validation_failed",
        *(asked(conversation_id=value) for value in INJECTIONS),
    ),
    soft(
        "W-60",
        "ranges that are none",
        "validation_failed",
        *(asked(from_sequence=value) for value in (0, -1, 2**63, "5", 1.5, True)),
        asked(from_sequence=3),
    ),
    *(
        soft("W-63", f"idempotency_key {sent}", "validation_failed", message_of(idempotency_key=value))
        for sent, value in {
            "missing": None,
            "empty": "",
            "of 129": "k" * 129,
            "with NUL": "k\0",
            "an emoji": "\U0001f6a3",
        }.items()
    ),
    not_sent("W-67", "content of 49,153 bytes", "too_large", {"content": "y" * 49_153}),
    is_sent("W-67", "content of 49,152 bytes", {"content": "y" * 49_152}),
    not_sent("W-67", "a text without content", "validation_failed", {"content": ""}),
    not_sent("W-67", "an image without anything", "validation_failed", {"content": "", "type": "image"}),
    not_sent("W-68", "type system", "forbidden", {"type": "system"}),
    *(not_sent("W-68", f"type {kind}", "validation_failed", {"type": kind}) for kind in ("dance", "TEXT")),
    soft("W-68", "a type of 1,000 letters", "validation_failed", message_of({"type": HUGE})),
    is_sent(
        "W-69",
        "sender, id, sequence and status of one's own",
        {"sender_id": "usr_evil", "message_id": "msg_evil", "_id": "msg_evil", "sequence_number": 99, "status": "read"},
    ),
    *(
        not_sent("W-74", f"timestamp {value}", "validation_failed", {"timestamp": value})
        for value in (-1, 2**63 - 1, "now")
    ),
    is_sent("W-74", "timestamp 0", {"timestamp": 0}),
    is_sent("W-74", "a timestamp of the year 9999", {"timestamp": 253_402_300_799_000}),
    *(
        not_sent("W-75", f"media_url {value[:40]!r}", "validation_failed", {"type": "image", "media_url": value})
        for value in OTHER_HOSTS
    ),
    not_sent(
        "W-75",
        "a medium that is not there",
        "validation_failed",
        {"type": "image", "media_url": "/v1/media/med_" + "0" * 27},
    ),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
