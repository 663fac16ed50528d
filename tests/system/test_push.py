"""Pushes over real processes: workers, the push role, a push service over TLS that checks who sends and a device that
decrypts. Who is offline is told once for five messages; who confirms is not; a role that is killed in between tells
all the same."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme

from bench.http_api import Refusal
from protocol import codec
from protocol.errors import ErrorCode
from tests.system.crowd import crowd, eventually, talker
from tests.workers.subscriber import Subscriber, proven

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from protocol.records import PushJob
    from tests.system.crowd import Crowd
    from tests.system.house import House

pytestmark = [pytest.mark.trio, pytest.mark.slow]

AFTER_SECONDS = 3.0
"""The default: from a message to its push."""
TOLD_SECONDS = 12.0
"""Until one is there: the time, the looks, and a busy machine."""
AGAIN_SECONDS = 40.0
"""Until what a killed role had in hand is told: its lease of 20 s, and more."""


class PushService:
    """A Web Push service: remembers what it gets, and answers as it is told."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.server = server
        self.port = server.server_address[1]
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.status = 201
        self.holding = threading.Event()
        """While it is clear nobody is answered."""
        self.holding.set()

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.port}/{path}"

    def got(self, path: str) -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for target, headers, body in self.requests if target == f"/{path}"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PushService, Path]]:
    """The service, and the certificate that vouches for it."""
    authority = trustme.CA()
    trusted = tmp_path_factory.mktemp("push") / "ca.pem"
    authority.cert_pem.write_to_path(str(trusted))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            there.requests.append((self.path, headers, body))
            there.holding.wait(30)
            self.send_response(there.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A sender that was killed."""

    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    there = PushService(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield there, trusted
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pushing(running: House, service: tuple[PushService, Path]) -> Iterator[House]:
    """The running system with one process of the role."""
    running.add_worker("push-1", "push", settings={"SSL_CERT_FILE": str(service[1])})
    yield running
    running.remove("push-1")


@pytest.fixture
def house(house: House, pushing: House) -> House:
    return house


class Told:
    """A browser of somebody, registered."""

    def __init__(self, there: PushService, user_id: str) -> None:
        self.subscriber = Subscriber()
        self.path = f"{user_id}/browser"
        self._there = there

    @property
    def jobs(self) -> list[PushJob]:
        return [codec.decode_push_job(self.subscriber.decrypt(body)) for _, body in self._there.got(self.path)]


async def browser(people: Crowd, there: PushService, user_id: str) -> Told:
    """Register, as the browser's Push API says."""
    told = Told(there, user_id)
    subscription = {"endpoint": there.url(told.path), "expirationTime": None, "keys": told.subscriber.keys}
    body = {"kind": "web_push", "subscription": subscription}
    answer = await people.api.call("PUT", "/v1/devices/phone-1/push", people.tokens[user_id], body)
    assert not isinstance(answer, Refusal), answer
    return told


async def test_five_messages_to_somebody_offline_are_one_push_that_only_the_device_can_read(
    house: House, service: tuple[PushService, Path]
) -> None:
    there, _ = service
    async with crowd(house) as people:
        conversation_id, ann, bob = await people.pair()
        await people.settle(conversation_id)
        told = await browser(people, there, bob.client.user_id)
        await bob.go_offline()
        for text in "12345":
            await ann.send_nowait(conversation_id, text)
        await eventually(lambda: bool(told.jobs), "the push", TOLD_SECONDS)
        await trio.sleep(AFTER_SECONDS + 1)
        (job,) = told.jobs
        assert (job.conversation_id, job.sequence_number, job.badge) == (conversation_id, 5, 5)
        offered: Any = await people.api.call("GET", "/v1/push", people.tokens[bob.client.user_id])
        ((headers, _),) = there.got(told.path)
        proven(headers["authorization"], offered["application_server_key"], there.url(told.path))
        with house.redis() as client:
            entries: Any = client.xrange("notifications")
        stored = [fields["r"] for _, fields in entries if fields["u"] == bob.client.user_id]
        assert [codec.decode_push_job(text.encode()) for text in stored] == [job]
        bob.go_online()
        await people.settle(conversation_id)


async def test_who_confirms_or_has_muted_is_not_told_and_who_is_online_and_mute_is(
    house: House, service: tuple[PushService, Path]
) -> None:
    there, _ = service
    async with crowd(house, judged=False) as people:
        group, (ann, *others) = await people.group(4)
        confirms, mutes, silent = others
        told = {user: await browser(people, there, user) for user in others}
        sender = await people.phone(ann)
        await people.phone(confirms)
        until = {"muted_until": "2099-01-01T00:00:00Z"}
        answer = await people.api.call("PATCH", f"/v1/conversations/{group}/settings", people.tokens[mutes], until)
        assert not isinstance(answer, Refusal), answer
        async with talker(house.urls["epoll"]) as talk:
            await talk.log_in(silent, people.tokens[silent])
            await sender.send_nowait(group, "hello")
            await eventually(lambda: bool(told[silent].jobs), "the push of who is online", TOLD_SECONDS)
            await trio.sleep(2)
        assert {user: len(one.jobs) for user, one in told.items()} == {confirms: 0, mutes: 0, silent: 1}


async def test_a_token_that_is_gone_is_removed_and_bad_ones_are_refused_in_words(
    house: House, service: tuple[PushService, Path]
) -> None:
    there, _ = service
    async with crowd(house, judged=False) as people:
        conversation_id, ann, bob = await people.pair()
        user_id = bob.client.user_id
        told = await browser(people, there, user_id)
        await bob.go_offline()
        there.status = 410
        try:
            await ann.send_nowait(conversation_id, "hello")
            await eventually(lambda: bool(told.jobs), "the push", TOLD_SECONDS)
        finally:
            there.status = 201
        token = people.tokens[user_id]

        async def gone() -> bool:
            answer = await people.api.call("GET", "/v1/devices/phone-1/push", token)
            return isinstance(answer, Refusal) and answer.code is ErrorCode.NOT_FOUND

        with trio.fail_after(5):
            while not await gone():  # noqa: ASYNC110 - it happens in another process
                await trio.sleep(0.1)
        for endpoint in ("https://169.254.169.254/x", "http://example.com/x", "https://u:p@example.com/", "x"):
            bad = {"endpoint": endpoint, "keys": told.subscriber.keys}
            body = {"kind": "web_push", "subscription": bad}
            answer = await people.api.call("PUT", "/v1/devices/phone-1/push", token, body)
            assert isinstance(answer, Refusal)
            assert answer.code is ErrorCode.VALIDATION_FAILED
            assert "endpoint" in answer.message


async def test_a_role_that_is_killed_between_its_claim_and_the_send_tells_all_the_same(
    house: House, service: tuple[PushService, Path]
) -> None:
    there, _ = service
    async with crowd(house) as people:
        conversation_id, ann, bob = await people.pair()
        told = await browser(people, there, bob.client.user_id)
        await bob.go_offline()
        there.holding.clear()
        await ann.send_nowait(conversation_id, "hello")
        await eventually(lambda: bool(there.got(told.path)), "the send", TOLD_SECONDS)
        house.kill("push-1")
        there.requests.clear()
        there.holding.set()
        house.start("push-1")
        await eventually(lambda: bool(told.jobs), "the push of the next process", AGAIN_SECONDS)
        assert told.jobs[0].sequence_number == 1


async def test_a_redis_that_forgot_everything_loses_no_push(house: House, service: tuple[PushService, Path]) -> None:
    there, _ = service
    async with crowd(house) as people:
        conversation_id, ann, bob = await people.pair()
        told = await browser(people, there, bob.client.user_id)
        await bob.go_offline()
        await ann.send_nowait(conversation_id, "hello")
        await people.settle()
        await trio.sleep(1.5)
        house.forget()
        await eventually(lambda: bool(told.jobs), "the push", AGAIN_SECONDS)
        house.wait_remembered()
