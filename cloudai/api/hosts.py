"""Keeps pages of other sites away from an API without passwords.

A browser sends a page's requests from the user's own machine, where a server bound to loopback can be reached. Two checks:
the Host header of a loopback server must be loopback (DNS rebinding), and a request that names its page in Origin must
come from a page of this very server.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from cloudai.api.answers import refuse
from cloudai.errors import CloudAIError, Code
from cloudai.settings import Settings

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class HostCheck:
    """Pure ASGI middleware over HTTP and WebSockets alike."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        allowed = {host.strip().lower().strip("[]") for host in settings.allowed_hosts.split(",") if host.strip()}
        self._allowed = frozenset(allowed)
        self._checks_host = is_loopback(settings.host) and "*" not in allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and (error := self._error(scope)):
            await refuse(error, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> CloudAIError | None:
        host = origin = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
        if self._checks_host:
            name = host_name(host or "")
            if name not in _LOCAL and name not in self._allowed:
                return CloudAIError(
                    Code.FORBIDDEN_HOST,
                    "This server is bound to loopback and answers to localhost only; CLOUDAI_ALLOWED_HOSTS adds names",
                    {"host": (host or "")[:255]},
                )
        if origin is not None and not self._same_site(origin, host or ""):
            return CloudAIError(
                Code.FORBIDDEN_ORIGIN, "Pages of other sites may not use this API", {"origin": origin[:255]}
            )
        return None

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
