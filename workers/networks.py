"""Which addresses are public: those that a stranger's URL may lead us to.

Called by `egress.py` for each address that a name stands for, right before it is connected to. Written out instead of
asking `ipaddress.is_global`, whose answers differ between Python versions (3.11.7 calls 64:ff9b:1::/48 global).
"""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Networks = tuple[Network, ...]

_PRIVATE_V4: Final = tuple(
    IPv4Network(name)
    for name in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers; one cloud's metadata
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; another cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, no more in use
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "168.63.129.16/32",  # a public number, and yet one cloud's own agent
    )
)
"""IANA's registry of special-purpose IPv4 addresses, without those that are globally reachable; and metadata."""

_GLOBAL_V6: Final = IPv6Network("2000::/3")
_PRIVATE_V6: Final = tuple(
    IPv6Network(name)
    for name in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: holds an IPv4 address
        "3fff::/20",  # documentation
    )
)
"""Of what IANA has given out (2000::/3); all else is refused: loopback, unique local, link-local, multicast."""
_NAT64: Final = IPv6Network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are the IPv4 address that is meant."""


def parse_networks(text: str) -> Networks:
    """`text`: networks and addresses, comma-separated. Raises ValueError, which names the one that is none."""
    return tuple(ip_network(name.strip()) for name in text.split(",") if name.strip())


def meant(address: Address) -> Address:
    """The IPv4 address inside a mapped or NAT64 one; any other as it is."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """May a stranger's URL lead here?"""
    address = meant(address)
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _PRIVATE_V4)
    return address in _GLOBAL_V6 and not any(address in network for network in _PRIVATE_V6)


def is_among(address: Address, networks: Networks) -> bool:
    """Is it in one of these?"""
    return any(meant(address) in network for network in networks)


def address_of(text: str) -> Address:
    """An address as the resolver writes it, `fe80::1%eth0` among them. Raises ValueError."""
    return ip_address(text.partition("%")[0])
