"""Bad input against the running gateways: each gets the documented answer; process and neighbours live on."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
from joserfc import jwk
from msgspec import UNSET

from bench.services import HOST
from protocol import codec, dev_keys, frames
from protocol.errors import AuthErrorCode, CloseCode, ErrorCode
from protocol.models import MessageType
from tests.system.crowd import auth, crowd, message, talker
from workers.tokens import Tokens

if TYPE_CHECKING:
    from protocol.codec import FrameCodec
    from tests.system.house import House

pytestmark = pytest.mark.trio
by_codec = pytest.mark.parametrize("frame_codec", [codec.JSON, codec.MSGPACK], ids=["json", "msgpack"])
JSON_PAYLOAD = {"conversation_id": "conv_1", "content": "x", "type": "text", "timestamp": 1}


def json_message(**changes: Any) -> bytes:
    return codec.JSON.encode({"type": "message", "idempotency_key": "k", "payload": JSON_PAYLOAD | changes})


REFUSED: list[tuple[bytes, ErrorCode]] = [
    (b"not json", ErrorCode.BAD_FRAME),
    (b"", ErrorCode.BAD_FRAME),
    (b"[1,2]", ErrorCode.BAD_FRAME),
    (b"[" * 10_000, ErrorCode.BAD_FRAME),
    (rb'{"type":"goodbye","payload":{"a":"\ud800"}}', ErrorCode.BAD_FRAME),
    (json_message().replace(b'"x"', rb'"\ud800"'), ErrorCode.BAD_FRAME),
    (b'{"type":"dance"}', ErrorCode.UNKNOWN_TYPE),
    (b'{"type":7}', ErrorCode.UNKNOWN_TYPE),
    (b'{"type":"auth_success","payload":{}}', ErrorCode.UNKNOWN_TYPE),
    (b'{"type":"heartbeat","timestamp":"now"}', ErrorCode.VALIDATION_FAILED),
    (json_message(conversation_id={"$ne": None}), ErrorCode.VALIDATION_FAILED),
    (json_message(type="TEXT"), ErrorCode.VALIDATION_FAILED),
    (json_message(timestamp=-1), ErrorCode.VALIDATION_FAILED),
    (json_message(content=""), ErrorCode.VALIDATION_FAILED),
    (json_message(type="system"), ErrorCode.FORBIDDEN),
    (json_message(content="y" * 49_153), ErrorCode.TOO_LARGE),
    (json_message(conversation_id="conv_nobody"), ErrorCode.CONVERSATION_NOT_FOUND),
    (json_message(conversation_id="a\0b"), ErrorCode.CONVERSATION_NOT_FOUND),
    (json_message(conversation_id="$where"), ErrorCode.CONVERSATION_NOT_FOUND),
]


async def test_soft_refusals_leave_the_connection_open(house: House, transport: str) -> None:
    """Nine on a connection: the eleventh within a minute would close it."""
    async with crowd(house) as people:
        user_id = await people.user()
        for start in range(0, len(REFUSED), 9):
            async with talker(house.urls[transport]) as talk:
                await talk.log_in(user_id, people.tokens[user_id])
                for data, code in REFUSED[start : start + 9]:
                    await talk.send_bytes(data)
                    error: frames.Error = await talk.expect(frames.Error)
                    assert error.payload.code is code, data[:80]
                    assert error.payload.retryable is code.retryable
                    assert "Traceback" not in error.payload.message
                await talk.send(frames.Heartbeat(timestamp=1))
                await talk.expect(frames.HeartbeatAck)
        assert house.is_alive(transport)


async def test_the_eleventh_bad_frame_closes_with_4400(house: House, transport: str) -> None:
    async with crowd(house) as people, talker(house.urls[transport]) as talk:
        user_id = await people.user()
        await talk.log_in(user_id, people.tokens[user_id])
        for _ in range(11):
            await talk.send_bytes(b"{")
        assert await talk.close_code() == CloseCode.BAD_FRAME


@by_codec
async def test_a_frame_over_64_kib_closes_with_1009(house: House, transport: str, frame_codec: FrameCodec) -> None:
    async with crowd(house) as people, talker(house.urls[transport], frame_codec) as talk:
        user_id = await people.user()
        await talk.log_in(user_id, people.tokens[user_id])
        await talk.send_bytes(b"x" * 65_537)
        assert await talk.close_code() == CloseCode.TOO_LARGE


async def test_a_frame_of_exactly_64_kib_is_read(house: House, transport: str) -> None:
    async with crowd(house) as people, talker(house.urls[transport]) as talk:
        user_id = await people.user()
        await talk.log_in(user_id, people.tokens[user_id])
        padding = 65_536 - len(b'{"type":"heartbeat","timestamp":1,"more":""}')
        await talk.send_bytes(b'{"type":"heartbeat","timestamp":1,"more":"' + b"m" * padding + b'"}')
        await talk.expect(frames.HeartbeatAck)


async def test_binary_where_text_is_spoken_closes_with_1003(house: House, transport: str) -> None:
    async with crowd(house) as people, talker(house.urls[transport]) as talk:
        user_id = await people.user()
        await talk.log_in(user_id, people.tokens[user_id])
        await talk.socket.send_message(b"\x00\xff garbage")
        assert await talk.close_code() == CloseCode.UNSUPPORTED_DATA


async def test_binary_garbage_in_messagepack_is_a_bad_frame(house: House, transport: str) -> None:
    async with crowd(house) as people, talker(house.urls[transport], codec.MSGPACK) as talk:
        user_id = await people.user()
        await talk.log_in(user_id, people.tokens[user_id])
        for garbage in (b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x93\x01", b"\x81\xa4type\xa5"):
            await talk.send_bytes(garbage)
            assert (await talk.expect(frames.Error)).payload.code is ErrorCode.BAD_FRAME


@by_codec
async def test_a_frame_before_auth_closes_with_4401(house: House, transport: str, frame_codec: FrameCodec) -> None:
    for frame in (message("conv_1", "k"), frames.Heartbeat(timestamp=1), {"type": "dance"}):
        async with talker(house.urls[transport], frame_codec) as talk:
            await talk.send(frame)
            assert (await talk.expect(frames.AuthError)).error is AuthErrorCode.AUTH_REQUIRED
            assert await talk.close_code() == CloseCode.AUTH


async def test_expired_forged_and_foreign_tokens(house: House, transport: str) -> None:
    async with crowd(house) as people:
        user_id, other = await people.user(), await people.user()
        now = time.time_ns() // 1_000_000
        expired, _ = Tokens(dev_keys.PRIVATE_JWK).sign(user_id, "phone-1", now - 7_200_000, 3600, "j1")
        stranger = jwk.OKPKey.generate_key("Ed25519")
        forged, _ = Tokens(json.dumps(stranger.as_dict(private=True))).sign(user_id, "phone-1", now, 3600, "j2")
        header, claims, signature = people.tokens[user_id].split(".")
        unsigned = "eyJhbGciOiJub25lIn0." + claims + "."
        attempts = [
            (user_id, expired, "phone-1", AuthErrorCode.EXPIRED_TOKEN),
            (user_id, forged, "phone-1", AuthErrorCode.INVALID_TOKEN),
            (user_id, unsigned, "phone-1", AuthErrorCode.INVALID_TOKEN),
            (user_id, f"{header}.{claims}.{signature[:-4]}AAAA", "phone-1", AuthErrorCode.INVALID_TOKEN),
            (user_id, "garbage", "phone-1", AuthErrorCode.INVALID_TOKEN),
            (other, people.tokens[user_id], "phone-1", AuthErrorCode.USER_MISMATCH),
            (user_id, people.tokens[user_id], "another", AuthErrorCode.INVALID_TOKEN),
        ]
        for name, token, device_id, error in attempts:
            async with talker(house.urls[transport]) as talk:
                await talk.send(auth(name, token, device_id))
                assert (await talk.expect(frames.AuthError)).error is error
                assert await talk.close_code() == CloseCode.AUTH


async def test_w71_foreign_conversations_look_like_unknown_ones(house: House, transport: str) -> None:
    async with crowd(house) as people:
        conversation_id, ann, _ = await people.pair()
        settled = await ann.send(conversation_id, "secret")
        stranger = await people.user()
        answers = []
        async with talker(house.urls[transport]) as talk:
            await talk.log_in(stranger, people.tokens[stranger])
            for name in (conversation_id, "conv_unknown"):
                answer = []
                await talk.send(message(name, "k"))
                answer.append(await talk.expect(frames.Error))
                await talk.send(frames.Retransmit(conversation_id=name, from_sequence=1, to_sequence=9))
                answer.append(await talk.expect(frames.Error))
                history = frames.HistoryPayload(conversation_id=name, before_sequence=9)
                await talk.send(frames.History(payload=history))
                answer.append(await talk.expect(frames.Error))
                answers.append(
                    [(frame.payload.code, frame.payload.message, frame.payload.retryable) for frame in answer]
                )
            await talk.send(frames.DeliveryAck(message_id=settled.message_id, timestamp=1))
            await talk.send(frames.ReadReceipt(message_ids=[settled.message_id], timestamp=1))
            await talk.send(frames.Sync(payload=frames.SyncPayload(cursors={conversation_id: 0})))
            complete = await talk.expect(frames.SyncComplete)
        assert answers[0] == answers[1]
        assert {code for code, _, _ in answers[0]} == {ErrorCode.CONVERSATION_NOT_FOUND}
        assert complete.payload.heads == {}
        assert house.sequences(conversation_id) == [1]
        await people.settle(conversation_id)


@by_codec
async def test_nul_and_any_other_text_in_content_comes_back_as_it_went(
    house: House, transport: str, frame_codec: FrameCodec
) -> None:
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        content = "a\0b \u202e \U0001f6a3 e\u0301 \ufeff \uffff $where"
        async with (
            talker(house.urls[transport], frame_codec) as author,
            talker(house.urls["epoll"], codec.JSON) as reader,
        ):
            await author.log_in(user_a, people.tokens[user_a])
            await reader.log_in(user_b, people.tokens[user_b])
            await author.send(message(conversation_id, "k", content, receiver_id=user_b))
            frame: frames.Messages = await reader.expect(frames.Messages)
        assert [stored.content for stored in frame.payload.messages] == [content]
        assert frame.payload.messages[0].idempotency_key is UNSET


async def test_w65_another_payload_under_the_same_key_is_a_conflict(house: House) -> None:
    async with crowd(house) as people:
        user_a, user_b = await people.user(), await people.user()
        conversation_id = await people.direct(user_a, user_b)
        async with talker(house.urls["epoll"]) as talk:
            await talk.log_in(user_a, people.tokens[user_a])
            await talk.send(message(conversation_id, "k", "one"))
            await talk.expect(frames.MessageAck)
            await talk.send(message(conversation_id, "k", "two"))
            assert (await talk.expect(frames.Error)).payload.code is ErrorCode.IDEMPOTENCY_CONFLICT
        assert house.sequences(conversation_id) == [1]


async def test_w70_w73_receiver_and_reply_must_belong_to_the_conversation(house: House) -> None:
    async with crowd(house, judged=False) as people:
        conversation_id, ann, _ = await people.pair()
        elsewhere, carl, _ = await people.pair()
        foreign = await carl.send(elsewhere, "elsewhere")
        async with talker(house.urls["epoll"]) as talk:
            await talk.log_in(ann.client.user_id, await people.api.create_token(ann.client.user_id, "raw"), "raw")
            await talk.send(message(conversation_id, "k1", receiver_id=carl.client.user_id))
            assert (await talk.expect(frames.Error)).payload.code is ErrorCode.VALIDATION_FAILED
            await talk.send(message(conversation_id, "k2", reply_to_message_id=foreign.message_id))
            assert (await talk.expect(frames.Error)).payload.code is ErrorCode.VALIDATION_FAILED
            await talk.send(message(conversation_id, "k3", message_type=MessageType.TEXT))
            assert (await talk.expect(frames.MessageAck)).payload.sequence_number == 1


# --- below the WebSocket ---------------------------------------------------------------------------------------------


async def http_answer(url: str, data: bytes, pause_seconds: float = 0.0) -> tuple[bytes, float]:
    """What comes back until the server closes, and how long that took."""
    stream = await trio.open_tcp_stream(HOST, int(url.split(":")[2].split("/")[0]))
    started = trio.current_time()
    received = b""

    async def write() -> None:
        try:
            for start in range(0, len(data), 1 if pause_seconds else 65_536):
                await stream.send_all(data[start : start + (1 if pause_seconds else 65_536)])
                await trio.sleep(pause_seconds)
        except trio.BrokenResourceError:
            pass

    with trio.fail_after(20):
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(write)
            try:
                while chunk := await stream.receive_some(65_536):
                    received += chunk
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()
    return received, trio.current_time() - started


async def test_a_ten_megabyte_handshake_is_cut_off(house: House, transport: str) -> None:
    resident_kib = house.resident_kib(transport)
    _, seconds = await http_answer(
        house.urls[transport], b"GET /v1/ws HTTP/1.1\r\nX-Filler: " + b"a" * 10_000_000 + b"\r\n\r\n"
    )
    assert seconds < 10
    assert house.is_alive(transport)
    assert house.resident_kib(transport) - resident_kib < 5_000


@pytest.mark.slow
async def test_w10_a_slow_handshake_is_cut_off_after_five_seconds(house: House, transport: str) -> None:
    _, seconds = await http_answer(house.urls[transport], b"GET /v1/ws HTTP/1.1\r\n" * 100, pause_seconds=0.2)
    assert 4 < seconds < 8
    assert house.is_alive(transport)


async def test_w13_another_path_is_not_found(house: House, transport: str) -> None:
    received, _ = await http_answer(
        house.urls[transport], b"GET /admin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert received.startswith(b"HTTP/1.1 404")


async def test_health_and_metrics_answer_on_the_same_port(house: House, transport: str) -> None:
    for path in (b"/health/live", b"/health/ready", b"/metrics"):
        received, _ = await http_answer(
            house.urls[transport], b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        assert received.startswith(b"HTTP/1.1 200"), received[:200]
