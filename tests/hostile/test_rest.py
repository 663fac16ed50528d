"""H-01 to H-28: bad input against the HTTP API."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
import trio

from bench.figures import thread_cpu_seconds
from protocol import dev_keys, frames
from protocol.errors import CloseCode
from tests.hostile.rows import Row, by_row, judge
from tests.system.crowd import message
from tests.system.test_schemathesis import test_the_http_api_keeps_what_its_document_says as keeps_its_document
from workers.rest.app import MAX_BODY_BYTES
from workers.settings import Settings
from workers.tokens import Tokens, new_key

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

    from tests.hostile.rows import Play
    from tests.hostile.scene import Scene
    from tests.system.house import House

pytestmark = pytest.mark.trio

UNKNOWN: Final = "conv_" + "0" * 28
JSON: Final = {"Content-Type": "application/json"}
CANARY: Final = "canary-7f3a-that-nobody-may-log"


def code_of(answer: httpx2.Response) -> tuple[int, str]:
    """(Status, error code)."""
    return answer.status_code, answer.json()["error"]["code"] if answer.status_code >= 400 else ""


async def own_token(scene: Scene) -> str:
    """Of a user who is nobody else's."""
    return scene.people.tokens[await scene.people.user()]


def refused(
    method: str, path: str, *, token: str | None = None, body: object = None, headers: dict[str, str] | None = None
) -> Play:
    """(Status, error code) of one request; `token` None: that of a user."""

    async def play(scene: Scene) -> tuple[int, str]:
        good = await own_token(scene)
        return code_of(await scene.ask(method, path, good if token is None else token, body, headers))

    return play


def raw(request: Callable[[str], bytes], pause_seconds: float = 0.0) -> Play:
    """The status of the one answer to these bytes, made with a user's token; 0 where the connection just ended."""

    async def play(scene: Scene) -> int:
        port = int(scene.house.rest_url.rsplit(":", 1)[1])
        received, _ = await scene.exchange(request(await own_token(scene)), port, pause_seconds)
        statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", received)
        assert len(statuses) <= 1, received
        return int(statuses[0]) if statuses else 0

    return play


def lines(*head: str, body: bytes = b"") -> bytes:
    return "\r\n".join((*head, "Host: a", "Connection: close")).encode() + b"\r\n\r\n" + body


# --- H-01, H-02: who may ask what ------------------------------------------------------------------------------------


async def bad_bearers(scene: Scene) -> tuple[int, int, set[str]]:
    """(How many different answers, their status, their WWW-Authenticate) to every kind of bad token."""
    user_id = await scene.people.user()
    head, claims, signature = scene.people.tokens[user_id].split(".")
    now = time.time_ns() // 1_000_000
    expired, _ = Tokens(dev_keys.PRIVATE_JWK).sign(user_id, "d", now - 10**7, 60, "t1")
    foreign, _ = Tokens(new_key()[0]).sign(user_id, "d", now, 3600, "t2")
    tokens = ["", "garbage", "a b", f"{head}.{claims}.", f"{head}.{claims}.{signature[:-4]}AAAA", expired, foreign]
    tokens += [f"eyJhbGciOiJub25lIn0.{claims}.", "x" * 5000]
    answers = [await scene.ask("GET", "/v1/conversations", token) for token in tokens]
    return (
        len({answer.content for answer in answers}),
        max(answer.status_code for answer in answers),
        {answer.headers["www-authenticate"] for answer in answers},
    )


async def foreign_ids(scene: Scene) -> list[tuple[int, bool]]:
    """(Status, same as for an unknown id) of everything that is asked about somebody else's."""
    conversation_id, ann, bob = await scene.people.pair()
    settled = await ann.send(conversation_id, "mine")
    stranger = await own_token(scene)
    found = []
    for method, path, body in (
        ("GET", "/v1/conversations/{}", None),
        ("GET", "/v1/conversations/{}/messages", None),
        ("GET", f"/v1/conversations/{{}}/messages/{settled.message_id}", None),
        ("PATCH", f"/v1/conversations/{{}}/messages/{settled.message_id}", {"content": "x"}),
        ("POST", "/v1/conversations/{}/participants", {"user_ids": [bob.client.user_id]}),
    ):
        headers = {"Idempotency-Key": "k"}
        answers = [
            await scene.ask(method, path.format(name), stranger, body, headers) for name in (conversation_id, UNKNOWN)
        ]
        found.append((answers[0].status_code, answers[0].content == answers[1].content))
    return found


# --- H-06, H-07, H-24: bodies ----------------------------------------------------------------------------------------


def posted(body: bytes, headers: dict[str, str] | None = None, path: str = "/v1/conversations") -> Play:
    return refused("POST", path, body=body, headers={**JSON, **(headers or {})})


def group(**more: object) -> bytes:
    return json.dumps({"type": "group", "participants": ["usr_x"], **more}).encode()


def endless(body: str, pause_seconds: float) -> Play:
    """A chunked body without end: (status, is the deadline of the running process kept, the default deadline)."""

    async def play(scene: Scene) -> tuple[int, bool, float]:
        port = int(scene.house.rest_url.rsplit(":", 1)[1])
        limit = float(scene.house.stack.environment["TRIREME_BODY_SECONDS"])
        token = await own_token(scene)
        head = lines(
            "POST /v1/conversations HTTP/1.1", f"Authorization: Bearer {token}", "Content-Type: application/json"
        )
        request = head.replace(b"Connection: close", b"Transfer-Encoding: chunked")
        began = trio.current_time()
        received = b""
        async with await scene.stream(port) as stream, trio.open_nursery() as nursery:

            async def drip() -> None:
                await stream.send_all(request)
                for sign in body:
                    await stream.send_all(b"1\r\n" + sign.encode() + b"\r\n")
                    await trio.sleep(pause_seconds)

            nursery.start_soon(drip)
            with trio.fail_after(limit + 5):
                while b"\r\n\r\n" not in received:
                    received += await stream.receive_some(65_536)
            nursery.cancel_scope.cancel()
        seconds = trio.current_time() - began
        default = next(field.default for field in msgspec.structs.fields(Settings) if field.name == "body_seconds")
        return int(received.split(b" ")[1]), limit - 0.2 < seconds < limit + 1.5, default

    return play


def quickly(body: bytes) -> Play:
    """(Status, were 50 ms of the process' time enough)."""

    async def play(scene: Scene) -> tuple[int, bool]:
        token = await own_token(scene)
        taken = []
        for _ in range(3):
            before = thread_cpu_seconds(scene.house.pids["rest"])
            answer = await scene.ask("POST", "/v1/conversations", token, body, JSON)
            taken.append(thread_cpu_seconds(scene.house.pids["rest"]) - before)
        return answer.status_code, min(taken) < 0.05

    return play


# --- H-10: a message under a key -------------------------------------------------------------------------------------


async def repeated_message(scene: Scene) -> list[tuple[int, str]]:
    """The same key with the same, the same and another payload; then ten at once: how many messages result."""
    token, other = await own_token(scene), await scene.people.user()
    made = await scene.ask("POST", "/v1/conversations", token, {"type": "1:1", "participants": [other]})
    path = f"/v1/conversations/{made.json()['_id']}/messages"
    body = {"content": "x", "type": "text", "timestamp": 1}
    answers = [
        await scene.ask("POST", path, token, body | change, {"Idempotency-Key": "k1"})
        for change in ({}, {}, {"content": "y"})
    ]
    at_once: list[str] = []

    async def again() -> None:
        answer = await scene.ask("POST", path, token, body, {"Idempotency-Key": "k2"})
        at_once.append(answer.json()["message_id"])

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(again)
    same = answers[0].json()["message_id"] == answers[1].json()["message_id"]
    return [*map(code_of, answers), (len(at_once), f"{len(set(at_once))} messages, same: {same}")]


# --- H-11 to H-14: logging in ----------------------------------------------------------------------------------------


async def begin(scene: Scene, **target: str) -> httpx2.Response:
    return await scene.ask("POST", "/v1/verifications", body=target)


def fresh_phone() -> str:
    return f"+4930{time.time_ns() % 10**9:09d}"


async def proof(scene: Scene, phone: str) -> dict[str, str]:
    """A verification and its code, from the log, where development sends it."""
    begun = (await begin(scene, phone=phone)).json()
    log = scene.house.log("rest").read_text().splitlines()
    (*_, last) = [line for line in log if '"verification_code"' in line and phone in line]
    return {"verification_id": begun["verification_id"], "code": json.loads(last)["code"]}


async def log_in(scene: Scene, phone: str) -> dict[str, Any]:
    body = {**await proof(scene, phone), "device_id": "phone-1", "name": "Ann"}
    login: dict[str, Any] = (await scene.ask("POST", "/v1/sessions", body=body)).json()
    return login


async def known_and_unknown(scene: Scene) -> tuple[set[tuple[int, tuple[str, ...]]], bool, int, bool]:
    """(Answers for a phone with and without an account, the same time class, answers to wrong codes and to codes of no
    verification, the same time class)."""
    known = fresh_phone()
    await log_in(scene, known)
    spent: dict[str, list[float]] = {"known": [], "unknown": [], "wrong": [], "none": []}
    shapes, refusals = set(), set()
    for phone, name in ((known, "known"), (fresh_phone(), "unknown")):
        for _ in range(3):
            began = time.perf_counter()
            answer = await begin(scene, phone=phone)
            spent[name].append(time.perf_counter() - began)
            shapes.add((answer.status_code, tuple(sorted(answer.json()))))
    verification = answer.json()["verification_id"]
    for _ in range(3):
        for name, made in (("wrong", verification), ("none", "ver_" + "0" * 32)):
            body = {"verification_id": made, "code": "000000", "device_id": "d", "name": "B"}
            began = time.perf_counter()
            answer = await scene.ask("POST", "/v1/sessions", body=body)
            spent[name].append(time.perf_counter() - began)
            refusals.add((answer.status_code, answer.content))
    middle = {name: statistics.median(seconds) for name, seconds in spent.items()}
    return (
        shapes,
        _alike(middle["known"], middle["unknown"]),
        len(refusals),
        _alike(middle["wrong"], middle["none"]),
    )


def _alike(one: float, other: float) -> bool:
    """The same class: each hashes for 30 ms, and what does not is an order of magnitude sooner."""
    return max(one, other) < 2.5 * min(one, other)


def again_and_again(times: int, path: str, body: Callable[[int], dict[str, str]]) -> Play:
    """The last of so many requests: (code of the one before, code, is the wait told)."""

    async def play(scene: Scene) -> tuple[str, str, bool]:
        codes = []
        for number in range(times):
            answer = await scene.ask("POST", path, body=body(number))
            codes.append(code_of(answer)[1])
        return codes[-2], codes[-1], answer.status_code == 429 and int(answer.headers["retry-after"]) > 1

    return play


TO_ONE_PLACE: Final = fresh_phone()


async def reused_refresh_token(scene: Scene) -> tuple[tuple[int, str], tuple[int, str], int]:
    """(The second use of a refresh token, the access token of the first use, how the live connection ended)."""
    login = await log_in(scene, fresh_phone())
    async with scene.talk() as talk:
        await talk.log_in(login["user"]["_id"], login["access_token"], "phone-1")
        body = {"refresh_token": login["refresh_token"]}
        fresh = (await scene.ask("POST", "/v1/tokens/refresh", body=body)).json()
        second = await scene.ask("POST", "/v1/tokens/refresh", body=body)
        with trio.fail_after(5):
            await talk.expect(frames.AuthError)
            ended = await talk.close_code()
    after = await scene.ask("GET", "/v1/devices", fresh["access_token"])
    return code_of(second), code_of(after), int(ended)


# --- H-21 to H-27 ----------------------------------------------------------------------------------------------------


async def administration(scene: Scene) -> tuple[set[int], tuple[int, str], bool]:
    """(Statuses of the administrator's routes for a user, metrics asked from outside, are they as any unknown path)."""
    token = await own_token(scene)
    statuses = {
        (await scene.ask("POST", path, token, body)).status_code
        for path, body in (("/v1/users", {"name": "x"}), ("/v1/tokens", {"user_id": "usr_x"}))
    }
    outside = {"X-Forwarded-For": "203.0.113.9"}
    metrics = await scene.ask("GET", "/metrics", token, headers=outside)
    nowhere = await scene.ask("GET", "/nowhere", token, headers=outside)
    return statuses, code_of(metrics), metrics.content == nowhere.content


async def preflight(scene: Scene) -> bool:
    """Is a page of another origin let in?"""
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    answers = [await scene.ask("OPTIONS", "/v1/conversations", headers=headers)]
    answers.append(await scene.ask("GET", "/v1/conversations", await own_token(scene), headers=headers))
    return any("access-control-allow-origin" in answer.headers for answer in answers)


async def deleted_account(scene: Scene) -> tuple[tuple[int, str], list[int], list[str]]:
    """(Its token afterwards, the sequences of its conversation, who is shown as their authors' account)."""
    phone = fresh_phone()
    login = await log_in(scene, phone)
    token, user_id = login["access_token"], login["user"]["_id"]
    bob = await scene.people.user()
    made = await scene.ask("POST", "/v1/conversations", token, {"type": "1:1", "participants": [bob]})
    conversation_id = made.json()["_id"]
    async with scene.talk() as talk:
        await talk.log_in(user_id, token, "phone-1")
        for number in range(3):
            await talk.send(message(conversation_id, f"k{number}", CANARY))
            await talk.expect(frames.MessageAck)
    await scene.ask("POST", "/v1/users/me/deletion", token, await proof(scene, phone))
    after = await scene.ask("GET", "/v1/conversations", token)
    other = scene.people.tokens[bob]
    log = (await scene.ask("GET", f"/v1/conversations/{conversation_id}/messages", other)).json()["items"]
    name = (await scene.ask("GET", f"/v1/users/{user_id}", other)).json()["name"]
    return code_of(after), sorted(item["sequence_number"] for item in log), [name]


async def mongodb_is_gone(scene: Scene) -> tuple[tuple[int, str], bool, bool, bool]:
    """(Answer, is the wait told, has the answer a name, does the log know that name)."""
    token = await own_token(scene)
    scene.house.kill("mongod")
    try:
        answer = await scene.ask("GET", "/v1/conversations", token)
    finally:
        scene.house.start("mongod")
        with trio.fail_after(20):
            while (await scene.ask("GET", "/v1/conversations", token)).status_code != 200:  # noqa: ASYNC110
                await trio.sleep(0.1)
    name = answer.headers["x-request-id"]
    assert "retry-after" in answer.headers
    known = f'"request": "{name}"' in scene.house.log("rest").read_text()
    return code_of(answer), int(answer.headers["retry-after"]) >= 1, len(name) == 16, known


async def twins(scene: Scene) -> set[tuple[int, str]]:
    """Ids that look the same after normalisation: none is an id, so nothing can be merged."""
    token = await own_token(scene)
    names = ("caf%C3%A9", "cafe%CC%81", "%EF%BD%95sr_a", "usr_%E2%80%8Ba", "ⓤsr")
    return {code_of(await scene.ask("GET", f"/v1/conversations/{name}", token)) for name in names}


async def logs_are_clean(scene: Scene) -> list[str]:
    """What stands in the logs of all processes that must not: content, tokens, codes, phone numbers."""
    login = await log_in(scene, phone := fresh_phone())
    bob = await scene.people.user()
    token = login["access_token"]
    made = await scene.ask("POST", "/v1/conversations", token, {"type": "1:1", "participants": [bob]})
    path = f"/v1/conversations/{made.json()['_id']}/messages"
    body = {"content": CANARY, "type": "text", "timestamp": 1}
    assert (await scene.ask("POST", path, token, body, {"Idempotency-Key": "k"})).status_code < 300
    await scene.ask("POST", path, token, body | {"type": CANARY}, {"Idempotency-Key": "k2"})
    await scene.ask("GET", f"/v1/conversations?cursor={CANARY}", token)
    secrets = {
        "content": CANARY,
        "access token": token,
        "signature": token.rsplit(".", 1)[1],
        "refresh token": login["refresh_token"],
        "administrator's token": scene.house.stack.admin_token,
        "phone": phone,
    }
    found = []
    logs = [file for file in scene.house.log("rest").parent.glob("*.log") if file.stem not in ("valkey", "mongod")]
    assert len(logs) >= 5, "two gateways, two workers, one HTTP API"
    for file in logs:
        for line in file.read_text().splitlines():
            if '"verification_code"' in line:
                continue  # the development sender: the log is where it sends to, and nowhere else is it allowed
            found += [f"{what} in {file.stem}: {line[:80]}" for what, secret in secrets.items() if secret in line]
    return found


async def documented(scene: Scene) -> bool:
    """The fuzzing of the whole document runs beside these rows, against the same code."""
    return bool(keeps_its_document.__doc__)


INVALID: Final = (400, "validation_failed")
BAD_QUERIES: Final = ("limit=-1", "limit=0", "limit=201", "limit=1e9", "limit=a", "limit=1&limit=2")
PRIVATE_URLS: Final = (
    "http://169.254.169.254/latest",
    "file:///etc/passwd",
    "gopher://x",
    "javascript:alert(1)",
    "//evil",
    "https://user@evil.example/a",
    "https://127.0.0.1/a",
    "https://[::ffff:7f00:1]/a",
    "https://localhost/a",
    "https://10.0.0.1/a",
    "https://evil.example/\r\nX: 1",
    "https://evil.example/" + "a" * 2048,
)

ROWS: Final = [
    Row("H-01", "no, bad, expired and forged tokens", (1, 401, {"Bearer"}), bad_bearers),
    Row("H-02", "ids of others", [(404, True)] * 5, foreign_ids),
    Row("H-03", "an id with $", INVALID, refused("GET", "/v1/conversations/a$b")),
    Row("H-03", "an id of 65 characters", INVALID, refused("GET", "/v1/conversations/" + "x" * 65)),
    Row("H-03", "an id with %00", INVALID, refused("GET", "/v1/conversations/a%00b")),
    Row(
        "H-03",
        "an id with a dot",
        (404, "conversation_not_found"),
        refused("GET", "/v1/conversations/a.b"),
        because="dots are of the alphabet of ids (section 7); it is no id of ours",
    ),
    Row(
        "H-03",
        "../ as a path",
        404,
        raw(lambda t: lines("GET /v1/conversations/../../metrics HTTP/1.1", f"Authorization: Bearer {t}")),
        because="paths are not normalised: there is no such route",
    ),
    *(Row("H-04", query, INVALID, refused("GET", f"/v1/conversations?{query}")) for query in BAD_QUERIES),
    Row("H-05", "before[$gt]=", INVALID, refused("GET", f"/v1/conversations/{UNKNOWN}/messages?before[$gt]=")),
    Row("H-06", "no JSON", INVALID, posted(b"{")),
    Row("H-06", "an array", INVALID, posted(b"[]")),
    Row("H-06", "1 MiB + 1", (413, "too_large"), posted(group(pad="x" * MAX_BODY_BYTES))),
    Row(
        "H-06",
        "a gzip bomb",
        (415, "validation_failed"),
        posted(gzip.compress(b" " * 10**8), {"Content-Encoding": "gzip"}),
    ),
    Row("H-06", "text/plain", (415, "validation_failed"), posted(group(), {"Content-Type": "text/plain"})),
    Row("H-07", "a chunked body that never ends", (408, True, 10.0), endless("{" + " " * 10_000, 0.005)),
    Row("H-07", "one byte, then silence", (408, True, 10.0), endless("{", 30)),
    Row("H-08", "TRACE", (405, "method_not_allowed"), refused("TRACE", "/v1/users")),
    Row("H-08", "PUT on a GET route", (405, "method_not_allowed"), refused("PUT", "/v1/conversations")),
    Row("H-08", "CONNECT", 400, raw(lambda _: lines("CONNECT a:1 HTTP/1.1")), because="its target is no path"),
    Row(
        "H-08",
        "X-HTTP-Method-Override",
        (405, "method_not_allowed"),
        refused("POST", f"/v1/conversations/{UNKNOWN}", body={}, headers={"X-HTTP-Method-Override": "DELETE"}),
    ),
    Row("H-09", "a preflight from a foreign origin", False, preflight),
    Row(
        "H-10",
        "a key three times, and ten times at once",
        [(201, ""), (201, ""), (409, "idempotency_conflict"), (10, "1 messages, same: True")],
        repeated_message,
        because="a repeat is answered as the first was; one code for both doors (409); one in flight is waited for",
    ),
    Row(
        "H-11",
        "a phone with and without account; a wrong code, and one of no verification",
        ({(202, ("expires_at", "verification_id"))}, True, 1, True),
        known_and_unknown,
        because="people log in by codes: there are no passwords",
    ),
    Row(
        "H-12",
        "the sixth code within an hour to one phone",
        ("", "rate_limited", True),
        again_and_again(6, "/v1/verifications", lambda _: {"phone": TO_ONE_PLACE}),
    ),
    Row(
        "H-12",
        "the 11th login within a minute from one address",
        ("code_refused", "rate_limited", True),
        again_and_again(
            11,
            "/v1/sessions",
            lambda _: {"verification_id": "ver_" + "0" * 32, "code": "000000", "device_id": "d", "name": "B"},
        ),
        because="60 by default",
    ),
    Row(
        "H-13",
        "looking for a phone number",
        INVALID,
        refused("GET", "/v1/conversations?phone=%2B4930123"),
        because="nobody can be found by phone or email address",
    ),
    Row(
        "H-14", "a refresh token twice", ((401, "revoked"), (401, "revoked"), int(CloseCode.AUTH)), reused_refresh_token
    ),
    *(
        Row("H-20", f"avatar {url[:40]!r}", INVALID, refused("PATCH", "/v1/users/me", body={"avatar_url": url}))
        for url in PRIVATE_URLS
    ),
    Row(
        "H-21",
        "the administrator's routes and the metrics",
        ({401}, (404, "not_found"), True),
        administration,
        because="that these routes exist is public: the OpenAPI document names them",
    ),
    Row(
        "H-23",
        "a deleted account",
        ((401, "revoked"), [1, 2, 3], ["Deleted account"]),
        deleted_account,
    ),
    Row(
        "H-24",
        "a hundred thousand keys",
        (400, True),
        quickly(b"{" + b",".join(b'"%05d":0' % n for n in range(100_000)) + b"}"),
    ),
    Row("H-24", "a number of a million digits", (400, True), quickly(b'{"type":' + b"1" * 1_000_000 + b"}")),
    Row("H-24", "a hundred thousand brackets", (400, True), quickly(b"[" * 100_000)),
    Row("H-25", "twins of ids", {INVALID}, twins),
    Row("H-26", "MongoDB is gone", ((503, "storage_unavailable"), True, True, True), mongodb_is_gone),
    Row(
        "H-28", "what the OpenAPI document says, fuzzed", True, documented, because="tests/system/test_schemathesis.py"
    ),
    Row("H-27", "the logs of all processes", [], logs_are_clean),
]


@by_row(ROWS)
async def test_row(row: Row, house: House, transport: str, record_property: Callable[[str, object], None]) -> None:
    await judge(row, house, transport, record_property)
