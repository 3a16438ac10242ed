"""Whose request it is: the peer's address, or the one that a trusted proxy reports. Pure."""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from chat.config import Network

Address = IPv4Address | IPv6Address


def client_address(peer: str, forwarded_for: Iterable[str], trusted: Sequence[Network]) -> str:
    """
    Return the address of the client.

    `X-Forwarded-For` is read from the right, where the nearest proxy has written; the first
    address that is no trusted proxy's is the client's. What stands left of it, anyone may have
    forged.

    Args:
        peer: the address of the connection's other end.
        forwarded_for: the values of the `X-Forwarded-For` headers, in order.
        trusted: the networks of the proxies to be believed.
    """
    client = peer
    hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
    while hops and is_trusted(client, trusted):
        address = _parse(hops.pop())
        if address is None:
            break
        client = str(address)
    return client


def bucket_of(client: str) -> str:
    """Return whom a limit is for: an address; of IPv6 its /64, which is one customer's."""
    address = _parse(client)
    if isinstance(address, IPv6Address):
        return str(IPv6Address(int(address) >> 64 << 64)) + "/64"
    return client if address is None else str(address)


def is_trusted(client: str, trusted: Sequence[Network]) -> bool:
    """Tell whether it is the address of a proxy that is to be believed."""
    address = _parse(client)
    return address is not None and any(address in network for network in trusted)


def _parse(text: str) -> Address | None:
    """Return the address in `text`, which some proxies give with a port."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
