"""Keeps pages of other sites away from an API without passwords.

A browser sends a page's requests from the user's own machine, where a server bound to loopback can be reached. Two checks:
the Host header of a loopback server must be loopback (DNS rebinding), and a request that names its page in Origin must
come from a page of this very server.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import Scope

from cloudai.errors import CloudAIError, Code
from cloudai.settings import Settings

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class HostCheck:
    """`check` passes a request, or a WebSocket's handshake, or raises why not."""

    def __init__(self, settings: Settings) -> None:
        allowed = {host.strip().lower().strip("[]") for host in settings.allowed_hosts.split(",") if host.strip()}
        self._allowed = frozenset(allowed)
        self._checks_host = is_loopback(settings.host) and "*" not in allowed

    def check(self, scope: Scope) -> None:
        """Raises FORBIDDEN_HOST or FORBIDDEN_ORIGIN."""
        host = origin = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value or b"null"
        if self._checks_host:
            name = host_name(host.decode("latin-1"))
            if name not in _LOCAL and name not in self._allowed:
                raise CloudAIError(
                    Code.FORBIDDEN_HOST,
                    "This server is bound to loopback and answers to localhost only; CLOUDAI_ALLOWED_HOSTS adds names",
                    {"host": host.decode("latin-1")[:255]},
                )
        if origin and not self._same_site(origin.decode("latin-1"), host.decode("latin-1")):
            raise CloudAIError(
                Code.FORBIDDEN_ORIGIN,
                "Pages of other sites may not use this API",
                {"origin": origin.decode("latin-1")[:255]},
            )

    def _same_site(self, origin: str, host: str) -> bool:
        site = _netloc(origin)
        return site == host.lower() or (bool(site) and host_name(site) in self._allowed)


def is_loopback(host: str) -> bool:
    """Whether a listening address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@lru_cache(maxsize=256)
def host_name(netloc: str) -> str:
    """`localhost` of `localhost:8080`, `::1` of `[::1]:8080`; lower case."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


@lru_cache(maxsize=256)
def _netloc(origin: str) -> str:
    """The host and port of an Origin; empty for `null` and for nonsense."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
