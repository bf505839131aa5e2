"""What is answered where a request never gets to the facade: the documented envelope, as for every other error."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.http11 import Request
from websockets.server import ServerProtocol

from cloudai.api.answers import envelope
from cloudai.errors import invalid


class Http(HttpToolsProtocol):
    """uvicorn's, which answers what is no HTTP, and a handshake that is none, in plain text."""

    def handle_websocket_upgrade(self) -> None:
        if (wrong := self._wrong_handshake()) is None:
            super().handle_websocket_upgrade()
        else:
            self._refuse(f"must be a WebSocket's handshake: {wrong}")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - always the same words
        self._refuse("must be HTTP/1.1")

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
