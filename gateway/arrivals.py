"""Whom a connection comes from, and how many of them one address may open.

Called by `upgrade.py` for every request that would become a WebSocket, and by the hub, which knows when one has shown a
good token. Holds no connection and reads no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final

from protocol.limits import counted_address

if TYPE_CHECKING:
    from collections.abc import Sequence

_WINDOW_SECONDS: Final = 1.0
ADDRESSES: Final = 10_000
"""Addresses whose new connections are counted; the one that began its second first is forgotten first."""
_CROWDED_SECONDS: Final = 1.0
"""When to come again where too many wait to be known: each shows a token at once or is closed within 10 s."""


class TrustedProxies:
    """Addresses whose `X-Forwarded-For` is believed; the same meaning as the REST role's setting of this name."""

    def __init__(self, text: str) -> None:
        """`text`: addresses and networks, comma-separated; `*`: all. Raises ValueError."""
        names = [name.strip() for name in text.split(",") if name.strip()]
        self._everybody = names == ["*"]
        self._networks: list[IPv4Network | IPv6Network] = []
        try:
            self._networks += [ip_network(name) for name in names if not self._everybody]
        except ValueError:
            raise ValueError("addresses and networks, comma-separated, without host bits") from None

    def remote(self, peer: str, forwarded: Sequence[str]) -> str:
        """Whom a request comes from, by the address it came over and its `X-Forwarded-For` headers.

        Every proxy appends whom it was called by, so the rightmost address that is no trusted proxy's is the client's:
        what stands left of it the client may have written. What is no address there is worth the proxy that says so.
        """
        if not forwarded or not self._trusts(_parse(peer)):
            return peer
        nearest = peer
        for text in reversed(", ".join(forwarded).split(",")):
            address = _parse(text)
            if address is None:
                return nearest
            nearest = str(address)
            if not self._trusts(address):
                return nearest
        return nearest

    def _trusts(self, address: IPv4Address | IPv6Address | None) -> bool:
        return self._everybody or (address is not None and any(address in network for network in self._networks))


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    """`1.2.3.4`, `1.2.3.4:5678`, `2001:db8::1`, `[2001:db8::1]:5678`; None for anything else."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Arrivals:
    """New connections per second and address, and those of an address that have shown no token yet. Atomic."""

    def __init__(self, per_second: int, unknown: int) -> None:
        """`unknown`: most connections of one address at a time that nobody has authenticated."""
        self._per_second = per_second
        self._limit = unknown
        self._seconds: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """Address → (when its second began, connections in it)."""
        self._unknown: dict[str, int] = {}

    @property
    def unknown(self) -> int:
        """Addresses with connections that have shown no token."""
        return len(self._unknown)

    def enter(self, remote: str, now: float) -> float:
        """One more connection of this address. Returns 0.0 and counts it until `leave`, or the seconds to wait."""
        address = counted_address(remote)
        since, count = self._seconds.get(address, (now, 0))
        if now - since >= _WINDOW_SECONDS:
            since, count = now, 0
        if count >= self._per_second:
            return since + _WINDOW_SECONDS - now
        waiting = self._unknown.get(address, 0)
        if waiting >= self._limit:
            return _CROWDED_SECONDS
        self._unknown[address] = waiting + 1
        if count == 0:
            self._seconds.pop(address, None)
        self._seconds[address] = (since, count + 1)
        if len(self._seconds) > ADDRESSES:
            self._seconds.popitem(last=False)
        return 0.0

    def leave(self, remote: str) -> None:
        """It has shown a good token, or is gone."""
        address = counted_address(remote)
        waiting = self._unknown[address] - 1
        if waiting:
            self._unknown[address] = waiting
        else:
            del self._unknown[address]
