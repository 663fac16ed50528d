"""What comes of a frame, in a word. Called by the rows about live sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from trio_websocket import ConnectionClosed

from protocol import frames

if TYPE_CHECKING:
    from tests.hostile.scene import Scene
    from tests.system.crowd import Talker


async def answer(talk: Talker, scene: Scene, seconds: float = 10.0) -> str | int:
    """What comes of a frame: "ack", "messages", the code of an `error`, the code of the close; the rest is passed
    over."""
    with trio.fail_after(seconds):
        while True:
            try:
                frame = await talk.receive(seconds)
            except ConnectionClosed as closed:
                return int(closed.reason.code) if closed.reason is not None else 1006
            match frame:
                case frames.Error():
                    scene.saw(frame.payload.message)
                    return frame.payload.code.value
                case frames.MessageAck():
                    return "ack"
                case frames.HeartbeatAck():
                    return "heartbeat_ack"
                case frames.Messages() if frame.payload.origin == "retransmit":
                    return "messages"
                case _:
                    pass
