"""W-40 to W-51: what comes before and with the first frame."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from joserfc import jwk, jwt

from protocol import codec, dev_keys, keys, records
from protocol.errors import AuthErrorCode, CloseCode
from protocol.limits import Limits
from tests.gateway.peers import CLOSE, TEXT, Peer, frame
from tests.hostile.rows import BOTH, Row, by_row, judge
from tests.system.crowd import auth, message
from workers.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio

PUBLIC: Final = json.loads(dev_keys.PUBLIC_JWK)
MINUTE_MS: Final = 60_000

Refused = tuple[str, int]
"""(error of the `auth_error`, or code of the `error`; close code)"""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def end(peer: Peer) -> tuple[list[dict[str, Any]], int]:
    """Every message until the server's Close, and its code."""
    told: list[dict[str, Any]] = []
    while True:
        opcode, payload = await peer.receive()
        if opcode == CLOSE:
            return told, int.from_bytes(payload[:2])
        if opcode == TEXT:
            told.append(json.loads(payload))


async def refusal(peer: Peer) -> Refused:
    """Why and how it ended."""
    told, code = await end(peer)
    last = told[-1] if told else {}
    return last.get("error") or last.get("payload", {}).get("code", ""), code


async def show(scene: Scene, payload: dict[str, Any]) -> Refused:
    """The answer to an `auth` frame with this payload, on a connection of its own."""
    peer = await scene.open()
    await peer.send(frame(TEXT, codec.JSON.encode({"type": "auth", "payload": payload})))
    return await refusal(peer)


def payload(user_id: str, token: str, device_id: object = "phone-1") -> dict[str, Any]:
    return {"user_id": user_id, "auth_token": token, "device_id": device_id, "platform": "test", "app_version": "1"}


def shows(make: Callable[[str], str]) -> Play:
    """The answer to the token that `make` makes for a user."""

    async def play(scene: Scene) -> Refused:
        user_id = await scene.people.user()
        return await show(scene, payload(user_id, make(user_id)))

    return play


# --- tokens ----------------------------------------------------------------------------------------------------------


def claims(user_id: str, **changes: object) -> dict[str, Any]:
    now = now_ms() // 1000
    return {"sub": user_id, "iat": now, "exp": now + 3600, "device_id": "phone-1", **changes}


def ours(user_id: str, **changes: object) -> str:
    """Signed with the key of the running system."""
    private = jwk.OKPKey.import_key(json.loads(dev_keys.PRIVATE_JWK))
    header = {"alg": "Ed25519", "kid": private.kid or private.thumbprint()}
    return jwt.encode(header, claims(user_id, **changes), private, algorithms=["Ed25519"])


def unsigned(user_id: str) -> str:
    return ours(user_id).replace(ours(user_id).split(".")[0], "eyJhbGciOiJub25lIn0").rsplit(".", 1)[0] + "."


def damaged(user_id: str) -> str:
    head, body, signature = ours(user_id).split(".")
    return f"{head}.{body}.{signature[:-8]}AAAAAAAA"


def strangers(user_id: str) -> str:
    key = jwk.OKPKey.generate_key("Ed25519")
    return jwt.encode({"alg": "Ed25519"}, claims(user_id), key, algorithms=["Ed25519"])


def confused(user_id: str) -> str:
    """HS256 with the bytes of the public key as the secret."""
    secret = jwk.OctKey.import_key(dev_keys.PUBLIC_JWK)
    return jwt.encode({"alg": "HS256"}, claims(user_id), secret, algorithms=["HS256"])


def with_kid(kid: str) -> Callable[[str], str]:
    def make(user_id: str) -> str:
        private = jwk.OKPKey.import_key(json.loads(dev_keys.PRIVATE_JWK))
        return jwt.encode({"alg": "Ed25519", "kid": kid}, claims(user_id), private, algorithms=["Ed25519"])

    return make


def an_hour_old(user_id: str) -> str:
    return Tokens(dev_keys.PRIVATE_JWK).sign(user_id, "phone-1", now_ms() - 7_200_000, 3600, "j")[0]


def not_yet_good(user_id: str) -> str:
    """In two minutes: a minute past what clocks may differ."""
    return ours(user_id, nbf=now_ms() // 1000 + 120)


BAD_TOKENS: Final[dict[str, Callable[[str], str]]] = {
    "a bad signature": damaged,
    "a stranger's key": strangers,
    "alg none": unsigned,
    "HS256 with the public key": confused,
    "an unknown kid": with_kid("nobody"),
    "a kid that is a path": with_kid("../../etc/passwd"),
    "no token at all": lambda _user_id: "garbage",
}


async def all_alike(scene: Scene) -> tuple[int, bool]:
    """(How many different answers bad tokens get, does their time tell them apart by less than 5 ms)."""
    user_id = await scene.people.user()
    answers: set[bytes] = set()
    medians: list[float] = []
    for make in BAD_TOKENS.values():
        token, times = make(user_id), []
        for _ in range(5):
            scene.move()
            peer = await scene.open()
            began = trio.current_time()
            await peer.send(frame(TEXT, codec.JSON.encode({"type": "auth", "payload": payload(user_id, token)})))
            answers.add((await peer.receive())[1])
            times.append(trio.current_time() - began)
        medians.append(statistics.median(times))
    return len(answers), max(medians) - min(medians) < 0.005


# --- rows with a story -----------------------------------------------------------------------------------------------


async def no_auth(scene: Scene) -> tuple[Refused, float]:
    return await refusal(await scene.open()), Limits().auth_timeout_seconds


async def message_first(scene: Scene) -> tuple[Refused, list[int]]:
    user_id, other = await scene.people.user(), await scene.people.user()
    conversation_id = await scene.people.direct(user_id, other)
    peer = await scene.open()
    await peer.send(frame(TEXT, codec.JSON.encode(message(conversation_id, "k1"))))
    return await refusal(peer), scene.house.sequences(conversation_id)


async def another_user(scene: Scene) -> tuple[Refused, bool]:
    """(The answer, is it in the log with both names)."""
    user_id, other = await scene.people.user(), await scene.people.user()
    got = await show(scene, payload(other, scene.people.tokens[user_id]))
    log = scene.house.log(scene.log_name).read_text()
    return got, any(other in line and "user_mismatch" in line and scene.address in line for line in log.splitlines())


async def logged_out(scene: Scene) -> tuple[Refused, Refused]:
    """(How the live session ends, the answer to the same token afterwards)."""
    user_id = await scene.people.user()
    token = scene.people.tokens[user_id]
    peer = await scene.enter(user_id)
    assert (await scene.ask("DELETE", "/v1/sessions/current", token)).status_code == 204
    with trio.fail_after(5):
        live = await refusal(peer)
    return live, await show(scene, payload(user_id, token))


def ticket(scene: Scene, user_id: str, expires_in_ms: int = MINUTE_MS) -> str:
    """A session token as a draining gateway makes one."""
    token = f"{keys.MIGRATION_PREFIX}{scene.address.replace('.', '')}{now_ms()}"
    value = records.MigrationTicket(user_id, "phone-1", now_ms() + expires_in_ms, now_ms())
    with scene.house.redis() as client:
        client.set(keys.migration(token), codec.encode_value(value), ex=keys.MIGRATION_TTL_SECONDS)
    return token


async def ticket_twice(scene: Scene) -> Refused:
    user_id = await scene.people.user()
    token = ticket(scene, user_id)
    first = await scene.open()
    await first.send(frame(TEXT, codec.JSON.encode(auth(user_id, token))))
    assert json.loads((await first.receive())[1])["type"] == "auth_success"
    return await show(scene, payload(user_id, token))


async def ticket_of_another_device(scene: Scene) -> Refused:
    user_id = await scene.people.user()
    return await show(scene, payload(user_id, ticket(scene, user_id), "phone-2"))


async def ticket_too_late(scene: Scene) -> tuple[Refused, int]:
    """(After its time, the time Redis keeps it)."""
    user_id = await scene.people.user()
    return await show(scene, payload(user_id, ticket(scene, user_id, -1))), keys.MIGRATION_TTL_SECONDS


async def eleven_failures(scene: Scene) -> tuple[set[Refused], Refused, bool, str]:
    """(Ten bad tokens, the eleventh, is it told how long to wait, the answer to another address)."""
    user_id = await scene.people.user()
    first = {await show(scene, payload(user_id, "garbage")) for _ in range(10)}
    peer = await scene.open()
    await peer.send(frame(TEXT, codec.JSON.encode({"type": "auth", "payload": payload(user_id, "garbage")})))
    told, code = await end(peer)
    scene.move()
    elsewhere, _ = await show(scene, payload(user_id, "garbage"))
    return first, (told[0]["error"], code), 0 < told[0]["retry_after_ms"] <= MINUTE_MS, elsewhere


def device(device_id: object) -> Play:
    async def play(scene: Scene) -> Refused:
        user_id = await scene.people.user()
        return await show(scene, payload(user_id, scene.people.tokens[user_id], device_id))

    return play


async def nine_devices(scene: Scene) -> Refused:
    user_id = await scene.people.user()
    for number in range(8):
        peer = await scene.open()
        token = await scene.people.api.create_token(user_id, f"d{number}")
        await peer.send(frame(TEXT, codec.JSON.encode(auth(user_id, token, f"d{number}"))))
        assert json.loads((await peer.receive())[1])["type"] == "auth_success"
    return await show(scene, payload(user_id, await scene.people.api.create_token(user_id, "d8"), "d8"))


async def another_user_on_a_live_socket(scene: Scene) -> Refused:
    other = await scene.people.user()
    peer = await scene.enter()
    await peer.send(frame(TEXT, codec.JSON.encode(auth(other, scene.people.tokens[other]))))
    return await refusal(peer)


async def twice_at_once(scene: Scene) -> tuple[Refused, str]:
    """(How the older ends, what the newer is told when it asks)."""
    user_id = await scene.people.user()
    older, newer = await scene.enter(user_id), await scene.enter(user_id)
    ended = await refusal(older)
    await newer.send(frame(TEXT, b'{"type":"heartbeat","timestamp":1}'))
    tag = ""
    while tag != "heartbeat_ack":
        tag = json.loads((await newer.receive())[1])["type"]
    return ended, tag


def refused(error: AuthErrorCode | str, code: CloseCode = CloseCode.AUTH) -> Refused:
    return str(error), int(code)


REPLACED: Final = refused("replaced", CloseCode.REPLACED)
BAD_DEVICES: Final = {
    "of 129 characters": "d" * 129,
    "with a newline": "a\nb",
    "with NUL": "a\0b",
    "as $ne": {"$ne": 1},
}
INVALID: Final = refused(AuthErrorCode.INVALID_TOKEN)
ROWS: Final = [
    Row("W-40", "nothing", (refused("auth_required", CloseCode.AUTH_TIMEOUT), 10.0), no_auth, BOTH),
    Row("W-41", "a message first", (refused("auth_required"), []), message_first, BOTH),
    *(Row("W-42", sent, INVALID, shows(make)) for sent, make in BAD_TOKENS.items()),
    Row("W-42", "all of them, five times", (1, True), all_alike),
    Row(
        "W-43",
        "a token of an hour ago",
        refused("expired_token"),
        shows(
            lambda user_id: Tokens(dev_keys.PRIVATE_JWK).sign(user_id, "phone-1", now_ms() - 7_200_000, 3600, "j")[0]
        ),
    ),
    Row(
        "W-43",
        "nbf in 2 minutes",
        refused("expired_token"),
        shows(not_yet_good),
    ),
    Row("W-44", "the token of another user", (refused("user_mismatch"), True), another_user),
    Row("W-45", "a logged-out session", (refused("revoked"), refused("revoked")), logged_out, BOTH),
    Row("W-46", "a session token, the second time", INVALID, ticket_twice),
    Row("W-46", "the session token of another device", INVALID, ticket_of_another_device),
    Row(
        "W-46",
        "a session token after its 60 s",
        (refused("expired_token"), 60),
        ticket_too_late,
        because="while Redis still has it, it is known to be ours and old; afterwards it is invalid_token",
    ),
    Row(
        "W-47",
        "the 11th bad token",
        ({INVALID}, refused("rate_limited", CloseCode.RATE), True, "invalid_token"),
        eleven_failures,
    ),
    *(
        Row("W-48", f"device_id {sent}", refused("validation_failed"), device(value))
        for sent, value in {
            "of 129 characters": "d" * 129,
            "with a newline": "a\nb",
            "with NUL": "a\0b",
            "as $ne": {"$ne": 1},
        }.items()
    ),
    Row("W-49", "a ninth device", refused("device_limit"), nine_devices),
    Row("W-50", "auth as another user on a live socket", refused("forbidden"), another_user_on_a_live_socket),
    Row("W-51", "the same device twice", (REPLACED, "heartbeat_ack"), twice_at_once, BOTH),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
