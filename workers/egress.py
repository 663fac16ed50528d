"""POSTs to URLs that others have chosen: the webhooks of apps and agents. The only way out of this house to strangers.

A URL may be hostile, and so may what answers there. So the name is looked up once per connection, every address that it
stands for must be public (`networks.py`) or named by the operator (`TRIREME_EGRESS_ALLOW`), and the connection goes to
the very address that was judged: a name whose answer changes gains nothing. Host and TLS still see the name. Nothing is
followed, unpacked or read past a bound; no proxy variable is heeded.

*Raises*: nothing for whatever the other side does: `Failed` says it. *Cancellation*: closes the connection; the request
may have been read.
"""

from __future__ import annotations

import re
import socket
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpcore2
import msgspec

from workers.networks import Networks, address_of, is_among, is_public, parse_networks

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

    from workers.networks import Address

    SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

LONGEST_URL: Final = 2048
CONNECTIONS: Final = 1024
"""Requests under way at once in one process. Whoever calls has a smaller bound of its own, so nobody waits here."""
_IDLE_CONNECTIONS: Final = 64
_IDLE_SECONDS: Final = 10.0
LOOKUPS: Final = 16
"""Threads that look names up at once: a name server that hangs holds no more. Such names fail at their deadlines."""
_ADDRESSES_TRIED: Final = 4
_LOOKUP_SECONDS: Final = 5.0
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")
_TROUBLE: Final = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError)
"""What goes wrong at the other side or on the way there; errors of TLS are OSErrors."""


class Answered(msgspec.Struct, frozen=True):
    """Somebody answered, with whatever status; 3xx too, which nobody follows.

    `headers` have small names; of several with one name the last. `body` is cut at the caller's bound: then it is not
    `is_whole`.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool


class Failed(msgspec.Struct, frozen=True):
    """Nobody answered in time, or nothing that is HTTP. `is_refused`: we do not go there, so trying again is no use."""

    reason: str
    is_refused: bool = False


class _Refused(Exception):
    """This address is not for strangers' URLs; one line."""


class _Target(NamedTuple):
    host: str
    port: int
    is_plain: bool


class _Judge:
    """Looks names up and decides about their addresses."""

    def __init__(self, allowed: Networks, lookup: Callable[[str, int], Awaitable[Sequence[str]]]) -> None:
        self._allowed = allowed
        self._lookup = lookup

    async def addresses(self, target: _Target) -> list[Address]:
        """Those to connect to, all of them judged: one that must not be is enough to refuse the name.

        Raises _Refused, OSError where the name has none.
        """
        try:
            found = [address_of(text) for text in await self._lookup(target.host, target.port)]
        except UnicodeError as error:
            raise OSError("the name cannot be looked up") from error
        if not found:
            raise OSError("the name has no address")
        for address in found:
            if is_among(address, self._allowed):
                continue
            if not is_public(address):
                raise _Refused(f"{target.host} is {address}, which is not a public address (TRIREME_EGRESS_ALLOW)")
            if target.is_plain:
                raise _Refused("plain http leaves this house only for networks of TRIREME_EGRESS_ALLOW: use https")
        return found


class _PinnedBackend(httpcore2.AnyIOBackend):
    """Connects to addresses that were judged a moment ago, and to no name."""

    def __init__(self, judge: _Judge, *, is_plain: bool) -> None:
        self._judge = judge
        self._is_plain = is_plain

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._judge.addresses(_Target(host, port, self._is_plain))
        trouble: httpcore2.NetworkError | None = None
        for address in addresses[:_ADDRESSES_TRIED]:
            try:
                return await super().connect_tcp(str(address), port, timeout, local_address, socket_options)
            except httpcore2.NetworkError as error:
                trouble = error
        assert trouble is not None, "there was an address"
        raise trouble


class Egress:
    """The client. Safe to share between the tasks of one event loop; opened by `open_egress`."""

    def __init__(self, judge: _Judge, secure: httpcore2.AsyncConnectionPool, plain: httpcore2.AsyncConnectionPool):
        self._judge = judge
        self._secure = secure
        self._plain = plain

    async def check(self, url: str) -> str:
        """Why nobody may register this URL, in one line; "" where it may be. Where it leads is judged again whenever
        it is called."""
        target = target_of(url)
        if isinstance(target, str):
            return target
        try:
            with anyio.fail_after(_LOOKUP_SECONDS):
                await self._judge.addresses(target)
        except _Refused as error:
            return str(error)
        except TimeoutError:
            return f"{target.host} could not be looked up in time"
        except OSError:
            return f"{target.host} has no address"
        return ""

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, *, seconds: float, max_bytes: int
    ) -> Answered | Failed:
        """One try: within `seconds` from now there is an answer, of whose body at most `max_bytes` are read."""
        target = target_of(url)
        if isinstance(target, str):
            return Failed(target, is_refused=True)
        pool = self._plain if target.is_plain else self._secure
        try:
            with anyio.move_on_after(seconds):
                return await _exchange(pool, url, headers, body, max_bytes)
        except _Refused as error:
            return Failed(str(error), is_refused=True)
        except _TROUBLE as error:
            return Failed(f"{type(error).__name__}: {error}"[:200])
        return Failed(f"no answer within {seconds:g} s")


async def _exchange(
    pool: httpcore2.AsyncConnectionPool, url: str, headers: Mapping[str, str], body: bytes, max_bytes: int
) -> Answered:
    named = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    taken = bytearray()
    is_whole = True
    async with pool.stream("POST", url.encode("ascii"), headers=named, content=body) as response:
        async with aclosing(response.aiter_stream()) as chunks:
            async for chunk in chunks:
                room = max_bytes - len(taken)
                taken += chunk[:room]
                if len(chunk) > room:
                    is_whole = False
                    break
        answered = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        return Answered(response.status, answered, bytes(taken), is_whole)


def target_of(url: str) -> _Target | str:
    """Where a URL leads, or why it leads nowhere: one line."""
    if len(url) > LONGEST_URL or not _VISIBLE.fullmatch(url):
        return f"a URL is at most {LONGEST_URL} printable ASCII characters without spaces"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "this is no URL"
    if parts.scheme not in ("http", "https"):
        return "a URL begins with https://"
    if not parts.hostname or port == 0:
        return "the URL names no host, or port 0"
    if "@" in parts.netloc:
        return "a URL with a name or password in it is not called"
    if "#" in url:
        return "a URL with a fragment is not called"
    is_plain = parts.scheme == "http"
    return _Target(parts.hostname, port or (80 if is_plain else 443), is_plain)


@asynccontextmanager
async def open_egress(
    allow: str,
    *,
    lookup: Callable[[str, int], Awaitable[Sequence[str]]] | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Egress]:
    """The client; closes its connections on exit. `allow`: the setting of that name.

    `lookup`, `tls`: of a test; the system's resolver and certificates otherwise.
    """
    judge = _Judge(parse_networks(allow), lookup or _system_lookup())
    tls = tls or httpcore2.default_ssl_context()
    async with (
        _pool(_PinnedBackend(judge, is_plain=False), tls) as secure,
        _pool(_PinnedBackend(judge, is_plain=True), tls) as plain,
    ):
        yield Egress(judge, secure, plain)


def _pool(backend: _PinnedBackend, tls: ssl.SSLContext) -> httpcore2.AsyncConnectionPool:
    return httpcore2.AsyncConnectionPool(
        ssl_context=tls,
        max_connections=CONNECTIONS,
        max_keepalive_connections=_IDLE_CONNECTIONS,
        keepalive_expiry=_IDLE_SECONDS,
        network_backend=backend,
    )


def _system_lookup() -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """The system's resolver, in threads of its own: uvloop would let two names that hang hold up all others."""
    room = anyio.CapacityLimiter(LOOKUPS)

    async def lookup(host: str, port: int) -> list[str]:
        found = await anyio.to_thread.run_sync(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), limiter=room, abandon_on_cancel=True
        )
        return [str(place[4][0]) for place in found]

    return lookup
