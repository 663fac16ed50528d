"""Both frame codecs: every frame comes back as it went; a client can raise nothing but RemoteProtocolError."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import codec, frames
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.models import MessagePayload, MessageType
from tests.protocol.test_frames import CLIENT_SHAPES, SERVER_SHAPES

if TYPE_CHECKING:
    from protocol.codec import FrameCodec

CODECS = [codec.JSON, codec.MSGPACK]
by_codec = pytest.mark.parametrize("frame_codec", CODECS, ids=lambda frame_codec: frame_codec.subprotocol)

CHARACTERS = st.characters(codec="utf-8")
ids = st.text(CHARACTERS, min_size=1, max_size=64)
keys = st.from_regex(r"\A[A-Za-z0-9._:-]{1,128}\Z")
devices = st.from_regex(r"\A[A-Za-z0-9._:-]{1,64}\Z")
labels = st.text(CHARACTERS, max_size=128)
contents = st.text(CHARACTERS, max_size=300)
times = st.integers(0, 253_402_300_799_999)
sequences = st.integers(1, 2**53)
cursors = st.dictionaries(ids, st.integers(0, 2**53), max_size=5)

client_frames: st.SearchStrategy[frames.ClientFrame] = st.one_of(
    st.builds(
        frames.Auth,
        payload=st.builds(
            frames.AuthPayload,
            user_id=ids,
            auth_token=st.text(st.characters(codec="ascii"), min_size=1, max_size=200),
            device_id=devices,
            platform=labels,
            app_version=labels,
            resume=st.one_of(st.just(msgspec.UNSET), cursors),
            protocol_version=st.one_of(st.just(msgspec.UNSET), st.integers(0, 9)),
        ),
    ),
    st.builds(
        frames.Message,
        client_message_id=st.none() | labels,
        idempotency_key=keys,
        payload=st.builds(
            MessagePayload,
            conversation_id=ids,
            receiver_id=st.text(CHARACTERS, max_size=64),
            content=contents,
            message_type=st.sampled_from(MessageType),
            media_url=st.none() | st.just("/v1/media/med_" + "0" * 27),
            reply_to_message_id=st.none() | ids,
            timestamp=times,
        ),
    ),
    st.builds(frames.DeliveryAck, message_id=ids, timestamp=times),
    st.builds(frames.ReadReceipt, message_ids=st.lists(ids, max_size=8), timestamp=times),
    st.builds(frames.Heartbeat, timestamp=times),
    st.builds(frames.Retransmit, conversation_id=ids, from_sequence=sequences, to_sequence=sequences),
    st.builds(frames.Sync, payload=st.builds(frames.SyncPayload, cursors=cursors, limit=st.integers(1, 100))),
    st.builds(
        frames.History,
        payload=st.builds(
            frames.HistoryPayload, conversation_id=ids, before_sequence=sequences, limit=st.integers(1, 100)
        ),
    ),
    st.builds(frames.Goodbye),
)


@by_codec
@given(frame=client_frames)
def test_every_client_frame_comes_back_as_it_went(frame_codec: FrameCodec, frame: frames.ClientFrame) -> None:
    assert frame_codec.decode(frame_codec.encode(frame)) == frame


@by_codec
@pytest.mark.parametrize("frame", [frame for frame, _ in SERVER_SHAPES], ids=lambda frame: type(frame).__name__)
def test_every_server_frame_comes_back_as_it_went(frame_codec: FrameCodec, frame: frames.ServerFrame) -> None:
    assert frame_codec.decode_server(frame_codec.encode(frame)) == frame


@pytest.mark.parametrize("frame", [frame for frame, _ in SERVER_SHAPES], ids=lambda frame: type(frame).__name__)
def test_a_workers_json_frame_means_the_same_in_messagepack(frame: frames.ServerFrame) -> None:
    packed = codec.transcode_to_msgpack(codec.JSON.encode(frame))
    assert codec.MSGPACK.decode_server(packed) == frame


def decodes_or_refuses(frame_codec: FrameCodec, data: bytes) -> None:
    try:
        frame_codec.decode(data)
        return
    except RemoteProtocolError as error:
        refused = error
    assert refused.code in (ErrorCode.BAD_FRAME, ErrorCode.UNKNOWN_TYPE, ErrorCode.VALIDATION_FAILED)
    assert len(refused.message) <= 160
    for echoed in (refused.client_message_id, refused.idempotency_key):
        assert echoed is None or len(echoed) <= 128


@by_codec
@settings(max_examples=500)
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=b"\xc1")
@example(data=b"\xdf\xff\xff\xff\xff")
@example(data=b"\xdd\xff\xff\xff\xff")
def test_random_bytes_are_refused_and_nothing_else(frame_codec: FrameCodec, data: bytes) -> None:
    decodes_or_refuses(frame_codec, data)


@by_codec
@settings(max_examples=500)
@given(frame=client_frames, flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4))
def test_flipped_bytes_are_refused_or_read_and_nothing_else(
    frame_codec: FrameCodec, frame: frames.ClientFrame, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(frame_codec.encode(frame))
    for position, mask in flips:
        data[position % len(data)] ^= mask
    decodes_or_refuses(frame_codec, bytes(data))


@by_codec
@given(frame=client_frames, cut=st.integers(0, 10_000))
def test_a_frame_cut_short_is_refused(frame_codec: FrameCodec, frame: frames.ClientFrame, cut: int) -> None:
    data = frame_codec.encode(frame)
    with pytest.raises(RemoteProtocolError):
        frame_codec.decode(data[: cut % len(data)])


def refusal(data: bytes | str, frame_codec: FrameCodec = codec.JSON) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        frame_codec.decode(data.encode() if isinstance(data, str) else data)
    return caught.value


# --- rows of the bad-input matrix ------------------------------------------------------------------------------------

NESTED = b'{"type":"goodbye","payload":{"a":'


@pytest.mark.parametrize(
    "data",
    [
        b"not json",
        b"[]",
        b'["type","message"]',
        b'"x"',
        b"7",
        b"null",
        b"",
        b"\xef\xbb\xbf{}",
        b'{"type":"goodbye"',
        b'{"type":"goodbye"}{"type":"goodbye"}',
        b"\xff\xfe\x00",
        b'{"type":"goodbye","payload":{"a":"\xc3\x28"}}',
    ],
)
def test_w55_what_is_no_json_object_is_a_bad_frame(data: bytes) -> None:
    assert refusal(data).code is ErrorCode.BAD_FRAME


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10_000,
        NESTED + b"[" * 10_000,
        NESTED + b"[" * 10_000 + b"]" * 10_000 + b"}}",
        NESTED + b'{"a":' * 10_000,
        b'{"type":"heartbeat","timestamp":NaN}',
        b'{"type":"heartbeat","timestamp":Infinity}',
        rb'{"type":"goodbye","payload":{"a":"\ud800"}}',
        rb'{"type":"goodbye","payload":{"\udfff":1}}',
    ],
    ids=["open", "inside", "closed", "objects", "nan", "infinity", "surrogate", "surrogate-key"],
)
def test_w56_nesting_numbers_and_surrogates(data: bytes) -> None:
    assert refusal(data).code is ErrorCode.BAD_FRAME


def test_w56_a_number_out_of_range() -> None:
    assert refusal(NESTED + b"1e400}}").code is ErrorCode.VALIDATION_FAILED
    assert refusal('{"type":"heartbeat","timestamp":' + "9" * 100_000 + "}").code in (
        ErrorCode.VALIDATION_FAILED,
        ErrorCode.BAD_FRAME,
    )


@pytest.mark.parametrize(
    "data",
    [
        '{"type":"dance"}',
        "{}",
        '{"payload":{}}',
        '{"type":7}',
        '{"type":null}',
        '{"type":["message"]}',
        '{"type":"auth_success","payload":{"session_id":"s","server_time":1,"unread_count":0}}',
        '{"type":"Message"}',
    ],
)
def test_w57_an_unknown_tag_is_an_unknown_type(data: str) -> None:
    assert refusal(data).code is ErrorCode.UNKNOWN_TYPE


def test_w58_unknown_fields_are_ignored() -> None:
    data = b'{"type":"heartbeat","timestamp":1,"more":{"deep":[1,2,{"x":null}]}}'
    assert codec.JSON.decode(data) == frames.Heartbeat(timestamp=1)


def string_fields(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [field for name, inner in value.items() for field in string_fields(inner, (*path, name))]
    return [path] if isinstance(value, str) and path != ("type",) else []


STRING_FIELDS = [(text, path) for text, _ in CLIENT_SHAPES for path in string_fields(json.loads(text))]


@by_codec
@pytest.mark.parametrize("injected", [{"$ne": None}, {"$gt": ""}, ["a"], 7, True], ids=str)
@pytest.mark.parametrize(
    ("text", "path"), STRING_FIELDS, ids=lambda value: ".".join(value) if type(value) is tuple else ""
)
def test_w59_no_operator_reaches_a_string_field(
    frame_codec: FrameCodec, text: str, path: tuple[str, ...], injected: object
) -> None:
    frame = json.loads(text)
    target = frame
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = injected
    error = refusal(frame_codec.encode(frame), frame_codec)
    assert error.code is ErrorCode.VALIDATION_FAILED


@by_codec
@pytest.mark.parametrize("value", [0, -1, 2**63, 2**53 + 1, "5", 1.5, True, None])
@pytest.mark.parametrize("field", ["from_sequence", "to_sequence"])
def test_w60_retransmit_takes_positive_integers_only(frame_codec: FrameCodec, field: str, value: object) -> None:
    frame = {"type": "retransmit", "conversation_id": "conv_1", "from_sequence": 1, "to_sequence": 2, field: value}
    assert refusal(frame_codec.encode(frame), frame_codec).code is ErrorCode.VALIDATION_FAILED


def message_frame(**changes: object) -> dict[str, Any]:
    payload = {"conversation_id": "conv_1", "content": "x", "type": "text", "timestamp": 1}
    return {"type": "message", "client_message_id": "c1", "idempotency_key": "k1", "payload": payload} | changes


@pytest.mark.parametrize("key", ["", "k" * 129, "a\0b", "🚣", "a b", "a\n", "ключ"])
def test_w63_what_no_idempotency_key_may_be(key: str) -> None:
    error = refusal(codec.JSON.encode(message_frame(idempotency_key=key)))
    assert error.code is ErrorCode.VALIDATION_FAILED
    assert error.client_message_id == "c1"


def test_w63_a_message_needs_an_idempotency_key() -> None:
    frame = message_frame()
    del frame["idempotency_key"]
    assert refusal(codec.JSON.encode(frame)).code is ErrorCode.VALIDATION_FAILED


def test_w68_message_types_are_lowercase_and_known() -> None:
    for kind in ("TEXT", "poll", ""):
        payload = message_frame()["payload"] | {"type": kind}
        assert refusal(codec.JSON.encode(message_frame(payload=payload))).code is ErrorCode.VALIDATION_FAILED


@pytest.mark.parametrize("timestamp", [-1, 2**63 - 1, 253_402_300_800_000, "1", 1.5])
def test_w74_timestamps_outside_the_calendar(timestamp: object) -> None:
    payload = message_frame()["payload"] | {"timestamp": timestamp}
    assert refusal(codec.JSON.encode(message_frame(payload=payload))).code is ErrorCode.VALIDATION_FAILED


def test_w76_five_hundred_ids_per_read_receipt() -> None:
    frame = {"type": "read_receipt", "message_ids": ["m"] * 500, "timestamp": 1}
    assert isinstance(codec.JSON.decode(codec.JSON.encode(frame)), frames.ReadReceipt)
    frame["message_ids"] = ["m"] * 501
    assert refusal(codec.JSON.encode(frame)).code is ErrorCode.VALIDATION_FAILED


def test_a_refusal_names_the_frame_it_refuses_but_echoes_no_long_input() -> None:
    error = refusal(codec.JSON.encode(message_frame(payload={})))
    assert (error.client_message_id, error.idempotency_key) == ("c1", "k1")
    error = refusal(codec.JSON.encode(message_frame(client_message_id="c" * 65, payload={})))
    assert error.client_message_id is None
