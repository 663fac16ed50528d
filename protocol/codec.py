"""The encoders and decoders, built once. Frames in two codecs, records in MessagePack, small values in JSON.

Called by the gateway's transports (frames), both brokers (records) and the bench. Raises `RemoteProtocolError` for what
a client got wrong, `msgspec.DecodeError` for a record that cannot be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec

from protocol import events, frames, records
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.models import ConnectionRegistry, Presence, SystemEvent
from protocol.repetition import is_plain

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_FRAME_BYTES: Final = 64 * 1024
MAX_CONTENT_BYTES: Final = 48 * 1024

SUBPROTOCOL_JSON: Final = "trireme.v1.json"
SUBPROTOCOL_MSGPACK: Final = "trireme.v1.msgpack"

_ECHO_LIMIT = 64
"""No answer repeats more than this many characters of input."""


class _Probe(msgspec.Struct):
    """What can still be read from a refused frame, to tell the client which one it was."""

    type: Any = None
    client_message_id: Any = None
    idempotency_key: Any = None
    payload: msgspec.Raw = msgspec.Raw()
    """Not looked into before the tag is known to be one of ours."""


class FrameCodec:
    """One of the two frame codecs. `binary` says which WebSocket opcode carries it."""

    __slots__ = ("_decode", "_decode_server", "_probe", "binary", "encode", "subprotocol")

    def __init__(self, subprotocol: str, binary: bool) -> None:
        self.subprotocol = subprotocol
        self.binary = binary
        decoder: Any = msgspec.msgpack.Decoder if binary else msgspec.json.Decoder
        self._decode = decoder(frames.ClientFrame).decode
        self._decode_server = decoder(frames.ServerFrame).decode
        self._probe = decoder(_Probe).decode
        self.encode = msgspec.msgpack.Encoder().encode if binary else msgspec.json.Encoder().encode

    def decode(self, data: bytes | bytearray | memoryview) -> frames.ClientFrame:
        """One client frame. Raises RemoteProtocolError: bad_frame, unknown_type or validation_failed."""
        try:
            frame: frames.ClientFrame = self._decode(data)
        except msgspec.ValidationError as error:
            raise self._refusal(data, str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RemoteProtocolError(ErrorCode.BAD_FRAME, f"not a {self.subprotocol} object") from None
        if not self.binary and not is_plain(bytes(data), frame):
            raise RemoteProtocolError(ErrorCode.BAD_FRAME, "a key is written twice, or a value cannot be read")
        return frame

    def decode_server(self, data: bytes | str) -> frames.ServerFrame:
        """One server frame, for clients. Raises msgspec.DecodeError."""
        frame: frames.ServerFrame = self._decode_server(data)
        return frame

    def _refusal(self, data: bytes | bytearray | memoryview, reason: str) -> RemoteProtocolError:
        try:
            probe = self._probe(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return RemoteProtocolError(ErrorCode.BAD_FRAME, f"not a {self.subprotocol} object")
        if not isinstance(probe.type, str) or probe.type not in frames.CLIENT_TAGS:
            return RemoteProtocolError(ErrorCode.UNKNOWN_TYPE, "unknown frame type")
        named = probe if probe.idempotency_key is not None else self._look_inside(probe)
        return RemoteProtocolError(
            ErrorCode.VALIDATION_FAILED,
            _without_input(reason),
            client_message_id=_short(named.client_message_id, _ECHO_LIMIT),
            idempotency_key=_short(named.idempotency_key, 128),
        )

    def _look_inside(self, probe: _Probe) -> _Probe:
        """An added frame carries its ids in the payload."""
        try:
            inside: _Probe = self._probe(probe.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return probe
        return inside


def _without_input(reason: str) -> str:
    """What msgspec says, but for the value it quotes: `Invalid enum value 'x' - at `$.payload.type``."""
    said, at, where = reason.rpartition(" - at ") if " - at " in reason else (reason, "", "")
    return (said.partition(" '")[0] + at + where)[:160]


def _short(value: object, limit: int) -> str | None:
    return value if isinstance(value, str) and len(value) <= limit else None


JSON: Final = FrameCodec(SUBPROTOCOL_JSON, binary=False)
MSGPACK: Final = FrameCodec(SUBPROTOCOL_MSGPACK, binary=True)
FRAME_CODECS: Final = {SUBPROTOCOL_JSON: JSON, SUBPROTOCOL_MSGPACK: MSGPACK}


def transcode_to_msgpack(json_frame: bytes) -> bytes:
    """A worker's JSON frame for a MessagePack connection."""
    return MSGPACK.encode(_from_json(json_frame))


Decoded = TypeVar("Decoded")
Data = TypeVar("Data")


def _record_decoder(decoder: msgspec.msgpack.Decoder[Decoded]) -> Callable[[bytes], Decoded]:
    """Bytes of a stream → record. Raises msgspec.DecodeError."""
    return _only_decode_errors(decoder.decode)


def _value_decoder(decoder: msgspec.json.Decoder[Decoded]) -> Callable[[bytes | str], Decoded]:
    """Bytes of a Redis value or channel → what they say. Raises msgspec.DecodeError."""
    return _only_decode_errors(decoder.decode)


def _only_decode_errors(decode_bytes: Callable[[Data], Decoded]) -> Callable[[Data], Decoded]:
    """msgspec lets lower errors through: bad UTF-8 in a tag, depth."""

    def decode(data: Data) -> Decoded:
        try:
            return decode_bytes(data)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(str(error)) from None

    return decode


def decode_event(data: bytes) -> events.Event:
    """A CloudEvent in structured mode. Raises msgspec.DecodeError."""
    return _EVENTS[_event_type(data).type](data)


_from_json = msgspec.json.Decoder().decode
_to_msgpack = msgspec.msgpack.Encoder().encode
encode_record = _to_msgpack
"""One ingest record or query → bytes."""
decode_ingest = _record_decoder(msgspec.msgpack.Decoder[records.IngestRecord](records.IngestRecord))
decode_query = _record_decoder(msgspec.msgpack.Decoder[records.Query](records.Query))
encode_down = _to_msgpack
"""A list of down items → bytes."""
decode_down = _record_decoder(msgspec.msgpack.Decoder[list[records.DownItem]](list[records.DownItem]))

encode_value = msgspec.json.Encoder().encode
decode_registry = _value_decoder(msgspec.json.Decoder(ConnectionRegistry))
decode_presence = _value_decoder(msgspec.json.Decoder(Presence))
decode_instance = _value_decoder(msgspec.json.Decoder(records.InstanceInfo))
decode_signal = _value_decoder(msgspec.json.Decoder(records.UserSignal | records.PushJob))
decode_push_job = _value_decoder(msgspec.json.Decoder(records.PushJob))
decode_presence_change = _value_decoder(msgspec.json.Decoder(records.PresenceChange))
decode_ticket = _value_decoder(msgspec.json.Decoder(records.MigrationTicket))
decode_system_event = _value_decoder(msgspec.json.Decoder(SystemEvent))


class _EventType(msgspec.Struct):
    """What an event says it is."""

    type: Literal["trireme.message.received.v1", "trireme.agent.response.v1", "trireme.webhook.disabled.v1"]


_event_type = _value_decoder(msgspec.json.Decoder(_EventType))
_EVENTS: Final[dict[str, Callable[[bytes], events.Event]]] = {
    events.MESSAGE_RECEIVED: msgspec.json.Decoder(events.CloudEvent[events.MessageReceivedEvent]).decode,
    events.AGENT_RESPONSE: msgspec.json.Decoder(events.CloudEvent[events.AgentResponseEvent]).decode,
    events.WEBHOOK_DISABLED: msgspec.json.Decoder(events.CloudEvent[events.WebhookDisabledEvent]).decode,
}
