"""Who calls: the client's address, through proxies that are trusted to tell it."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from starlette.types import Scope

from cloudai.settings import SettingsError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(listed: str) -> tuple[Network, ...]:
    """`10.0.0.0/8, ::1` as networks. Raises SettingsError for anything else."""
    try:
        return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in listed.split(",") if part.strip())
    except ValueError as error:
        raise SettingsError(f"CLOUDAI_TRUSTED_PROXIES: {error}") from None


class Clients:
    """Finds the address that counts for a connection."""

    def __init__(self, trusted_proxies: str) -> None:
        self._trusted = networks(trusted_proxies)

    def address(self, scope: Scope) -> str:
        """The caller's IPv4 address or IPv6 /64: one household has a whole /64 to call from."""
        peer = scope["client"][0] if scope.get("client") else ""
        if self._trusted and self._trusts(peer):
            peer = self._forwarded(scope, peer)
        return counted(peer)

    def _forwarded(self, scope: Scope, peer: str) -> str:
        """The last address in X-Forwarded-For that no trusted proxy has: what is before it, anybody may have made up."""
        listed = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        for hop in reversed([hop.strip() for line in listed for hop in line.split(",")]):
            if parsed(hop) is None:
                break
            peer = hop
            if not self._trusts(hop):
                break
        return peer

    def _trusts(self, text: str) -> bool:
        address = parsed(text)
        return address is not None and any(address in network for network in self._trusted)


@lru_cache(maxsize=4096)
def parsed(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=4096)
def counted(text: str) -> str:
    address = parsed(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address or text)
