"""Everything that reads bytes of strangers, as functions that raise only where there is a bug; and where to begin.

Called by `fuzz` and its tests. What each reader may say about bytes it does not like is caught here, everything else
is found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from websockets.frames import Frame, Opcode

from bench.echo_gateway import EchoHost
from gateway import upgrade
from gateway.transport import TransportLimits
from gateway.websocket import FrameMeter, FrameReader, FrameRefused, Shut, frame_length
from protocol import codec
from protocol.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS: Final = TransportLimits(max_message_bytes=4096, max_fragments=16)
"""Small enough that a fuzzer reaches them."""


def frame(opcode: Opcode, payload: bytes, *, fin: bool = True) -> bytes:
    """A client's WebSocket frame."""
    return Frame(opcode, payload, fin=fin).serialize(mask=True)


def read_json_frame(data: bytes) -> None:
    _read_frame(codec.JSON, data)


def read_msgpack_frame(data: bytes) -> None:
    _read_frame(codec.MSGPACK, data)


def _read_frame(frame_codec: codec.FrameCodec, data: bytes) -> None:
    try:
        found = frame_codec.decode(data)
    except RemoteProtocolError:
        return
    assert frame_codec.decode(frame_codec.encode(found)) == found


def read_records(data: bytes) -> None:
    """What lies in streams and channels: ours, unless somebody else wrote there."""
    for decode in (codec.decode_ingest, codec.decode_query, codec.decode_down, codec.decode_signal):
        _refused_or_read(decode, data)
    for decode in (codec.decode_registry, codec.decode_presence, codec.decode_ticket, codec.decode_system_event):
        _refused_or_read(decode, data)


def _refused_or_read(decode: Callable[[bytes], Any], data: bytes) -> None:
    try:
        decode(data)
    except msgspec.DecodeError:
        return


def read_websocket(data: bytes) -> None:
    """Frame after frame, as both transports do; the meter must not let through what the reader refuses for its size."""
    reader = FrameReader(LIMITS.max_message_bytes, LIMITS.max_fragments)
    at = 0
    while at < len(data):
        try:
            length = frame_length(data, at, reader.room)
        except FrameRefused:
            break
        if length <= 0 or isinstance(reader.feed(data[at : at + length], False), Shut):
            break
        at += length
    meter = FrameMeter(LIMITS.max_message_bytes, LIMITS.max_fragments, LIMITS.control_frames, 0.0)
    passed, _ = meter.measure(data, 0.0)
    assert 0 <= passed <= len(data)


def read_request(data: bytes) -> None:
    """The head of an HTTP request."""
    length = upgrade.head_length(data)
    if length:
        upgrade.answer(data[:length], "127.0.0.1", EchoHost(), LIMITS, 0.0)
    else:
        upgrade.hopeless(data, LIMITS)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "json": read_json_frame,
    "msgpack": read_msgpack_frame,
    "records": read_records,
    "websocket": read_websocket,
    "request": read_request,
}
_KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
_IDS: Final = {"conversation_id": "conv_1", "message_id": "msg_1", "idempotency_key": "k1"}
WHO: Final = {"user_id": "usr_1", "auth_token": "t", "device_id": "d", "platform": "p", "app_version": "1"}
FRAMES: Final[list[dict[str, Any]]] = [
    {"type": "auth", "payload": WHO | {"resume": {"conv_1": 3}}},
    {
        "type": "message",
        "client_message_id": "c1",
        "idempotency_key": "k1",
        "payload": {"conversation_id": "conv_1", "receiver_id": "", "content": "é:x", "type": "text", "timestamp": 1},
    },
    {"type": "delivery_ack", "message_id": "msg_1", "timestamp": 1, "sequence_number": 4},
    {"type": "read_receipt", "message_ids": ["msg_1", "msg_2"], "timestamp": 1},
    {"type": "heartbeat", "timestamp": 1},
    {"type": "retransmit", "conversation_id": "conv_1", "from_sequence": 1, "to_sequence": 4},
    {"type": "sync", "payload": {"cursors": {"conv_1": 1}, "limit": 10}},
    {"type": "history", "payload": {"conversation_id": "conv_1", "before_sequence": 9, "limit": 5}},
    {"type": "typing", "payload": {"conversation_id": "conv_1", "state": "start"}},
    {"type": "presence_subscribe", "payload": {"user_ids": ["usr_1"]}},
    {"type": "message_edit", "payload": _IDS | {"content": "y"}},
    {"type": "message_delete", "payload": _IDS | {"scope": "me"}},
    {"type": "reaction", "payload": _IDS | {"emoji": "👍", "op": "add"}},
    {"type": "goodbye"},
]
"""One of each kind a client may send."""
_HEAD: Final = (
    "GET /v1/ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {_KEY}\r\nOrigin: https://a\r\n"
    "Sec-WebSocket-Protocol: trireme.v1.json\r\n\r\n"
)
SEEDS: Final[dict[str, list[bytes]]] = {
    "json": [codec.JSON.encode(found) for found in FRAMES],
    "msgpack": [codec.MSGPACK.encode(found) for found in FRAMES],
    "records": [codec.MSGPACK.encode({"type": "send", "conversation_id": "c"}), codec.JSON.encode({"type": "revoked"})],
    "websocket": [
        frame(Opcode.TEXT, b"a", fin=False) + frame(Opcode.PING, b"p") + frame(Opcode.CONT, b"\xc3\xa9"),
        frame(Opcode.TEXT, b"x" * 300) + frame(Opcode.CLOSE, b"\x03\xe8bye"),
        frame(Opcode.BINARY, b"\x80") + frame(Opcode.PONG, b""),
    ],
    "request": [_HEAD.encode(), b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4, 5.6.7.8\r\n\r\n"],
}
