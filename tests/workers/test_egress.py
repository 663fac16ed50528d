"""POSTs to URLs that strangers chose: no way to what is not public, and whatever is answered is at most a failure."""

from __future__ import annotations

import gzip
import ssl
from typing import TYPE_CHECKING

import anyio
import pytest
import trustme

from tests.workers.receiver import HANG, answer, receiving
from workers import egress
from workers.egress import Answered, Failed, open_egress
from workers.networks import address_of, is_public, parse_networks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.egress import Egress

pytestmark = pytest.mark.anyio

LOOPBACK = "127.0.0.0/8"
MEBIBYTE = 2**20


async def post(way: Egress, url: str, *, seconds: float = 5.0, max_bytes: int = 1024) -> Answered | Failed:
    return await way.post(url, {"content-type": "text/plain"}, b"hello", seconds=seconds, max_bytes=max_bytes)


class Names:
    """A resolver that gives these answers in turn, the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
        "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16", "::", "::1",
        "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "fe80::1", "fe80::1%lo", "fc00::1", "fd00:ec2::254", "ff02::1",
        "fec0::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1",
    ],
)  # fmt: skip
def test_h20_an_address_that_is_not_public(text: str) -> None:
    assert not is_public(address_of(text))


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::101:101"],
)
def test_a_public_address(text: str) -> None:
    assert is_public(address_of(text))


def test_networks_are_named_with_commas() -> None:
    assert [str(network) for network in parse_networks("127.0.0.0/8, ::1")] == ["127.0.0.0/8", "::1/128"]
    assert parse_networks("") == ()
    with pytest.raises(ValueError, match="intranet"):
        parse_networks("10.0.0.0/8,intranet")


# --- where nobody goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f000001", "017700000001", "127.1", "0", "[::1]",
        "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]",
    ],
)  # fmt: skip
async def test_h20_loopback_by_any_spelling_is_refused_and_never_connected_to(host: str) -> None:
    async with receiving() as receiver, open_egress("") as way:
        for scheme in ("http", "https"):
            url = f"{scheme}://{host}:{receiver.port}/hook"
            assert await way.check(url)
            outcome = await post(way, url)
            assert isinstance(outcome, Failed)
            assert outcome.is_refused
        assert receiver.connections == 0


async def test_h20_a_name_whose_answer_changes_is_refused_at_the_connection() -> None:
    names = Names(["1.1.1.1"], ["127.0.0.1"])
    async with receiving() as receiver, open_egress("", lookup=names) as way:
        url = f"https://rebinding.example:{receiver.port}/"
        assert await way.check(url) == ""
        outcome = await post(way, url)
        assert outcome == Failed(
            "rebinding.example is 127.0.0.1, which is not a public address (TRIREME_EGRESS_ALLOW)", is_refused=True
        )
        assert receiver.connections == 0


async def test_h20_one_private_address_among_public_ones_refuses_the_name() -> None:
    async with open_egress("", lookup=Names(["1.1.1.1", "2606:4700::1111", "10.0.0.1"])) as way:
        assert "10.0.0.1" in await way.check("https://mixed.example/")


async def test_the_connection_goes_to_the_address_that_was_judged_and_the_host_sees_its_name() -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    async with receiving() as receiver, open_egress(LOOPBACK, lookup=names) as way:
        url = f"http://hook.example:{receiver.port}/a?b=c"
        assert await post(way, url) == Answered(204, {"content-length": "0"}, b"", is_whole=True)
        (request,) = receiver.requests
        assert (request.target, request.headers["host"]) == ("/a?b=c", f"hook.example:{receiver.port}")
        assert request.body == b"hello"
        assert names.asked == ["hook.example"], "looked up once"


async def test_plain_http_goes_to_named_networks_only() -> None:
    async with open_egress(LOOPBACK, lookup=Names(["1.1.1.1"])) as way:
        assert "use https" in await way.check("http://hook.example/")
        assert await way.check("https://hook.example/") == ""


@pytest.mark.parametrize(
    "url",
    [
        "", "hook.example", "ftp://hook.example/", "file:///etc/passwd", "https://", "https:///x", "https://user@h.example/",
        "https://u:p@h.example/", "https://h.example/#f", "https://h.example:0/", "https://h.example:99999/",
        "https://h.example:x/", "https://h exa.mple/", "https://h.example/\r\nX: y", "https://höst.example/",
        "https://[::1/", "https://h.example/" + "x" * 2048, "gopher://127.0.0.1:6379/_FLUSHALL",
        "https://1.1.1.1\\@127.0.0.1/",
    ],
)  # fmt: skip
async def test_what_is_no_url_of_ours_is_refused_before_any_look_up(url: str) -> None:
    names = Names(["1.1.1.1"])
    async with open_egress("", lookup=names) as way:
        assert await way.check(url)
        outcome = await post(way, url)
        assert isinstance(outcome, Failed)
        assert outcome.is_refused
        assert names.asked == []


async def test_a_name_without_an_address_fails_and_may_be_tried_again() -> None:
    async with open_egress("") as way:
        assert "has no address" in await way.check("https://nowhere.invalid/")
        outcome = await post(way, "https://nowhere.invalid/")
        assert isinstance(outcome, Failed)
        assert not outcome.is_refused


async def test_a_name_server_that_hangs_costs_no_more_than_the_deadline() -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await anyio.sleep_forever()
        return []

    async with open_egress("", lookup=hang) as way:
        assert await post(way, "https://slow.example/", seconds=0.2) == Failed("no answer within 0.2 s")


# --- what answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:1/", "//[::1]/"])
async def test_h20_a_redirect_is_an_answer_that_nobody_follows(place: str) -> None:
    async with receiving(answer(302, Location=place)) as receiver, open_egress(LOOPBACK) as way:
        outcome = await post(way, receiver.url)
        assert isinstance(outcome, Answered)
        assert (outcome.status, outcome.headers["location"]) == (302, place)
        assert len(receiver.requests) == 1


async def test_who_hangs_is_left_at_the_deadline() -> None:
    async with receiving(HANG) as receiver, open_egress(LOOPBACK) as way:
        with anyio.fail_after(2):
            assert await post(way, receiver.url, seconds=0.3) == Failed("no answer within 0.3 s")
        assert len(receiver.requests) == 1


async def test_who_answers_a_byte_now_and_then_is_left_at_the_deadline_too() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:

        async def drip(client: anyio.abc.SocketStream) -> None:
            async with client:
                try:
                    for byte in answer(200, b"x" * 1000):
                        await client.send(bytes([byte]))
                        await anyio.sleep(0.05)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return

        group.start_soon(listener.serve, drip)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with open_egress(LOOPBACK) as way:
            with anyio.fail_after(2):
                assert isinstance(await post(way, f"http://127.0.0.1:{port}/", seconds=0.4), Failed)
        group.cancel_scope.cancel()


@pytest.mark.parametrize(
    "said",
    [
        b"\x00\xff\x13garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 two hundred OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * MEBIBYTE,
        b"\r\n" * 100_000,
    ],
    ids=lambda said: repr(said[:30]),
)
async def test_garbage_is_a_failure(said: bytes) -> None:
    async with receiving(said) as receiver, open_egress(LOOPBACK) as way:
        outcome = await post(way, receiver.url)
        assert isinstance(outcome, Failed)
        assert not outcome.is_refused


@pytest.mark.parametrize("size", [1024, 1025, 10 * MEBIBYTE])
async def test_of_ten_mebibytes_no_more_than_the_bound_is_read(size: int) -> None:
    async with receiving(answer(200, b"x" * size)) as receiver, open_egress(LOOPBACK) as way:
        outcome = await post(way, receiver.url, max_bytes=1024)
        assert isinstance(outcome, Answered)
        assert (outcome.body, outcome.is_whole) == (b"x" * 1024, size == 1024)


async def test_what_is_packed_stays_packed() -> None:
    packed = gzip.compress(bytes(10 * MEBIBYTE))
    async with receiving(answer(200, packed, Content_Encoding="gzip")) as receiver, open_egress(LOOPBACK) as way:
        outcome = await post(way, receiver.url, max_bytes=MEBIBYTE)
        assert isinstance(outcome, Answered)
        assert outcome.body == packed


async def test_a_port_where_nobody_listens_is_a_failure() -> None:
    async with receiving() as receiver:
        url = receiver.url
    async with open_egress(LOOPBACK) as way:
        outcome = await post(way, url)
        assert isinstance(outcome, Failed)
        assert outcome.reason.startswith("ConnectError")


async def test_a_connection_is_used_again_and_not_after_an_answer_that_was_cut() -> None:
    async with receiving(answer(200), answer(200, b"x" * MEBIBYTE), answer(200)) as receiver:
        async with open_egress(LOOPBACK) as way:
            for _ in range(3):
                assert isinstance(await post(way, receiver.url), Answered)
        assert receiver.connections == 2


async def test_requests_that_hang_leave_the_others_alone() -> None:
    async with (
        receiving(HANG) as hanging,
        receiving() as prompt,
        open_egress(LOOPBACK) as way,
        anyio.create_task_group() as group,
    ):
        for _ in range(50):
            group.start_soon(lambda: post(way, hanging.url, seconds=3.0))
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(1):
            assert isinstance(await post(way, prompt.url), Answered)
        group.cancel_scope.cancel()


# --- TLS -------------------------------------------------------------------------------------------------------------


async def test_a_certificate_is_checked_against_the_name_though_the_address_is_pinned() -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hook.example").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with (
        receiving(tls=server) as receiver,
        open_egress(LOOPBACK, lookup=Names(["127.0.0.1"]), tls=client) as way,
    ):
        good = await post(way, f"https://hook.example:{receiver.port}/")
        assert isinstance(good, Answered)
        other = await post(way, f"https://other.example:{receiver.port}/")
        assert isinstance(other, Failed)
        assert "certificate" in other.reason
        assert len(receiver.requests) == 1


async def test_a_certificate_of_nobody_we_know_is_a_failure() -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("hook.example").configure_cert(server)
    async with receiving(tls=server) as receiver, open_egress(LOOPBACK, lookup=Names(["127.0.0.1"])) as way:
        outcome = await post(way, f"https://hook.example:{receiver.port}/")
        assert isinstance(outcome, Failed)
        assert not outcome.is_refused
        assert receiver.requests == []


# --- bounds ----------------------------------------------------------------------------------------------------------


async def test_names_that_hang_hold_no_more_threads_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = 0
    most = 0

    def slow(host: str, port: int, **_: object) -> list[object]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        anyio.from_thread.run(anyio.sleep, 0.02)
        at_once -= 1
        return []

    monkeypatch.setattr("socket.getaddrinfo", slow)
    async with open_egress("") as way, anyio.create_task_group() as group:
        for number in range(egress.LOOKUPS * 3):
            group.start_soon(way.check, f"https://n{number}.example/")
    assert most == egress.LOOKUPS
