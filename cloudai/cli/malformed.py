"""What is answered where a request never gets to the facade: the documented envelope, as for every other error.

Also how long, and how large, what comes before a request's body may be: nothing of it gets to the facade before it is whole.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.http11 import Request
from websockets.server import ServerProtocol

from cloudai.api.answers import envelope
from cloudai.errors import invalid

MAX_HEAD = 64 * 1024  # bytes before a request's body
HEAD_SECONDS = 10.0  # from a connection's begin until its first request's head is whole
_TOO_LONG = f"must have at most {MAX_HEAD} bytes before its body"


class Http(HttpToolsProtocol):
    """uvicorn's, which answers what is no HTTP, and a handshake that is none, in plain text, and takes a head of any size,
    however long it is in coming.
    """

    _deadline: asyncio.TimerHandle
    _piece = 0  # bytes that came last
    _whole: object = None  # the request whose head came last
    _head: int | None = None  # bytes of a head that came in several pieces, but for the piece that it began in
    _wrong = "must be HTTP/1.1"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._end_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._piece = len(data)
        before = self.scope
        super().data_received(data)
        if self.scope is not self._whole:  # of a head that is not whole the parser keeps what there is
            # Where it begins, the end of another request may be before it.
            self._head = (self._head or 0) + self._piece if self.scope is before else 0
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self._refuse(_TOO_LONG)

    def on_headers_complete(self) -> None:
        if self._head is not None or self._piece > MAX_HEAD:
            self._head = None
            if self._head_size() > MAX_HEAD:
                self._wrong = _TOO_LONG
                raise ValueError(_TOO_LONG)  # the parser goes no further, and `send_400_response` is called
        self._whole = self.scope
        super().on_headers_complete()

    def _end_without_request(self) -> None:
        if self._whole is None:
            self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        if (wrong := self._wrong_handshake()) is None:
            super().handle_websocket_upgrade()
        else:
            self._refuse(f"must be a WebSocket's handshake: {wrong}")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the words are ours
        self._refuse(self._wrong)

    def _head_size(self) -> int:
        """As it is usually written: `GET /path HTTP/1.1`, a line for each header with one space in it, an empty line."""
        first = len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1\r\n")
        return first + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers) + len("\r\n")

    def _wrong_handshake(self) -> str | None:
        if self.scope["method"] != "GET":
            return f"the method must be GET, not {self.scope['method']}"
        headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.scope["headers"]])
        try:
            ServerProtocol().process_request(Request(self.url.decode("latin-1"), headers))
        except InvalidHandshake as error:
            return str(error)
        return None

    def _refuse(self, reason: str) -> None:
        answer = envelope(invalid("request", reason))
        lines = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in lines)
        self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + bytes(answer.body))
        self.transport.close()
