"""The methods of one path, and reading a request: its headers, its query and a body of bounded size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

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
                return bytes(value)
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
        body = b""
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


Handler = Callable[[Request], Awaitable[ASGIApp]]


class Methods:
    """An ASGI application for one path: a handler a method. HEAD is GET without the body; OPTIONS lists the methods."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self.path = path
        self.handlers = dict(handlers)
        if "GET" in handlers:
            self.handlers["HEAD"] = handlers["GET"]
        self.allowed = ", ".join(sorted({*self.handlers, "OPTIONS"}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.handlers.get(scope["method"])
        if handler is None:
            await self._other(scope, send)
            return
        try:
            response = await handler(Request(scope, receive))
        except Disconnected:
            return
        await response(scope, receive, send)

    async def _other(self, scope: Scope, send: Send) -> None:
        if scope["method"] != "OPTIONS":
            method = str(scope["method"])[:20]
            message = f"{method} is not a method of this path, which has {self.allowed}"
            raise CloudAIError(Code.METHOD_NOT_ALLOWED, message, {"allowed": self.allowed})
        headers = [(b"allow", self.allowed.encode())]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
