"""Which handler a request goes to, and reading a request: its headers, its query and a body of bounded size."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope

from cloudai.errors import CloudAIError, Code


class Disconnected(Exception):
    """The client has gone before it had sent its request; nobody is there to answer."""


class Request:
    """What a handler needs of a request, without the cost of what it does not."""

    __slots__ = ("receive", "scope")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.receive = receive

    @property
    def params(self) -> Mapping[str, str]:
        """The variable parts of the path."""
        params: Mapping[str, str] = self.scope["path_params"]
        return params

    @property
    def query(self) -> bytes:
        return bytes(self.scope["query_string"])

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return cast(bytes, value)
        return None

    async def json_body(self, limit: int) -> bytes:
        """The body, declared as JSON and at most `limit` bytes. Raises UNSUPPORTED_MEDIA_TYPE or BODY_TOO_LARGE."""
        kind = self.header(b"content-type") or b""
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise CloudAIError(
                Code.UNSUPPORTED_MEDIA_TYPE,
                "Send the body as JSON, with the header Content-Type: application/json",
                {"content_type": kind.decode("latin-1")[:100]},
            )
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        body: bytes = b""
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            if not message.get("more_body", False):
                return body


def _too_large(limit: int) -> CloudAIError:
    return CloudAIError(Code.BODY_TOO_LARGE, f"The body may have at most {limit} bytes", {"limit": limit})


Handler = Callable[[Request], Awaitable[Response]]


class Path:
    """One path of the API: a handler a method. HEAD is GET without the body; OPTIONS lists the methods."""

    def __init__(self, pattern: str, handlers: Mapping[str, Handler]) -> None:
        self.pattern = pattern
        self.handlers = dict(handlers)
        if "GET" in handlers:
            self.handlers["HEAD"] = handlers["GET"]
        self.allowed = ", ".join(sorted({*self.handlers, "OPTIONS"}))

    def handler(self, method: str) -> Handler:
        """Raises METHOD_NOT_ALLOWED."""
        found = self.handlers.get(method)
        if found is not None:
            return found
        if method == "OPTIONS":
            return self._options
        message = f"{method[:20]} is not a method of this path, which has {self.allowed}"
        raise CloudAIError(Code.METHOD_NOT_ALLOWED, message, {"allowed": self.allowed})

    async def _options(self, _: Request) -> Response:
        return Response(status_code=204, headers={"allow": self.allowed})


class Paths:
    """Finds the path of a request: by one look-up where it has no variable part, else by one regular expression each."""

    def __init__(self, paths: Iterable[Path]) -> None:
        every = list(paths)
        self._fixed = {path.pattern: path for path in every if "{" not in path.pattern}
        self._variable = [
            (re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path.pattern)), path)
            for path in every
            if "{" in path.pattern
        ]

    def find(self, scope: Scope) -> Path:
        """Sets the scope's `path_params`. Raises ROUTE_NOT_FOUND."""
        text: str = scope["path"]
        found = self._fixed.get(text)
        if found is not None:
            return found
        for pattern, path in self._variable:
            if match := pattern.fullmatch(text):
                scope["path_params"] = match.groupdict()
                return path
        raise no_route(text)


def no_route(path: str) -> CloudAIError:
    if path.startswith("/ws/"):
        hint = "a WebSocket client on /ws/telemetry, which answers nothing else"
        return CloudAIError(Code.ROUTE_NOT_FOUND, f"There is no such path for HTTP; try {hint}", {"path": path[:255]})
    hint = "a path without the slash at its end" if path.endswith("/") and path != "/" else "one of those at /docs"
    return CloudAIError(Code.ROUTE_NOT_FOUND, f"There is no such path; try {hint}", {"path": path[:255]})
